"""What a score means nothing without: the chance level, and a model that knows how frequent tokens are and no more.

Both go through the tasks' own metrics on the same documents, so that they stand beside a score in its own units.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launch.errors import DataError
from llm.data.documents import open_corpus
from llm.data.fetch import corpus_folder
from llm.data.shards import TokenDataset
from llm.evals.encoding import Encoder
from llm.evals.models import ScoringTokenizer
from llm.evals.run import Samples, aggregate, group_metrics
from llm.evals.tasks import Selection
from llm.heldout import token_counts

_CORPUS, _CORPUS_CHARACTERS = "prose-21", 4_000_000  # for models whose training text is not here


@dataclass(frozen=True, kw_only=True)
class Unigram:
    """A language model without context: log-probabilities of tokens, and whose frequencies they are."""

    log_probs: np.ndarray  # float64 [V], nats
    source: str

    def score(self, ids: list[int]) -> float:
        """Log-likelihood in nats."""
        return float(self.log_probs[ids].sum())


def unigram_of_dataset(data: Path) -> Unigram:
    """Of the training split of a prepared data set."""
    return _unigram(token_counts(TokenDataset.open(data, "train", block_length=64)), f"training tokens of {data}")


def unigram_of_prose(tokenizer: ScoringTokenizer, cache: Path | None = None) -> Unigram | None:
    """Of fetched prose under another tokenizer; None where none is fetched."""
    try:
        corpus = open_corpus(corpus_folder(_CORPUS, cache))
    except DataError:
        return None
    counts, seen = np.ones(tokenizer.vocab_size), 0
    documents = corpus.read(lambda _: None)
    while seen < _CORPUS_CHARACTERS and (texts := [document.text for document in islice(documents, 512)]):
        ids = [i for text in tokenizer.encode_batch(texts) for i in text]
        counts += np.bincount(ids, minlength=len(counts))
        seen += sum(map(len, texts))
    return _unigram(counts, f"the first {seen:,} characters of {_CORPUS}")


def _unigram(counts: np.ndarray, source: str) -> Unigram:
    return Unigram(log_probs=np.log(counts) - np.log(counts.sum()), source=source)


def unigram_metrics(
    unigram: Unigram, encoder: Encoder, selection: Selection, samples: Samples
) -> dict[str, dict[str, Any]]:
    """The results of tasks and groups that the unigram model gets, in the harness's layout; none for generation."""
    metrics = {}
    for name, task in selection.tasks.items():
        arguments = [pair for sample in samples[name] for pair in sample["arguments"]]
        responses: Iterator[Any]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            texts = encoder.texts([text for (text,) in arguments], special=False)
            responses = map(unigram.score, texts)
        elif task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            pairs, _ = encoder.pairs(arguments)
            responses = ((unigram.score(continuation), False) for _, continuation in pairs)
        else:
            continue
        rescored = []
        for sample in samples[name]:
            values: Any = task.process_results(sample["doc"], list(islice(responses, len(sample["arguments"]))))
            rescored.append(sample | values)
        metrics[name] = aggregate(task, rescored)
    return metrics | group_metrics(selection, metrics)


def chance_metrics(selection: Selection, samples: Samples) -> dict[str, dict[str, Any]]:
    """Accuracy of guessing among the options of each document; tasks without options have no entry."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, task in selection.tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or not samples[name]:
            continue
        chance = float(np.mean([1.0 / num_options(sample) for sample in samples[name]]))
        names = [(metric, s["filter"]) for s in samples[name] for metric in s["metrics"] if metric.startswith("acc")]
        scores = {f"{metric},{key}": chance for metric, key in names}
        errors = {f"{metric}_stderr,{key}": 0.0 for metric, key in names}
        metrics[name] = {"name": name, "sample_len": len(samples[name]), **scores, **errors}
    return metrics | group_metrics(selection, metrics)


def num_options(sample: Mapping[str, Any]) -> int:
    """Answers that a document offers; requests without its context (of acc_mutual_info) repeat them."""
    with_context = sum(context != "" for context, _ in sample["arguments"])
    return with_context or len(sample["arguments"])

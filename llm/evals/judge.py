"""Texts as a causal judge reads them: how well it expects them, and beside that, always, how varied they are.

`generative_ppl` is a statement about texts: the perplexity that the judge, a model of its own, has on them. It says
nothing about the likelihood of the model that drew them, and it rewards repetition ("the the the" surprises nobody):
hence the entropy beside it, and the same figures of real text of the same shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.errors import ConfigError, DataError
from llm.data.shards import TokenDataset
from llm.data.tokenizers import TextTokenizer
from llm.diffusion.likelihood import Draws, Estimate
from llm.evals import text_metrics
from llm.evals.encoding import Encoder
from llm.evals.models import Scorable, open_scorable
from llm.evals.packing import Tokens
from llm.evals.scoring import Request, ScoringConfig, score
from llm.heldout import heldout_blocks

_REPETITIONS = (2, 3, 4)
_DISTINCTS = (1, 2, 3, 4)
_BATCH_TOKENS = 4096  # of a forward for features, padding included
_PROBE = 8  # tokens of the input that shows whether a model looks ahead


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model whose every probability of a token rests on the tokens before it."""

    name: str  # in the names of metrics
    scorable: Scorable

    def describe(self) -> dict[str, Any]:
        """What figures under this judge must be quoted with."""
        return {
            "name": self.name,
            "fingerprint": self.scorable.fingerprint,
            "family": self.scorable.family,
            "dtype": str(self.scorable.dtype).removeprefix("torch."),
            "tokenizer_sha256": self.scorable.tokenizer.sha256,
            "max_length": self.scorable.max_length,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Texts under a judge."""

    texts: Sequence[str]
    tokens: Sequence[Tokens]  # of the judge, a text each
    nats: Sequence[float]  # of each text under the judge, its first token behind BOS (or EOS)

    @property
    def estimate(self) -> Estimate:
        """Of all texts together under the judge: every token weighs the same, and errors are over texts."""
        nats = torch.tensor(self.nats, dtype=torch.float64).unsqueeze(-1)
        counts = torch.tensor([len(tokens) for tokens in self.tokens])
        estimate = Draws(name="nll_ar", estimator="exact", values=nats, num_tokens=counts, exact=True).estimate()
        assert isinstance(estimate, Estimate)
        return estimate

    def figures(self) -> dict[str, float]:
        """Metrics by name, with the standard error over texts as NAME_se where texts are independent there."""
        estimate = self.estimate
        per_text = {
            "unigram_entropy": [text_metrics.unigram_entropy(tokens) for tokens in self.tokens],
            "tokens_per_text": [float(len(tokens)) for tokens in self.tokens],  # the entropy's limit is log of it
        }
        per_text |= {
            f"repetition_{n}": [text_metrics.repetition(tokens, n) for tokens in self.tokens] for n in _REPETITIONS
        }
        per_text["longest_repeat"] = [float(text_metrics.longest_repeat(tokens)) for tokens in self.tokens]
        found: dict[str, float] = {
            "texts": len(self.texts),
            "tokens": estimate.num_tokens,
            "generative_ppl": estimate.ppl,
            "generative_ppl_se": estimate.ppl_standard_error,
        }
        for name, values in per_text.items():
            found[name], found[f"{name}_se"] = text_metrics.mean(values)
        found |= {f"distinct_{n}": text_metrics.distinct(self.tokens, n) for n in _DISTINCTS}
        if len(self.texts) > 1:
            found["self_bleu_4"] = text_metrics.self_bleu(self.texts[: text_metrics.BLEU_TEXTS])
        return {name: value for name, value in found.items() if not np.isnan(value)}  # one text has no error


def open_judge(path_or_name: str, device: torch.device) -> Judge:
    """A causal model by folder or name. ConfigError for one that looks ahead: what it says of a text is no likelihood.

    Whether it does is tried out, because transformers opens masked language models (BERT) as causal ones, too.
    """
    scorable = open_scorable(path_or_name, device)
    name = Path(path_or_name).resolve().name
    remedy = "; use a model that reads left to right, such as smollm2 or an autoregressive run"
    if not scorable.is_causal:
        raise ConfigError(
            f"{path_or_name} is a masked model ({scorable.family}), which bounds likelihoods and has none to judge "
            f"texts by{remedy}"
        )
    tokens = torch.arange(_PROBE, device=device).repeat(2, 1) % scorable.tokenizer.vocab_size
    tokens[1, -1] = 0
    first, second = _hidden(scorable, tokens)[:, :-1]
    if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise ConfigError(
            f"{path_or_name} ({type(scorable.model).__name__}) looks ahead: its word on a token changes with the "
            f"tokens behind it{remedy}"
        )
    return Judge(name=name, scorable=scorable)


def judge_texts(judge: Judge, texts: Sequence[str]) -> Judged:
    """Have the judge read `texts` in its own tokens, long ones in parts. DataError if all of them are empty."""
    tokens = _encode(judge.scorable, texts)
    if not any(tokens):
        raise DataError(f"all of the {len(texts)} texts are empty: there is nothing for {judge.name} to read")
    requests = [Request(context=(judge.scorable.first_token,), continuation=ids, group="") for ids in tokens]
    scores = score(judge.scorable, requests, ScoringConfig())
    return Judged(texts=texts, tokens=tokens, nats=[0.0 - one.value for one in scores])


@torch.no_grad()
def features(judge: Judge, texts: Sequence[str]) -> np.ndarray:
    """float32 [N, D] for MAUVE: the last hidden state, normed, at the last token of each text behind BOS (or EOS).

    Of a text that is longer than the judge's input, its beginning counts.
    """
    scorable = judge.scorable
    inputs = [(scorable.first_token, *ids)[: scorable.max_length] for ids in _encode(scorable, texts)]
    found: dict[int, Tensor] = {}
    waiting = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    while waiting:
        longest = len(inputs[waiting[0]])
        room = max(1, _BATCH_TOKENS // longest)
        now, waiting = waiting[:room], waiting[room:]
        tokens = torch.zeros(len(now), longest, dtype=torch.int64)
        for row, i in enumerate(now):
            tokens[row, : len(inputs[i])] = torch.tensor(inputs[i])
        last = torch.tensor([len(inputs[i]) - 1 for i in now])
        hidden = _hidden(scorable, tokens.to(scorable.device))
        found |= dict(zip(now, hidden[torch.arange(len(now)), last].float().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(inputs))]).numpy()


def text_of(ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """The documents among `ids`, with a blank line between them: the judge has no use for another tokenizer's EOS."""
    ends = [-1, *(i for i, token in enumerate(ids) if token == tokenizer.eos_id), len(ids)]
    documents = (tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(ends))
    return "\n\n".join(document for document in documents if document)


def reference_texts(path: Path, tokenizer: TextTokenizer, *, length: int, count: int) -> tuple[list[str], list[str]]:
    """`count` held-out texts of `length` tokens of the data set at `path`, and `count` others where there are so many.

    Texts of another shape have other figures: DataError if they are too few, or of another tokenizer.
    """
    dataset = TokenDataset.open(path, "validation", length)
    if dataset.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} is of another tokenizer than the model, so that {length} tokens are texts of another length; "
            "name a data set that was prepared with the model's own"
        )
    if len(dataset) < count:
        raise DataError(
            f"{path} has {len(dataset)} held-out blocks of {length} tokens, fewer than the {count} samples; lower "
            "--count or --length"
        )
    blocks = dataset.blocks(heldout_blocks(dataset, 2 * count))
    texts = [text_of(ids, tokenizer) for ids in blocks.tolist()]
    return (texts[::2], texts[1::2]) if len(texts) == 2 * count else (texts[:count], [])


def _encode(scorable: Scorable, texts: Sequence[str]) -> list[Tokens]:
    encoder = Encoder(tokenizer=scorable.tokenizer, prefix=scorable.first_token, add_bos=scorable.add_bos)
    return [tuple(ids) for ids in encoder.texts(texts, special=False)]


@torch.no_grad()
def _hidden(scorable: Scorable, tokens: Tensor) -> Tensor:
    """[B, L, D] for tokens int64 [B, L]; padding behind a text needs no mask, for a causal model never sees it."""
    model: Any = scorable.model
    if scorable.language is not None:
        return model(tokens, lambda hidden, weight, bias: hidden)
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

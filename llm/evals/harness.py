"""lm-evaluation-harness on our models: a `TemplateLM` for every family that `open_scorable` opens, named "unmask".

The harness splits documents over ranks and gathers through the model; ranks here are global, and one that has more to
do than another just takes longer: every process holds the whole model, so no two need the same number of forwards. The
scores of a document depend on nothing but its own text, so any number of processes gives the same results.

Which requests need what: a document with several options is multiple choice, where all that counts is which option
scores best. A document with one (lambada) is reported as perplexity and by whether its continuation is greedy, and so
are rolling requests as perplexity: settings that give no likelihood are refused there, and greedy filling, which costs
masked models a forward a token, is done there alone.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.evals.cache import ScoreCache
from llm.evals.encoding import Encoder
from llm.evals.generation import GenerationConfig, generate_until, read_generation
from llm.evals.models import Scorable, open_scorable
from llm.evals.scoring import Request, Score, ScoringConfig, score_each

_PATIENCE_S = 24 * 3600.0  # ranks meet after hours of work of different lengths

Document = tuple[str | None, int | None]
"""(task, number): where a request comes from."""


@dataclass(kw_only=True)
class Counts:
    """What happened to the requests of this process; sums, so that those of all processes add up."""

    requests: int = 0
    rolling_requests: int = 0
    cached: int = 0  # scores that a cache had
    empty: int = 0  # continuations without a token, scored 0
    straddling: int = 0  # continuations whose first token begins in the context
    cut: int = 0  # contexts that had to lose their beginning
    drawn: int = 0  # scores with a Monte-Carlo error
    error: float = 0.0  # sum of these errors, nats
    questions: int = 0  # of several options
    close: int = 0  # questions whose best two options are within two standard errors of their difference

    def add(self, other: "Counts") -> None:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))


@register_model("unmask")
class HarnessModel(TemplateLM):
    """One model under one scoring configuration.

    runtime: the processes of the evaluation (None: this one alone). cache: a folder for scores, see `ScoreCache`.
    generation: how texts are continued, where a request does not say it.
    """

    def __init__(
        self,
        scorable: Scorable,
        scoring: ScoringConfig | None = None,
        generation: GenerationConfig | None = None,
        runtime: Runtime | None = None,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.scorable = scorable
        self.scoring = ScoringConfig() if scoring is None else scoring
        self.scoring.check()
        self.generation = GenerationConfig() if generation is None else generation
        self.generation.check()
        self.generation.check_for(scorable)
        self.runtime = runtime
        self._settings = self.scoring.settings(scorable)
        add_bos = scorable.add_bos if self.scoring.add_bos is None else self.scoring.add_bos
        self.encoder = Encoder(
            tokenizer=scorable.tokenizer,
            prefix=scorable.first_token,
            add_bos=add_bos,
            boundary=self.scoring.boundary,
        )
        self.counts = Counts()  # of this process
        self._totals = self.counts  # of all processes, as of the last time they met
        self._cache = None
        if cache is not None:
            identity = {"model": scorable.fingerprint, "scoring": self._settings}
            self._cache = ScoreCache(cache, identity, self.rank)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        """From the command line of the harness: path, weights, step, dtype, cache, the fields of ScoringConfig, and
        those of GenerationConfig as generation.FIELD."""
        arguments = dict(arg_dict)
        path = arguments.pop("path", None) or arguments.pop("pretrained", None)
        if path is None:
            raise ConfigError("--model unmask needs --model_args path=RUN (a run, an exported folder, or a model name)")
        opening = {key: arguments.pop(key) for key in ("weights", "step") if key in arguments}
        dtype = getattr(torch, str(arguments.pop("dtype", "float32")), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError("dtype in --model_args is not a type of torch; use float32, bfloat16 or float16")
        cache = arguments.pop("cache", None)
        of_generation = [key for key in arguments if key.startswith("generation.")]
        generation = read_generation(
            {key.removeprefix("generation."): arguments.pop(key) for key in of_generation}, source="--model_args"
        )
        scoring = configs.from_dict(ScoringConfig, arguments, source="--model_args")
        device = (additional_config or {}).get("device")  # its batch sizes mean nothing here: batches go by tokens
        runtime = runtimes.start(device=str(device).split(":")[0] if device else "auto", timeout_seconds=_PATIENCE_S)
        scorable = open_scorable(path, runtime.device, dtype=dtype, **opening)
        return cls(scorable, scoring, generation, runtime, None if cache is None else Path(cache))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "HarnessModel":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --- processes ---------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Among all processes of all machines; the harness's own models take that of the machine."""
        return 0 if self.runtime is None else self.runtime.rank

    @property
    def world_size(self) -> int:
        return 1 if self.runtime is None else self.runtime.world_size

    @property
    def device(self) -> torch.device:
        return self.scorable.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collective. A number or a row of every rank, one after the other."""
        parts = self._gather(tensor.detach().cpu().reshape(-1).tolist())
        return torch.tensor([value for part in parts for value in part], dtype=tensor.dtype)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collective. The objects of all ranks on rank `dst`, None elsewhere."""
        everyone = self._gather(obj)
        return everyone if self.rank == dst else None

    def barrier(self) -> None:
        """Collective. The harness calls it when all ranks have answered a kind of request: time to add up."""
        self._totals = Counts()
        for counts in self._gather(self.counts):
            self._totals.add(counts)

    def _gather(self, value: Any) -> list[Any]:
        return [value] if self.runtime is None else self.runtime.gather(value)

    # --- tokens ------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.scorable.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.scorable.first_token

    @property
    def max_length(self) -> int:
        return self.scoring.longest(self.scorable)

    @property
    def tokenizer_name(self) -> str:
        return self.scorable.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.encoder.texts([string], special=add_special_tokens)[0]

    # --- scores ------------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood or bound in nats, whether greedy) of each request, in their order."""
        texts: list[tuple[str, str]] = [request.args for request in requests]  # type: ignore[misc]
        encoded, straddling = self.encoder.pairs(texts)
        self.counts.straddling += straddling
        documents = _documents(requests)
        singles = {document for document, options in documents.items() if len(options) == 1}
        for task, _ in sorted(singles, key=str)[:1]:
            self.scoring.check_likelihood(f"the task {task}, whose documents have one continuation each,")
        groups = {document: _digest(options[min(options)].args[0]) for document, options in documents.items()}
        wanted = []
        for i, (context, continuation) in enumerate(encoded):
            document = _document_of(requests[i], i)
            wanted.append(
                Request(
                    context=tuple(context),
                    continuation=tuple(continuation),
                    group=groups[document],
                    check_greedy=document in singles and not self.scorable.is_causal,
                )
            )
        scores = self._score(wanted, "loglikelihood", disable_tqdm)
        self._judge(requests, scores)
        self.counts.requests += len(requests)
        return [(score.value, score.is_greedy) for score in scores]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        wanted = [
            Request(context=tuple(context), continuation=tuple(continuation), group=_digest(str(context)))
            for _, context, continuation in requests
        ]
        return [(s.value, s.is_greedy) for s in self._score(wanted, "loglikelihood", disable_tqdm)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (masked models: minus an upper bound on its negative) of whole texts, in nats.

        A text is scored behind BOS (or EOS), in parts as long as an input that leaves room for a token before them,
        each given as much of the text before it as fits.
        """
        self.scoring.check_likelihood("a rolling request")
        texts = [str(request.args[0]) for request in requests]
        wanted = [
            Request(context=(self.prefix_token_id,), continuation=tuple(ids), group=_digest(text))
            for text, ids in zip(texts, self.encoder.texts(texts, special=False), strict=True)
        ]
        self.counts.rolling_requests += len(requests)
        return [score.value for score in self._score(wanted, "loglikelihood_rolling", disable_tqdm)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to the first of its stop strings. Never cached: it may be drawn."""
        pairs: list[Any] = [request.args for request in requests]
        with tqdm(total=len(pairs), desc="generate_until", disable=disable_tqdm or self.rank != 0) as bar:
            return generate_until(
                self.scorable, pairs, self.generation, add_bos=self.scoring.add_bos, progress=bar.update
            )

    def set_cache_hook(self, cache_hook: Any) -> None:
        raise ConfigError(
            "use_cache of the harness keys scores by the text alone and would serve those of another model; leave it "
            "out and give the model a cache folder instead (cache=DIR)"
        )

    def _score(self, wanted: Sequence[Request], what: str, disable_tqdm: bool) -> list[Score]:
        scores: dict[int, Score] = {}
        if self._cache is not None:
            scores = {i: score for i, request in enumerate(wanted) if (score := self._cache.find(request)) is not None}
            self.counts.cached += len(scores)
        missing = [i for i in range(len(wanted)) if i not in scores]
        bar = tqdm(
            score_each(self.scorable, [wanted[i] for i in missing], self.scoring),
            total=len(missing),
            desc=what,
            disable=disable_tqdm or self.rank != 0,
        )
        for number, score in bar:
            scores[missing[number]] = score
            if self._cache is not None:
                self._cache.add(wanted[missing[number]], score)
        found = [scores[i] for i in range(len(wanted))]
        for score in found:
            self.counts.empty += score.rows == 0
            self.counts.cut += score.cut > 0
            if score.standard_error != 0.0:
                self.counts.drawn += 1
                self.counts.error += score.standard_error
        return found

    def _judge(self, requests: Sequence[Instance], scores: Sequence[Score]) -> None:
        """Count the questions that another seed might answer otherwise."""
        questions: dict[Any, dict[int, Score]] = defaultdict(dict)
        for i, (request, score) in enumerate(zip(requests, scores, strict=True)):
            unconditional = request.args[0] == ""  # of acc_mutual_info, beside the real options
            questions[_document_of(request, i), unconditional][request.idx] = score
        for options in questions.values():
            if len(options) > 1:
                first, second = sorted(options.values(), key=lambda score: -score.value)[:2]
                doubt = 2.0 * math.hypot(first.standard_error, second.standard_error)
                self.counts.questions += 1
                self.counts.close += doubt > 0.0 and first.value - second.value < doubt

    def get_model_info(self) -> dict[str, Any]:
        """What the results rest on; merged into those of the harness. Counts of all ranks as of their last meeting."""
        counts, scorable = self._totals, self.scorable
        single_draws = math.isnan(counts.error)  # no error is known, nor how close the best options are
        return {
            "family": scorable.family,
            "fingerprint": scorable.fingerprint,
            "parameters": sum(p.numel() for p in scorable.model.parameters()),
            "dtype": str(scorable.dtype).removeprefix("torch."),
            "tokenizer_sha256": scorable.tokenizer.sha256,
            "scoring": self._settings,
            "generation": asdict(self.generation),
            "add_bos": self.encoder.add_bos,
            "boundary": self.scoring.boundary,
            "world_size": self.world_size,
            "requests": counts.requests,
            "rolling_requests": counts.rolling_requests,
            "cached_scores": counts.cached,
            "empty_continuations": counts.empty,
            "boundary_events": counts.straddling,
            "truncations": counts.cut,
            "exact_scores": counts.requests + counts.rolling_requests - counts.drawn,
            "mean_monte_carlo_error": _number(counts.error, counts.drawn),
            "questions": counts.questions,
            "share_within_two_errors": None if single_draws else _number(counts.close, counts.questions),
        }


def _document_of(request: Instance, position: int) -> Document:
    """Requests made by hand belong to no document: each is one of its own."""
    return (None, position) if request.doc_id is None else (request.task_name, request.doc_id)


def _documents(requests: Sequence[Instance]) -> dict[Document, dict[int, Instance]]:
    """The options of each document by their numbers; repeated requests count once."""
    documents: dict[Document, dict[int, Instance]] = defaultdict(dict)
    for i, request in enumerate(requests):
        documents[_document_of(request, i)][request.idx] = request
    return documents


def _digest(text: str) -> str:
    """Names the noise of a question: the same for every model, task order and number of processes."""
    return hashlib.sha256(text.encode()).hexdigest()


def _number(total: float, count: int) -> float | None:
    """The mean, or None where there is none: JSON has no nan."""
    mean = total / count if count else math.nan
    return mean if math.isfinite(mean) else None

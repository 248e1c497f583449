"""Log-likelihoods of continuations under any model, by one estimator for everything that is compared.

Causal models have an exact value. Masked ones are scored by a bound or a chain of `llm.diffusion`, over masks of the
continuation alone: the context is always visible. The options of a question share their noise (their `group`), which
belongs to the question and to nothing else, so that a score depends neither on the batch, the order nor the number of
processes. Equal requests are scored once, equal inputs are read once, and short continuations exactly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from launch.errors import ConfigError
from launch.random import stream_key, uniform
from llm.diffusion import regions
from llm.diffusion.likelihood import Estimator
from llm.diffusion.regions import Plan, RegionName
from llm.evals.models import Scorable
from llm.evals.packing import Answer, Batch, Question, Tokens, batches, causal_jobs, distribute, masked_jobs
from llm.evals.reading import Reader

_NAMES: dict[str, RegionName] = {  # of the library, by those of the configuration
    "nelbo_token": "nelbo_token",
    "nelbo_subtoken": "nelbo_subtoken",
    "nelbo_layered": "nelbo_layered",
    "nll_chain": "nll_chain",
    "ce_joint": "loss_ce_joint",
}


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How continuations are scored: the same for all tasks of an evaluation. The defaults suit every family.

    estimator: "auto" is nll_ar for causal models, nelbo_layered for those that reveal digits in layers, and nelbo_token
    for other masked ones; ce_joint ranks, and is no likelihood.
    """

    estimator: Literal["auto", "nll_ar", "nelbo_token", "nelbo_subtoken", "nelbo_layered", "nll_chain", "ce_joint"] = (
        "auto"
    )
    draws: int = (
        128  # masks of a continuation (nelbo_layered: of each layer); n tokens are exact if 2**n - 1 are enough
    )
    variant: Estimator = "E2"  # E2 draws how many tokens are masked; E1 the time, as published: more variance
    guidance: float = 0.0  # w of un + (w + 1) (cond - un), un without the context; ranks options only, 0 is off
    temperature: float = 1.0  # divides the logits; ranks options only, 1 is off
    seed: int = 0  # of the masks
    batch_tokens: int | None = None  # of a forward pass, padding included; null: 4096, or 32768 on a GPU
    max_length: int | None = None  # tokens of an input; null for what the model was trained with
    boundary: Literal["harness", "longest_prefix"] = "harness"  # context's end where a token straddles it
    add_bos: bool | None = None  # whether a text begins with BOS (or EOS); null as in the model's training

    def check(self, path: str = "scoring") -> None:
        if self.draws < 1 or (self.batch_tokens is not None and self.batch_tokens < 1):
            raise ConfigError(
                f"{path}: draws = {self.draws}, batch_tokens = {self.batch_tokens}; both must be at least 1"
            )
        if not (-1.0 <= self.guidance < math.inf and 0.0 < self.temperature < math.inf):
            raise ConfigError(
                f"{path}.guidance = {self.guidance} must be finite and at least -1, {path}.temperature = "
                f"{self.temperature} above 0; off are 0 and 1"
            )
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"{path}.max_length = {self.max_length} leaves no room for a context; use at least 2")

    def name_for(self, scorable: Scorable) -> str:
        """The estimate that this model gets; `ConfigError` where it has none of that name."""
        if not scorable.is_causal:
            if self.estimator == "nll_ar":
                raise ConfigError("scoring.estimator = nll_ar needs a causal model; use auto, nelbo_token or nll_chain")
            if self.estimator != "auto":
                return self.estimator
            assert scorable.language is not None
            return "nelbo_layered" if scorable.language.order == "layers" else "nelbo_token"
        if self.estimator not in ("auto", "nll_ar"):
            raise ConfigError(
                f"scoring.estimator = {self.estimator}, but a causal model ({scorable.family}) masks nothing; use auto"
            )
        if self.guidance != 0.0:
            raise ConfigError(
                f"scoring.guidance = {self.guidance} needs a model that can hide its context, which a causal one "
                f"({scorable.family}) cannot; use 0"
            )
        return "nll_ar"

    def check_likelihood(self, what: str) -> None:
        """`ConfigError` unless scores may become a perplexity; `what` asks for one."""
        if self.guidance != 0.0 or self.temperature != 1.0:
            raise ConfigError(
                f"{what} reports a likelihood, and scoring.guidance = {self.guidance} with scoring.temperature = "
                f"{self.temperature} is no model of the data; use 0 and 1"
            )
        if self.estimator == "ce_joint":
            raise ConfigError(
                f"{what} reports a likelihood, and scoring.estimator = ce_joint bounds none (it can fall below the "
                "entropy of the data); use auto, or a nelbo or nll estimator"
            )

    def settings(self, scorable: Scorable) -> dict[str, Any]:
        """What the scores of given tokens depend on, beside the weights. JSON-able."""
        settings: dict[str, Any] = {
            "estimator": self.name_for(scorable),
            "temperature": self.temperature,
            "max_length": self.longest(scorable),
        }
        if not scorable.is_causal:
            settings |= {"draws": self.draws, "variant": self.variant, "guidance": self.guidance, "seed": self.seed}
        if settings["estimator"] == "ce_joint":
            settings["estimator"] = "score_joint"  # never to be mistaken for a likelihood
        return settings

    def longest(self, scorable: Scorable) -> int:
        """Tokens of the longest input."""
        return scorable.max_length if self.max_length is None else self.max_length


@dataclass(frozen=True, kw_only=True)
class Request:
    """Score `continuation` after `context`. `group`: options of one question share it, and with it their noise."""

    context: Tokens
    continuation: Tokens
    group: str
    check_greedy: bool = False  # also find out what filling in greedily gives: a forward per token of masked models


@dataclass(frozen=True, kw_only=True)
class Score:
    """value: log-likelihood in nats, or minus its upper bound; under ce_joint, guidance or temperature only a score."""

    value: float
    standard_error: float  # Monte Carlo, on the safe side; 0 where exact, nan for a single draw
    rows: int  # inputs that it rests on, shared ones included
    is_greedy: bool  # causal: always known; masked: False unless asked for
    cut: int = 0  # tokens of the context that did not fit


def score(scorable: Scorable, requests: Sequence[Request], config: ScoringConfig) -> list[Score]:
    """The scores, in the order of the requests."""
    scores: dict[int, Score] = dict(score_each(scorable, requests, config))
    return [scores[i] for i in range(len(requests))]


def score_each(scorable: Scorable, requests: Sequence[Request], config: ScoringConfig) -> Iterator[tuple[int, Score]]:
    """(which request, its score) as they are known: longest first, so that what does not fit shows at once.

    No collectives: every process may score as many requests as it likes, with a model that is whole on each of them.
    ConfigError, before anything is computed, if the settings do not suit the model.
    """
    config.check()
    name = config.name_for(scorable)
    reader = Reader(
        scorable=scorable,
        name=_NAMES.get(name),
        guidance=config.guidance,
        temperature=config.temperature,
    )
    batch_tokens = config.batch_tokens or (32768 if scorable.device.type == "cuda" else 4096)  # what fits its caches
    capacity = config.longest(scorable) + (1 if scorable.is_causal else 0)  # the last token is never an input
    ledger = _Ledger(len(requests))
    for i, request in enumerate(requests):
        context = request.context or ((scorable.first_token,) if scorable.is_causal else ())
        parts = windows(context, request.continuation, capacity)
        cut = len(context) - len(parts[0][0]) if parts else 0
        for number, (before, tokens) in enumerate(parts):
            group = "" if scorable.is_causal else (f"{request.group} {number}" if number else request.group)
            question = Question(context=before, continuation=tokens, group=group)
            ledger.add(i, question, check_greedy=request.check_greedy and not scorable.is_causal)
        if not parts:
            yield i, Score(value=0.0, standard_error=0.0, rows=0, is_greedy=True)
        ledger.cut[i] = cut

    questions = list(ledger.questions)
    greedy = _fill_greedily(reader, [q for q in questions if q in ledger.greedy], batch_tokens)
    plan_of = _planner(reader, config)
    jobs = causal_jobs(questions) if scorable.is_causal else masked_jobs(questions, plan_of)
    for pieces in batches(jobs, batch_tokens):
        for answer in distribute(pieces, reader.answers(pieces)):
            fills = answer.is_mode or greedy.get(questions[answer.question], False)
            yield from ledger.settle(questions[answer.question], answer, fills)


def windows(context: Tokens, continuation: Tokens, capacity: int) -> list[tuple[Tokens, Tokens]]:
    """Cut a continuation into parts that fit, each given as much of what stands before it as fits: the chain rule.

    One part where the whole fits beside at least one token of context; every token is scored exactly once.
    """
    text, start = (*context, *continuation), len(context)
    parts = []
    while start < len(text):
        stop = min(len(text), start + capacity - min(1, start))
        parts.append((text[max(0, stop - capacity) : start], text[start:stop]))
        start = stop
    return parts


class _Ledger:
    """Which requests wait for which questions."""

    def __init__(self, count: int) -> None:
        self.questions: dict[Question, list[int]] = {}
        self.greedy: set[Question] = set()
        self.cut = [0] * count
        self._missing = [0] * count
        self._sums: dict[int, tuple[float, float, int, bool]] = {}

    def add(self, request: int, question: Question, *, check_greedy: bool) -> None:
        self.questions.setdefault(question, []).append(request)
        self._missing[request] += 1
        if check_greedy:
            self.greedy.add(question)

    def settle(self, question: Question, answer: Answer, fills: bool) -> Iterator[tuple[int, Score]]:
        if not math.isfinite(answer.nats):
            raise FloatingPointError(
                f"a continuation of {len(question.continuation)} tokens after {len(question.context)} scored "
                f"{-answer.nats} nats: the model's logits are not finite there"
            )
        for request in self.questions[question]:
            nats, variance, rows, greedy = self._sums.pop(request, (0.0, 0.0, 0, True))
            nats, rows, greedy = nats + answer.nats, rows + answer.rows, greedy and fills
            variance += answer.standard_error**2
            self._missing[request] -= 1
            if self._missing[request]:
                self._sums[request] = (nats, variance, rows, greedy)
                continue
            yield (
                request,
                Score(
                    value=-nats,
                    standard_error=math.sqrt(variance),
                    rows=rows,
                    is_greedy=greedy,
                    cut=self.cut[request],
                ),
            )


def _planner(reader: Reader, config: ScoringConfig) -> Any:
    """(group, length) -> the masks of such a continuation."""

    def plan_of(group: str, length: int) -> Plan:
        language = reader.scorable.language
        assert language is not None and reader.name is not None

        def noise(count: int) -> Tensor:
            return uniform(stream_key(config.seed, "score", group), torch.arange(config.draws), count)

        return regions.plan(
            reader.name,
            length,
            language.codec.granularity,
            draws=config.draws,
            uniform=noise,
            estimator=config.variant,
        )

    return plan_of


def _fill_greedily(reader: Reader, questions: Sequence[Question], batch_tokens: int) -> dict[Question, bool]:
    """Whether the most confident modes, filled in one by one, spell each continuation."""
    found: dict[Question, bool] = {}
    waiting = sorted(questions, key=lambda question: -question.length)
    while waiting:
        room = max(1, batch_tokens // waiting[0].length)
        now, waiting = waiting[:room], waiting[room:]
        place = torch.arange(now[0].length)
        tokens = torch.zeros(len(now), len(place), dtype=torch.int64)
        for row, question in enumerate(now):
            tokens[row, : question.length] = torch.tensor((*question.context, *question.continuation))
        contexts = torch.tensor([[len(question.context)] for question in now])
        lengths = torch.tensor([[question.length] for question in now])
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = Batch(
            tokens=tokens,
            real=None if bool((lengths == len(place)).all()) else place < lengths,
            hidden=((place >= contexts) & (place < lengths)).unsqueeze(-1),
            context=place < contexts,
            places=nothing,
            targets=nothing,
        )
        found |= dict(zip(now, reader.fills_greedily(batch).tolist(), strict=True))
    return found

"""Estimates of the likelihood of masked and partial-masking models, and the one number that is not a likelihood.

Valid, and therefore allowed to become a perplexity: `nelbo_subtoken`, `nelbo_token`, `nelbo_layered` and `nelbo_steps`
bound the negative log-likelihood from above, `nll_chain` and `nll_ar` are the exact value for one order of the tokens.
They reveal groups of digits that each lie within one token, and charge each group its probability given everything
revealed before.
`loss_ce_joint`, published as perplexity for MDM-Prime, charges whole tokens under masks of single digits; it can fall
below the entropy of the data, and has a type of its own that cannot be exponentiated.

Estimators: E1 draws a time and weighs by 1/t; E2 draws the number k of masked units of N, then a subset of that size,
and weighs by N/k. Both have the same mean; E2 has bounded weights and less variance. All values are nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from llm.diffusion import groups, masking
from llm.diffusion.codec import Codec
from llm.diffusion.head import RowLoss, chunked_readout
from llm.diffusion.objective import SMALLEST_TIME, ar_inputs, select_positions

ValidName = Literal["nelbo_subtoken", "nelbo_token", "nelbo_layered", "nelbo_steps", "nll_chain", "nll_ar"]
Estimator = Literal["E1", "E2"]
Order = Literal["left_to_right", "confidence"]

_CPU_READ_BYTES = 2**23  # of logits at a time: with no gradient to keep, those that stay in the cache are fastest

Predict = Callable[[Tensor, Callable[[Tensor, Tensor, Tensor | None], Any]], Any]
"""(inputs, readout) -> readout(hidden [B, L, D], weight [V, D], bias): a backbone. Inputs: digits or (AR) tokens."""

Noise = Callable[[int, int], Tensor]
"""(draw, count) -> uniforms [B, count] on [0, 1), independent between draws and sequences."""


# Results


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Nats of each sequence under each Monte-Carlo draw: [B, K]. An exact evaluator has K = 1 and `exact` set."""

    name: str
    estimator: str
    values: Tensor  # float64 [B, K]
    num_tokens: Tensor  # int64 [B]
    exact: bool = False

    def variance(self) -> Tensor:
        """float64 [B]: of each sequence's mean over its draws; 0 if exact, nan for a single draw.

        On the safe side: draws that are stratified differ more from each other than their mean does from the truth.
        """
        draws = self.values.shape[1]
        if self.exact or draws == 1:
            return torch.full_like(self.values[:, 0], 0.0 if self.exact else torch.nan)
        return self.values.var(-1) / draws

    def moments(self) -> Tensor:
        """float64 [7], to be added up over batches and ranks before `estimate` reads them."""
        values, tokens = self.values.mean(-1), self.num_tokens.double()
        one = torch.ones_like(values)
        columns = [one, values, tokens, values * values, values * tokens, tokens * tokens, self.variance()]
        return torch.stack(columns).sum(-1)

    def estimate(self) -> "Estimate | JointLoss":
        """The estimate of these sequences alone."""
        return estimate(self.name, self.estimator, draws=self.values.shape[1], moments=self.moments())


@dataclass(frozen=True, kw_only=True)
class JointLoss:
    """A training loss in nats that is no bound on anything: it has no perplexity and no bits, on purpose."""

    name: Literal["loss_ce_joint"]
    estimator: str
    draws: int  # for each sequence
    num_tokens: int
    loss_sum: float
    standard_error: float  # of loss_sum, over sequences and draws

    @property
    def loss_per_token(self) -> float:
        return self.loss_sum / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A valid negative log-likelihood, or upper bound on one, summed over a data set. TypeError for any other name."""

    name: ValidName
    estimator: str
    draws: int  # for each sequence
    num_tokens: int
    nats: float
    standard_error: float  # of nats, over sequences and draws; nan for a single sequence
    monte_carlo_error: float  # of nats, over draws alone; 0 if exact, nan for a single draw, else on the safe side

    def __post_init__(self) -> None:
        if self.name not in get_args(ValidName):
            raise TypeError(f"{self.name} is not a likelihood: it has no perplexity. Use one of {get_args(ValidName)}.")

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def ppl(self) -> float:
        """Perplexity per token of the tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def ppl_standard_error(self) -> float:
        """To first order."""
        return self.ppl * self.standard_error / self.num_tokens

    def ppl_per_word(self, num_words: float) -> float:
        """Comparable between tokenizers that share the words. num_words: behind the tokens; inf beyond float64."""
        return float(torch.tensor(self.nats / num_words, dtype=torch.float64).exp())

    def bits_per_byte(self, num_bytes: int) -> float:
        """Comparable between tokenizers. num_bytes: of the UTF-8 text behind the tokens."""
        return self.nats / math.log(2.0) / num_bytes


def estimate(name: str, estimator: str, *, draws: int, moments: Tensor) -> Estimate | JointLoss:
    """Summary of `Draws.moments`, added up over batches and ranks. Only valid names give an Estimate.

    The standard error is that of a ratio: sequences that are merely longer than others add no uncertainty.
    """
    sequences, nats, tokens, nats_2, cross, tokens_2, spread = moments.tolist()
    rate = nats / tokens
    residual = max(nats_2 - 2.0 * rate * cross + rate * rate * tokens_2, 0.0)
    error = math.sqrt(residual * sequences / (sequences - 1)) if sequences > 1 else math.nan
    shared = {"estimator": estimator, "draws": draws, "num_tokens": round(tokens), "standard_error": error}
    if name == "loss_ce_joint":
        return JointLoss(name=name, loss_sum=nats, **shared)
    return Estimate(name=name, nats=nats, monte_carlo_error=math.sqrt(spread), **shared)  # type: ignore[arg-type]


# Evaluators. tokens int64 [B, L]; scored bool [B, L] restricts masks and charges to a region (None: everywhere).


def nelbo_subtoken(
    predict: Predict,
    tokens: Tensor,
    codec: Codec,
    noise: Noise,
    *,
    draws: int,
    estimator: Estimator = "E2",
    scored: Tensor | None = None,
    carry_over: bool = True,
) -> Draws:
    """Upper bound: digits masked one by one, each masked digit charged its marginal. carry_over=False: no filter."""

    def cost(mask: Tensor) -> Tensor:
        return digit_nll(predict, tokens, mask, codec, carry_over=carry_over)

    values = _monte_carlo(cost, tokens, noise, draws, estimator, scored, per_token=codec.granularity)
    return Draws(name="nelbo_subtoken", estimator=estimator, values=values, num_tokens=_count(tokens, scored))


def nelbo_token(
    predict: Predict,
    tokens: Tensor,
    codec: Codec,
    noise: Noise,
    *,
    draws: int,
    estimator: Estimator = "E2",
    scored: Tensor | None = None,
) -> Draws:
    """Upper bound: whole tokens masked, each charged its probability. The number that all families share."""

    def cost(mask: Tensor) -> Tensor:
        whole = mask.expand(*tokens.shape, codec.granularity)
        return token_nll(predict, tokens, whole, codec, carry_over=False)  # nothing of a hidden token is revealed

    values = _monte_carlo(cost, tokens, noise, draws, estimator, scored, per_token=1)
    return Draws(name="nelbo_token", estimator=estimator, values=values, num_tokens=_count(tokens, scored))


def nelbo_layered(
    predict: Predict,
    tokens: Tensor,
    codec: Codec,
    noise: Noise,
    *,
    draws: int,
    estimator: Estimator = "E2",
    scored: Tensor | None = None,
) -> Draws:
    """Upper bound: all first digits are revealed in random order, then all second ones, and so on; l passes a draw.

    A reveal schedule that does not depend on the data, so it bounds like any other (docs/likelihood.md), from coarse to
    fine if the first digit says what kind of token it is.
    """
    values = torch.zeros(len(tokens), draws, dtype=torch.float64, device=tokens.device)
    for index in range(codec.granularity):
        layer = torch.full_like(tokens[:, 0], index)

        def cost(mask: Tensor, layer: Tensor = layer) -> Tensor:
            hidden = masking.layered(mask, layer, codec.granularity, maskable=scored)
            due = mask & (torch.arange(codec.granularity, device=mask.device) == layer[:, None, None])
            return group_nll(predict, tokens, hidden, due, codec)

        def layer_noise(draw: int, count: int, index: int = index) -> Tensor:
            return noise(draw * codec.granularity + index, count)

        values += _monte_carlo(cost, tokens, layer_noise, draws, estimator, scored, per_token=1)
    return Draws(name="nelbo_layered", estimator=estimator, values=values, num_tokens=_count(tokens, scored))


def loss_ce_joint(
    predict: Predict,
    tokens: Tensor,
    codec: Codec,
    noise: Noise,
    *,
    draws: int,
    estimator: Estimator = "E2",
    scored: Tensor | None = None,
    carry_over: bool = True,
) -> Draws:
    """NOT a bound when l > 1: digits masked one by one, every touched token charged as a whole. For comparison only."""

    def cost(mask: Tensor) -> Tensor:
        return token_nll(predict, tokens, mask, codec, carry_over=carry_over)

    values = _monte_carlo(cost, tokens, noise, draws, estimator, scored, per_token=codec.granularity)
    return Draws(name="loss_ce_joint", estimator=estimator, values=values, num_tokens=_count(tokens, scored))


def nelbo_steps(
    predict: Predict,
    tokens: Tensor,
    codec: Codec,
    noise: Noise,
    *,
    steps: int,
    draws: int,
    scored: Tensor | None = None,
) -> Draws:
    """Upper bound for the ancestral sampler of `steps` uniform steps: what it reveals at once in a token is one group.

    Each draw looks at one step, weight `steps`, stratified: draws = steps visits every step of a sequence once.
    """
    shape = (*tokens.shape, codec.granularity)
    columns = []
    for draw in range(draws):
        uniform = noise(draw, 1 + math.prod(shape[1:]))
        step = masking.stratified_count(uniform[:, 0], draw, draws, torch.full_like(tokens[:, 0], steps))
        reveal_time = uniform[:, 1:].view(shape)
        mask = masking.random_mask(reveal_time, step / steps, maskable=scored)
        stays = masking.random_mask(reveal_time, (step - 1) / steps, maskable=scored)
        columns.append(steps * group_nll(predict, tokens, mask, mask & ~stays, codec))
    values = torch.stack(columns, dim=-1)
    return Draws(name="nelbo_steps", estimator=f"T={steps}", values=values, num_tokens=_count(tokens, scored))


def nll_chain(
    predict: Predict, tokens: Tensor, codec: Codec, *, order: Order = "left_to_right", scored: Tensor | None = None
) -> Draws:
    """Exact: tokens revealed one by one, L forward passes. confidence: next comes the token whose mode is most likely.

    The confidence order depends on nothing but what is revealed, so its chain rule is exact too (DUEL, 2026).
    """
    hidden = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored.clone()
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    for _ in range(int(hidden.sum(-1).max())):
        first = torch.where(hidden, place, tokens.shape[1]).amin(-1, keepdim=True)
        candidates = hidden if order == "confidence" else place == first
        charge, confidence = _whole_token_scores(predict, tokens, hidden, candidates, codec)
        best = confidence.amax(-1, keepdim=True)
        ties = candidates & (confidence == best)
        chosen = place == torch.where(ties, place, tokens.shape[1]).amin(-1, keepdim=True)  # none in a finished row
        total += torch.where(chosen, charge, 0.0).sum(-1)
        hidden &= ~chosen
    return Draws(
        name="nll_chain", estimator=order, values=total.unsqueeze(-1), num_tokens=_count(tokens, scored), exact=True
    )


def fills_greedily(predict: Predict, tokens: Tensor, codec: Codec, *, scored: Tensor) -> Tensor:
    """bool [B]: whether the scored tokens are what filling in gives, one by one, the most confident mode first.

    As many forward passes as the longest region has tokens; a sequence that has failed costs no more head.
    """
    hidden = scored.clone()
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    agrees = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    while bool(hidden.any()):
        charge, confidence = _whole_token_scores(predict, tokens, hidden, hidden, codec)
        best = confidence.amax(-1, keepdim=True)
        ties = hidden & (confidence == best)
        chosen = place == torch.where(ties, place, tokens.shape[1]).amin(-1, keepdim=True)
        agrees &= ~(chosen & (-charge < confidence)).any(-1)
        hidden &= ~chosen & agrees.unsqueeze(-1)
    return agrees


def nll_ar(predict: Predict, tokens: Tensor, *, bos: int, scored: Tensor | None = None) -> Draws:
    """Exact: the autoregressive model's own chain rule, every token scored, the first after `bos`."""
    selected = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    index = selected.flatten().nonzero().squeeze(-1)
    targets = tokens.flatten()[index]

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none").unsqueeze(-1)

    values = read_rows(predict, ar_inputs(tokens, bos=bos), index, row_loss)
    nats = _sum_by_sequence(values[:, 0], index, tokens)
    return Draws(
        name="nll_ar", estimator="exact", values=nats.unsqueeze(-1), num_tokens=_count(tokens, scored), exact=True
    )


# Charges of one state: nats [B], float64, of what `mask` (bool [B, L, l]) hides


def digit_nll(predict: Predict, tokens: Tensor, mask: Tensor, codec: Codec, *, carry_over: bool = True) -> Tensor:
    """Sum over the masked digits of -log of their marginals."""
    at = select_positions(mask.any(-1), tokens, mask, codec, filtered=carry_over and codec.granularity > 1)

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        revealed = None if at.revealed is None else at.revealed[rows]
        _, log_digits = groups.true_log_probs(logits, revealed, at.tokens[rows], codec)
        return -torch.where(at.mask[rows], log_digits, 0.0).sum(-1, keepdim=True)

    values = read_rows(predict, masking.hide(codec.encode(tokens), mask, codec), at.index, row_loss)
    return _sum_by_sequence(values[:, 0], at.index, tokens)


def token_nll(predict: Predict, tokens: Tensor, mask: Tensor, codec: Codec, *, carry_over: bool = True) -> Tensor:
    """Sum over the tokens with a masked digit of -log p(token)."""
    at = select_positions(mask.any(-1), tokens, mask, codec, filtered=carry_over and codec.granularity > 1)

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        revealed = None if at.revealed is None else at.revealed[rows]
        return -groups.token_log_prob(logits, revealed, at.tokens[rows], codec).unsqueeze(-1)

    values = read_rows(predict, masking.hide(codec.encode(tokens), mask, codec), at.index, row_loss)
    return _sum_by_sequence(values[:, 0], at.index, tokens)


def group_nll(predict: Predict, tokens: Tensor, mask: Tensor, group: Tensor, codec: Codec) -> Tensor:
    """Sum over the tokens of -log of the probability of their digits `group` (bool [B, L, l], within the mask)."""
    at = select_positions(group.any(-1), tokens, mask, codec, filtered=False)
    members = group.flatten(0, 1)[at.index]
    revealed = masking.hide(codec.encode(at.tokens), at.mask, codec)

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        return -groups.group_log_prob(logits, revealed[rows], at.tokens[rows], members[rows], codec).unsqueeze(-1)

    values = read_rows(predict, masking.hide(codec.encode(tokens), mask, codec), at.index, row_loss)
    return _sum_by_sequence(values[:, 0], at.index, tokens)


def _whole_token_scores(
    predict: Predict, tokens: Tensor, hidden: Tensor, candidates: Tensor, codec: Codec
) -> tuple[Tensor, Tensor]:
    """-log p(x_i) and log p(most likely token), both float64 [B, L], at `candidates`; -inf confidence elsewhere."""
    index = candidates.flatten().nonzero().squeeze(-1)
    targets = tokens.flatten()[index]

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        log_probs = logits.log_softmax(-1)
        true = log_probs.gather(-1, targets[rows].unsqueeze(-1))
        return torch.cat([-true, log_probs.amax(-1, keepdim=True)], dim=-1)

    inputs = masking.hide(codec.encode(tokens), hidden.unsqueeze(-1), codec)
    values = read_rows(predict, inputs, index, row_loss, columns=2).double()
    charge = torch.zeros(tokens.numel(), dtype=torch.float64, device=tokens.device)
    confidence = torch.full_like(charge, -torch.inf)
    charge[index], confidence[index] = values[:, 0], values[:, 1]
    return charge.view(tokens.shape), confidence.view(tokens.shape)


@torch.no_grad()
def read_rows(predict: Predict, inputs: Tensor, index: Tensor, row_loss: RowLoss, *, columns: int = 1) -> Tensor:
    """[P, columns]: row_loss of the logits at the flattened positions `index` [P], chunk by chunk in the forward."""

    def readout(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        unweighted = torch.zeros(len(index), columns, device=hidden.device)  # only the values are wanted
        rows = None if hidden.is_cuda else max(1, _CPU_READ_BYTES // (4 * len(weight)))
        return chunked_readout(hidden.flatten(0, 1)[index], weight, bias, row_loss, unweighted, chunk_rows=rows)[1]

    return predict(inputs, readout)


def _monte_carlo(
    cost: Callable[[Tensor], Tensor],
    tokens: Tensor,
    noise: Noise,
    draws: int,
    estimator: Estimator,
    scored: Tensor | None,
    *,
    per_token: int,
) -> Tensor:
    """float64 [B, K]: weight * cost(mask [B, L, per_token]); the draws of a sequence are stratified in k or in t."""
    units = _count(tokens, scored) * per_token
    columns = []
    for draw in range(draws):
        uniform = noise(draw, 1 + tokens.shape[1] * per_token)
        mask, weight = weighted_mask(uniform, units, draw, draws, estimator, per_token=per_token, scored=scored)
        columns.append(weight * cost(mask))
    return torch.stack(columns, dim=-1)


def weighted_mask(
    uniform: Tensor,
    units: Tensor,
    draw: int | Tensor,
    draws: int,
    estimator: Estimator,
    *,
    per_token: int,
    scored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """bool [B, L, per_token]: what one draw of each row hides, and float64 [B]: the weight of its charge.

    uniform [B, 1 + L * per_token]; units int64 [B]: how many may be hidden. draw: which of the `draws` strata, for all
    rows or int64 [B].
    """
    unit_noise = uniform[:, 1:].unflatten(1, (-1, per_token))
    if estimator == "E2":
        count = masking.stratified_count(uniform[:, 0], draw, draws, units)
        return masking.fixed_count_mask(unit_noise, count, maskable=scored), units / count.clamp(min=1).double()
    times = ((draw + uniform[:, 0].double()) / draws).clamp(min=SMALLEST_TIME)
    return masking.random_mask(unit_noise, times, maskable=scored), 1.0 / times


def _sum_by_sequence(values: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """float64 [B]: sums of the values [P] at the flattened positions `index` [P] of each sequence."""
    total = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    return total.index_add_(0, index // tokens.shape[1], values.double())


def _count(tokens: Tensor, scored: Tensor | None) -> Tensor:
    """int64 [B]: tokens that are scored."""
    return torch.full_like(tokens[:, 0], tokens.shape[1]) if scored is None else scored.sum(-1)

"""Likelihood of short regions, many of them in one batch: which masks a region needs, and charges that share a forward.

The evaluators of `likelihood.py` draw one mask for each sequence of a batch. Answers to questions are short, and many
continue one context: all masks of a region are then listed at once, equal ones once, and whoever packs the batch may
ask several tokens of one input. The masks and weights are the same; a region of n units (tokens, or the digits of
tokens) with 2**n - 1 <= draws gets every mask, and is exact. In layers the units are the tokens' digits of one layer,
and each layer has masks of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llm.diffusion import groups, masking
from llm.diffusion.codec import Codec
from llm.diffusion.likelihood import Draws, Estimator, Predict, read_rows, weighted_mask

RegionName = Literal["nelbo_token", "nelbo_subtoken", "nelbo_layered", "nll_chain", "loss_ce_joint"]
Charge = Literal["digits", "first_digit", "token"]


# Which masks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """R distinct masks of a region of n tokens, and K draws, each a sum of T terms: weights times charges of masks.

    The estimate is the mean of the draws. If it is `exact` there is one of them, of all terms there are.
    """

    name: RegionName
    estimator: str
    masks: Tensor  # bool [R, n, u], what is hidden: u = 1 for whole tokens, u = l for digits
    charged: Tensor  # bool [R, n], the tokens that are charged
    mask_of: Tensor  # int64 [K, T], in 0..R-1
    weights: Tensor  # float64 [K, T]
    exact: bool

    def draws(self, charges: Tensor) -> Draws:
        """The estimates of B regions of this size, from the charges float64 [B, R] of the masks."""
        values = (charges[:, self.mask_of] * self.weights).sum(-1)  # [B, K]
        num_tokens = torch.full((len(values),), self.masks.shape[1])
        return Draws(name=self.name, estimator=self.estimator, values=values, num_tokens=num_tokens, exact=self.exact)


def plan(
    name: RegionName,
    length: int,
    granularity: int,
    *,
    draws: int,
    uniform: Callable[[int], Tensor],
    estimator: Estimator = "E2",
) -> Plan:
    """How to estimate `name` for a region of `length` tokens: exactly where that takes no more masks than `draws`.

    uniform: count -> noise [draws, count] on [0, 1), called only if masks are drawn. The first number (of each layer)
    chooses how many are hidden, the others rank the units in order of place: regions of different lengths share what
    they can.
    """
    if name == "nll_chain":
        return _one_by_one(length)
    per_token = granularity if name in ("nelbo_subtoken", "loss_ce_joint") else 1
    layers = granularity if name == "nelbo_layered" else 1
    units = length * per_token
    if 2**units - 1 <= draws:
        return _every_subset(name, length, per_token, layers)
    noise, number, every = uniform(layers * (1 + units)), torch.arange(draws), torch.full((draws,), units)
    drawn = [
        weighted_mask(noise[:, layer::layers], every, number, draws, estimator, per_token=per_token)
        for layer in range(layers)
    ]
    hidden, charged = _states(torch.stack([mask for mask, _ in drawn]))
    both = torch.cat([hidden.flatten(1), charged], dim=1)
    distinct, mask_of = torch.unique(both, dim=0, return_inverse=True)
    return Plan(
        name=name,
        estimator=estimator,
        masks=distinct[:, :-length].reshape(-1, *hidden.shape[1:]),
        charged=distinct[:, -length:],
        mask_of=mask_of.view(layers, draws).T,
        weights=torch.stack([weight for _, weight in drawn], dim=-1).double(),
        exact=False,
    )


@cache
def _every_subset(name: RegionName, length: int, per_token: int, layers: int) -> Plan:
    """All masks but the empty one; a subset of size m weighs 1 / (m C(N, m)), the mean of E1 and of E2."""
    units = length * per_token
    masks = ((torch.arange(1, 2**units).unsqueeze(-1) >> torch.arange(units)) & 1).bool()
    by_size = [0.0] + [1.0 / (m * math.comb(units, m)) for m in range(1, units + 1)]
    hidden, charged = _states(masks.view(-1, length, per_token).expand(layers, -1, -1, -1))
    return Plan(
        name=name,
        estimator="every mask",
        masks=hidden,
        charged=charged,
        mask_of=torch.arange(len(hidden)).unsqueeze(0),
        weights=torch.tensor(by_size, dtype=torch.float64)[masks.sum(-1)].repeat(1, layers),
        exact=True,
    )


def _states(masks: Tensor) -> tuple[Tensor, Tensor]:
    """What is hidden (bool [T * K, n, u]) and which tokens are charged (bool [T * K, n]) under the masks [T, K, n, u].

    Several layers T: a mask hides digits of its own layer; those of the layers behind it are hidden in every token.
    """
    layers, draws = masks.shape[:2]
    flat = masks.flatten(0, 1)
    if layers == 1:
        return flat, flat.any(-1)
    return masking.layered(flat, torch.arange(layers).repeat_interleave(draws), layers), flat.squeeze(-1)


@cache
def _one_by_one(length: int) -> Plan:
    """Left to right: row i hides the tokens from i on and charges token i."""
    return Plan(
        name="nll_chain",
        estimator="left_to_right",
        masks=torch.ones(length, length, dtype=torch.bool).triu().unsqueeze(-1),
        charged=torch.eye(length, dtype=torch.bool),
        mask_of=torch.arange(length).unsqueeze(0),
        weights=torch.ones(1, length, dtype=torch.float64),
        exact=True,
    )


# What a batch of inputs says about tokens


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Q tokens asked of a batch at P distinct places, in order of place."""

    order: Tensor  # int64 [Q], the questions as they were asked
    tokens: Tensor  # int64 [Q], in that order
    places: Tensor  # int64 [P], into the flattened [B * L], increasing
    starts: Tensor  # int64 [P + 1], on the CPU: the questions of place p are starts[p] to starts[p + 1]
    place_of: Tensor  # int64 [Q], in 0..P-1

    @staticmethod
    def of(places: Tensor, tokens: Tensor) -> "Questions":
        """Ask for `tokens` [Q] at the flattened `places` [Q]; the same place may be asked for many."""
        order = places.argsort(stable=True)
        distinct, place_of, counts = places[order].unique_consecutive(return_inverse=True, return_counts=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0).cpu()])
        return Questions(order=order, tokens=tokens[order], places=distinct, starts=starts, place_of=place_of)

    def to(self, device: torch.device) -> "Questions":
        """The same on `device`, but for `starts`, which stay at hand."""
        moved = {name: getattr(self, name).to(device) for name in ("order", "tokens", "places", "place_of")}
        return replace(self, **moved)

    def within(self, rows: slice, num_rows: int) -> tuple[slice, Tensor]:
        """The questions of the places `rows`, and for each of them its row in that chunk."""
        asked = slice(int(self.starts[rows.start]), int(self.starts[rows.start + num_rows]))
        return asked, self.place_of[asked] - rows.start

    def in_order_of_asking(self, answers: Tensor) -> Tensor:
        return torch.empty_like(answers).index_copy_(0, self.order, answers)


def token_answers(logits: Tensor, rows: Tensor, tokens: Tensor, *, modes: bool) -> Tensor:
    """float32 or better [q, 1]: -log p of `tokens` [q] under row `rows` [q] of the logits [p, V].

    modes: [q, 2], the second column whether the token is the likeliest there (1 or 0).
    """
    charges = -logits.log_softmax(-1)[rows, tokens].unsqueeze(-1)
    if not modes:
        return charges
    return torch.cat([charges, (logits.argmax(-1)[rows] == tokens).unsqueeze(-1)], dim=-1)


def ask_tokens(predict: Predict, inputs: Tensor, asked: Questions, *, modes: bool) -> Tensor:
    """float64 [Q, 1], in the order of asking: -log p of each token where the input [B, L, l] hides it wholly (or, for
    causal models, does not show it yet); with `modes` [Q, 2], as in `token_answers`."""

    def charge(logits: Tensor, rows: Tensor, which: slice) -> Tensor:
        return token_answers(logits, rows, asked.tokens[which], modes=modes)

    return _ask(predict, inputs, asked, charge, columns=1 + modes)


def ask_digits(predict: Predict, inputs: Tensor, asked: Questions, codec: Codec, charge: Charge) -> Tensor:
    """float64 [Q, 1]: the charge of each token for those of its digits that the input [B, L, l] hides.

    digits: the sum of the -log of their marginals; first_digit: of the first hidden one alone, which is that of the
    layer where digits are hidden in layers; token: -log p(token) given the others, whose sum bounds nothing.
    """
    revealed = inputs.flatten(0, 1)[asked.places]  # [P, l]
    counted = revealed == codec.mask_symbol
    if charge == "first_digit":
        counted &= counted.cumsum(-1) == 1

    def charges(logits: Tensor, rows: Tensor, which: slice) -> Tensor:
        place = asked.place_of[which]
        log_token, log_digits = groups.true_log_probs(logits[rows], revealed[place], asked.tokens[which], codec)
        return -(log_token if charge == "token" else torch.where(counted[place], log_digits, 0.0).sum(-1)).unsqueeze(-1)

    return _ask(predict, inputs, asked, charges, columns=1)


def _ask(
    predict: Predict,
    inputs: Tensor,
    asked: Questions,
    charge: Callable[[Tensor, Tensor, slice], Tensor],
    *,
    columns: int,
) -> Tensor:
    answers = torch.zeros(len(asked.tokens), columns, dtype=torch.float64, device=inputs.device)

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        which, local = asked.within(rows, len(logits))
        answers[which] = charge(logits, local, which).double()
        return logits.new_zeros(len(logits), 1)  # a place has any number of answers: they are written above

    read_rows(predict, inputs, asked.places, row_loss)
    return asked.in_order_of_asking(answers)

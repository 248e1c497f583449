"""Training objectives of the autoregressive, masked and partial-masking families, as sums over a micro-batch.

| name | masks | charge, times w(t) = 1/t |
|---|---|---|
| ar | none | -log p(x_i | x_<i): the exact negative log-likelihood, w = 1 |
| mdm | tokens | -log p(x_i) of each masked token |
| ce_joint | any | -log p(x_i) of each touched token: a proper scoring rule, but NOT a bound when l > 1 |
| nelbo_subtoken | digits | -log p(digit) of each masked digit: a bound |
| nelbo_token | whole tokens | -log p(x_i) of each masked token: a bound |
| nelbo_layered | digits, layer by layer | l * -log p(digit) of each masked digit of the current layer: a bound |

A mixture is a mapping from names to factors, computed from one forward pass and one chunk of logits. In a batch that
mixes granularities, nelbo_subtoken (or nelbo_layered) charges the sequences masked by digits, nelbo_token those masked
by whole tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm.diffusion import groups, masking
from llm.diffusion.codec import Codec
from llm.diffusion.head import chunked_readout

Name = Literal["ar", "mdm", "ce_joint", "nelbo_subtoken", "nelbo_token", "nelbo_layered"]
Readout = Callable[[Tensor, Tensor, Tensor | None], "Loss"]
"""(hidden [B, L, D], weight [V, D], bias [V] or None) -> Loss: what a backbone calls in place of its head."""

SMALLEST_TIME = 2.0**-24  # the resolution of float32 noise; below it nothing is ever masked


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Sums over a micro-batch. The caller divides by the global number of tokens."""

    loss_sum: Tensor  # float32 [], differentiable
    metrics: dict[str, Tensor]  # detached sums; keys end in _sum (nats, true weight 1/t) or begin with num_


@dataclass(frozen=True, kw_only=True)
class MaskedObjective:
    """What to minimise, for one codec. The three last fields reproduce the published recipes and cost accuracy."""

    terms: Mapping[Name, float]
    t_min: float = 1e-3  # w(t) = 1 / max(t, t_min): bounds the weight of the rare, nearly clean sequences
    weighting: Literal["inverse_time", "none"] = "inverse_time"  # none: the published image recipe, w = 1
    carry_over: bool = True  # restrict the softmax to tokens that agree with the revealed digits
    positions: Literal["masked", "all"] = "masked"  # all: also charge tokens that are fully visible

    def check(self, codec: Codec, *, can_group: bool, can_split: bool, in_layers: bool = False) -> None:
        """ValueError unless the terms suit masks by whole tokens (can_group) and by single digits (can_split).

        in_layers: digits are masked layer by layer, not in any order.
        """
        names = set(self.terms)
        if not names or names - {"mdm", "ce_joint", "nelbo_subtoken", "nelbo_token", "nelbo_layered"}:
            raise ValueError(
                f"objective = {sorted(names)}: use mdm, ce_joint, nelbo_subtoken, nelbo_token and nelbo_layered."
            )
        if in_layers != ("nelbo_layered" in names) or (in_layers and names & {"ce_joint", "nelbo_subtoken"}):
            raise ValueError(
                f"objective {'+'.join(sorted(names))} does not go with the order of the digits: order = layers is "
                "trained by nelbo_layered, alone or with nelbo_token. Use order = uniform for the others."
            )
        if "mdm" in names and codec.granularity > 1:
            raise ValueError(
                f"objective mdm needs granularity 1, not {codec.granularity}. Use ce_joint or nelbo_subtoken."
            )
        if codec.granularity == 1:  # every mask is a mask of digits and of whole tokens
            return
        if "nelbo_token" in names and not can_group:
            raise ValueError(
                "objective nelbo_token charges whole-token masks, but none are drawn. Raise p_group above 0."
            )
        if "nelbo_subtoken" in names and not can_split:
            raise ValueError("objective nelbo_subtoken charges digit masks, but none are drawn. Lower p_group below 1.")
        by_digit = "nelbo_layered" if in_layers else "nelbo_subtoken"
        if (names == {by_digit} and can_group) or (names == {"nelbo_token"} and can_split):
            other = "nelbo_token" if by_digit in names else by_digit
            raise ValueError(
                f"objective {sorted(names)[0]} leaves part of the batch without a loss. Add {other}, or set p_group to "
                f"{0 if other == 'nelbo_token' else 1}."
            )


@dataclass(frozen=True, kw_only=True)
class MaskedBatch:
    """A micro-batch and its noise: B sequences of L tokens with l digits each."""

    tokens: Tensor  # int64 [B, L]
    mask: Tensor  # bool [B, L, l], the hidden digits
    times: Tensor  # float32 [B], the probability with which each unit was masked
    grouped: Tensor | None = None  # bool [B], sequences masked by whole tokens; None: none of them
    scored: Tensor | None = None  # bool [B, L], tokens that count; None: all
    layer: Tensor | None = None  # int64 [B], the digit that is charged, times being those of its window; None: all

    def inputs(self, codec: Codec) -> Tensor:
        """int64 digits [B, L, l], b where hidden: what the network sees."""
        return masking.hide(codec.encode(self.tokens), self.mask, codec)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The P positions of a batch whose logits are needed, and what is known about them."""

    index: Tensor  # int64 [P], into the flattened [B * L]
    sequence: Tensor  # int64 [P], the row of the batch
    tokens: Tensor  # int64 [P]
    mask: Tensor  # bool [P, l]
    revealed: Tensor | None  # int64 [P, l], b where hidden; None where no filter applies


def select_positions(selected: Tensor, tokens: Tensor, mask: Tensor, codec: Codec, *, filtered: bool) -> Positions:
    """The positions where `selected` [B, L] is set, with their revealed digits if these restrict the softmax."""
    index = selected.flatten().nonzero().squeeze(-1)
    chosen, hidden = tokens.flatten()[index], mask.flatten(0, 1)[index]
    revealed = masking.hide(codec.encode(chosen), hidden, codec) if filtered else None
    return Positions(index=index, sequence=index // tokens.shape[1], tokens=chosen, mask=hidden, revealed=revealed)


def masked_readout(objective: MaskedObjective, batch: MaskedBatch, codec: Codec) -> Readout:
    """The readout that turns the hidden states of `batch.inputs(codec)` into the Loss of `objective`."""
    scored = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.scored is None else batch.scored
    charged = _charged(batch, codec)
    touched = charged.any(-1)
    charges_all = objective.positions == "all"
    selected = scored if charges_all else scored & touched  # [B, L]
    restricts = codec.granularity > 1 or charges_all  # at l = 1 a hidden token reveals nothing
    filtered = objective.carry_over and restricts
    at = select_positions(selected, batch.tokens, batch.mask, codec, filtered=filtered)
    charged = charged.flatten(0, 1)[at.index]  # [P, l]
    with_digits = bool({"nelbo_subtoken", "nelbo_layered"} & set(objective.terms)) and codec.granularity > 1
    shares = _shares(objective, batch, codec)  # [B, K]
    weights = (shares * loss_weight(objective, batch.times).unsqueeze(-1))[at.sequence]  # [P, K]

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        revealed = None if at.revealed is None else at.revealed[rows]
        if not with_digits:
            return -groups.token_log_prob(logits, revealed, at.tokens[rows], codec).unsqueeze(-1)
        log_token, log_digits = groups.true_log_probs(logits, revealed, at.tokens[rows], codec)
        return -torch.stack([log_token, torch.where(charged[rows], log_digits, 0.0).sum(-1)], dim=-1)

    def readout(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Loss:
        rows = hidden.flatten(0, 1)[at.index]
        loss_sum, values = chunked_readout(rows, weight, bias, row_loss, weights)
        return Loss(loss_sum=loss_sum, metrics=_metrics(values, at, batch, scored, codec))

    return readout


def ar_inputs(tokens: Tensor, *, bos: int) -> Tensor:
    """int64 [B, L]: `tokens` shifted right behind `bos`, so that position i predicts token i and all L are scored."""
    return torch.cat([torch.full_like(tokens[:, :1], bos), tokens[:, :-1]], dim=1)


def ar_readout(tokens: Tensor, *, scored: Tensor | None = None) -> Readout:
    """The readout for the hidden states of `ar_inputs`: exact nats of the tokens [B, L] where `scored` is set."""
    counted = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    index = counted.flatten().nonzero().squeeze(-1)
    targets = tokens.flatten()[index]

    def readout(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Loss:
        def row_loss(logits: Tensor, rows: slice) -> Tensor:
            return torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none").unsqueeze(-1)

        ones = torch.ones(len(index), 1, device=hidden.device)
        loss_sum, values = chunked_readout(hidden.flatten(0, 1)[index], weight, bias, row_loss, ones)
        num_tokens = torch.tensor(len(index), device=hidden.device)
        return Loss(loss_sum=loss_sum, metrics={"nll_ar_sum": values.sum(), "num_tokens": num_tokens})

    return readout


def loss_weight(objective: MaskedObjective, times: Tensor) -> Tensor:
    """[B]: what the charges of a sequence at time t are multiplied with in the loss."""
    return torch.ones_like(times) if objective.weighting == "none" else 1.0 / times.clamp(min=objective.t_min)


def _shares(objective: MaskedObjective, batch: MaskedBatch, codec: Codec) -> Tensor:
    """float32 [B, K]: factor of the token's charge and, when digits are charged too (K = 2), of the digits' charge."""
    terms = {name: float(factor) for name, factor in objective.terms.items()}
    nothing = torch.zeros_like(batch.times)
    whole = nothing + terms.get("mdm", 0.0) + terms.get("ce_joint", 0.0)
    if codec.granularity == 1:  # a digit is a token: every mask is both
        return (whole + terms.get("nelbo_token", 0.0) + terms.get("nelbo_subtoken", 0.0)).unsqueeze(-1)
    grouped = _grouped(batch)
    whole = whole + torch.where(grouped, terms.get("nelbo_token", 0.0), nothing)
    by_digit = terms.get("nelbo_subtoken", 0.0) + terms.get("nelbo_layered", 0.0) * codec.granularity  # one of l layers
    if by_digit == 0.0:
        return whole.unsqueeze(-1)
    return torch.stack([whole, torch.where(grouped, nothing, by_digit)], dim=-1)


def _charged(batch: MaskedBatch, codec: Codec) -> Tensor:
    """bool [B, L, l]: the hidden digits that the loss charges; of a sequence masked by layers those of its layer."""
    if batch.layer is None:
        return batch.mask
    digit = torch.arange(codec.granularity, device=batch.mask.device)
    within = (digit == batch.layer[:, None, None]) | _grouped(batch)[:, None, None]
    return batch.mask & within


def _metrics(values: Tensor, at: Positions, batch: MaskedBatch, scored: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Sums of nats with the exact weight 1/t, each beside the number of tokens that it covers."""
    weight = 1.0 / batch.times.clamp(min=SMALLEST_TIME)
    nats = values * weight[at.sequence].unsqueeze(-1)  # [P, K]
    tokens_of = scored.sum(-1)  # [B]
    grouped = _grouped(batch) if codec.granularity > 1 else torch.ones_like(batch.times, dtype=torch.bool)
    touched = at.mask.any(-1)
    metrics = {
        "nelbo_token_sum": nats[:, 0][grouped[at.sequence] & touched].sum(),
        "num_tokens": tokens_of.sum(),
        "num_tokens_nelbo_token": (tokens_of * grouped).sum(),
        "num_loss_positions": torch.tensor(len(at.index), device=values.device),
    }
    if batch.layer is None:
        metrics["loss_ce_joint_sum"] = nats[:, 0].sum()
    if values.shape[1] == 2:
        name, factor = ("nelbo_subtoken", 1) if batch.layer is None else ("nelbo_layered", codec.granularity)
        metrics[f"{name}_sum"] = factor * nats[:, 1][~grouped[at.sequence]].sum()
        metrics[f"num_tokens_{name}"] = (tokens_of * ~grouped).sum()
    return metrics


def _grouped(batch: MaskedBatch) -> Tensor:
    return torch.zeros_like(batch.times, dtype=torch.bool) if batch.grouped is None else batch.grouped

"""Probabilities of groups of sub-tokens under a V-way head: the one copy of the consistency filter.

A token that is partly revealed can only be one of the tokens that agree with what is revealed. With z the logits,

    C = { v : codes[v, j] = y_j for every revealed digit j },    p(v) = softmax of z over C, 0 outside C,
    p(group R = x_R) = sum of p(v) over the v in C that agree with x on the digits R.

R = all masked digits is the token itself, R = {j} is the marginal of one digit. When digits are masked independently,
charging each masked digit its marginal bounds the log-likelihood; charging the token does not. Objectives, evaluators
and samplers all call this module. Shapes: P positions, V tokens, l digits, base b, mask symbol b.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.diffusion.codec import Codec


def consistent(revealed: Tensor, codec: Codec) -> Tensor:
    """bool [P, V]: whether token v agrees with every revealed digit of position p. `revealed` [P, l], b where hidden.

    Digits are packed into bit fields of one integer, so that any base costs one AND and one comparison per (p, v).
    """
    visible = revealed != codec.mask_symbol
    ones = (1 << codec.digit_bits) - 1
    care = codec.pack(visible * ones)  # [P], all bits of the visible digits
    want = codec.pack(torch.where(visible, revealed, 0))  # [P]
    return (codec.packed & care.unsqueeze(-1)) == want.unsqueeze(-1)


def filter_logits(logits: Tensor, revealed: Tensor, codec: Codec) -> Tensor:
    """The logits [P, V] in float32 or better, -inf at the tokens that disagree with the revealed digits [P, l]."""
    return _at_least_float32(logits).masked_fill(~consistent(revealed, codec), -torch.inf)


def filtered_log_probs(logits: Tensor, revealed: Tensor, codec: Codec) -> Tensor:
    """log p(v) [P, V] over the consistent tokens, -inf elsewhere. A position that no token fits gives NaN."""
    return filter_logits(logits, revealed, codec).log_softmax(-1)


def digit_log_probs(logits: Tensor, revealed: Tensor, codec: Codec) -> Tensor:
    """log p(digit j = a) [P, l, b] of every digit and value, -inf where impossible: for sampling digit by digit."""
    scores = filter_logits(logits, revealed, codec)
    mass = (scores - scores.amax(-1, keepdim=True)).exp()
    empty = torch.zeros(len(mass), codec.base, dtype=mass.dtype, device=mass.device)
    sums = torch.stack([empty.index_add(1, column, mass) for column in codec.codes.unbind(-1)], dim=1)
    return sums.log() - sums.sum(-1, keepdim=True).log()


def group_log_prob(logits: Tensor, revealed: Tensor, tokens: Tensor, group: Tensor, codec: Codec) -> Tensor:
    """log p(x_R) [P]: mass of the consistent tokens agreeing with `tokens` [P] on the digits `group` (bool [P, l])."""
    scores = filter_logits(logits, revealed, codec)
    after = torch.where(group, codec.encode(tokens), revealed)
    return filter_logits(scores, after, codec).logsumexp(-1) - scores.logsumexp(-1)


def token_log_prob(logits: Tensor, revealed: Tensor | None, tokens: Tensor, codec: Codec) -> Tensor:
    """log p(x) [P] of the true `tokens` [P]. revealed: digits [P, l] with b where hidden; None applies no filter.

    Differentiable once, like `true_log_probs`, which also gives the digits.
    """
    return _TrueLogProbs.apply(logits, revealed, tokens, codec, False)[0]  # type: ignore[index]


def true_log_probs(logits: Tensor, revealed: Tensor | None, tokens: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """log p(x) [P] of the true `tokens` [P] and log p(digit j = x_j) [P, l] of each of their digits, for training.

    revealed: digits [P, l] with b where hidden; None applies no filter. Differentiable once; the backward is written by
    hand and keeps one [P, V] tensor. Finite whenever the logits are: where the tokens that share a digit have less than
    1e-30 of the largest token's mass, the true token stands in for them, a lower bound with a useful gradient.
    """
    log_token, log_digits = _TrueLogProbs.apply(logits, revealed, tokens, codec, codec.granularity > 1)  # type: ignore[misc]
    return log_token, log_token.unsqueeze(-1) if log_digits is None else log_digits  # l = 1: the digit is the token


class _TrueLogProbs(torch.autograd.Function):
    """mass_v = exp(z_v - max z) on C, summed over all of C and over the tokens that share the true value of a digit."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, revealed: Tensor | None, tokens: Tensor, codec: Codec, with_digits: bool
    ) -> tuple[Tensor, Tensor | None]:
        scores = _at_least_float32(logits) if revealed is None else filter_logits(logits, revealed, codec)
        top = scores.amax(-1, keepdim=True)
        true_score = scores.gather(-1, tokens.unsqueeze(-1)) - top  # [P, 1]
        mass = (scores - top).exp_()
        total = mass.sum(-1, keepdim=True)
        log_token = (true_score - total.log()).squeeze(-1)
        if not with_digits:
            ctx.save_for_backward(mass, total, tokens)
            return log_token, None

        digits = codec.encode(tokens)
        agreeing, whole = _digit_mass(mass, digits, codec)
        floored = agreeing < torch.finfo(mass.dtype).tiny ** 0.8  # 1e-30: the backward divides by it, times a weight
        log_digits = torch.where(floored, true_score - total.log(), agreeing.log() - whole.log())
        ctx.save_for_backward(mass, total, tokens, digits, agreeing, whole, floored)
        ctx.codec = codec
        return log_token, log_digits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_token: Tensor, grad_digits: Tensor | None) -> tuple[Tensor | None, ...]:
        mass, total, tokens, *of_digits = ctx.saved_tensors
        grad_true = grad_token.unsqueeze(-1)  # of log p(x), to which the floored digits add theirs
        if of_digits and grad_digits is not None:
            digits, agreeing, whole, floored = of_digits
            grad_true = grad_true + torch.where(floored, grad_digits, 0.0).sum(-1, keepdim=True)
            grad_digits = torch.where(floored, 0.0, grad_digits)
            slope = torch.where(floored, 0.0, grad_digits / agreeing)
            slope_whole = -grad_digits / whole
            slope_whole[:, :1] -= grad_true / total  # every token has a first digit: one pass over [P, V] less
            grad = _spread_over_tokens(slope, slope_whole, digits, ctx.codec).mul_(mass)
        else:
            grad = mass * (-grad_true / total)
        grad.scatter_add_(-1, tokens.unsqueeze(-1), grad_true)
        return grad, None, None, None, None


def _digit_mass(mass: Tensor, digits: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """[P, l] mass of the tokens that share digit j with `digits` [P, l], and [P, l] the mass of all of them.

    One product with the one-hot digit table while that is thin (l * b = 32 columns for binary codes). Its cost grows
    with b; that of a masked sum for each digit does not, and is less for two digits of base 225.
    """
    if codec.has_thin_table:
        by_value = (codec.one_hot.T.to(mass.dtype) @ mass.T).T  # this way round CPU libraries are a third faster
        by_value = by_value.unflatten(-1, (codec.granularity, codec.base))  # [P, l, b]
        return by_value.gather(-1, digits.unsqueeze(-1)).squeeze(-1), by_value.sum(-1)
    agreeing = [
        torch.where(column == digit.unsqueeze(-1), mass, 0.0).sum(-1)
        for column, digit in zip(codec.codes.unbind(-1), digits.unbind(-1), strict=True)
    ]
    return torch.stack(agreeing, dim=-1), mass.sum(-1, keepdim=True).expand(digits.shape)


def _spread_over_tokens(slope: Tensor, slope_whole: Tensor, digits: Tensor, codec: Codec) -> Tensor:
    """[P, V]: gradient of the mass, from those [P, l] of the two results of `_digit_mass`."""
    if codec.has_thin_table:
        by_value = slope_whole.unsqueeze(-1).repeat(1, 1, codec.base)
        by_value.scatter_add_(-1, digits.unsqueeze(-1), slope.unsqueeze(-1))
        return by_value.flatten(1) @ codec.one_hot.to(slope.dtype).T
    grad = slope_whole.sum(-1, keepdim=True).repeat(1, codec.vocab_size)
    for column, digit, value in zip(codec.codes.unbind(-1), digits.unbind(-1), slope.unbind(-1), strict=True):
        grad += torch.where(column == digit.unsqueeze(-1), value.unsqueeze(-1), 0.0)
    return grad


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

"""Probabilities of groups of sub-tokens under a V-way head: the one copy of the consistency filter.

A token that is partly revealed can only be one of the tokens that agree with what is revealed. With z the logits,

    C = { v : codes[v, j] = y_j for every revealed digit j },    p(v) = softmax of z over C, 0 outside C,
    p(group R = x_R) = sum of p(v) over the v in C that agree with x on the digits R.

R = all masked digits is the token itself, R = {j} is the marginal of one digit. When digits are masked independently,
charging each masked digit its marginal bounds the log-likelihood; charging the token does not. Objectives, evaluators
and samplers all call this module. Shapes: P positions, V tokens, l digits, base b, mask symbol b.
"""

import torch
from torch import Tensor

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
    sums = torch.stack([_sum_by_digit(mass, digit, codec) for digit in codec.codes.unbind(-1)], dim=1)
    return sums.log() - sums.sum(-1, keepdim=True).log()


def group_log_prob(logits: Tensor, revealed: Tensor, tokens: Tensor, group: Tensor, codec: Codec) -> Tensor:
    """log p(x_R) [P]: mass of the consistent tokens agreeing with `tokens` [P] on the digits `group` (bool [P, l])."""
    scores = filter_logits(logits, revealed, codec)
    after = torch.where(group, codec.encode(tokens), revealed)
    return filter_logits(scores, after, codec).logsumexp(-1) - scores.logsumexp(-1)


def _sum_by_digit(mass: Tensor, digit: Tensor, codec: Codec) -> Tensor:
    """[P, b]: mass [P, V] added up over the tokens that share the value of one digit [V]."""
    return torch.zeros(len(mass), codec.base, dtype=mass.dtype, device=mass.device).index_add_(1, digit, mass)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()

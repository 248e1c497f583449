"""When each hidden unit of a sequence is revealed: orders, counts and blocks, without a network.

B sequences, L tokens, l digits per token, U units per token (U = 1: whole tokens, U = l: single digits).

Every order that does not look at the network's output is a plan: one integer per digit, the step that reveals it. The
sampler then visits the steps that reveal something and no others (first-hitting sampling), which has the law of the
step-by-step process and not merely its limit: with T uniform steps and alpha_t = 1 - t, a unit that is still hidden at
step k is revealed there with probability 1 / (T - k), so its step is uniform on 0..T-1.
"""

import math

import torch
from torch import Tensor


def predicted_idle_ratio(steps: int, units: int) -> float:
    """Expected fraction of `steps` uniform ancestral steps that reveal none of `units` units: (1 - 1/T)^N.

    A property of the schedule alone, whatever the network has learned (MDM-Prime, arXiv 2505.18495).
    """
    return (1 - 1 / steps) ** units


def blocks(hidden: Tensor, block_length: int | None) -> Tensor:
    """int64 [B, L]: block of each token in semi-autoregressive order, -1 for a token with nothing to reveal.

    hidden: bool [B, L]. Blocks count the hidden tokens of their own sequence, so prompts of different lengths, and gaps
    between given tokens, do not shift them.
    """
    index = hidden.cumsum(1) - 1
    return torch.where(hidden, index // block_length if block_length else 0, -1)


def units_per_block(units: Tensor, block: Tensor, num_blocks: int) -> Tensor:
    """int64 [B, num_blocks]: hidden units in each block. units: bool [B, L, U]; block: int64 [B, L]."""
    counts = units.new_zeros(units.shape[0], num_blocks, dtype=torch.int64)
    return counts.scatter_add_(1, block.clamp(min=0), units.sum(-1))


def reveal_count(total: Tensor, step: int, steps: int) -> Tensor:
    """Units revealed at `step` when `total` units are spread over `steps`: the remainder goes to the first steps."""
    return total // steps + (step < total % steps)


def top_units(score: Tensor, count: Tensor) -> Tensor:
    """bool [B, L, U]: the `count` [B] units with the highest score [B, L, U] in each sequence; ties go to the left."""
    order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < count[:, None]).view(score.shape)


def token_steps(steps: int, chunk_point: float) -> int:
    """Number of the first steps k, at time t = 1 - k/steps, with t above the chunk point: these reveal whole tokens."""
    return math.ceil(steps * (1 - chunk_point))


def ancestral_plan(token: Tensor, digit: Tensor, steps: int, whole_token_steps: int) -> Tensor:
    """int64 [B, L, l]: the step in 0..steps-1 at which the ancestral sampler reveals each digit.

    token [B, L] and digit [B, L, l] are uniforms. The first `whole_token_steps` steps reveal whole tokens. A token that
    outlives them has told nothing about its digits, whose steps are then uniform on what remains.
    """
    token_step = (token * steps).long().unsqueeze(-1)
    digit_step = whole_token_steps + (digit * (steps - whole_token_steps)).long()
    return torch.where(token_step < whole_token_steps, token_step, digit_step)


def layered_plan(digit: Tensor, steps: int) -> Tensor:
    """int64 [B, L, l]: the step in 0..steps-1 at which each digit is revealed when all first digits come before any
    second one. digit: uniforms [B, L, l]. Every layer has 1 / l of the steps; a step on a border serves two layers."""
    granularity = digit.shape[-1]
    layer = torch.arange(granularity, device=digit.device)
    return ((layer + digit) * (steps / granularity)).long().clamp(max=steps - 1)


def counted_plan(units: Tensor, key: Tensor, block: Tensor, steps: int) -> Tensor:
    """int64 [B, L, U]: the step in 0..steps-1 at which each unit is revealed, with `reveal_count` units at each step.

    units: bool [B, L, U], what is hidden; key [B, L, U] in [0, 1): the order within a block, smallest first. Values at
    visible units mean nothing.
    """
    num_blocks = max(1, int(block.max()) + 1)
    counts = units_per_block(units, block, num_blocks)
    member = block.clamp(min=0)
    total = counts.gather(1, member).unsqueeze(-1)  # [B, L, 1]
    first = (counts.cumsum(1) - counts).gather(1, member).unsqueeze(-1)
    key = torch.where(units, key + block.unsqueeze(-1), torch.inf).flatten(1)
    rank = key.argsort(dim=1, stable=True).argsort(dim=1).view(units.shape) - first
    share, remainder = total // steps, total % steps
    generous = remainder * (share + 1)  # units revealed by the steps that take one more
    late = remainder + (rank - generous) // share.clamp(min=1)
    return torch.where(rank < generous, rank // (share + 1), late)

"""Exact enumeration over every mask, order and sequence of tiny vocabularies: the oracles of this folder's tests.

Everything is float64 and written the slow, obvious way, without the library's filter. A model is a callable
`predict(digits [B, L, l]) -> logits [B, L, V]` whose entry (i, v) is the unfiltered logit of token v at position i.
"""

from collections.abc import Callable
from itertools import permutations, product
from math import comb, log
from typing import Any

import torch
from torch import Tensor

from llm.diffusion.codec import Codec

Predict = Callable[[Tensor], Tensor]


# Data and models


def all_sequences(vocab_size: int, length: int) -> Tensor:
    """int64 [V**L, L], in the order of a flattened [V, V, ...] table."""
    return torch.tensor(list(product(range(vocab_size), repeat=length)))


def copy_joint(vocab_size: int = 4, stay: float = 0.85) -> Tensor:
    """float64 [V, V]: the first token uniform, the second equal to it with probability `stay`, else any other."""
    other = (1 - stay) / (vocab_size - 1)
    table = torch.full((vocab_size, vocab_size), other, dtype=torch.float64)
    return (table.fill_diagonal_(stay)) / vocab_size


def entropy(joint: Tensor) -> float:
    """Nats of a table of probabilities."""
    return float(torch.special.entr(joint).sum())


def posterior(joint: Tensor, codec: Codec) -> Predict:
    """The perfect predictor of the data law `joint` [V] * L: logits are log p(x_i = v | revealed digits), exact."""
    length = joint.dim()
    sequences = all_sequences(codec.vocab_size, length)
    digits_of = codec.encode(sequences)  # [V**L, L, l]
    weight = joint.reshape(-1)
    one_hot = torch.nn.functional.one_hot(sequences, codec.vocab_size).to(torch.float64)  # [V**L, L, V]

    def predict(digits: Tensor) -> Tensor:
        hidden = digits.unsqueeze(1) == codec.mask_symbol
        agrees = (hidden | (digits.unsqueeze(1) == digits_of)).all(-1).all(-1)  # [B, V**L]
        return torch.einsum("bs,siv->biv", agrees * weight, one_hot).log()

    return predict


def random_model(codec: Codec, length: int, seed: int, scale: float = 1.5) -> Predict:
    """An arbitrary conditional table: independent normal logits for every partial state of the whole sequence."""
    num_units, num_symbols = length * codec.granularity, codec.base + 1
    generator = torch.Generator().manual_seed(seed)
    shape = (num_symbols**num_units, length, codec.vocab_size)
    table = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    place = num_symbols ** torch.arange(num_units)
    return lambda digits: table[(digits.flatten(1) * place).sum(-1)]


def uniform_model(codec: Codec) -> Predict:
    """Every token equally likely before the filter."""
    return lambda digits: torch.zeros(*digits.shape[:2], codec.vocab_size, dtype=torch.float64)


# Probabilities of one state


def filtered(predict: Predict, codec: Codec, digits: Tensor) -> Tensor:
    """p(v) [B, L, V], restricted to the tokens that agree with the revealed digits and normalised."""
    hidden = (digits == codec.mask_symbol).unsqueeze(2)
    agrees = (hidden | (digits.unsqueeze(2) == codec.codes)).all(-1)  # [B, L, V]
    return predict(digits).masked_fill(~agrees, -torch.inf).softmax(-1)


def group_log_probs(predict: Predict, codec: Codec, tokens: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """log p(x_R) [B, L] of each position's group R = `group` (bool [L, l]) when `mask` (bool [L, l]) is hidden."""
    true = codec.encode(tokens)
    probs = filtered(predict, codec, torch.where(mask, codec.mask_symbol, true))
    agrees = (~group.unsqueeze(1) | (true.unsqueeze(2) == codec.codes)).all(-1)
    return torch.where(agrees, probs, 0.0).sum(-1).log()


# Sums over masks: E over the number k of masked units and over the subsets of that size, times N / k


def all_masks(num_units: int) -> Tensor:
    """bool [2**n - 1, n]: every non-empty subset."""
    return torch.tensor(list(product((False, True), repeat=num_units))[1:])


def subset_weight(num_masked: int, num_units: int) -> float:
    """The integral of t**(k-1) (1-t)**(n-k) over the unit interval: 1 / (k * C(n, k))."""
    return 1.0 / (num_masked * comb(num_units, num_masked))


def nelbo_subtoken(predict: Predict, codec: Codec, tokens: Tensor) -> Tensor:
    """Nats [B]: every masked digit charged with its own marginal."""
    return _integrate(predict, codec, tokens, cost=_digit_cost, whole_tokens=False)


def nelbo_token(predict: Predict, codec: Codec, tokens: Tensor) -> Tensor:
    """Nats [B]: whole tokens masked, each charged with its probability."""
    return _integrate(predict, codec, tokens, cost=_token_cost, whole_tokens=True)


def joint_loss(predict: Predict, codec: Codec, tokens: Tensor) -> Tensor:
    """Nats [B] that are NOT a bound: digits masked one by one, but every touched token charged as a whole."""
    return _integrate(predict, codec, tokens, cost=_token_cost, whole_tokens=False)


def all_orders(length: int, granularity: int) -> list[tuple[int, ...]]:
    """Every order of the units, unit i * l + j being digit j of token i."""
    return list(permutations(range(length * granularity)))


def layered_orders(length: int, granularity: int) -> list[tuple[int, ...]]:
    """Every order in which all first digits come before any second one, and so on."""
    layers = [permutations(range(j, length * granularity, granularity)) for j in range(granularity)]
    return [sum(parts, ()) for parts in product(*layers)]


def nelbo_over_orders(predict: Predict, codec: Codec, tokens: Tensor, orders: list[tuple[int, ...]]) -> Tensor:
    """Nats [B]: mean over the orders of the units of the sum of -log marginals along the order."""
    return -_log_probs_along_orders(predict, codec, tokens, orders).mean(0)


def nll_over_orders(predict: Predict, codec: Codec, tokens: Tensor, orders: list[tuple[int, ...]]) -> Tensor:
    """Nats [B]: -log of the mean over the orders of the product of the marginals: one digit at a time, exactly."""
    log_probs = _log_probs_along_orders(predict, codec, tokens, orders)
    return log(len(log_probs)) - log_probs.logsumexp(0)


def masked_cost(cost: str, predict: Predict, codec: Codec, tokens: Tensor) -> dict[tuple[bool, ...], Tensor]:
    """Nats [B] of every mask of the units: cost "digits" charges marginals, "tokens" charges touched tokens."""
    units = tokens.shape[1] * codec.granularity
    function = {"digits": _digit_cost, "tokens": _token_cost}[cost]
    shape = (tokens.shape[1], codec.granularity)
    return {tuple(mask.tolist()): function(predict, codec, tokens, mask.view(shape)) for mask in all_masks(units)}


def _integrate(predict: Predict, codec: Codec, tokens: Tensor, *, cost: Callable[..., Tensor], whole_tokens: bool):
    length = tokens.shape[1]
    units = length if whole_tokens else length * codec.granularity
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for mask in all_masks(units):
        shaped = mask.view(length, -1).expand(length, codec.granularity)
        total += subset_weight(int(mask.sum()), units) * cost(predict, codec, tokens, shaped)
    return total


def _digit_cost(predict: Predict, codec: Codec, tokens: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for i, j in mask.nonzero().tolist():
        group = torch.zeros_like(mask)
        group[i, j] = True
        total -= group_log_probs(predict, codec, tokens, mask, group)[:, i]
    return total


def _token_cost(predict: Predict, codec: Codec, tokens: Tensor, mask: Tensor) -> Tensor:
    return -group_log_probs(predict, codec, tokens, mask, mask).sum(-1)


def _log_probs_along_orders(predict: Predict, codec: Codec, tokens: Tensor, orders: list[tuple[int, ...]]) -> Tensor:
    """[orders, B]: log of the product of the marginals along each order of the N units."""
    length, granularity = tokens.shape[1], codec.granularity
    marginal: dict[tuple[int, frozenset[int]], Tensor] = {}
    units = range(length * granularity)
    rows = []
    for order in orders:
        row = torch.zeros(len(tokens), dtype=torch.float64)
        for step, unit in enumerate(order):
            hidden = frozenset(order[step:])
            if (unit, hidden) not in marginal:
                mask = torch.tensor([u in hidden for u in units]).view(length, granularity)
                group = torch.tensor([u == unit for u in units]).view(length, granularity)
                log_probs = group_log_probs(predict, codec, tokens, mask, group)
                marginal[unit, hidden] = log_probs[:, unit // granularity]
            row += marginal[unit, hidden]
        rows.append(row)
    return torch.stack(rows)


# A sampler of T steps, alpha = 1 - t, which reveals the masked units of step k with probability 1 / k


def step_pairs(num_units: int, steps: int) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, mask [n], group [n]) of every state at t = k / T and every non-empty set revealed next."""
    pairs = []
    for k in range(1, steps + 1):
        for mask in all_masks(num_units):
            masked = int(mask.sum())
            state = (k / steps) ** masked * (1 - k / steps) ** (num_units - masked)
            for picks in all_masks(masked):
                group = torch.zeros_like(mask)
                group[mask] = picks
                shown = int(picks.sum())
                pairs.append((state * (1 / k) ** shown * (1 - 1 / k) ** (masked - shown), mask, group))
    return [pair for pair in pairs if pair[0] > 0]


def steps_bound(predict: Predict, codec: Codec, tokens: Tensor, steps: int) -> Tensor:
    """Nats [B]: what the T-step sampler pays on average; digits of one token revealed together form one group."""
    shape = (tokens.shape[1], codec.granularity)
    total = torch.zeros(len(tokens), dtype=torch.float64)
    cache: dict[tuple[tuple[bool, ...], tuple[bool, ...]], Tensor] = {}
    for weight, mask, group in step_pairs(shape[0] * shape[1], steps):
        key = (tuple(mask.tolist()), tuple(group.tolist()))
        if key not in cache:
            cache[key] = -group_log_probs(predict, codec, tokens, mask.view(shape), group.view(shape)).sum(-1)
        total += weight * cache[key]
    return total


def sampler_law(predict: Predict, codec: Codec, length: int, steps: int) -> Tensor:
    """float64 [V**L]: the exact law of the T-step sampler's output, by the Markov chain over all partial states.

    In each step every masked unit is chosen with probability 1 / k; the chosen digits of one token are drawn together
    from the filtered token distribution, different tokens independently.
    """
    law = {(codec.mask_symbol,) * (length * codec.granularity): 1.0}
    for k in range(steps, 0, -1):
        after: dict[tuple[int, ...], float] = {}
        for state, mass in law.items():
            digits = torch.tensor(state).view(length, codec.granularity)
            probs = filtered(predict, codec, digits.unsqueeze(0))[0]
            moves = [_token_moves(digits[i], probs[i], codec, 1 / k) for i in range(length)]
            for parts in product(*moves):
                target = tuple(digit for part, _ in parts for digit in part)
                chance = mass
                for _, probability in parts:
                    chance *= probability
                if chance > 0:
                    after[target] = after.get(target, 0.0) + chance
        law = after
    finals = codec.encode(all_sequences(codec.vocab_size, length)).flatten(1).tolist()
    return torch.tensor([law.get(tuple(final), 0.0) for final in finals], dtype=torch.float64)


def _token_moves(digits: Tensor, probs: Tensor, codec: Codec, rate: float) -> list[tuple[tuple[int, ...], float]]:
    """(digits after, probability) of one position in one step."""
    hidden = (digits == codec.mask_symbol).nonzero().flatten().tolist()
    moves: dict[tuple[int, ...], float] = {}
    for picks in product((False, True), repeat=len(hidden)):
        shown = [j for j, pick in zip(hidden, picks, strict=True) if pick]
        chance = rate ** len(shown) * (1 - rate) ** (len(hidden) - len(shown))
        for token, probability in enumerate(probs.tolist() if shown else [1.0]):
            after = digits.clone()
            after[shown] = codec.codes[token, shown]
            key = tuple(after.tolist())
            moves[key] = moves.get(key, 0.0) + chance * probability
    return list(moves.items())


def as_backbone(predict: Predict, vocab_size: int) -> Callable[..., Any]:
    """The model as the library's evaluators call it: its logits are the hidden states, under an identity head."""
    identity = torch.eye(vocab_size, dtype=torch.float64)
    return lambda digits, readout: readout(predict(digits).clamp(min=-1e30), identity, None)

"""Which samples a step trains on: pure functions of the step, so that resuming is a number and not a replay.

    positions = micro_batches(step, global_batch=512, micro_batch=8, rank=r, world_size=W)   # this rank's share
    indices = GlobalOrder(num_samples, seed).samples(positions[0])                           # what to read

A *position* counts the samples of the whole run, over all ranks and epochs: step s owns [s * B, (s + 1) * B) for a
global batch of B. Nothing here depends on the rank or the world size except `micro_batches`, which deals the positions
of one step out; so a run may stop on 4 ranks and go on with 6 and still read every sample in the same order.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launch.errors import ConfigError
from launch.random import stream_key

IndexArray = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 8  # 4 suffice for large domains (Luby-Rackoff); tiny ones, where a half is a bit or two, want more
_MAX_PERIOD = 1 << 16  # longest mixture schedule that is tabulated; coarser weights are exact, finer ones are rounded


def micro_batches(step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[IndexArray]:
    """The positions that `rank` reads in `step`: one int64 [micro_batch] array per micro-step.

    A step is cut into the same micro-batches of neighbouring positions at every world size, and the ranks take turns.
    """
    accumulation = accumulation_steps(global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}")
    everyone = step * global_batch + np.arange(global_batch, dtype=np.int64)
    return list(everyone.reshape(accumulation, world_size, micro_batch)[:, rank])


def accumulation_steps(*, global_batch: int, micro_batch: int, world_size: int, group: int = 1) -> int:
    """Micro-steps a rank makes per step, where `group` ranks (a divisor of the world size) read the same samples.

    ConfigError, naming what would work, unless the numbers divide exactly.
    """
    if min(global_batch, micro_batch, world_size) < 1:
        raise ConfigError(
            f"global batch {global_batch}, micro-batch {micro_batch} and world size {world_size} must all be at least 1"
        )
    if global_batch % micro_batch:
        sizes = ", ".join(map(str, _divisors(global_batch)))
        raise ConfigError(
            f"a global batch of {global_batch} samples is not divisible by a micro-batch of {micro_batch}; "
            f"micro-batches that divide it: {sizes}"
        )
    per_step = micro_batch * (world_size // group)
    if global_batch % per_step:
        worlds = ", ".join(str(group * readers) for readers in _divisors(global_batch // micro_batch))
        size = f"{world_size} / tensor-parallel size {group}" if group > 1 else f"{world_size}"
        raise ConfigError(
            f"a global batch of {global_batch} samples is not divisible by micro-batch {micro_batch} x world size "
            f"{size} = {per_step}; with this micro-batch it runs on {worlds} ranks (or choose a global batch of "
            f"{math.ceil(global_batch / per_step) * per_step})"
        )
    return global_batch // per_step


@dataclass(frozen=True)
class GlobalOrder:
    """An endless order of samples: epoch after epoch, each a permutation of [0, num_samples) of its own.

    The permutation is a keyed bijection (a Feistel network, cycle-walked down to num_samples), computed where it is
    asked for: no memory, no state, the same cost for a thousand samples or 10^12.
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples < 2**62:
            raise ValueError(f"an order needs 1 to 2^62 samples, not {self.num_samples}")

    def samples(self, positions: ArrayLike) -> IndexArray:
        """Sample index, int64 in [0, num_samples), for each global position (int >= 0, any shape)."""
        positions = _as_positions(positions)
        epochs, offsets = np.divmod(positions.reshape(-1), self.num_samples)
        bits = (self.num_samples - 1).bit_length()
        keys = _mix(epochs.astype(np.uint64) * _GOLDEN + self._key)
        values = _feistel(offsets.astype(np.uint64), keys, bits)
        # Cycle walking: the network permutes [0, 2^bits), less than twice the range; what falls outside goes in again.
        while (outside := values >= self.num_samples).any():
            values[outside] = _feistel(values[outside], keys[outside], bits)
        return values.astype(np.int64).reshape(positions.shape)

    @cached_property
    def _key(self) -> np.uint64:
        return np.uint64(stream_key(self.seed, "order") % 2**64)


@dataclass(frozen=True)
class Mixture:
    """Deals an endless run of positions out to sources in proportion to their weights.

    After any number n of positions source s has had floor or ceil of n * weight[s] / sum(weights): it is never a whole
    sample away from its share. Sample j of a source with share w is due between positions j / w and (j + 1) / w, and
    taking the earliest due date first meets them all (Pfair scheduling: Baruah, Cohen, Plaxton and Varvel, 1996).

    The schedule repeats after the common denominator of the shares. Where that exceeds 65536, shares are rounded to
    multiples of 1 / 65536 (none below one); `shares` are the exact ones in use.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ConfigError(f"mixture weights must be finite and above 0, got {list(self.weights)}; drop the others")
        if len(self.weights) > _MAX_PERIOD:
            raise ConfigError(f"a mixture takes up to {_MAX_PERIOD} sources, got {len(self.weights)}")

    @property
    def shares(self) -> tuple[Fraction, ...]:
        return tuple(Fraction(quota, len(self._schedule)) for quota in self._quotas.tolist())

    def locate(self, positions: ArrayLike) -> tuple[IndexArray, IndexArray]:
        """(source, position within the source) of each global position; int64 arrays of its shape."""
        cycles, offsets = np.divmod(_as_positions(positions), len(self._schedule))
        sources = self._schedule[offsets]
        return sources, cycles * self._quotas[sources] + self._counts_before[offsets]

    @cached_property
    def _quotas(self) -> IndexArray:
        """Samples of each source in one period; their sum is the period."""
        exact = [Fraction(repr(float(weight))) for weight in self.weights]  # 0.1 means one tenth, not its binary double
        shares = [weight / sum(exact) for weight in exact]
        period = math.lcm(*(share.denominator for share in shares))
        if period <= _MAX_PERIOD:
            return np.array([int(share * period) for share in shares], dtype=np.int64)
        return np.array(_round_to_sum(shares, _MAX_PERIOD), dtype=np.int64)

    @cached_property
    def _schedule(self) -> IndexArray:
        """[period] source of each position of a period."""
        return _earliest_due_first(self._quotas.tolist())

    @cached_property
    def _counts_before(self) -> IndexArray:
        """[period] how many earlier positions of the period have the same source."""
        counts = np.empty_like(self._schedule)
        for source, quota in enumerate(self._quotas.tolist()):
            counts[self._schedule == source] = np.arange(quota)
        return counts


def _earliest_due_first(quotas: Sequence[int]) -> IndexArray:
    period = sum(quotas)
    jobs = [  # (release, due, source) of every sample of a period, in exact integers
        (j * period // quota, -(-(j + 1) * period // quota), source)
        for source, quota in enumerate(quotas)
        for j in range(quota)
    ]
    jobs.sort(reverse=True)
    schedule = np.empty(period, dtype=np.int64)
    ready: list[tuple[int, int]] = []
    for position in range(period):
        while jobs and jobs[-1][0] <= position:
            heapq.heappush(ready, jobs.pop()[1:])
        due, schedule[position] = heapq.heappop(ready)
        assert due > position, "earliest due first keeps every date of a full schedule"
    return schedule


def _round_to_sum(shares: Sequence[Fraction], total: int) -> list[int]:
    """Positive integers near total * shares that add up to total (largest remainders)."""
    quotas = [max(1, math.floor(share * total)) for share in shares]
    while (missing := total - sum(quotas)) != 0:  # at most one pass up, or one down where tiny shares were lifted to 1
        step = 1 if missing > 0 else -1
        gaps = [
            (step * (share * total - quota), s) for s, (share, quota) in enumerate(zip(shares, quotas, strict=True))
        ]
        for _, s in sorted((gap for gap in gaps if quotas[gap[1]] + step >= 1), reverse=True)[: abs(missing)]:
            quotas[s] += step
    return quotas


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """A bijection of [0, 2^bits) per key: two halves (of unequal length when bits is odd) scramble each other."""
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    high, low = values >> low_bits, values & low_mask
    for number in range(1, _FEISTEL_ROUNDS + 1):
        round_keys = keys + np.uint64(number * int(_GOLDEN) % 2**64)
        if number % 2:
            high = high ^ (_mix(low + round_keys) & high_mask)
        else:
            low = low ^ (_mix(high + round_keys) & low_mask)
    return (high << low_bits) | low


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser on uint64 (launch.random has it for torch tensors)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_positions(positions: ArrayLike) -> IndexArray:
    array = np.asarray(positions, dtype=np.int64)
    if array.size and array.min() < 0:
        raise ValueError(f"positions count from 0, got {array.min()}")
    return array


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})

"""Counter-based random numbers: a draw is a pure function of (key, index, counter), on every device and world size.

Nothing here has state, so nothing here needs saving: the noise of sample 17 of step 1000 is the same on one process
and on a thousand, before and after a restart. The mixer is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)
in wrapping 64-bit integer arithmetic, which CPU and CUDA compute bit for bit alike.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer, because torch has no uint64 arithmetic
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream_key(seed: int, *names: str | int) -> int:
    """Signed 64-bit key of the stream called `names` (for example "mask", step) under `seed`."""
    text = "/".join(str(name) for name in (seed, *names)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def random_bits(key: int, index: Tensor, count: int) -> Tensor:
    """int64 [*index.shape, count]: 64 random bits for each (index, counter) pair. `index` is int64, on any device."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=index.device)
    lane = _mix(index + key)  # decorrelate neighbouring samples before their counters are added
    return _mix(lane.unsqueeze(-1) + counter * _GOLDEN)


def uniform(key: int, index: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1), [*index.shape, count]. float32 carries 24 random bits, float64 carries 53."""
    digits = 53 if dtype == torch.float64 else 24
    return _shift_right(random_bits(key, index, count), 64 - digits).to(dtype) * 2.0**-digits


def generator(key: int) -> torch.Generator:
    """A CPU generator seeded by `key`, for library code that wants a generator (weight initialisation)."""
    return torch.Generator().manual_seed(key & (2**63 - 1))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

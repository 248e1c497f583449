"""Sub-tokens: the invertible map between a token id and its l digits in base b (MDM-Prime, arXiv 2505.18495).

Token v is written as the l base-b digits, most significant first, of the integer pi(v). pi is the identity (MDM-Prime)
or one fixed random permutation (MDM-Prime-v2, arXiv 2603.16077). The symbol b means "masked". With l = 1 the only digit
of a token is its id, b = V and the mask symbol is V: plain masked diffusion is the l = 1 case of everything here.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Scope = Literal["tokens", "all_codes"]


def smallest_base(vocab_size: int, granularity: int) -> int:
    """The smallest b with b**l >= V, in integers: ceil(V ** (1 / l)) in floats is one too large for 5**5 and others."""
    base = max(1, round(vocab_size ** (1.0 / granularity)) - 2)  # a safe start below the answer
    while base**granularity < vocab_size:
        base += 1
    return base


def build_codec(
    vocab_size: int,
    granularity: int,
    *,
    shuffle_seed: int | None = None,
    scope: Scope = "tokens",
    permutation: np.ndarray | None = None,
) -> "Codec":
    """The codec of `vocab_size` tokens with `granularity` digits each.

    shuffle_seed: draw pi from numpy's PCG64 with this seed; None keeps the identity. scope "tokens" permutes the codes
    0..V-1 among themselves (the Prime-v2 1.1B run), "all_codes" spreads the tokens over all b**l codes (its scaling).
    permutation: pi itself, instead of a seed, as an integer array over V or over b**l codes (for a published table).
    Raises ValueError when the sizes, the seed and the permutation do not fit together.
    """
    if vocab_size < 2 or granularity < 1:
        raise ValueError(f"vocab_size = {vocab_size} and granularity = {granularity} must be at least 2 and 1.")
    if 2 ** (granularity - 1) >= vocab_size and granularity > 1:
        most = (vocab_size - 1).bit_length()
        raise ValueError(
            f"granularity = {granularity} makes the first digit of {vocab_size} tokens always 0. Use at most {most}."
        )
    if granularity == 1 and (shuffle_seed is not None or permutation is not None):
        raise ValueError("granularity = 1 has no digits to shuffle. Leave the shuffle out, or use granularity >= 2.")
    if shuffle_seed is not None and permutation is not None:
        raise ValueError("Both a shuffle seed and a permutation are given. Give one of them.")

    base = smallest_base(vocab_size, granularity)
    if shuffle_seed is not None:
        size = vocab_size if scope == "tokens" else base**granularity
        permutation = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(size)
    if permutation is None:
        numbers = np.arange(vocab_size, dtype=np.int64)
    else:
        numbers = _checked_permutation(permutation, vocab_size, base**granularity)[:vocab_size]
    return _from_numbers(numbers, base=base, granularity=granularity, seed=shuffle_seed, scope=scope)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codec:
    """The tables of one sub-tokenisation. Built by `build_codec`; two are the same iff their `sha256` are."""

    vocab_size: int  # V
    base: int  # b
    granularity: int  # l
    seed: int | None  # of the shuffle; None for the identity and for a permutation given as a table
    scope: Scope  # what the shuffle permutes
    codes: Tensor  # int64 [V, l], the digits of each token
    by_number: Tensor  # int64 [V], token ids ordered by pi(v); the inverse table without its holes
    sorted_numbers: Tensor  # int64 [V], pi(v) of those tokens, increasing

    @property
    def mask_symbol(self) -> int:
        """b, one past the last digit."""
        return self.base

    def encode(self, tokens: Tensor) -> Tensor:
        """int64 digits [..., l] of the token ids [...]."""
        return self.codes[tokens]

    def decode(self, digits: Tensor) -> Tensor:
        """int64 token ids [...] of digits [..., l]. Raises ValueError for a masked digit and for a code of no token."""
        if digits.numel() and not bool(((digits >= 0) & (digits < self.base)).all()):
            raise ValueError(
                f"Some digits are masked or outside 0..{self.base - 1}. Reveal every digit before decoding."
            )
        numbers = (digits.to(torch.int64) * self._place_values).sum(-1)
        slot = torch.searchsorted(self.sorted_numbers, numbers).clamp_(max=self.vocab_size - 1)
        unused = self.sorted_numbers[slot] != numbers
        if bool(unused.any()):
            code = digits[unused][0].tolist()
            raise ValueError(
                f"The digits {code} belong to no token: {self.base}**{self.granularity} > {self.vocab_size}."
            )
        return self.by_number[slot]

    def to(self, device: torch.device | str) -> "Codec":
        """The same codec with its tables on `device`."""
        tables = {name: getattr(self, name).to(device) for name in ("codes", "by_number", "sorted_numbers")}
        return replace(self, **tables)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of (V, b, l, pi)."""
        header = f"{self.vocab_size},{self.base},{self.granularity};".encode()
        numbers = (self.codes * self._place_values).sum(-1).cpu().numpy().astype("<i8")
        return hashlib.sha256(header + numbers.tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records, JSON-able. Weights restored under another codec are noise: compare `sha256`."""
        return {
            "vocab_size": self.vocab_size,
            "base": self.base,
            "granularity": self.granularity,
            "seed": self.seed,
            "scope": self.scope,
            "sha256": self.sha256,
        }

    @cached_property
    def packed(self) -> Tensor:
        """int32 or int64 [V]: the digits of each token side by side in `digit_bits` bits each (see groups.py)."""
        return self.pack(self.codes)

    @property
    def digit_bits(self) -> int:
        """Bits that hold one digit."""
        return max(1, (self.base - 1).bit_length())

    def pack(self, digits: Tensor) -> Tensor:
        """[...] integers whose bit fields are the digits [..., l], each of which must fit in `digit_bits` bits."""
        shifts = torch.arange(self.granularity, device=digits.device) * self.digit_bits
        narrow = self.granularity * self.digit_bits <= 31  # int32 halves the memory traffic of the filter
        return (digits.to(torch.int64) << shifts).sum(-1).to(torch.int32 if narrow else torch.int64)

    @property
    def has_thin_table(self) -> bool:
        """Whether `one_hot` is thin enough for products with it to be a few per cent of a model's head."""
        return self.granularity * self.base <= 128

    @cached_property
    def one_hot(self) -> Tensor:
        """float32 [V, l * b]: the digits of each token as 0 and 1."""
        values = torch.arange(self.base, device=self.codes.device)
        return (self.codes.unsqueeze(-1) == values).flatten(1).float()  # unlike F.one_hot, looks at no value first

    @cached_property
    def _place_values(self) -> Tensor:
        powers = [self.base**exponent for exponent in reversed(range(self.granularity))]
        return torch.tensor(powers, dtype=torch.int64, device=self.codes.device)


def _from_numbers(numbers: np.ndarray, *, base: int, granularity: int, seed: int | None, scope: Scope) -> Codec:
    """The codec in which token v has the integer code numbers[v]."""
    powers = np.array([base**exponent for exponent in reversed(range(granularity))], dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    return Codec(
        vocab_size=len(numbers),
        base=base,
        granularity=granularity,
        seed=seed,
        scope=scope,
        codes=torch.from_numpy(numbers[:, None] // powers % base),
        by_number=torch.from_numpy(order),
        sorted_numbers=torch.from_numpy(numbers[order]),
    )


def _checked_permutation(permutation: np.ndarray, vocab_size: int, num_codes: int) -> np.ndarray:
    numbers = np.asarray(permutation).astype(np.int64)
    if numbers.shape not in ((vocab_size,), (num_codes,)):
        raise ValueError(
            f"The permutation has shape {numbers.shape}; it must list {vocab_size} tokens or all {num_codes} codes."
        )
    if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise ValueError(f"The table of {len(numbers)} codes is not a permutation of 0..{len(numbers) - 1}.")
    return numbers

"""The digits of a token: bases, permutations, round trips."""

import numpy as np
import pytest
import torch

from llm.diffusion.codec import build_codec, smallest_base

PUBLISHED_BASES = {
    50257: {2: 225, 3: 37, 4: 15, 6: 7, 8: 4, 16: 2},
    32000: {2: 179, 3: 32, 4: 14, 6: 6, 8: 4, 15: 2},
    256: {2: 16, 3: 7, 4: 4, 8: 2},
}
SIZES = [(size, granularity) for size, bases in PUBLISHED_BASES.items() for granularity in bases]


@pytest.mark.parametrize(("vocab_size", "granularity"), SIZES)
def test_the_base_is_the_published_one(vocab_size: int, granularity: int):
    assert smallest_base(vocab_size, granularity) == PUBLISHED_BASES[vocab_size][granularity]


def test_the_base_of_an_exact_power_is_not_one_too_large():
    for base in range(2, 400):
        for granularity in range(1, 20):
            assert smallest_base(base**granularity, granularity) == base


@pytest.mark.parametrize(("vocab_size", "granularity"), [*SIZES, (3125, 5), (50257, 1)])
def test_every_token_survives_the_round_trip(vocab_size: int, granularity: int):
    codec = build_codec(vocab_size, granularity)
    tokens = torch.arange(vocab_size)
    digits = codec.encode(tokens)
    assert digits.shape == (vocab_size, granularity)
    assert int(digits.min()) >= 0 and int(digits.max()) < codec.base == codec.mask_symbol
    assert torch.equal(codec.decode(digits), tokens)


def test_digits_are_written_most_significant_first():
    assert build_codec(4, 2).codes.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_given_permutation_is_the_code_of_each_token():
    codec = build_codec(4, 2, permutation=np.array([2, 0, 3, 1]))
    assert codec.codes.tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]
    assert codec.decode(torch.tensor([[1, 0], [0, 1]])).tolist() == [0, 3]


def test_one_digit_per_token_is_the_token_itself():
    codec = build_codec(50257, 1)
    assert codec.base == codec.mask_symbol == 50257
    assert torch.equal(codec.codes.squeeze(-1), torch.arange(50257))


def test_shuffling_tokens_keeps_their_codes_below_the_vocabulary_size():
    numbers = build_codec(32000, 15, shuffle_seed=3, scope="tokens").sorted_numbers
    assert torch.equal(numbers, torch.arange(32000))


def test_shuffling_all_codes_spreads_the_tokens_over_all_of_them():
    numbers = build_codec(50257, 16, shuffle_seed=3, scope="all_codes").sorted_numbers
    assert len(numbers.unique()) == 50257 and 65000 < int(numbers.max()) < 65536


def test_a_shuffle_depends_on_its_seed_alone():
    first, again, other = (build_codec(50257, 16, shuffle_seed=seed) for seed in (7, 7, 8))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.describe() == {
        "vocab_size": 50257,
        "base": 2,
        "granularity": 16,
        "seed": 7,
        "scope": "tokens",
        "sha256": first.sha256,
    }


def test_a_published_table_over_all_codes_equals_the_same_table_over_the_tokens():
    table = np.random.Generator(np.random.PCG64(0)).permutation(5)
    over_codes = np.concatenate([table, [5, 6, 7]])
    assert build_codec(5, 3, permutation=table).sha256 == build_codec(5, 3, permutation=over_codes).sha256


def test_a_code_of_no_token_and_a_masked_digit_cannot_be_decoded():
    codec = build_codec(3, 2)
    with pytest.raises(ValueError, match=r"\[1, 1\] belong to no token"):
        codec.decode(torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match="masked"):
        codec.decode(torch.tensor([[0, 2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 1, "granularity": 1}, "at least 2"),
        ({"vocab_size": 50257, "granularity": 17}, "at most 16"),
        ({"vocab_size": 8, "granularity": 1, "shuffle_seed": 0}, "no digits to shuffle"),
        ({"vocab_size": 4, "granularity": 2, "permutation": np.array([0, 1, 2, 2])}, "not a permutation"),
        ({"vocab_size": 4, "granularity": 2, "permutation": np.arange(3)}, "must list 4 tokens"),
        ({"vocab_size": 4, "granularity": 2, "permutation": np.arange(4), "shuffle_seed": 0}, "Give one"),
    ],
)
def test_sizes_and_tables_that_do_not_fit_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_codec(**arguments)

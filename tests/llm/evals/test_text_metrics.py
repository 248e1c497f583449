"""How varied texts are: every figure by hand, and MAUVE between sets whose answer is known."""

import math

import numpy as np
import pytest

from llm.evals.text_metrics import (
    LEAST_FOR_MAUVE,
    distinct,
    longest_repeat,
    mauve,
    mean,
    repetition,
    self_bleu,
    unigram_entropy,
)

CAT, DOG = "the cat sat on the mat", "a dog lay under our bed"


@pytest.mark.parametrize(
    ("tokens", "nats"),
    [
        ([7, 7, 7, 7], 0.0),
        ([1, 2, 3, 4], math.log(4)),
        ([1, 1, 2, 3], 1.5 * math.log(2)),  # 1/2 log 2 + 2/4 log 4
        ([], 0.0),
    ],
)
def test_entropy_is_that_of_the_frequencies_within_a_text(tokens: list[int], nats: float) -> None:
    assert unigram_entropy(tokens) == pytest.approx(nats, abs=1e-15)
    assert math.copysign(1.0, unigram_entropy(tokens)) == 1.0


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        ([1, 2, 3, 1, 2, 3], {2: 2 / 5, 3: 1 / 4, 4: 0.0}),  # 12 23 31 12 23; 123 231 312 123
        ([5] * 6, {2: 4 / 5, 3: 3 / 4, 4: 2 / 3}),
        ([1, 2, 3, 4], {2: 0.0, 3: 0.0, 4: 0.0}),
        ([1, 1], {2: 0.0, 3: 0.0, 4: 0.0}),  # too short to repeat anything
    ],
)
def test_repetition_is_the_share_of_ngrams_that_stood_before(tokens: list[int], shares: dict[int, float]) -> None:
    assert {n: repetition(tokens, n) for n in shares} == pytest.approx(shares)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 2, 1], 1), ([1, 2, 3, 9, 1, 2, 3, 8], 3), ([4] * 5, 4)],
)
def test_the_longest_repeat_may_overlap_itself(tokens: list[int], length: int) -> None:
    assert longest_repeat(tokens) == length


def test_the_longest_repeat_is_that_of_a_search_over_all_pairs_of_places() -> None:
    draw = np.random.default_rng(0)
    for size in (2, 7, 30, 61):
        tokens = draw.integers(0, 3, size).tolist()
        common = [
            next((n for n in range(size - j) if tokens[i + n] != tokens[j + n]), size - j)
            for i in range(size)
            for j in range(i + 1, size)
        ]
        assert longest_repeat(tokens) == max(common)


def test_distinct_counts_over_all_texts_together() -> None:
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct(texts, 1) == pytest.approx(3 / 7)
    assert distinct(texts, 2) == pytest.approx(3 / 5)  # 12 21 12 12 23
    assert distinct(texts, 4) == 1.0
    assert distinct([[1]], 2) == 0.0


def test_self_bleu_is_one_for_copies_and_zero_where_no_word_is_shared() -> None:
    assert self_bleu([CAT] * 3) == pytest.approx(1.0)
    assert self_bleu([CAT, DOG]) == 0.0
    assert 0.0 < self_bleu([CAT, DOG, "the cat sat under our bed"]) < 1.0
    assert self_bleu(["hi", "hi"]) == pytest.approx(1.0)  # shorter than four words


def test_a_mean_has_the_error_of_independent_values() -> None:
    assert mean([1.0, 3.0, 5.0]) == pytest.approx((3.0, 2.0 / math.sqrt(3)))
    value, error = mean([2.0])
    assert value == 2.0 and math.isnan(error)


def test_mauve_is_one_for_the_same_set_less_for_another_draw_and_nothing_far_away() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.standard_normal((2, 2 * LEAST_FOR_MAUVE, 16), dtype=np.float32)
    assert mauve(first, first.copy(), seed=0) == pytest.approx(1.0)
    near, far = mauve(first, second, seed=0), mauve(first, second + 3.0, seed=0)
    assert 0.7 < near < 1.0 and far < 0.05
    assert near == mauve(first, second, seed=0)


def test_mauve_of_a_few_texts_is_refused() -> None:
    few = np.zeros((LEAST_FOR_MAUVE - 1, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="MAUVE of 99 texts"):
        mauve(few, np.zeros((LEAST_FOR_MAUVE, 4), dtype=np.float32), seed=0)

"""Classes of tokens against known languages and against every possible classification."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from launch.errors import ConfigError
from llm.data import word_classes
from llm.data.cli import main
from llm.data.codes import neighbour_counts, read_code
from llm.data.shards import TokenDataset
from llm.data.word_classes import by_classes, class_information
from llm.diffusion.codec import build_codec
from tests.runs import Tiny


def two_kinds(size: int = 8) -> np.ndarray:
    """Bigrams of a language in which even and odd tokens take turns, with frequencies that hide it."""
    frequency = 1.0 + np.arange(size)[::-1]
    apart = (np.arange(size)[:, None] + np.arange(size)) % 2
    return np.outer(frequency, frequency) * apart


def random_counts(size: int, seed: int) -> np.ndarray:
    return np.floor(np.random.Generator(np.random.PCG64(seed)).gamma(0.3, 20.0, (size, size)))


def labels_of(order: np.ndarray, base: int, behind: int) -> np.ndarray:
    """The class of each token by its leading digits, of a code with `behind` digits behind them."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place // base**behind


def test_the_first_digit_tells_kinds_that_take_turns_apart():
    first = labels_of(by_classes(two_kinds(), base=2, granularity=3), 2, 2)
    assert set(first[::2]) != set(first[1::2]) and len(set(first[::2])) == len(set(first[1::2])) == 1
    assert class_information(two_kinds(), first) == pytest.approx(np.log(2))


@pytest.mark.parametrize(("size", "base", "granularity"), [(8, 2, 3), (7, 2, 3), (9, 3, 2), (11, 4, 2), (20, 3, 3)])
def test_every_token_has_a_place_and_the_order_depends_on_the_counts_alone(size: int, base: int, granularity: int):
    counts = random_counts(size, seed=size)
    order = by_classes(counts, base=base, granularity=granularity)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, by_classes(counts.copy(), base=base, granularity=granularity))


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_with_the_rarest_token_of_the_other_class_tells_more(seed: int):
    counts = random_counts(6, seed)
    labels = labels_of(by_classes(counts, base=3, granularity=2), 3, 1)
    found, frequency = class_information(counts, labels), counts.sum(0) + counts.sum(1)
    every = [class_information(counts, np.array(other)) for other in set(permutations((0, 0, 0, 1, 1, 1)))]
    assert found <= max(every) + 1e-12 and found > np.median(every)
    for kind in (0, 1):
        rarest = min(np.flatnonzero(labels == 1 - kind), key=lambda token: frequency[token])
        for token in np.flatnonzero(labels == kind):
            exchanged = labels.copy()
            exchanged[[token, rarest]] = 1 - kind, kind
            assert class_information(counts, exchanged) <= found + 1e-12


def test_a_finer_digit_divides_the_classes_of_the_digit_before_it_and_loses_nothing():
    counts = random_counts(20, seed=5)
    order = by_classes(counts, base=3, granularity=3)
    coarse, fine = labels_of(order, 3, 2), labels_of(order, 3, 1)
    assert np.array_equal(fine // 3, coarse)
    assert class_information(counts, fine) >= class_information(counts, coarse) - 1e-12


def test_gains_of_joining_a_class_differ_as_the_information_does():
    counts, labels = random_counts(9, seed=1), np.arange(9) % 3
    for token in range(9):
        others = np.delete(np.arange(9), token)
        away = word_classes._class_bigrams(counts[np.ix_(others, others)], labels[others])
        gains = word_classes._gains(away, *word_classes._neighbours(counts, labels, token), np.arange(3))
        joined = [np.where(np.arange(9) == token, goal, labels) for goal in range(3)]
        expected = np.array([class_information(counts, each) for each in joined]) * counts.sum()
        np.testing.assert_allclose(gains - gains[0], expected - expected[0], rtol=1e-9, atol=1e-7)


def test_tokens_that_never_occur_take_the_places_that_are_left():
    counts = np.zeros((10, 10))
    counts[:4, :4] = random_counts(4, seed=2) + 1
    order = by_classes(counts, base=4, granularity=2)
    assert sorted(order.tolist()) == list(range(10))
    assert len(set(labels_of(order, 4, 1)[:4])) > 1  # the used tokens are not crowded into one class


def test_the_command_writes_a_table_whose_first_digit_is_the_class(tiny: Tiny, tmp_path: Path):
    out = tmp_path / "classes.json"
    assert main(["code", str(tiny.data), "--kind", "classes", "--granularity", "2", "--out", str(out)]) == 0
    codec = build_codec(300, 2, permutation=read_code(out))
    counts = neighbour_counts(TokenDataset.open(tiny.data, "train", 16))
    by_place = np.arange(300) // codec.base
    told, told_by_ids = (class_information(counts, labels) for labels in (codec.codes[:, 0].numpy(), by_place))
    assert told > 1.5 * told_by_ids
    with pytest.raises(ConfigError, match="--granularity is 1"):
        main(["code", str(tiny.data), "--granularity", "1", "--out", str(tmp_path / "none.json")])

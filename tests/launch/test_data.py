from fractions import Fraction

import numpy as np
import pytest

from launch.data import GlobalOrder, Mixture, accumulation_steps, micro_batches
from launch.errors import ConfigError


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 65537])
def test_every_epoch_is_a_permutation(n: int) -> None:
    epochs = GlobalOrder(n, seed=3).samples(np.arange(3 * n)).reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()


def test_epochs_seeds_and_neighbours_differ() -> None:
    n = 10_000
    first, second = GlobalOrder(n, seed=0).samples(np.arange(2 * n)).reshape(2, n)
    other = GlobalOrder(n, seed=1).samples(np.arange(n))
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).sum() < 12  # two independent permutations agree in 1 place on average
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_every_order_of_a_tiny_set_comes_up_equally_often() -> None:
    epochs = 24_000
    orders = GlobalOrder(4, seed=5).samples(np.arange(4 * epochs)).reshape(epochs, 4)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 60  # 23 degrees of freedom: mean 23, standard deviation 6.8


def test_a_position_needs_no_other_position() -> None:
    order = GlobalOrder(1_000_003, seed=7)
    positions = np.array([0, 5, 999_999, 1_000_003, 7 * 10**12])
    together = order.samples(positions)
    assert [int(order.samples(p)) for p in positions] == together.tolist()
    assert order.samples(positions.reshape(5, 1)).shape == (5, 1)


def test_order_reaches_over_a_trillion_samples() -> None:
    n = 10**13 + 7
    indices = GlobalOrder(n, seed=1).samples(np.arange(50_000))
    assert len(np.unique(indices)) == 50_000
    assert 0 <= indices.min() < n // 1000 and n - n // 1000 < indices.max() < n


def test_order_is_the_same_on_every_machine() -> None:
    assert GlobalOrder(10, seed=0).samples(np.arange(10)).tolist() == [5, 8, 2, 7, 1, 3, 6, 4, 9, 0]


def test_positions_and_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0"):
        GlobalOrder(5, seed=0).samples([-1])
    with pytest.raises(ValueError, match="not 0"):
        GlobalOrder(0, seed=0)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_the_ranks_together_read_the_global_order(world_size: int) -> None:
    batch, micro = 840 * 2, 2
    for step in (0, 3):
        of_rank = [
            micro_batches(step, global_batch=batch, micro_batch=micro, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        seen = np.concatenate([np.concatenate(share) for share in of_rank])
        assert sorted(seen.tolist()) == list(range(step * batch, (step + 1) * batch))
        for i, first in enumerate(of_rank[0]):  # the ranks' i-th micro-batches are one contiguous run
            together = np.sort(np.concatenate([share[i] for share in of_rank]))
            assert together.tolist() == list(range(first[0], first[0] + micro * world_size))


def test_a_run_resumed_on_another_world_size_reads_the_same_samples() -> None:
    order = GlobalOrder(1000, seed=2)

    def read(steps: range, world_size: int) -> list[list[int]]:
        return [
            sorted(
                int(index)
                for rank in range(world_size)
                for part in micro_batches(step, global_batch=24, micro_batch=2, rank=rank, world_size=world_size)
                for index in order.samples(part)
            )
            for step in steps
        ]

    assert read(range(0, 5), 4) + read(range(5, 60), 6) == read(range(60), 1)


def test_a_batch_that_does_not_divide_names_the_worlds_that_work() -> None:
    with pytest.raises(ConfigError, match=r"8 x world size 5 = 40; .* on 1, 2, 4, 8 ranks .*global batch of 80"):
        accumulation_steps(global_batch=64, micro_batch=8, world_size=5)
    with pytest.raises(ConfigError, match=r"micro-batch of 5; .*: 1, 2, 3, 4, 6, 12"):
        accumulation_steps(global_batch=12, micro_batch=5, world_size=1)
    with pytest.raises(ConfigError, match="at least 1"):
        accumulation_steps(global_batch=12, micro_batch=0, world_size=1)
    with pytest.raises(ValueError, match="rank 2"):
        micro_batches(0, global_batch=12, micro_batch=2, rank=2, world_size=2)


@pytest.mark.parametrize(
    "weights",
    [(1.0,), (0.7, 0.3), (3, 1), (1, 1, 1), (0.5, 0.25, 0.125, 0.125), (0.9, 0.01, 0.04, 0.05), (5, 3, 3, 2, 1, 1)],
)
def test_every_prefix_of_a_mixture_is_within_one_of_the_ideal(weights: tuple[float, ...]) -> None:
    sources, local = Mixture(weights).locate(np.arange(3000))
    n = np.arange(1, 3001)
    exact = [Fraction(str(w)) for w in weights]
    for source, weight in enumerate(exact):
        count = np.cumsum(sources == source)
        share = weight / sum(exact)
        below, above = n * share.numerator // share.denominator, -(-n * share.numerator // share.denominator)
        assert ((below <= count) & (count <= above)).all()
        assert local[sources == source].tolist() == list(range(count[-1]))


def test_fine_weights_are_rounded_to_the_stated_shares() -> None:
    weights = (4_479_679.0, 1_234_567.0, 3.0)
    mixture = Mixture(weights)
    assert sum(mixture.shares) == 1
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(float(share) - weight / sum(weights)) < 1 / 65536 + 1e-12
    sources, _ = mixture.locate(np.arange(100_000))
    for source, share in enumerate(mixture.shares):
        assert abs((sources == source).sum() - 100_000 * share) < 1


def test_many_tiny_weights_each_keep_a_turn() -> None:
    mixture = Mixture((1.0, *[1e-9] * 50))
    assert sum(mixture.shares) == 1 and min(mixture.shares) == Fraction(1, 65536)


def test_a_mixture_position_needs_no_other_position() -> None:
    mixture = Mixture((0.61, 0.39))
    far = np.arange(10**12, 10**12 + 500)
    sources, local = mixture.locate(far)
    alone = [mixture.locate(p) for p in far]
    assert [(int(s), int(j)) for s, j in alone] == list(zip(sources.tolist(), local.tolist(), strict=True))
    assert abs(local[sources == 0][0] - 0.61e12) <= 1


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (float("inf"),)])
def test_weights_that_are_no_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Mixture(weights)

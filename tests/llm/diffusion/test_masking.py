"""Times and masks as functions of given noise."""

import pytest
import torch

from llm.diffusion import masking
from llm.diffusion.codec import build_codec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_times_fill_each_stratum_of_the_global_batch_once():
    size = 64
    offset, shuffle = torch.rand((), generator=generator()), torch.rand(size, generator=generator(1))
    times = masking.stratified_times(offset, shuffle, torch.arange(size))
    assert torch.equal(((times.double() - offset) % 1.0 * size).round().long().sort().values % size, torch.arange(size))
    assert (times.sort().indices != torch.arange(size)).any()  # shuffled: not in the order of the samples
    assert float(times.min()) >= 0.0 and float(times.max()) < 1.0


def test_times_do_not_depend_on_who_asks_for_which_samples():
    offset, shuffle = torch.tensor(0.3), torch.rand(12, generator=generator())
    whole = masking.stratified_times(offset, shuffle, torch.arange(12))
    for world in (1, 2, 3, 4):
        parts = [masking.stratified_times(offset, shuffle, torch.arange(rank, 12, world)) for rank in range(world)]
        assert all(torch.equal(part, whole[rank::world]) for rank, part in enumerate(parts))


def test_a_unit_is_masked_with_probability_t():
    noise = torch.rand(40000, 3, 2, generator=generator())
    times = torch.full((40000,), 0.3)
    for grouped in (None, torch.ones(40000, dtype=torch.bool)):
        rate = masking.random_mask(noise, times, grouped=grouped).float().mean()
        assert abs(float(rate) - 0.3) < 4 * (0.3 * 0.7 / 80000) ** 0.5


def test_the_digits_of_a_token_of_a_grouped_sequence_share_their_fate():
    noise, times = torch.rand(64, 5, 4, generator=generator()), torch.full((64,), 0.5)
    grouped = torch.arange(64) % 2 == 0
    shown = masking.random_mask(noise, times, grouped=grouped).float().mean(-1)
    assert ((shown[grouped] == 0) | (shown[grouped] == 1)).all()
    assert ((shown[~grouped] > 0) & (shown[~grouped] < 1)).any()


def test_a_region_that_may_not_be_masked_never_is():
    maskable = torch.arange(6).expand(8, 6) >= 2
    noise = torch.rand(8, 6, 3, generator=generator())
    assert not masking.random_mask(noise, torch.ones(8), maskable=maskable)[:, :2].any()
    full = masking.fixed_count_mask(noise, torch.full((8,), 12), maskable=maskable)
    assert torch.equal(full, maskable.unsqueeze(-1).expand_as(full))


def test_a_fixed_count_masks_exactly_that_many_units_and_each_subset_equally_often():
    draws = 30000
    noise = torch.rand(draws, 2, 2, generator=generator())
    mask = masking.fixed_count_mask(noise, torch.full((draws,), 2))
    assert (mask.flatten(1).sum(-1) == 2).all()
    subset = (mask.flatten(1) * 2 ** torch.arange(4)).sum(-1)
    frequency = torch.bincount(subset, minlength=16)[[3, 5, 6, 9, 10, 12]] / draws
    assert (frequency - 1 / 6).abs().max() < 4 * (1 / 6 * 5 / 6 / draws) ** 0.5


def test_more_masked_units_than_there_are_is_an_error():
    maskable = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="Cannot mask 3 units"):
        masking.fixed_count_mask(torch.zeros(1, 2, 2), torch.tensor([3]), maskable=maskable)


def test_stratified_counts_are_uniform_over_the_draws_of_a_sequence():
    units = torch.tensor([8, 4])
    counts = torch.stack([masking.stratified_count(torch.tensor([0.5, 0.5]), i, 8, units) for i in range(8)])
    assert counts[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert counts[:, 1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert masking.stratified_count(torch.tensor([1 - 2.0**-24]), 7, 8, torch.tensor([8])).item() == 8


def test_granularity_is_drawn_by_sequence_or_read_off_the_time():
    times = torch.tensor([0.2, 0.5, 0.8])
    assert masking.granularity_by_time(times, chunk_point=0.5).tolist() == [False, False, True]
    assert not masking.granularity_by_time(times, chunk_point=1.0).any()
    noise = torch.rand(20000, generator=generator())
    assert abs(float(masking.random_granularity(noise, p_group=0.25).float().mean()) - 0.25) < 0.0125
    assert not masking.random_granularity(noise, p_group=0.0).any()
    assert masking.random_granularity(noise, p_group=1.0).all()


def test_the_floor_of_the_mask_probability_keeps_its_ends():
    fraction = masking.masked_fraction(torch.tensor([0.0, 0.5, 1.0]), epsilon=1e-3)
    torch.testing.assert_close(fraction, torch.tensor([0.001, 0.5005, 1.0]))


def test_lengths_are_whole_or_uniform():
    noise = torch.rand(20000, 2, generator=generator())
    assert {masking.random_length(row, 8, probability=0.0) for row in noise[:50]} == {8}
    lengths = torch.tensor([masking.random_length(row, 8, probability=1.0) for row in noise])
    assert sorted(lengths.unique().tolist()) == list(range(1, 9))
    assert (torch.bincount(lengths)[1:] / 20000 - 1 / 8).abs().max() < 4 * (7 / 64 / 20000) ** 0.5


def test_the_network_sees_the_mask_symbol_and_nothing_of_what_it_hides():
    codec = build_codec(16, 2)
    mask = torch.tensor([[[True, False], [True, True]]])
    seen = [
        masking.hide(codec.encode(torch.tensor([[token, other]])), mask, codec) for token, other in ((1, 7), (5, 9))
    ]
    assert seen[0].tolist() == [[[4, 1], [4, 4]]]
    assert torch.equal(*seen)

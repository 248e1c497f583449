import torch

from launch.random import generator, stream_key, uniform


def test_a_draw_depends_on_key_index_and_counter_only():
    whole = uniform(stream_key(1, "mask", 5), torch.arange(8), 100)
    part = uniform(stream_key(1, "mask", 5), torch.tensor([6, 2]), 10)
    assert torch.equal(part, whole[[6, 2], :10])
    assert not torch.equal(whole, uniform(stream_key(1, "mask", 6), torch.arange(8), 100))
    assert not torch.equal(whole, uniform(stream_key(2, "mask", 5), torch.arange(8), 100))


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(stream_key(0, "test"), torch.arange(1000), 1000, torch.float64)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / (12 * 1e6) ** 0.5
    assert abs(draws.var() - 1 / 12) < 1e-3
    for neighbours in (draws[:2], draws[:, :2].T):  # samples, counters
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 4 / 1000**0.5
    assert draws.unique().numel() == draws.numel()


def test_generators_of_other_streams_differ():
    first, again, other = (torch.rand(4, generator=generator(stream_key(0, n))) for n in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)

"""Who is slow, by times that are given; tests/distributed/test_run_faults.py shows it with real ranks."""

from dataclasses import dataclass

import pytest
import torch

from launch import straggler
from launch.straggler import Stragglers, slowest

HOSTS = ("node1", "node2", "node3")


@dataclass
class Rank:
    rank: int = 0
    world_size: int = 3

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(straggler.time, "monotonic", lambda: now[0])
    return now


def lines(watch: Stragglers, clock: list[float], read: list[float], count: int) -> list[dict[str, float | str]]:
    """Of `count` lines of metrics, two seconds apart, in which the ranks read for so long a step."""
    rows = []
    for _ in range(count):
        clock[0] += 2.0
        gathered = torch.tensor([[seconds, 0.1] for seconds in read], dtype=torch.float64).flatten()
        rows.append(watch.judge(gathered))
    return rows


def test_the_slowest_is_compared_with_the_median_of_the_others() -> None:
    found = slowest([0.1, 0.6, 0.2, 0.3], "read")
    assert (found.rank, found.seconds, found.others, found.factor) == (1, 0.6, 0.2, pytest.approx(3.0))
    assert slowest([0.2, 0.1], "read").factor == pytest.approx(2.0)


def test_a_rank_is_named_after_three_windows_in_a_row_and_once(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    watch = Stragglers(1.5, Rank(), strategy="ddp", hosts=HOSTS)  # type: ignore[arg-type]
    rows = lines(watch, clock, [0.1, 0.1, 0.2], 5)
    assert [row.get("straggler/read_rank") for row in rows] == [None, None, 2, 2, 2]
    assert rows[2]["straggler/read_host"] == "node3" and rows[0]["straggler/read_factor"] == pytest.approx(2.0)
    assert rows[0]["straggler/compute_factor"] == pytest.approx(1.0)
    words = "rank 2 on node3 holds the others up: reading its batches takes it 0.2 s, 2.0 times the 0.1 s of the others"
    assert [record.message.split(";")[0] for record in caplog.records] == [words]
    assert watch.words == words
    lines(watch, clock, [0.1, 0.1, 0.1], 1)
    assert watch.words == ""
    clock[0] += 600.0
    lines(watch, clock, [0.1, 0.1, 0.2], 3)
    assert len(caplog.records) == 2, "after ten minutes again"


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([[0.1, 0.1, 0.14]] * 5, "below the factor"),
        ([[0.001, 0.001, 0.02]] * 5, "below the floor"),
        ([[0.1, 0.1, 0.3], [0.1, 0.3, 0.1]] * 5, "never the same rank"),
        ([[0.1, 0.1, 0.3], [0.1, 0.1, 0.3], [0.1, 0.1, 0.1]] * 5, "not in a row"),
    ],
)
def test_nobody_is_named(clock: list[float], times: list[list[float]], why: str) -> None:
    watch = Stragglers(1.5, Rank(), strategy="ddp", hosts=HOSTS)  # type: ignore[arg-type]
    for read in times:
        lines(watch, clock, read, 1)
        assert watch.words == "", why


def test_lines_are_put_together_until_they_cover_a_second(clock: list[float]) -> None:
    watch = Stragglers(1.5, Rank(), strategy="ddp", hosts=HOSTS)  # type: ignore[arg-type]
    clock[0] += 0.6
    assert watch.judge(torch.tensor([0.1, 0.1] * 3, dtype=torch.float64)) == {}
    clock[0] += 0.6
    assert watch.judge(torch.tensor([0.3, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)) == {
        "straggler/read_factor": pytest.approx(2.0),
        "straggler/compute_factor": pytest.approx(1.0),
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_puts_its_own_seconds_a_step_in_its_own_place(strategy: str) -> None:
    watch = Stragglers(1.5, Rank(rank=1), strategy=strategy, hosts=HOSTS)  # type: ignore[arg-type]
    for _ in range(2):
        with watch.reading():
            pass
        with watch.computing():
            pass
    mine = watch.own().view(3, 2)
    assert (mine[1] > 0).all() and mine[[0, 2]].eq(0).all(), "under fsdp2 the time of a product"
    assert watch.own().eq(0).all(), "of the steps since the last line, and there was none"


@pytest.mark.parametrize(("factor", "world_size"), [(None, 3), (1.5, 1)])
def test_off_or_alone_nothing_is_measured(factor: float | None, world_size: int) -> None:
    watch = Stragglers(factor, Rank(world_size=world_size), strategy="fsdp2", hosts=HOSTS)  # type: ignore[arg-type]
    with watch.reading():
        pass
    assert watch.own().numel() == 0 and watch.judge(watch.own()) == {}

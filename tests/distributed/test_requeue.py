"""Which signals ask the job script for another start, decided by all ranks together."""

import json
import signal
import time
from pathlib import Path

import pytest

from launch.metrics import read_metrics
from launch.stop import EXIT_STOPPED
from tests.runs import Ranks, Tiny, steps_saved

USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize(
    ("signals", "wants"),
    [({0: USR1, 1: USR1}, True), ({1: USR1}, True), ({0: TERM, 1: TERM}, False), ({1: TERM}, False)],
    ids=["warning", "warning of one rank", "end", "end of one rank"],
)
def test_a_run_asks_to_be_requeued_after_a_warning_and_not_when_told_to_end(
    tiny: Tiny, tmp_path: Path, signals: dict[int, int], wants: bool
) -> None:
    ranks = Ranks(tiny.prime, 2, tmp_path, "train.steps=1M")
    wait_for_a_step(ranks, tmp_path)
    for rank, number in signals.items():
        ranks.send(number, [rank])
    assert ranks.wait().codes == [EXIT_STOPPED] * 2
    (saved,) = steps_saved(tmp_path)
    assert (tmp_path / "REQUEUE").exists() == wants
    if wants:
        assert json.loads((tmp_path / "REQUEUE").read_text())["step"] == saved
    assert [(tmp_path / "health" / f"rank-0000{rank}.exit").read_text() for rank in (0, 1)] == ["75\n"] * 2


def wait_for_a_step(ranks: Ranks, run: Path) -> None:
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").exists() and read_metrics(run / "metrics.jsonl")):
        assert ranks.running and time.monotonic() < deadline
        time.sleep(0.02)

"""The helper that all distributed tests stand on."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.processes import RankFailed, spawn


def sum_of_ranks(offset: int) -> torch.Tensor:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return value


def rank_and_flag(name: str) -> tuple[str, str | None]:
    return os.environ["RANK"], os.environ.get(name)


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"the coal is out on rank {rank}")
    dist.barrier()  # fails here as soon as its peer is gone


def hang_on(rank: int, pid_file: Path) -> None:
    if dist.get_rank() == rank:
        child = subprocess.Popen(["sleep", "1000"])
        pid_file.write_text(f"{os.getpid()} {child.pid}")
        sleep_in_a_named_function()


def sleep_in_a_named_function() -> None:
    time.sleep(1000)


def die_on(rank: int, how: str) -> None:
    if dist.get_rank() == rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    dist.barrier()


def leave_a_thread_behind() -> None:
    threading.Thread(target=time.sleep, args=(1000,)).start()


def test_every_rank_joins_one_group_and_returns_its_result_in_rank_order() -> None:
    assert [int(value) for value in spawn(sum_of_ranks, 3, 10)] == [33, 33, 33]


def test_a_rank_sees_the_callers_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    spawn(rank_and_flag, 1, "UNMASK_TEST_FLAG")  # the fork server is running now, with an older environment
    monkeypatch.setenv("UNMASK_TEST_FLAG", "up")
    assert spawn(rank_and_flag, 2, "UNMASK_TEST_FLAG", group=False) == [("0", "up"), ("1", "up")]


def test_a_rank_that_raises_is_named_with_its_traceback_although_its_peers_fail_too() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 3 raised.*in raise_on.*the coal is out on rank 1") as caught:
        spawn(raise_on, 3, 1)
    assert caught.value.rank == 1


@pytest.mark.parametrize(("how", "words"), [("kill", "by SIGKILL"), ("exit", "with exit code 7")])
def test_a_rank_that_dies_without_a_word_is_named_with_its_cause_of_death(how: str, words: str) -> None:
    with pytest.raises(RankFailed, match=f"rank 2 of 3 died {words}"):
        spawn(die_on, 3, 2, how)


def test_a_rank_that_hangs_is_named_with_its_stack_and_nothing_survives_it(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 hung: not finished after 2 s.*sleep_in_a_named_function"):
        spawn(hang_on, 2, 1, tmp_path / "pids", timeout=2)
    assert time.monotonic() - start < 10
    time.sleep(0.1)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rank_that_returns_but_leaves_a_thread_running_counts_as_hung() -> None:
    with pytest.raises(RankFailed, match="rank 0 of 1 hung"):
        spawn(leave_a_thread_behind, 1, timeout=2)

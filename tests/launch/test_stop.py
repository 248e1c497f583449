"""Signals are sent to real processes: a handler that works only when called by hand is no handler."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.stop import (
    EXIT_HUNG,
    EXIT_NOW,
    GO_ON,
    STOP_SIGNALS,
    TOLD_TO_END,
    WARNED,
    StopFlag,
    ask_for_requeue,
    ignore_stop_signals,
    record_exit,
)

POLLING = """
import time
from launch.stop import StopFlag
with StopFlag() as flag:
    print("ready", flush=True)
    while flag.code() == 0:
        time.sleep(0.01)
    print(flag.request.reason, flush=True)
    time.sleep({linger})
print("closed", flush=True)
"""

# Locking a mutex twice waits in C without the interpreter lock and is not interrupted by signals, as in a collective
# whose peer is gone: the Python handler never runs.
STUCK = """
import ctypes, pathlib
from launch.stop import StopFlag
flag = StopFlag(grace_seconds=0.5, stacks_path=pathlib.Path({stacks!r})).install()
def wait_for_a_peer_that_is_gone():
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
wait_for_a_peer_that_is_gone()
"""


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    previous = [signal.getsignal(number) for number in STOP_SIGNALS]
    yield
    for number, handler in zip(STOP_SIGNALS, previous, strict=True):
        signal.signal(number, handler)


def start(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_sets_the_flag_and_leaves_the_process_in_charge(number: signal.Signals) -> None:
    process = start(POLLING.format(linger=0))
    process.send_signal(number)
    assert finish(process) == (0, f"{number.name}\nclosed\n", "")


def test_the_first_signal_gives_the_reason_and_repeated_ones_change_nothing() -> None:
    process = start(POLLING.format(linger=0.3))
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "SIGTERM\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGINT):  # one Ctrl-C, delivered twice
        process.send_signal(number)
    assert finish(process) == (0, "closed\n", "")


def test_a_request_that_is_repeated_after_the_stop_does_not_end_the_process() -> None:
    process = start(POLLING.format(linger=0) + "time.sleep(0.5)\n")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "SIGTERM\n"
    assert process.stdout.readline() == "closed\n"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    assert finish(process) == (0, "", "")


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = start(POLLING.format(linger=60))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "SIGINT\n"
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (EXIT_NOW, "", "")


def test_a_main_thread_that_stays_stuck_is_ended_with_its_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    process = start(STUCK.format(stacks=str(stacks)))
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == EXIT_HUNG
    assert 0.4 < time.monotonic() - begin < 10
    assert "SIGTERM came 0.5 s ago" in err and "wait_for_a_peer_that_is_gone" in err
    assert "wait_for_a_peer_that_is_gone" in stacks.read_text()


def test_an_acknowledged_stop_may_take_longer_than_the_grace() -> None:
    process = start(
        POLLING.replace("StopFlag()", "StopFlag(grace_seconds=0.3)")
        .replace("    print(flag", "    flag.acknowledge()\n    print(flag")
        .format(linger=0.8)
    )
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == (0, "SIGUSR1\nclosed\n", "")


def test_a_process_without_a_signal_outlives_the_grace() -> None:
    with StopFlag(grace_seconds=0.05) as flag:
        time.sleep(0.2)
        assert flag.code() == 0 and flag.request is None


def test_close_restores_what_was_there_before() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    wakeup_before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_before)
    flag = StopFlag(grace_seconds=10).install()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    flag.close()
    flag.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup_before) == wakeup_before


def test_the_flag_records_when_the_signal_came(restored_handlers: None) -> None:
    with StopFlag() as flag:
        before = time.time()
        signal.raise_signal(signal.SIGUSR2)
        assert flag.code() == 1
        assert flag.request is not None and flag.request.reason == "SIGUSR2"
        assert before <= flag.request.time <= time.time()


@pytest.mark.parametrize(
    ("number", "code"), [("SIGUSR1", WARNED), ("SIGUSR2", WARNED), ("SIGTERM", TOLD_TO_END), ("SIGINT", TOLD_TO_END)]
)
def test_a_warning_wants_to_go_on_later_and_is_weaker_than_a_wish_to_end(
    restored_handlers: None, number: str, code: int
) -> None:
    with StopFlag() as flag:
        signal.raise_signal(signal.Signals[number])
        assert flag.code() == code
    assert GO_ON < WARNED < TOLD_TO_END


def test_a_rank_leaves_its_exit_code_where_the_job_script_looks_for_it(tmp_path: Path) -> None:
    record_exit(tmp_path, 3, 77)
    assert list(tmp_path.iterdir()) == []  # nobody looks: a refused start leaves no run folder behind
    (tmp_path / "health").mkdir()
    record_exit(tmp_path, 3, 77)
    assert (tmp_path / "health" / "rank-00003.exit").read_text() == "77\n"


def test_the_wish_to_be_requeued_names_reason_step_and_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    ask_for_requeue(tmp_path, reason="SIGUSR1", step=7)
    assert json.loads((tmp_path / "REQUEUE").read_text()) == {"reason": "SIGUSR1", "step": 7, "restart": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["REQUEUE"]


def test_a_helper_process_ignores_every_stop_signal(restored_handlers: None) -> None:
    ignore_stop_signals(3)
    for number in STOP_SIGNALS:
        signal.raise_signal(number)

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.stop import EXIT_HUNG
from launch.watch import GuardConfig, LossGuard, RankHealth, WatchConfig, Watchdog, file_clock, lagging, read_health

NAN, INF = math.nan, math.inf


def verdicts(guard: LossGuard, grad_norms: list[float]) -> str:
    """First letters: o(k), s(kip), r(ollback), g(ive_up); rollbacks are done as they are ordered."""
    letters = ""
    for grad_norm in grad_norms:
        accepted = guard.accepts(grad_norm)
        verdict = guard.verdict()
        assert accepted == (verdict == "ok")
        if verdict == "rollback":
            guard.rolled_back()
        letters += verdict[0]
    return letters


# --- guard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad_norms", "max_skips", "max_rollbacks", "expected"),
    [
        ([3, 2, 1], 2, 1, "ooo"),
        ([3, NAN, 1], 2, 1, "oso"),
        ([3, INF, -INF, 1], 2, 1, "osso"),
        ([NAN] * 7, 2, 1, "ssrssgg"),
        ([NAN, NAN, 1, NAN, NAN, 1], 2, 0, "ssosso"),  # a good step ends a row
        ([NAN, NAN], 0, 1, "rg"),
        ([NAN], 0, 0, "g"),
        ([NAN, NAN, NAN, 1, NAN, NAN, NAN], 2, 1, "ssrossg"),  # rollbacks count over the whole run
    ],
)
def test_bad_steps_are_skipped_then_rolled_back_then_given_up(
    grad_norms: list[float], max_skips: int, max_rollbacks: int, expected: str
) -> None:
    guard = LossGuard(GuardConfig(max_consecutive_skips=max_skips, max_rollbacks=max_rollbacks))
    assert verdicts(guard, grad_norms) == expected
    assert guard.total_skips == len(expected) - expected.count("o")


def test_a_loop_that_knows_its_loss_may_have_it_judged_too() -> None:
    guard = LossGuard(GuardConfig())
    assert not guard.accepts(1.0, NAN)
    assert guard.reason == "loss is nan"
    assert not guard.accepts(INF, 1.0)
    assert guard.reason == "gradient norm is inf"
    assert guard.accepts(1.0, 1.0)
    assert guard.reason == ""


def test_a_spike_is_a_value_above_mean_plus_k_sigma_of_the_accepted_ones() -> None:
    guard = LossGuard(GuardConfig(spike_sigma=2.0, window=4))
    assert verdicts(guard, [1, 3]) == "oo"  # mean 2, sigma 1: the limit is 4
    assert verdicts(guard, [4.001]) == "s"
    assert guard.reason == "gradient norm 4.001 exceeds mean 2 + 2 x sigma 1 of 2 steps"
    assert verdicts(guard, [4.001, 4.0]) == "so"  # rejected values do not move the limit


def test_the_spike_rule_sleeps_until_half_the_window_is_there_and_forgets_old_values() -> None:
    guard = LossGuard(GuardConfig(spike_sigma=1.0, window=4))
    assert verdicts(guard, [1, 1000]) == "oo"
    assert verdicts(guard, [5, 6, 5, 6]) == "oooo"  # the window now holds only these: mean 5.5, sigma 0.5
    assert verdicts(guard, [6.1]) == "s"


def test_a_falling_value_is_never_a_spike() -> None:
    guard = LossGuard(GuardConfig(spike_sigma=1.0, window=8))
    assert verdicts(guard, [100.0 / (n + 1) for n in range(50)]) == "o" * 50


def test_a_guard_restored_from_its_json_state_goes_on_with_the_same_verdicts() -> None:
    config = GuardConfig(spike_sigma=2.0, window=6, max_consecutive_skips=2, max_rollbacks=1)
    losses = [1.0, 1.1, 0.9, NAN, 1.0, 5.0, NAN, 7.0, 1.0, 9.0, 9.0, 9.0]
    whole = verdicts(LossGuard(config), losses)
    assert set(whole) == set("osrg")
    for cut in range(len(losses)):
        first, second = LossGuard(config), LossGuard(config)
        head = verdicts(first, losses[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        assert head + verdicts(second, losses[cut:]) == whole


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GuardConfig(spike_sigma=0.0), "guard.spike_sigma = 0.0"),
        (GuardConfig(window=1), "guard.window = 1 must be at least 2"),
        (GuardConfig(max_rollbacks=-1), "guard.max_rollbacks = -1"),
        (WatchConfig(timeout=0.0), "guard.timeout = 0.0"),
        (WatchConfig(interval=INF), "guard.interval = inf"),
    ],
)
def test_impossible_limits_are_refused_by_name(config: GuardConfig | WatchConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.check("guard")


# --- heartbeat and watchdog ------------------------------------------------------------------------------------------

PATIENT = WatchConfig(timeout=60, first_step_timeout=60, interval=0.05)  # in this process, which must not be ended


def health(rank: int, *, step: int, phase: str = "forward", silent: float = 0.0) -> RankHealth:
    return RankHealth(
        rank=rank,
        world_size=3,
        host=f"node{rank}",
        pid=100 + rank,
        step=step,
        phase=phase,
        progress_time=1000.0 - 60,
        written_time=1000.0 - silent,
    )


def run_watchdog(
    run_dir: Path,
    body: str,
    *,
    timeout: float = 0.6,
    phase_timeout: float | None = None,
    world_size: int = 1,
    first: float = 5.0,
) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom launch.watch import WatchConfig, Watchdog\n"
        "def wait_for_a_peer_that_is_gone():\n    time.sleep(60)\n"
        "config = WatchConfig("
        f"timeout={timeout}, first_step_timeout={first}, phase_timeout={phase_timeout}, interval=0.05)\n"
        f"watchdog = Watchdog(Path({str(run_dir)!r}), config, rank=0, world_size={world_size}).start()\n{body}\n"
        "watchdog.close()\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)


def test_a_hanging_rank_leaves_its_stacks_and_says_who_lags(tmp_path: Path) -> None:
    with Watchdog(tmp_path, WatchConfig(timeout=None), rank=1, world_size=3) as peer:
        peer.beat(4, "backward")
        peer._write()
        done = run_watchdog(
            tmp_path,
            "watchdog.beat(6, 'x')\nwatchdog.beat(7, 'all-reduce')\nwait_for_a_peer_that_is_gone()",
            world_size=3,
        )
    assert done.returncode == EXIT_HUNG
    first, *others, last = done.stderr.splitlines()
    assert first.startswith(f"rank 0 on {socket.gethostname()}: no progress for ")
    assert first.endswith(" s (limit 0.6 s) at step 7, phase all-reduce")
    assert f"exit code 76; what is saved is intact: `unmask resume {tmp_path}`" in last
    assert "rank 2 has written nothing" in others[0]
    assert "rank 1 (" in others[1] and "step 4 of 7, phase backward" in others[1]
    assert len(others) == 2  # rank 0 is where it should be
    stacks = (tmp_path / "health/rank-00000.stacks.txt").read_text()
    assert "wait_for_a_peer_that_is_gone" in stacks and "Thread" in stacks
    mine = read_health(tmp_path)[0]
    assert (mine.rank, mine.step, mine.phase) == (0, 7, "all-reduce")


def test_the_first_step_and_phases_have_limits_of_their_own(tmp_path: Path) -> None:
    done = run_watchdog(
        tmp_path,
        "watchdog.beat(1, 'compile')\ntime.sleep(0.9)\n"  # longer than `timeout`
        "watchdog.beat(2, 'train')\n"
        "with watchdog.phase(2, 'evaluate'):\n    watchdog.beat(3, 'evaluate')\n    time.sleep(0.9)\n"
        "print('alive', flush=True)\n"
        "wait_for_a_peer_that_is_gone()",
    )
    assert done.stdout == "alive\n"
    assert done.returncode == EXIT_HUNG
    assert "(limit 0.6 s) at step 2, phase train" in done.stderr


def test_a_phase_that_exceeds_its_own_limit_is_a_hang(tmp_path: Path) -> None:
    done = run_watchdog(
        tmp_path, "with watchdog.phase(4, 'checkpoint'):\n    wait_for_a_peer_that_is_gone()", phase_timeout=0.2
    )
    assert done.returncode == EXIT_HUNG
    assert "(limit 0.2 s) at step 4, phase checkpoint" in done.stderr


def test_a_rank_that_beats_outlives_its_limit_and_ends_orderly(tmp_path: Path) -> None:
    beating = (
        "end, step = time.monotonic() + 3.5, 0\n"
        "while time.monotonic() < end:\n    watchdog.beat(step := step + 1, 'step')\n    time.sleep(0.05)\n"
        "watchdog.beat(1000, 'step')"
    )
    done = run_watchdog(tmp_path, beating, timeout=3.0)
    assert done.returncode == 0, done.stderr
    assert [(h.rank, h.step, h.phase) for h in read_health(tmp_path)] == [(0, 1000, "end")]
    assert sorted(p.name for p in (tmp_path / "health").iterdir()) == ["rank-00000.json"]


def test_without_a_timeout_nobody_is_ended(tmp_path: Path) -> None:
    config = WatchConfig(timeout=None, first_step_timeout=0.1, interval=0.05)
    with Watchdog(tmp_path, config, rank=0, world_size=1) as watchdog:
        time.sleep(0.3)
        watchdog.beat(1, "step")
        watchdog.beat(2, "step")
        time.sleep(0.3)


def test_lagging_names_the_ranks_behind_first() -> None:
    lines = lagging(
        [health(0, step=9), health(1, step=7), health(2, step=8)], world_size=3, now=1000.0, silent_seconds=30
    )
    assert [line.split(",")[0] for line in lines] == ["rank 1 (node1", "rank 2 (node2"]
    assert lines[0] == (
        "rank 1 (node1, pid 101): step 7 of 9, phase forward, no progress for 60 s, last heard of 0 s ago"
    )


def test_lagging_names_everybody_if_all_stand_at_the_same_step() -> None:
    lines = lagging([health(r, step=9) for r in range(3)], world_size=3, now=1000.0, silent_seconds=30)
    assert len(lines) == 3


def test_a_rank_known_only_from_an_earlier_start_lags_however_far_it_came() -> None:
    lines = lagging(
        [health(0, step=5), health(1, step=900, silent=9999.0)], world_size=2, now=1000.0, silent_seconds=30
    )
    assert len(lines) == 1 and lines[0].startswith("rank 1") and "last heard of 9999 s ago" in lines[0]


def test_health_of_an_earlier_larger_run_and_torn_files_are_left_out(tmp_path: Path) -> None:
    for rank in range(3):
        Watchdog(tmp_path, PATIENT, rank=rank, world_size=3).starting("build")
    time.sleep(0.01)
    Watchdog(tmp_path, PATIENT, rank=0, world_size=2).starting("build")
    (tmp_path / "health/rank-00001.json").write_text('{"rank": 1')
    assert [h.rank for h in read_health(tmp_path)] == [0]


def test_a_start_that_has_come_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Watchdog(run, PATIENT, rank=0, world_size=1) as watchdog:
        time.sleep(0.1)
        watchdog.meet("a1")
    assert not run.exists()


def test_a_start_that_hangs_leaves_its_stacks(tmp_path: Path) -> None:
    done = run_watchdog(tmp_path / "run", "watchdog.starting('build')\nwait_for_a_peer_that_is_gone()", first=0.5)
    assert done.returncode == EXIT_HUNG
    assert "(limit 0.5 s) at step 0, phase build" in done.stderr
    assert "wait_for_a_peer_that_is_gone" in (tmp_path / "run/health/rank-00000.stacks.txt").read_text()


def test_the_word_of_one_rank_ends_the_others_of_the_same_start_alone(tmp_path: Path) -> None:
    (tmp_path / "health").mkdir()
    early = "watchdog.meet('a1')\nwatchdog.beat(1, 'train')\nwatchdog.beat(2, 'train')\n"
    with_phase = early + "with watchdog.phase(2, 'evaluate'):\n    wait_for_a_peer_that_is_gone()"
    (tmp_path / "health/hung-a0.txt").write_text("a rank of an earlier start")
    writer = threading.Timer(1.5, lambda: (tmp_path / "health/hung-a1.txt").write_text("rank 1"))
    writer.start()
    done = run_watchdog(tmp_path, with_phase)
    assert done.returncode == EXIT_HUNG
    assert "at step 2, phase evaluate when another rank gave up" in done.stderr
    assert "wait_for_a_peer_that_is_gone" in (tmp_path / "health/rank-00000.stacks.txt").read_text()
    assert [path.name for path in (tmp_path / "health").glob("hung-*")] == ["hung-a1.txt"]


def test_code_that_holds_the_interpreter_lock_cannot_hide_a_hang(tmp_path: Path) -> None:
    done = run_watchdog(tmp_path, "import ctypes\nctypes.PyDLL(None).sleep(60)", first=0.5)
    assert done.returncode == 1, "of the timer in C; other ranks end with 76"
    assert "Timeout (0:00:0" in done.stderr and 'File "<string>"' in done.stderr


def test_ages_are_told_by_the_clock_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose clock is five hours ahead, and one that is five hours behind."""
    real = time.time
    for rank, hours in ((0, 5), (1, -5)):
        monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
        peer = Watchdog(tmp_path, PATIENT, rank=rank, world_size=2)
        peer.beat(7 + rank, "train")
        peer._write()
    now = file_clock(tmp_path)
    for health in read_health(tmp_path):
        assert 0 <= now - health.written_time < 30 and 0 <= now - health.progress_time < 30
    old = tmp_path / "health/rank-00001.json"
    os.utime(old, (now - 100, now - 100))
    (line,) = lagging(read_health(tmp_path), world_size=2, now=now, silent_seconds=30)
    assert line.startswith("rank 1") and "last heard of 100 s ago: SILENT" in line
    assert not list(tmp_path.glob(".clock*"))

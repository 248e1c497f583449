"""What goes wrong costs at most the steps since the last checkpoint, and never the result."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.metrics import read_metrics
from launch.stop import EXIT_DIVERGED, EXIT_HUNG, EXIT_OK, EXIT_USER_ERROR
from launch.watch import file_clock, read_health
from tests.runs import (
    Accident,
    Ranks,
    Tiny,
    assert_equal_states,
    checkpoint,
    command,
    curve,
    scalars,
    state,
    steps_saved,
    train,
)

BATCH = 8  # samples of a step
SHARDED = ("engine.strategy=fsdp2", "checkpoint.every_steps=2", "checkpoint.keep_last=2")


def steps(first: int, last: int) -> range:
    """The global positions that the steps from `first` to before `last` read."""
    return range(first * BATCH, last * BATCH)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["checkpoint.sync:kill:1:2", "checkpoint.before_rename:kill:0:2"])
def test_a_kill_inside_a_save_costs_the_steps_since_the_save_before(tiny: Tiny, tmp_path: Path, fault: str) -> None:
    whole = train(tiny.prime, 2, tmp_path / "whole", *SHARDED)
    run = tmp_path / "killed"
    ended = Ranks(tiny.prime, 2, run, *SHARDED, fault=fault).wait()
    assert -signal.SIGKILL in ended.codes
    assert steps_saved(run) == [2]
    train(tiny.prime, 2, run, *SHARDED)
    assert_equal_states(state(run, 6), state(whole, 6))
    assert curve(run) == curve(whole)


def test_a_rank_that_dies_in_the_last_save_is_no_error_of_the_user(tiny: Tiny, tmp_path: Path) -> None:
    """A cluster starts a run again whose node has failed, but not one whose configuration is wrong."""
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, fault="checkpoint.sync:kill:1:3").wait()
    assert ended.codes[0] not in (EXIT_OK, EXIT_USER_ERROR) and ended.codes[1] == -signal.SIGKILL, ended.output
    train(tiny.prime, 2, tmp_path, *SHARDED)
    assert steps_saved(tmp_path) == [4, 6]


# --- damaged ---------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


@pytest.fixture(scope="module")
def saved_twice(tiny: Tiny, shared: Path) -> Path:
    """Checkpoints of steps 4 and 6."""
    return train(tiny.prime, 1, shared / "saved-twice", "checkpoint.every_steps=2")


@pytest.mark.parametrize("name", ["state/rank-00000.safetensors", "trainer.json"])
@pytest.mark.parametrize("harm", [truncate, flip_a_byte, remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tiny: Tiny, saved_twice: Path, tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_twice, run)
    harm(checkpoint(run, 6) / name)
    ended = Ranks(tiny.prime, 1, run, "checkpoint.every_steps=2").wait()
    assert ended.codes == [EXIT_OK], ended.output
    assert "skipping the damaged checkpoint of step 6" in ended.output and name in ended.output
    assert "step 4, from its checkpoint" in ended.output
    assert_equal_states(state(run, 6), state(saved_twice, 6))
    assert curve(run) == curve(saved_twice)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(
    tiny: Tiny, saved_twice: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved_twice, run)
    for step in (4, 6):
        truncate(checkpoint(run, step) / "state/rank-00000.safetensors")
    ended = Ranks(tiny.prime, 1, run).wait()
    assert ended.codes == [EXIT_USER_ERROR]
    assert "none of its 2 checkpoints is whole" in ended.output and "restore one from a copy" in ended.output
    assert len(curve(run)) == 6, "and nothing of the run was touched"


# --- full ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_during_one_save_costs_that_checkpoint_alone(tiny: Tiny, tmp_path: Path) -> None:
    options = (*SHARDED, "checkpoint.keep_last=5")
    ended = Ranks(tiny.prime, 2, tmp_path, *options, fault="checkpoint.write:enospc:1:2").wait()
    assert ended.codes == [EXIT_OK, EXIT_OK], ended.output
    assert steps_saved(tmp_path) == [2, 6]
    assert "the checkpoint of step 4 was not saved: rank 1: OSError: [Errno 28]" in ended.output
    assert "free space at" in ended.output and "checkpoint.keep_last" in ended.output


@pytest.mark.parametrize("stopped", [False, True], ids=["finished", "stopped"])
def test_a_run_whose_last_save_fails_does_not_end_as_if_its_work_were_safe(
    tiny: Tiny, tmp_path: Path, stopped: bool
) -> None:
    accident = Accident(kind="sigterm", ranks=(0,), at=steps(3, 4) if stopped else range(0))
    hit = 2 if stopped else 3
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, task=accident, fault=f"checkpoint.write:enospc:0:{hit}").wait()
    assert ended.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended.output
    assert f"error: the checkpoint of step {3 if stopped else 6} was not saved" in ended.output
    assert "with a checkpoint" not in ended.output
    train(tiny.prime, 2, tmp_path, *SHARDED)
    assert steps_saved(tmp_path)[-1] == 6


def test_after_max_failures_full_disks_in_a_row_the_run_stops_and_says_what_to_do(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny.prime, 2, tmp_path / "run", *SHARDED, "train.steps=4")
    before = state(run, 4)
    # A limit on the size of files fails every save from here on, on both ranks.
    limited = Ranks(
        tiny.prime, 2, run, *SHARDED, "train.steps=40", "checkpoint.max_failures=2", largest_file=20_000
    ).wait()
    assert limited.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], limited.output
    assert "failure 2 in a row (checkpoint.max_failures = 2)" in limited.output
    assert "older checkpoints are intact" in limited.output and "ulimit -f" in limited.output
    assert steps_saved(run) == [2, 4]
    assert_equal_states(state(run, 4), before)
    train(tiny.prime, 2, run, *SHARDED, "train.steps=10")


def test_a_disk_that_takes_no_configuration_ends_the_start_with_a_remedy(tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny.prime, 2, tmp_path / "run", *SHARDED)
    before = (run / "config.yaml").read_text()
    limited = Ranks(tiny.prime, 2, run, *SHARDED, "train.steps=10", largest_file=1500).wait()
    assert limited.codes[0] == EXIT_USER_ERROR, limited.output
    assert f"error: cannot write to {run}: [Errno 27] File too large; " in limited.output
    assert "ulimit -f" in limited.output
    assert steps_saved(run) == [4, 6] and (run / "config.yaml").read_text() == before
    train(tiny.prime, 2, run, *SHARDED, "train.steps=10")


def on_a_disk_of(size: str, mounted: Path, run: Path) -> list[str]:
    """Runs a command where a file system of `size` is mounted at `mounted`, and copies `run` to `run`.after."""
    script = (
        f'mkdir -p {mounted} && mount -t tmpfs -o size={size} none {mounted} && "$@"; code=$?; '
        f"cp -a {run} {run}.after; exit $code"
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


CANNOT_MOUNT = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0
needs_mounts = pytest.mark.skipif(CANNOT_MOUNT, reason="a small disk is a mount namespace, which needs root")
ON_DISK = (*SHARDED, "train.steps=40", "checkpoint.max_failures=3", "watch.interval=0.2", "metrics.tensorboard=true")


@pytest.fixture
def config(tiny: Tiny, tmp_path: Path) -> Path:
    """For launchers, which know no `Accident` but that of the environment."""
    path = tmp_path / "tiny.yaml"
    path.write_text(f"base: {tiny.prime}\nentry: tests.train\n")
    return path


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fill", "read_only"])
def test_a_run_folder_that_stays_full_or_read_only_ends_the_run_by_the_policy_of_checkpoints(
    config: Path, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    mounted, file = (run, run / "filler") if kind == "fill" else (run / "checkpoints", run / "checkpoints")
    accident = Accident(kind=kind, ranks=(0,), at=steps(7, 8), file=str(file))
    line = ["unmask", "train", str(config), "--nproc", "2", f"run.dir={run}", *ON_DISK]
    ended = command(*line, environment=accident.environment(), within=on_a_disk_of("4m", mounted, run))
    assert ended.codes == [EXIT_USER_ERROR], ended.output
    assert "This was failure 3 in a row (checkpoint.max_failures = 3); older checkpoints are intact" in ended.output
    remedy = "free space at" if kind == "fill" else f"make {run / 'checkpoints'} writable"
    assert remedy in ended.output and f"unmask resume {run}" in ended.output.splitlines()[-1], ended.output
    after = tmp_path / "run.after"
    assert steps_saved(after) == [4, 6]
    shutil.rmtree(run)
    shutil.move(after, run)
    (run / "filler").unlink(missing_ok=True)
    read_metrics(run / "metrics.jsonl")  # no row in it is torn
    none = Accident(kind="slow", ranks=())
    assert command(*line, environment=none.environment()).codes == [EXIT_OK]
    assert list(curve(run)) == list(range(1, 41))


@needs_mounts
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fill", "read_only"])
def test_a_run_folder_that_is_full_or_read_only_for_a_while_costs_checkpoints_alone(
    config: Path, tmp_path: Path, kind: str
) -> None:
    """No row of the metrics is missing, and none is torn."""
    run = tmp_path / "run"
    mounted, file = (run, run / "filler") if kind == "fill" else (run / "checkpoints", run / "checkpoints")
    accident = Accident(kind=kind, ranks=(0,), at=steps(7, 8), file=str(file), seconds=1.0)
    line = ["unmask", "train", str(config), "--nproc", "2", f"run.dir={run}", *ON_DISK]
    ended = command(*line, "train.steps=150", "checkpoint.max_failures=10000", "metrics.console=0",
                    environment=accident.environment(), within=on_a_disk_of("4m", mounted, run))  # fmt: skip
    assert ended.codes == [EXIT_OK], ended.output
    assert "the checkpoint of step 8 was not saved: " in ended.output
    if kind == "fill":
        assert "its rows are kept and will be written when it can be" in ended.output
    after = tmp_path / "run.after"
    assert list(curve(after)) == list(range(1, 151))
    assert steps_saved(after) == [148, 150]


# --- the data of a run harmed while it reads them --------------------------------------------------------------------


@pytest.fixture
def own(tiny: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    """A configuration with a copy of the data, and the shard that it trains on."""
    shutil.copytree(tiny.data, tmp_path / "data")
    config = tmp_path / "own.yaml"
    config.write_text(f"base: {tiny.prime}\ndata: {{sources: [{{path: {tmp_path / 'data'}}}]}}\n")
    return config, tmp_path / "data/train-00000.bin"


@pytest.mark.parametrize(
    ("kind", "said", "found"),
    [
        ("truncate", "was cut short while in use", " bytes, the manifest says "),
        ("overwrite", "was written to while in use: its sha256 is", ": its content changed"),
    ],
)
def test_a_shard_that_is_harmed_ends_the_run_by_name_with_its_steps_saved_and_a_resume_finds_it(
    tiny: Tiny, own: tuple[Path, Path], tmp_path: Path, kind: str, said: str, found: str
) -> None:
    (config, shard), run = own, tmp_path / "run"
    whole = train(config, 2, tmp_path / "whole", *SHARDED, "train.steps=12")
    accident = Accident(kind=kind, ranks=(1,), at=steps(5, 6), file=str(shard))
    ended = Ranks(config, 2, run, *SHARDED, "train.steps=12", task=accident).wait()
    assert ended.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended.output
    assert f"{shard} {said}" in ended.output and "Traceback" not in ended.output
    stopped_at = steps_saved(run)[-1]
    assert stopped_at >= 5, "truncation shows where the lost half is read"
    assert f"stopped at step {stopped_at} with a checkpoint" in ended.output and f"unmask resume {run}" in ended.output
    refused = Ranks(config, 2, run, *SHARDED, "train.steps=12", "data.verify=true").wait()
    assert refused.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert str(shard) in refused.output and found in refused.output
    shutil.copy(tiny.data / shard.name, shard)
    train(config, 2, run, *SHARDED, "train.steps=12")
    assert_equal_states(state(run, 12), state(whole, 12))


def test_a_shard_that_is_removed_is_read_to_the_end_and_missed_at_the_next_start(
    own: tuple[Path, Path], tmp_path: Path
) -> None:
    (config, shard), run = own, tmp_path / "run"
    whole = train(config, 2, tmp_path / "whole", *SHARDED)
    accident = Accident(kind="remove", ranks=(1,), at=steps(3, 4), file=str(shard))
    train(config, 2, run, *SHARDED, task=accident)
    assert_equal_states(state(run, 6), state(whole, 6))
    refused = Ranks(config, 2, run, *SHARDED, "train.steps=12").wait()
    assert refused.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR]
    assert f"{shard} is missing" in refused.output


def test_data_that_one_host_cannot_read_end_all_ranks_at_once_and_name_the_host(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="unreadable", ranks=(1,), at=steps(3, 4))
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, task=accident).wait(60)
    assert ended.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended.output
    words = f"error: rank 1 on {socket.gethostname()}: /data/train-00000.bin: Input/output error"
    assert ended.output.count(words) == 2, "both say it last"
    assert steps_saved(tmp_path)[-1] == 3
    train(tiny.prime, 2, tmp_path, *SHARDED)


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [5, -5])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_clock_that_is_hours_off_changes_nothing(
    tiny: Tiny, shared: Path, tmp_path: Path, hours: int, rank: int
) -> None:
    """Not the result, not which checkpoints stay, not who counts as silent."""
    timed = ("checkpoint.every=1h", "watch.interval=0.2")  # due by the time that has passed, not by the clock
    accident = Accident(kind="skew", ranks=(rank,), seconds=3600.0 * hours)
    train(tiny.prime, 2, tmp_path, *SHARDED, *timed, "train.steps=4")
    run = train(tiny.prime, 2, tmp_path, *SHARDED, *timed, "train.steps=10", task=accident)
    assert steps_saved(run) == [8, 10]
    now, healths = file_clock(run), read_health(run)
    assert [health.rank for health in healths] == [0, 1]
    assert all(0 <= now - health.written_time < 120 for health in healths)
    train(tiny.prime, 2, run, *SHARDED, "train.steps=12")
    assert steps_saved(run) == [10, 12]


# --- slow ------------------------------------------------------------------------------------------------------------

WATCHED = ("train.steps=50", "train.micro_batch=4", "watch.straggler_factor=3", "watch.interval=0.2")


@pytest.mark.parametrize(
    ("where", "strategy", "words"),
    [("batch", "fsdp2", "reading its batches takes it 0.1"), ("loss", "ddp", "its forward takes it 0.1")],
)
def test_a_slow_rank_is_named_with_what_is_slow(
    tiny: Tiny, tmp_path: Path, where: str, strategy: str, words: str
) -> None:
    accident = Accident(kind="slow", ranks=(1,), at=range(10**6), where=where, seconds=0.1)
    ended = Ranks(tiny.prime, 2, tmp_path, *WATCHED, f"engine.strategy={strategy}", task=accident).wait()
    assert ended.codes == [EXIT_OK, EXIT_OK], ended.output
    assert ended.output.count("rank 1 on") == 1, "once, whatever the number of lines"
    assert f"WARNING rank 1 on {socket.gethostname()} holds the others up: {words}" in ended.output, ended.output
    kind = {"batch": "read", "loss": "compute"}[where]
    named = [row for row in read_metrics(tmp_path / "metrics.jsonl") if f"straggler/{kind}_rank" in row]
    assert named and all(row[f"straggler/{kind}_rank"] == 1 and row[f"straggler/{kind}_factor"] > 3 for row in named)
    assert "rank 1 on" in read_health(tmp_path)[0].straggler


def test_ranks_that_are_equally_slow_are_not_named(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="slow", ranks=(0, 1), at=range(10**6), seconds=0.1)
    ended = Ranks(tiny.prime, 2, tmp_path, *WATCHED, task=accident).wait()
    assert ended.codes == [EXIT_OK, EXIT_OK] and "holds the others up" not in ended.output
    factors = [row["straggler/read_factor"] for row in read_metrics(tmp_path / "metrics.jsonl")
               if "straggler/read_factor" in row]  # fmt: skip
    assert factors and all(1 <= factor < 3 for factor in factors)
    assert read_health(tmp_path)[0].straggler == ""


# --- not a number ----------------------------------------------------------------------------------------------------

GUARDED = (*SHARDED, "guard.max_consecutive_skips=2", "guard.max_rollbacks=1", "train.steps=10")


def test_a_nan_on_one_rank_is_skipped_by_all_alike(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="nan", ranks=(1,), at=steps(3, 5))
    ended = Ranks(tiny.prime, 2, tmp_path, *GUARDED, task=accident).wait()
    assert ended.codes == [EXIT_OK, EXIT_OK], ended.output
    assert "step 3 skipped: gradient norm is nan" in ended.output
    assert scalars(tmp_path, 10)["engine"]["updates"] == 8
    assert scalars(tmp_path, 10)["guard"]["total_skips"] == 2
    assert all(tensor.isfinite().all() for tensor in state(tmp_path, 10).values())
    finite = {step for step, value in curve(tmp_path).items() if value == value}
    assert finite == set(range(1, 11)) - {4, 5}, "rows count steps that are done"


def test_too_many_nans_in_a_row_roll_back_and_go_on_with_other_data(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="nan", ranks=(1,), at=steps(5, 8))  # one more than may be skipped
    ended = Ranks(tiny.prime, 2, tmp_path, *GUARDED, task=accident).wait()
    assert ended.codes == [EXIT_OK, EXIT_OK], ended.output
    assert "rolled back from step 8 to the checkpoint of step 6" in ended.output
    progress = scalars(tmp_path, 10)["progress"]
    assert progress["passed_over"] == 2 * BATCH, "the samples of steps 6 and 7 are left out, step 5 was before"
    assert list(curve(tmp_path)) == list(range(1, 11))
    assert scalars(tmp_path, 10)["guard"]["rollbacks"] == 1


@pytest.mark.parametrize("first", [1, 5])
def test_a_loss_that_stays_nan_ends_with_code_77_and_keeps_the_checkpoint(
    tiny: Tiny, tmp_path: Path, first: int
) -> None:
    """From step 1 on there is no checkpoint to go back to; from step 5 on the one rollback does not help."""
    accident = Accident(kind="nan", ranks=(0,), at=steps(first, 1000))
    ended = Ranks(tiny.prime, 2, tmp_path, *GUARDED, "checkpoint.every_steps=5", task=accident).wait()
    assert ended.codes == [EXIT_DIVERGED, EXIT_DIVERGED], ended.output
    assert "giving up at step" in ended.output and "schedule.lr" in ended.output
    assert steps_saved(tmp_path) == ([] if first == 1 else [5])


# --- hung ------------------------------------------------------------------------------------------------------------

QUICK = ("watch.timeout=3", "watch.first_step_timeout=60", "watch.interval=0.2")  # silent after six intervals


def stacks(run: Path, rank: int) -> str:
    return (run / f"health/rank-{rank:05d}.stacks.txt").read_text()


def test_when_one_rank_hangs_all_write_their_stacks_and_end_with_code_76(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="hang", ranks=(1,), at=steps(3, 4))
    begin = time.monotonic()
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, *QUICK, task=accident).wait()
    assert ended.codes == [EXIT_HUNG, EXIT_HUNG], ended.output
    assert time.monotonic() - begin < 45
    assert "no progress for 3 s (limit 3 s) at step 3" in ended.output
    assert "in _strike" in stacks(tmp_path, 1) and "in sum_and_max" in stacks(tmp_path, 0)
    assert f"exit code 76; what is saved is intact: `unmask resume {tmp_path}`" in ended.output.splitlines()[-1]
    assert steps_saved(tmp_path) == [2]
    train(tiny.prime, 2, tmp_path, *SHARDED)


@pytest.mark.parametrize("kind", ["hang_in_c", "stop"])
def test_a_rank_that_can_say_nothing_is_named_by_the_others(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    accident = Accident(kind=kind, ranks=(0,), at=steps(3, 4))
    ended = Ranks(tiny.prime, 3, tmp_path, *SHARDED, *QUICK, "train.micro_batch=1", "train.global_batch=6",
                  task=accident).wait()  # fmt: skip
    assert ended.codes[1:] == [EXIT_HUNG, EXIT_HUNG], ended.output
    assert ended.codes[0] == (1 if kind == "hang_in_c" else -signal.SIGKILL), "its own timer in C; whoever started it"
    assert "  rank 0 (" in ended.output and ": SILENT" in ended.output
    assert "in sum_and_max" in stacks(tmp_path, 1) and "in sum_and_max" in stacks(tmp_path, 2)
    if kind == "hang_in_c":
        assert "in _strike" in ended.output, "the stacks of the rank that held the lock are in its log"


@pytest.mark.parametrize("where", ["open", "build", "evaluate", "sample"])
def test_a_hang_outside_the_steps_has_a_limit_too(tiny: Tiny, tmp_path: Path, where: str) -> None:
    """Of the rank itself where it is shorter, else engine.timeout of those that wait for it; then all leave."""
    limits = ("watch.timeout=3", "watch.first_step_timeout=60", "watch.interval=0.5", "engine.timeout=4")
    accident = Accident(kind="hang", ranks=(0,), where=where)
    begin = time.monotonic()
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, *limits, task=accident).wait()
    assert time.monotonic() - begin < 60
    waiting = ended.codes[1]
    assert waiting == EXIT_HUNG, ended.output
    assert "engine.timeout has passed" in ended.output
    assert f"unmask resume {tmp_path}" in ended.output
    if where != "open":  # where nothing of the run is on disk yet
        assert ended.codes[0] == EXIT_HUNG and "in _strike" in stacks(tmp_path, 0), ended.output


def test_a_hang_in_the_thread_that_saves_ends_the_run_at_its_next_save(tiny: Tiny, tmp_path: Path) -> None:
    limits = ("watch.timeout=30", "watch.interval=0.5", "engine.timeout=4", "watch.phase_timeout=20")
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, *limits, fault="checkpoint.write:hang:1:2").wait()
    assert ended.codes == [EXIT_HUNG, EXIT_HUNG], ended.output
    assert "write_part" in stacks(tmp_path, 1)
    assert steps_saved(tmp_path) == [2]
    train(tiny.prime, 2, tmp_path, *SHARDED)


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
@pytest.mark.parametrize("kind", ["hang", "stop"])
@pytest.mark.slow
def test_launchers_end_a_job_with_a_hung_rank(config: Path, tmp_path: Path, launcher: str, kind: str) -> None:
    """Within watch.timeout and, for a rank that cannot end itself, ten seconds (local) or thirty (torchrun)."""
    run, accident = tmp_path / "run", Accident(kind=kind, ranks=(1,), at=steps(3, 4))
    line = ["unmask", "train", str(config), "--nproc", "2", "--launcher", launcher, f"run.dir={run}", *SHARDED, *QUICK]
    begin = time.monotonic()
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where torchrun is
    ended = command(*line, environment=accident.environment() | path)
    assert ended.codes == [EXIT_HUNG if launcher == "local" else 1], ended.output
    assert time.monotonic() - begin < 120
    assert "in sum_and_max" in stacks(run, 0)
    assert "no progress for 3 s (limit 3 s) at step 3" in ended.output
    if kind == "hang":
        assert "in _strike" in stacks(run, 1)
    else:
        assert "rank 1 (" in ended.output and ": SILENT" in ended.output
    if launcher == "torchrun":
        _, summary = ended.output.split("Root Cause")
        assert "exitcode  : 76" in summary and "no progress for 3 s (limit 3 s) at step 3" in summary
    assert f"unmask resume {run}" in ended.output.splitlines()[-1], ended.output

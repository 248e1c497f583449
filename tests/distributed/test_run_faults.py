"""What goes wrong costs at most the steps since the last checkpoint, and never the result."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.stop import EXIT_DIVERGED, EXIT_HUNG, EXIT_OK, EXIT_USER_ERROR
from tests.runs import (
    Accident,
    Ranks,
    Tiny,
    assert_equal_states,
    checkpoint,
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


def test_when_one_rank_hangs_all_write_their_stacks_and_end_with_code_76(tiny: Tiny, tmp_path: Path) -> None:
    accident = Accident(kind="hang", ranks=(1,), at=steps(3, 4))
    begin = time.monotonic()
    limits = ("watch.timeout=3", "watch.first_step_timeout=60", "watch.interval=0.5")
    ended = Ranks(tiny.prime, 2, tmp_path, *SHARDED, *limits, task=accident).wait()
    assert ended.codes == [EXIT_HUNG, EXIT_HUNG], ended.output
    assert time.monotonic() - begin < 45
    assert "no progress for 3 s (limit 3 s) at step 3" in ended.output
    hung, waiting = ((tmp_path / f"health/rank-0000{rank}.stacks.txt").read_text() for rank in (1, 0))
    assert "in batch" in hung and "in sum_and_max" in waiting
    assert steps_saved(tmp_path) == [2]
    train(tiny.prime, 2, tmp_path, *SHARDED)

"""A run that was cut in two is the run that was not."""

import signal
import time
from pathlib import Path

import pytest

from launch.stop import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from tests.runs import Accident, Ranks, Tiny, assert_equal_states, command, curve, scalars, start, state, steps_saved
from tests.runs import train as run_to_the_end

STEPS = 8
OPTIONS = (
    "engine.ema_decay=0.9",
    "model.dropout=0.1",
    "schedule.kind=cosine",
    "schedule.lr=1.0e-3",  # Adam turns the rounding of a gradient near 0 into a part of lr
    "schedule.warmup_steps=2",
    f"train.steps={STEPS}",
)
RESUMED_AS = [  # (processes, strategy) of each part
    ((2, "ddp"), (1, "ddp"), (4, "ddp")),
    ((2, "fsdp2"), (1, "ddp"), (4, "fsdp2")),
    ((2, "ddp"), (4, "fsdp2"), (2, "ddp")),
]


def train(tiny: Tiny, run: Path, world: int, strategy: str) -> Path:
    return run_to_the_end(tiny.prime, world, run, *OPTIONS, f"engine.strategy={strategy}")


def train_until(tiny: Tiny, run: Path, world: int, strategy: str, step: int, *, signalled: int = 0) -> None:
    """SIGTERM comes to one rank while it reads the batch of `step`."""
    accident = Accident(kind="sigterm", ranks=(signalled,), at=range(8 * step, 8 * step + 8))
    ended = Ranks(tiny.prime, world, run, *OPTIONS, f"engine.strategy={strategy}", task=accident).wait()
    assert ended.codes == [EXIT_STOPPED] * world, ended.output
    assert f"SIGTERM: stopped at step {step} with a checkpoint" in ended.output or signalled != 0
    assert f"unmask resume {run}" in ended.output
    assert steps_saved(run)[-1] == step


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, shared: Path) -> dict[int, Path]:
    """By number of processes."""
    return {1: train(tiny, shared / "unbroken-1", 1, "ddp"), 2: train(tiny, shared / "unbroken-2", 2, "fsdp2")}


@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "fsdp2")])
def test_a_stop_by_a_signal_and_a_resume_change_no_bit(
    tiny: Tiny, unbroken: dict[int, Path], tmp_path: Path, world: int, strategy: str
) -> None:
    """The signal comes to the last rank alone: all agree to stop before the step whose batch it read."""
    train_until(tiny, tmp_path, world, strategy, 4, signalled=world - 1)
    train(tiny, tmp_path, world, strategy)
    assert_equal_states(state(tmp_path, STEPS), state(unbroken[world], STEPS))
    assert curve(tmp_path) == curve(unbroken[world])
    assert list(curve(tmp_path)) == list(range(1, STEPS + 1))
    cut, whole = scalars(tmp_path, STEPS), scalars(unbroken[world], STEPS)
    for saved in (cut, whole):
        saved["progress"]["seconds"] = None
    assert cut == whole


@pytest.mark.parametrize("parts", RESUMED_AS, ids=lambda parts: "-".join(f"{s}x{w}" for w, s in parts))
def test_each_part_may_run_on_other_processes_under_another_strategy(
    tiny: Tiny, unbroken: dict[int, Path], tmp_path: Path, parts: tuple[tuple[int, str], ...]
) -> None:
    (first, second, third) = parts
    train_until(tiny, tmp_path, *first, 3)
    train_until(tiny, tmp_path, *second, 5)
    train(tiny, tmp_path, *third)
    assert curve(tmp_path) == pytest.approx(curve(unbroken[1]), rel=1e-6)
    assert list(curve(tmp_path)) == list(range(1, STEPS + 1))
    expected = state(unbroken[1], STEPS)
    weights = {name: tensor for name, tensor in state(tmp_path, STEPS).items() if name.startswith(("model.", "ema."))}
    assert_equal_states(weights, {name: expected[name] for name in weights}, atol=1e-6)


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again_with_each_step_once(
    tiny: Tiny, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    ranks = Ranks(tiny.prime, 1, tmp_path, *OPTIONS, fault="checkpoint.begin:kill")
    assert ranks.wait().codes == [-signal.SIGKILL]
    assert list(curve(tmp_path)) == list(range(1, STEPS + 1)) and steps_saved(tmp_path) == []
    train(tiny, tmp_path, 1, "ddp")
    assert curve(tmp_path) == curve(unbroken[1])


def test_a_finished_run_says_so_and_goes_on_when_it_gets_more_steps(tiny: Tiny, tmp_path: Path) -> None:
    constant = ("train.steps=4",)  # the schedule of the file is constant: it does not look at the number of steps
    run = run_to_the_end(tiny.ar, 1, tmp_path / "cut", *constant)
    ended = Ranks(tiny.ar, 1, run, *constant).wait()
    assert ended.codes == [EXIT_OK] and "is finished: step 4 of 4. Raise train.steps to go on" in ended.output
    shorter = Ranks(tiny.ar, 1, run, "train.steps=3").wait()
    assert shorter.codes == [EXIT_USER_ERROR] and "use train.steps=4 or more" in shorter.output
    assert run_to_the_end(tiny.ar, 1, run, "train.steps=6") == run
    whole = run_to_the_end(tiny.ar, 1, tmp_path / "whole", "train.steps=6")
    assert_equal_states(state(run, 6), state(whole, 6))


def test_a_signal_to_unmask_train_stops_2_processes_with_code_75_and_unmask_resume_goes_on(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    many = ("train.steps=100000", "checkpoint.every_steps=1000000")
    process = start("unmask", "train", str(tiny.prime), "--nproc", "2", f"run.dir={run}", *many)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(curve(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    (saved,) = steps_saved(run)
    assert saved == max(curve(run)), "every step that was logged is in the checkpoint, and no other"
    ended = command("unmask", "resume", str(run), f"train.steps={saved + 2}")
    assert ended.codes == [EXIT_OK], ended.output
    assert f"step {saved}, from its checkpoint" in ended.output
    assert list(curve(run)) == list(range(1, saved + 3))

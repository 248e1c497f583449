"""Whatever happens during a save, what can be loaded afterwards is the old checkpoint or the new one, whole."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.checkpoint import CheckpointStore, SaveFailure, SaveResult, commit, layout
from launch.checkpoint.commit import FAULT_POINTS, remedy
from launch.errors import CheckpointError, ClusterError
from tests.disk import Disk
from tests.launch.checkpoint import state
from tests.processes import RankFailed, spawn

BEFORE_THE_RENAME = FAULT_POINTS[: FAULT_POINTS.index("checkpoint.after_rename")]


def save_twice(folder: Path, asynchronous: bool) -> None:
    """Step 1, then step 2, of which only the newest is kept."""
    runtime, store = state.open_store(folder, asynchronous=asynchronous, keep_last=1)
    for step in (1, 2):
        store.save(step, state.held_as("shard", runtime.world_size, step=step), {"step": step})
        store.wait()
    runtime.close()


def load_newest(folder: Path) -> tuple[int | None, list[str], dict[str, Any]]:
    """(step, wrong tensors, scalars), and a save afterwards, on one process."""
    runtime, store = state.open_store(folder)
    step = store.latest_valid()
    target = state.held_as("plain", 1, step=None)
    scalars = store.load(step, target) if step is not None else {}
    wrong = state.differing(target, step or 0)
    outcomes = store.save(3, target, {})
    assert isinstance(outcomes[0], SaveResult)
    runtime.close()
    return step, wrong, scalars


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_between_any_two_operations_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    hit = 1 if point == "checkpoint.after_trash" else 2  # the first save has nothing to delete
    monkeypatch.setenv("UNMASK_FAULT", f"{point}:kill:0:{hit}")
    with pytest.raises(RankFailed, match="rank 0 of 2 died by SIGKILL"):
        spawn(save_twice, 2, tmp_path, True, group=False)
    monkeypatch.delenv("UNMASK_FAULT")
    step = 1 if point in BEFORE_THE_RENAME else 2
    assert spawn(load_newest, 1, tmp_path, group=False) == [(step, [], {"step": step})]
    assert layout.leftovers(tmp_path) == [], "the next save sweeps what the dead one left"


@pytest.mark.parametrize("point", ["checkpoint.write", "checkpoint.sync"])
def test_a_kill_of_another_rank_fails_the_save_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("UNMASK_FAULT", f"{point}:kill:1:2")
    with pytest.raises(RankFailed, match="rank 1 of 2 died by SIGKILL"):
        spawn(save_twice, 2, tmp_path, False, group=False)
    monkeypatch.delenv("UNMASK_FAULT")
    assert spawn(load_newest, 1, tmp_path, group=False) == [(1, [], {"step": 1})]


def save_beside_training(folder: Path, steps: int) -> tuple[list[SaveResult | SaveFailure], float]:
    """Collectives and in-place changes go on while each save is written; every save must hold its own moment."""
    runtime, store = state.open_store(folder, asynchronous=True, keep_last=steps)
    weights = torch.zeros(2_000_000)  # plain: each rank writes about half of the state
    tensors = {"model.a": weights, "model.b": weights.clone()}
    outcomes = []
    for step in range(1, steps + 1):
        for tensor in tensors.values():
            tensor.add_(1)
        for _ in range(5):
            dist.all_reduce(torch.ones(1000))
        outcomes += store.save(step, tensors, {"step": step})
    outcomes += store.wait()
    total = torch.ones(1)
    dist.all_reduce(total)
    for step in range(1, steps + 1):
        target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        store.load(step, target)
        assert all(torch.all(tensor == step) for tensor in target.values())
    runtime.close()
    return outcomes, float(total)


def test_saving_beside_training_neither_hangs_nor_sees_later_steps(tmp_path: Path) -> None:
    results = spawn(save_beside_training, 2, tmp_path, 6, group=False)
    assert results[0] == results[1], "all ranks hear the same outcomes"
    outcomes, total = results[0]
    assert total == 2
    assert [outcome.step for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    for outcome in outcomes:
        assert isinstance(outcome, SaveResult)
        assert outcome.bytes > 16_000_000 and outcome.write_seconds > 0 and outcome.wait_seconds >= 0


def save_with_failures(folder: Path, asynchronous: bool, steps: int) -> tuple[list[str], int | None]:
    """Outcomes in words, with the newest whole step at the end."""
    runtime, store = state.open_store(folder, asynchronous=asynchronous, keep_last=5)
    outcomes = []
    for step in range(1, steps + 1):
        outcomes += store.save(step, state.held_as("plain", runtime.world_size, step=step), {})
    outcomes += store.wait()
    newest = store.latest_valid()
    runtime.close()
    return [str(o) if isinstance(o, SaveFailure) else f"saved {o.step}" for o in outcomes], newest


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("point", "rank"),
    [("checkpoint.write", 1), ("checkpoint.mkdir", 0), ("checkpoint.manifest", 0)],
)
def test_a_full_disk_on_one_rank_fails_that_save_on_all_ranks_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, rank: int, asynchronous: bool
) -> None:
    monkeypatch.setenv("UNMASK_FAULT", f"{point}:enospc:{rank}:2")
    results = spawn(save_with_failures, 2, tmp_path, asynchronous, 3, group=False)
    assert results[0] == results[1]
    words, newest = results[0]
    assert (words[0], words[2], newest) == ("saved 1", "saved 3", 3)
    assert "the checkpoint of step 2 was not saved" in words[1]
    assert "No space left on device" in words[1] and f"free space at {tmp_path}" in words[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Disk(folder, options))
        except subprocess.CalledProcessError:
            pytest.skip("mounting a small tmpfs needs root")
        yield


def fill_a_disk(folder: Path) -> list[str]:
    """Step 1; step 2 with the disk full; step 3 with room again."""
    runtime, store = state.open_store(folder / "checkpoints", asynchronous=True, keep_last=2)
    ballast = folder / "ballast"
    words = []
    for step in (1, 2, 3):
        if runtime.rank == 0:
            ballast.write_bytes(bytes(2_200_000 if step == 2 else 0))
        runtime.barrier()
        for outcome in [*store.save(step, {"model.w": torch.full((400_000,), float(step))}, {}), *store.wait()]:
            words.append(str(outcome))
    runtime.close()
    return words


def test_a_disk_that_is_really_full_costs_one_save_and_nothing_else(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m"):
        results = spawn(fill_a_disk, 2, tmp_path / "disk", group=False)
        assert results[0] == results[1]
        assert "step 2 was not saved" in results[0][1] and "No space left" in results[0][1]
        folder = tmp_path / "disk" / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000001", "step_00000003"]


def save_into(folder: Path) -> list[str]:
    runtime, store = state.open_store(folder)
    try:
        store.preflight({"model.w": torch.zeros(3)})
        before = "preflight passed"
    except CheckpointError as error:
        before = str(error)
    outcomes = store.save(1, {"model.w": torch.zeros(3)}, {})
    runtime.close()
    return [before, *(str(outcome) for outcome in outcomes)]


def test_a_read_only_folder_is_named_before_the_first_step_and_at_the_save(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro"):
        for before, at_save in spawn(save_into, 2, tmp_path / "disk" / "checkpoints", group=False):
            assert "cannot write to" in before and "writable" in before
            assert "step 1 was not saved" in at_save and "writable" in at_save


def test_a_run_folder_that_is_a_file_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    ((before, at_save),) = spawn(save_into, 1, tmp_path / "taken" / "checkpoints", group=False)
    assert "cannot write to" in before and "was not saved" in at_save


def save_different_states(folder: Path, how: str) -> str:
    runtime, store = state.open_store(folder)
    other = runtime.rank == 1
    tensors = {"model.a": torch.zeros(4, 3), "model.b": torch.zeros(8, 3)}
    if how == "names" and other:
        tensors["model.c"] = torch.zeros(99)
    if how == "shapes" and other:
        tensors["model.b"] = torch.zeros(7, 3)
    (outcome,) = store.save(1, tensors, {})
    runtime.close()
    return str(outcome)


@pytest.mark.parametrize("how", ["names", "shapes"])
def test_ranks_whose_states_differ_fail_at_the_save_and_not_at_the_next_load(tmp_path: Path, how: str) -> None:
    for words in spawn(save_different_states, 2, tmp_path, how, group=False):
        assert "step 1 was not saved" in words and "rank 1 saves tensors of other names, shapes" in words


def preflight_in_own_folder(folder: Path, shared: bool, elements: int) -> str:
    runtime, _ = state.open_store(folder)
    mine = folder if shared else folder / str(runtime.rank)
    store = CheckpointStore(mine, runtime, asynchronous=False)
    try:
        store.preflight({"model.w": torch.empty(elements, device="meta")})
    except (CheckpointError, ClusterError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        runtime.close()
    return "passed"


def test_preflight_leaves_nothing_behind(tmp_path: Path) -> None:
    assert spawn(preflight_in_own_folder, 2, tmp_path, True, 1000, group=False) == ["passed", "passed"]
    assert list(tmp_path.iterdir()) == []


def test_preflight_refuses_a_checkpoint_larger_than_the_free_space(tmp_path: Path) -> None:
    for words in spawn(preflight_in_own_folder, 2, tmp_path, True, 10**15, group=False):
        assert words.startswith("CheckpointError: a checkpoint takes 4000000.00 GB, but ")


def test_preflight_refuses_a_folder_that_the_ranks_do_not_share(tmp_path: Path) -> None:
    for words in spawn(preflight_in_own_folder, 2, tmp_path, False, 1000, group=False):
        assert words.startswith("ClusterError: rank 1 on") and "file system that all nodes share" in words


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("OSError: [Errno 28] No space left on device: 'x'", "free space at"),
        ("SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)", "free space at"),
        ("OSError: [Errno 122] Disk quota exceeded", "quota"),
        ("SafetensorError: I/O error: File too large (os error 27)", "ulimit -f"),
        ("PermissionError: [Errno 13] Permission denied", "writable"),
        ("OSError: [Errno 5] Input/output error", "older checkpoints"),
    ],
)
def test_an_operating_system_error_comes_with_its_remedy(tmp_path: Path, words: str, advice: str) -> None:
    assert advice in remedy(words, tmp_path / "not" / "there")


def save_behind_a_gate(folder: Path) -> tuple[bool, bool]:
    """Whether step 1 was published when `save` had returned, and when `wait` had."""
    runtime, store = state.open_store(folder, asynchronous=True)
    gate = threading.Event()
    commit.fault = lambda point: gate.wait(30) and None  # no operation of the protocol happens before it opens
    store.save(1, {"model.w": torch.ones(1000)}, {})
    published_early = (folder / "step_00000001").exists()
    gate.set()
    store.wait()
    runtime.close()
    return published_early, (folder / "step_00000001").exists()


def test_an_asynchronous_save_returns_before_anything_is_written(tmp_path: Path) -> None:
    assert spawn(save_behind_a_gate, 1, tmp_path, group=False) == [(False, True)]

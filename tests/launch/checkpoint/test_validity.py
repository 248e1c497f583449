"""What is damaged is named and passed over; what does not fit is refused before anything is changed."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import launch.checkpoint
from launch.checkpoint import CheckpointStore, SaveResult, layout
from launch.errors import CheckpointError
from launch.runtime import Runtime, start
from tests.launch.checkpoint import state
from tests.processes import spawn


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = start(device="cpu", timeout_seconds=30)
    yield runtime
    runtime.close()


def small_state(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((64, 8), float(value)), "optim.exp_avg.w": torch.zeros(64, 8), "ema.w": torch.ones(3)}


def store_of(folder: Path, runtime: Runtime, **options: Any) -> CheckpointStore:
    return CheckpointStore(folder, runtime, **{"asynchronous": False, **options})


def save_steps(folder: Path, runtime: Runtime, steps: list[int], **options: Any) -> CheckpointStore:
    store = store_of(folder, runtime, **options)
    for step in steps:
        (outcome,) = store.save(step, small_state(step), {"step": step})
        assert isinstance(outcome, SaveResult), outcome
    return store


def shard_of(folder: Path) -> Path:
    return folder / "state" / "rank-00000.safetensors"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """As an attacker or another version would: with a checksum that fits."""
    body = json.loads((folder / "MANIFEST.json").read_text())
    body.pop("checksum")
    change(body)
    (folder / "MANIFEST.json").write_text(json.dumps({"checksum": layout._checksum(body), **body}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda f: truncate(shard_of(f)), "rank-00000.safetensors: .* bytes, but"),
    "flipped byte": (lambda f: flip_byte(shard_of(f)), "rank-00000.safetensors: its sha256"),
    "missing shard": (lambda f: shard_of(f).unlink(), "rank-00000.safetensors: No such file"),
    "missing scalars": (lambda f: (f / "trainer.json").unlink(), "trainer.json: No such file"),
    "changed scalars": (lambda f: flip_byte(f / "trainer.json"), "trainer.json: its sha256"),
    "missing manifest": (lambda f: (f / "MANIFEST.json").unlink(), "no MANIFEST.json"),
    "half a manifest": (lambda f: truncate(f / "MANIFEST.json"), "MANIFEST.json: cannot be read"),
    "flipped byte in the manifest": (lambda f: flip_byte(f / "MANIFEST.json"), "MANIFEST.json: "),
    "foreign folder": (lambda f: (f / "MANIFEST.json").write_text('{"weights": 3}'), "format None"),
    "manifest that is a list": (lambda f: (f / "MANIFEST.json").write_text("[1]"), "format None"),
    "format of the future": (lambda f: change_manifest(f, lambda b: b.update(format=2)), "format 2, but"),
    "manifest of another step": (lambda f: change_manifest(f, lambda b: b.update(step=7)), "its manifest is of step 7"),
    "file outside the folder": (
        lambda f: change_manifest(f, lambda b: b["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": None}})),
        "'../../etc/passwd' is none that a checkpoint holds",
    ),
    "chunk in a file that is not listed": (
        lambda f: change_manifest(f, lambda b: b["tensors"]["ema.w"]["chunks"][0].__setitem__(0, "/etc/passwd")),
        "which the file table does not have",
    ),
    "chunk that is missing": (
        lambda f: change_manifest(f, lambda b: b["tensors"]["model.w"].update(chunks=[])),
        "tensor model.w: its chunks hold 0 of 512 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_its_reason_and_the_one_before_is_used(
    tmp_path: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    save_steps(tmp_path, runtime, [1, 2])
    hurt, words = DAMAGES[damage]
    hurt(tmp_path / "step_00000002")
    assert store_of(tmp_path, runtime).latest_valid() == 1
    (warning,) = [record.getMessage() for record in caplog.records if "skipping" in record.getMessage()]
    assert "step 2" in warning and str(tmp_path) in warning and re.search(words, warning), warning


def test_sizes_alone_do_not_show_a_flipped_byte_and_make_no_hashes(tmp_path: Path, runtime: Runtime) -> None:
    store = save_steps(tmp_path, runtime, [1], verify="size")
    flip_byte(shard_of(tmp_path / "step_00000001"))
    assert store.latest_valid() == 1
    assert layout.read_manifest(tmp_path / "step_00000001").files["state/rank-00000.safetensors"].sha256 is None


def find_newest(folder: Path) -> int | None:
    runtime, store = state.open_store(folder)
    newest = store.latest_valid()
    runtime.close()
    return newest


def save_two(folder: Path) -> None:
    runtime, store = state.open_store(folder)
    for step in (1, 2):
        store.save(step, state.held_as("shard", runtime.world_size), {})
    runtime.close()


def test_damage_that_only_one_rank_looks_at_is_agreed_by_all(tmp_path: Path) -> None:
    spawn(save_two, 3, tmp_path, group=False)
    flip_byte(tmp_path / "step_00000002" / "state" / "rank-00001.safetensors")
    assert spawn(find_newest, 2, tmp_path, group=False) == [1, 1]


def test_without_any_checkpoint_there_is_none_but_without_a_whole_one_it_is_an_error(
    tmp_path: Path, runtime: Runtime
) -> None:
    folder = tmp_path / "checkpoints"
    assert store_of(folder, runtime).latest_valid() is None
    save_steps(folder, runtime, [1, 2])
    for step in (1, 2):
        shard_of(folder / layout.step_name(step)).unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole.*start from step 0"):
        store_of(folder, runtime).latest_valid()


def test_a_latest_file_that_points_nowhere_is_only_remarked_on(
    tmp_path: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, runtime, [1, 2])
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    (tmp_path / "latest").write_text("step_00000009\n")
    assert store_of(tmp_path, runtime).latest_valid() == 2
    assert "latest says 'step_00000009', but the newest whole checkpoint is that of step 2" in caplog.text
    (tmp_path / "latest").unlink()
    assert store_of(tmp_path, runtime).latest_valid() == 2


def test_unfinished_and_deleted_folders_are_never_read(tmp_path: Path, runtime: Runtime) -> None:
    save_steps(tmp_path, runtime, [1, 2])
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.tmp-77-1")
    assert store_of(tmp_path, runtime).latest_valid() == 1
    (tmp_path / "step_00000002.tmp-77-1").rename(tmp_path / ".trash-step_00000002")
    assert store_of(tmp_path, runtime).latest_valid() == 1


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in small_state(-7).items() if key != name}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (small_state(-7) | {"model.extra": torch.zeros(1)}, "the checkpoint lacks model.extra"),
        (without("model.w"), "the checkpoint holds model.w, which the model does not have"),
        (
            small_state(-7) | {"model.w": torch.zeros(64, 9)},
            r"model.w has shape \[64, 8\] .* but \[64, 9\] in the model",
        ),
        (
            small_state(-7) | {"model.w": torch.zeros(64, 8).bfloat16()},
            "model.w is torch.float32 .* but torch.bfloat16",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed(
    tmp_path: Path, runtime: Runtime, target: dict[str, Tensor], words: str
) -> None:
    store = save_steps(tmp_path, runtime, [1])
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(CheckpointError, match=words):
        store.load(1, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in before.items())


def load_on_one_rank_wrongly(folder: Path) -> str:
    runtime, store = state.open_store(folder)
    rows = 3 if runtime.rank == 1 else 4
    store.save(1, {"model.w": torch.zeros(4)}, {})
    try:
        store.load(1, {"model.w": torch.zeros(rows)})
    except CheckpointError as error:
        return str(error)
    finally:
        runtime.close()
    return "loaded"


def test_a_load_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    for words in spawn(load_on_one_rank_wrongly, 2, tmp_path, group=False):
        assert "tensor model.w has shape [4] in the checkpoint but [3] in the model" in words


def test_a_prefix_selects_part_of_a_checkpoint(tmp_path: Path, runtime: Runtime) -> None:
    store = save_steps(tmp_path, runtime, [3])
    target = {"ema.w": torch.zeros(3)}
    assert store.load(3, target, prefixes=("ema.",)) == {"step": 3}
    assert torch.equal(target["ema.w"], torch.ones(3))
    with pytest.raises(CheckpointError, match=r"holds model\.w"):
        store.load(3, target, prefixes=("ema.", "model."))


def test_a_step_that_is_not_there_is_an_error(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000004: no MANIFEST.json"):
        store_of(tmp_path, runtime).load(4, {})


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 2, "keep_every": 3}, [3, 5, 6]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_retention_keeps_the_newest_and_the_permanent_ones(
    tmp_path: Path, runtime: Runtime, options: dict[str, int], kept: list[int]
) -> None:
    save_steps(tmp_path, runtime, [1, 2, 3, 4, 5, 6], **options)
    assert layout.committed_steps(tmp_path) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"latest", *(layout.step_name(step) for step in kept)}


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(tmp_path: Path, runtime: Runtime) -> None:
    save_steps(tmp_path, runtime, [1, 2, 3], keep_last=3)
    for step in (2, 3):
        flip_byte(shard_of(tmp_path / layout.step_name(step)))
    store = store_of(tmp_path, runtime, keep_last=2)
    assert store.latest_valid() == 1
    store.load(1, small_state(0))
    store.save(4, small_state(4), {})
    assert layout.committed_steps(tmp_path) == [1, 2, 3, 4], "1 and 4 count; the damaged ones are left for a person"
    store.save(5, small_state(5), {})
    assert layout.committed_steps(tmp_path) == [2, 3, 4, 5]


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tmp_path: Path, runtime: Runtime) -> None:
    save_steps(tmp_path, runtime, [1, 2])
    shard_of(tmp_path / "step_00000002").unlink()
    store = store_of(tmp_path, runtime)
    assert store.latest_valid() == 1
    store.save(2, small_state(22), {})
    assert store.latest_valid() == 2
    target = small_state(0)
    store.load(2, target)
    assert torch.equal(target["model.w"], torch.full((64, 8), 22.0))


def test_a_step_that_is_already_on_disk_is_not_written_again(tmp_path: Path, runtime: Runtime) -> None:
    store = save_steps(tmp_path, runtime, [1])
    written = shard_of(tmp_path / "step_00000001").stat().st_mtime_ns
    assert store.save(1, small_state(1), {}) == []
    resumed = store_of(tmp_path, runtime)
    resumed.load(1, small_state(0))
    assert resumed.save(1, small_state(1), {}) == []
    assert shard_of(tmp_path / "step_00000001").stat().st_mtime_ns == written


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(tmp_path: Path, runtime: Runtime) -> None:
    store = save_steps(tmp_path, runtime, [1, 2, 3], keep_last=3)
    assert store.set_aside_after(1) == [2, 3]
    assert store.latest_valid() == 1
    assert len(list(tmp_path.glob("abandoned-step_*"))) == 2


def test_an_asynchronous_save_is_reported_once_by_the_next_save_or_wait(tmp_path: Path, runtime: Runtime) -> None:
    store = store_of(tmp_path, runtime, asynchronous=True)
    assert store.save(1, small_state(1), {}) == []
    assert [outcome.step for outcome in store.save(2, small_state(2), {}, block=True)] == [1, 2]
    assert store.wait() == []


def test_a_manifest_speaks_for_itself(tmp_path: Path, runtime: Runtime) -> None:
    save_steps(tmp_path, runtime, [1])
    body = json.loads((tmp_path / "step_00000001" / "MANIFEST.json").read_text())
    assert body["tensors"]["model.w"] == {
        "dtype": "float32", "shape": [64, 8], "chunks": [["state/rank-00000.safetensors", [0, 0], [64, 8]]]
    }  # fmt: skip
    assert (body["format"], body["step"], body["world_size"], body["torch"]) == (1, 1, 1, torch.__version__)
    assert body["files"].keys() == {"trainer.json", "state/rank-00000.safetensors"}
    assert shard_of(tmp_path / "step_00000001").stat().st_mode == (tmp_path / "latest").stat().st_mode


def test_nothing_in_the_package_can_run_code_from_a_file() -> None:
    sources = list(Path(launch.checkpoint.__file__).parent.glob("*.py"))
    assert len(sources) >= 6
    for source in sources:
        assert not re.search(r"torch\.load|import pickle|pickle\.load|\beval\(|\bexec\(", source.read_text()), source


def test_results_are_logged_once_and_failures_loudly(
    tmp_path: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    with caplog.at_level(logging.INFO):
        save_steps(tmp_path, runtime, [1])
        store_of(tmp_path / "taken" / "x", runtime).save(1, small_state(1), {})
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]

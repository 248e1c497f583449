"""Weights leave as a Hugging Face folder and come back the same; what is not safetensors is never opened."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.checkpoint import publish, read_safetensors, stream, write_safetensors
from launch.errors import CheckpointError
from tests.launch.checkpoint import state
from tests.processes import spawn


def save_state(folder: Path, kind: str) -> None:
    runtime, store = state.open_store(folder)
    store.save(5, state.held_as(kind, runtime.world_size), {})
    runtime.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by four ranks as a grid of shards."""
    folder = tmp_path_factory.mktemp("saved")
    spawn(save_state, 4, folder, "grid", group=False)
    return folder / "step_00000005"


WEIGHTS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(6).reshape(2, 3),
    "c": torch.ones(5),
    "d": torch.tensor(3.0),
}


def test_a_stream_holds_the_full_tensors_of_one_prefix_in_the_order_of_their_names(checkpoint: Path) -> None:
    tensors = list(stream(checkpoint, "model."))
    assert [name for name, _ in tensors] == ["cube", "nothing", "scalar", "short", "single", "uneven"]
    for name, tensor in tensors:
        assert torch.equal(tensor, state.full(f"model.{name}")) and tensor.dtype == state.SHAPES[f"model.{name}"][1]
    ((name, tensor),) = stream(checkpoint, "ema.")
    assert name == "count" and torch.equal(tensor, state.full("ema.count"))


def test_a_prefix_that_is_not_there_is_answered_with_those_that_are(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor under 'teacher\.'; it has ema\., model\., optim\."):
        list(stream(checkpoint, "teacher."))


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / checkpoint.name
    (copy / "state").mkdir(parents=True)
    for path in checkpoint.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            flipped = data[:-1] + bytes([data[-1] ^ 1]) if path.suffix == ".safetensors" else data
            (copy / path.relative_to(checkpoint)).write_bytes(flipped)
    with pytest.raises(CheckpointError, match="sha256"):
        list(stream(copy, "model."))


def test_a_small_export_is_one_file_that_stock_tools_open(checkpoint: Path, tmp_path: Path) -> None:
    assert write_safetensors(stream(checkpoint, "model."), tmp_path) == 4 * 35 + 2 * 6 + 4 * 24 + 4 + 0 + 4
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["uneven"], state.full("model.uneven"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_export_is_cut_into_numbered_files_with_an_index(tmp_path: Path) -> None:
    total = write_safetensors(WEIGHTS.items(), tmp_path, max_file_bytes=60)
    assert total == 48 + 48 + 20 + 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": total},
        "weight_map": {"a": files[0], "b": files[1], "c": files[2], "d": files[2]},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], WEIGHTS[name])


@pytest.mark.parametrize("max_file_bytes", [1, 60, 10**9])
def test_reading_is_the_inverse_of_writing(tmp_path: Path, max_file_bytes: int) -> None:
    write_safetensors(WEIGHTS.items(), tmp_path, max_file_bytes=max_file_bytes)
    back = dict(read_safetensors(tmp_path))
    assert list(back) == sorted(WEIGHTS)
    assert all(torch.equal(back[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_cast_converts_floating_point_tensors_alone_and_a_rename_names_them(tmp_path: Path) -> None:
    write_safetensors(WEIGHTS.items(), tmp_path, dtype=torch.bfloat16, rename=lambda name: f"layers.{name}.weight")
    back = dict(read_safetensors(tmp_path))
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        "layers.a.weight": torch.bfloat16,
        "layers.b.weight": torch.int64,
        "layers.c.weight": torch.bfloat16,
        "layers.d.weight": torch.bfloat16,
    }


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="b and a are both renamed to x"):
        write_safetensors(WEIGHTS.items(), tmp_path, rename=lambda name: "x")


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with publish(tmp_path / "out" / "export") as folder:
        write_safetensors(WEIGHTS.items(), folder)
        assert not (tmp_path / "out" / "export").exists()
    assert [path.name for path in (tmp_path / "out" / "export").iterdir()] == ["model.safetensors"]
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "out" / "second") as folder:
        write_safetensors(WEIGHTS.items(), folder)
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export"]
    with pytest.raises(CheckpointError, match="export exists already"), publish(tmp_path / "out" / "export"):
        pass


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file; convert"):
        list(read_safetensors(tmp_path))


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match=f"places a in '{place}'"):
        list(read_safetensors(folder))


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks b"):
        list(read_safetensors(tmp_path))


def test_an_export_holds_one_output_file_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for index in range(6):
            alive.append(len(list(tmp_path.glob("part-*"))))
            yield f"w{index}", torch.zeros(100)

    write_safetensors(tensors(), tmp_path, max_file_bytes=800)
    assert alive == [0, 0, 0, 1, 1, 2], "a file is written as soon as the next tensor would not fit"

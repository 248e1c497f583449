"""A checkpoint of any world size and any placement loads into any other, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from launch.checkpoint import CheckpointStore, layout
from launch.checkpoint.layout import Box, SavedTensor
from launch.checkpoint.shards import local_box, owned_boxes
from launch.errors import CheckpointError
from tests.launch.checkpoint import state
from tests.processes import spawn

WORLDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the same state: every world size x every kind."""
    folder = tmp_path_factory.mktemp("saved")
    for world_size in WORLDS:
        spawn(state.save_as_every_kind, world_size, folder, group=False)
    return folder


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_checkpoint_loads_in_place_as_every_kind(saved: Path, world_size: int) -> None:
    assert len(list(saved.iterdir())) == len(WORLDS) * len(state.KINDS)
    assert spawn(state.load_as_every_kind, world_size, saved, group=False) == [[]] * world_size


@pytest.mark.parametrize("kind", state.KINDS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_element_is_on_disk_exactly_once(saved: Path, world_size: int, kind: str) -> None:
    folder = saved / f"{kind}-{world_size}" / "step_00000005"
    manifest = layout.read_manifest(folder)  # checks that the chunks tile every tensor
    assert manifest.tensors.keys() == state.SHAPES.keys()
    for name, tensor in manifest.tensors.items():
        assert (tensor.shape, tensor.dtype) == state.SHAPES[name]
    headers = sum(8 + int.from_bytes((folder / f).read_bytes()[:8], "little") for f in manifest.files if "rank" in f)
    data = sum(file.bytes for name, file in manifest.files.items() if "rank" in name)
    assert data - headers == sum(tensor.bytes for tensor in manifest.tensors.values())


@pytest.mark.parametrize("world_size", (1, 2, 3, 7))
def test_replicas_are_shared_out_so_that_ranks_write_alike(world_size: int) -> None:
    tensors = {f"t{index}": torch.empty(100 + 7 * index) for index in range(40)}
    parts = [owned_boxes(tensors, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    loads = [sum(box.numel for box in part.values()) for part in parts]
    assert max(loads) - min(loads) <= 100 + 7 * 39


def small_model() -> nn.Module:
    """7, 5 and 3 rows: uneven on 2, 3 and 4 ranks, with an empty shard on 4. The same weights on every rank."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    for index, parameter in enumerate(model.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
        parameter.data.copy_(torch.sin(values + index))
    return model


def trained(kind: str, world_size: int, *, steps: int) -> dict[str, Tensor]:
    """Canonical state of an FSDP2 or plain model after `steps` AdamW steps on the same batch everywhere."""
    model = small_model()
    if kind != "plain":
        shape, names = ((world_size,), ("shard",)) if kind == "fsdp" else ((2, world_size // 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (*model.children(), model):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(max(steps, 1)):
        model(torch.linspace(-1, 1, 20).reshape(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        result[f"model.{name}"] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            result[f"optim.{moment}.{name}"] = optimizer.state[parameter][moment]
    if steps == 0:
        with torch.no_grad():
            for value in result.values():
                value.fill_(-7)
    return result


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in tensors.items()}


def save_trained(folder: Path, kind: str) -> dict[str, Tensor]:
    runtime, store = state.open_store(folder)
    tensors = trained(kind, runtime.world_size, steps=3)
    store.save(3, tensors, {})
    values = whole(tensors)
    runtime.close()
    return values


def load_trained(folders: list[Path], kind: str) -> list[dict[str, Tensor]]:
    runtime, _ = state.open_store(folders[0])
    values = []
    for folder in folders:
        tensors = trained(kind, runtime.world_size, steps=0)
        CheckpointStore(folder, runtime, asynchronous=False).load(3, tensors)
        values.append(whole(tensors))
    runtime.close()
    return values


def test_parameters_and_adam_moments_move_between_fsdp2_hybrid_sharding_and_plain_models(tmp_path: Path) -> None:
    saved = {}
    for kind, world_size in [("fsdp", 3), ("fsdp", 4), ("hsdp", 4), ("plain", 2)]:
        folder = tmp_path / f"{kind}{world_size}"
        saved[folder] = spawn(save_trained, world_size, folder, kind, group=False)[0]
        assert len(saved[folder]) == 15
    for kind, world_size in [("fsdp", 2), ("hsdp", 4), ("plain", 1)]:
        for rank in spawn(load_trained, world_size, list(saved), kind, group=False):
            for loaded, expected in zip(rank, saved.values(), strict=True):
                assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2))
    said = []
    for placements in (
        [_StridedShard(0, split_factor=4), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(1)],
        [Shard(0), Partial()],
    ):
        tensor = DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False)
        try:
            local_box("model.x", tensor)
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_placements_that_no_engine_makes_are_refused_with_the_name_of_the_tensor() -> None:
    for strided, other_dimension, partial in spawn(refusals, 4):
        assert "tensor model.x" in strided and "not those of fully_shard over tensor parallelism" in strided
        assert "not those of fully_shard" in other_dimension
        assert "tensor model.x: placement P" in partial and "redistribute it" in partial


def box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[str, Box]:
    return "state/rank-00000.safetensors", Box(offsets=offsets, sizes=sizes)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([box((0, 0), (2, 3))], "6 of 12 elements"),
        ([box((0, 0), (3, 3)), box((2, 0), (2, 3))], "overlap"),
        ([box((0, 0), (4, 2)), box((0, 1), (4, 1)), box((0, 2), (4, 1))], "overlap"),
        ([box((0, 0), (4, 3)), box((4, 0), (1, 3))], "outside"),
        ([], "0 of 12 elements"),
    ],
)
def test_chunks_with_a_gap_an_overlap_or_an_excess_are_refused(chunks: list[tuple[str, Box]], words: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor model.x.*{words}"):
        layout.check_tiling("model.x", SavedTensor(dtype=torch.float32, shape=(4, 3), chunks=tuple(chunks)))

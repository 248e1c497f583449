"""A small state with every awkward shape, in every way an engine may hold it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from launch.checkpoint import CheckpointStore
from launch.runtime import Runtime, start

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "model.uneven": ((7, 5), torch.float32),  # 4 + 3, or 3 + 3 + 1, or 2 + 2 + 2 + 1 rows
    "model.short": ((2, 3), torch.bfloat16),  # empty on the last ranks of 3 and 4
    "model.cube": ((4, 3, 2), torch.float32),
    "model.single": ((1,), torch.float32),  # on rank 0 alone
    "model.nothing": ((0, 3), torch.float32),
    "optim.exp_avg.uneven": ((7, 5), torch.float32),
    "ema.count": ((9,), torch.int64),
    "model.scalar": ((), torch.float32),
}
KINDS = ("plain", "replicate", "shard", "hsdp", "grid", "split")


def full(name: str, step: int = 0) -> Tensor:
    """The whole tensor; every element, name and step has a value of its own that is exact in its dtype."""
    shape, dtype = SHAPES[name]
    count = torch.Size(shape).numel()
    start = 100 * list(SHAPES).index(name) + 1000 * step
    if dtype == torch.bfloat16:
        start = start % 128
    return torch.arange(start, start + count).reshape(shape).to(dtype)


def held_as(kind: str, world_size: int, *, step: int | None = 0) -> dict[str, Tensor]:
    """The state as `kind` on this rank; with `step` None filled with a value that is nowhere in it."""
    values = {name: full(name, step) if step is not None else torch.full_like(full(name), -7) for name in SHAPES}
    if kind == "plain":
        return values
    if kind == "split":
        return {name: split_then_sharded(value, world_size) for name, value in values.items()}
    side = 2 if world_size == 4 else 1
    mesh = init_device_mesh("cpu", (world_size,) if kind in ("replicate", "shard") else (side, world_size // side))

    def placements(value: Tensor) -> list[Placement]:
        if kind == "replicate" or value.dim() == 0:
            return [Replicate()] * mesh.ndim
        if kind == "shard":
            return [Shard(0)]
        return [Replicate() if kind == "hsdp" else Shard(min(1, value.dim() - 1)), Shard(0)]

    return {name: distribute_tensor(value, mesh, placements(value)) for name, value in values.items()}


def split_then_sharded(value: Tensor, world_size: int) -> Tensor:
    """As `fully_shard` leaves rows that tensor parallelism has split: over 2 ranks if it can, its own cut last."""
    tensor = 2 if world_size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (world_size // tensor, tensor))
    if value.dim() == 0:
        return distribute_tensor(value, mesh, [Replicate()] * 2)
    local = value
    for mesh_dim in (1, 0):
        parts = local.chunk(mesh.size(mesh_dim))
        index = mesh.get_local_rank(mesh_dim)
        local = parts[index].clone() if index < len(parts) else local.new_empty((0, *local.shape[1:]))
    placements = [_StridedShard(0, split_factor=tensor) if tensor > 1 else Shard(0), Shard(0)]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def differing(state: dict[str, Tensor], step: int = 0) -> list[str]:
    """Names whose tensor is not bit for bit that of `step`. Collective for DTensors."""
    wrong = []
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if whole.dtype != SHAPES[name][1] or not torch.equal(whole, full(name, step)):
            wrong.append(name)
    return wrong


def open_store(folder: Path, **options: Any) -> tuple[Runtime, CheckpointStore]:
    runtime = start(device="cpu", timeout_seconds=30)
    return runtime, CheckpointStore(folder, runtime, **{"asynchronous": False, **options})


def save_as_every_kind(folder: Path) -> None:
    runtime, _ = open_store(folder)
    for kind in KINDS:
        store = CheckpointStore(folder / f"{kind}-{runtime.world_size}", runtime, asynchronous=False)
        (outcome,) = store.save(5, held_as(kind, runtime.world_size), {"step": 5, "kind": kind})
        if isinstance(outcome, Exception):
            raise outcome
    runtime.close()


def load_as_every_kind(folder: Path) -> list[tuple[str, str, list[str]]]:
    """(saved folder, kind loaded as, names that came back wrong) of every combination that went wrong."""
    runtime, _ = open_store(folder)
    wrong = []
    targets = {kind: held_as(kind, runtime.world_size, step=None) for kind in KINDS}
    for saved in sorted(path.name for path in folder.iterdir()):
        store = CheckpointStore(folder / saved, runtime, asynchronous=False)
        for kind, target in targets.items():
            for tensor in target.values():
                tensor.fill_(-7)
            scalars = store.load(5, target)
            names = differing(target)
            if names or scalars != {"step": 5, "kind": saved.split("-")[0]}:
                wrong.append((saved, kind, names))
    runtime.close()
    return wrong

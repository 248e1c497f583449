"""From tensors in memory to boxes in files and back. One rank's view; no communication anywhere.

A tensor is plain (the same on every rank, as under DDP) or a DTensor on a mesh of any dimension, whose placements are
Replicate, Shard, or the strided shard of `fully_shard` over tensor parallelism. Each rank holds one box of it, possibly
empty; boxes that several ranks hold are written by one of them. Who that is follows from the names, shapes and the mesh
alone, so every rank works it out for itself.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from launch.checkpoint.layout import Box, Manifest, SavedTensor
from launch.errors import CheckpointError


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of the whole state over all ranks, each element once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def local_box(name: str, tensor: Tensor) -> Box:
    """The block of the global tensor that this rank holds."""
    if not isinstance(tensor, DTensor):
        return Box(offsets=(0,) * tensor.dim(), sizes=tuple(tensor.shape))
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the mesh
        return Box(offsets=(0,) * tensor.dim(), sizes=(0,) * tensor.dim())
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    for mesh_dim, dim in _cuts(name, tensor):
        part = -(-sizes[dim] // mesh.size(mesh_dim))  # as torch.chunk: the last parts may be short, or empty
        start = min(part * coordinate[mesh_dim], sizes[dim])
        offsets[dim], sizes[dim] = offsets[dim] + start, min(part, sizes[dim] - start)
    return Box(offsets=tuple(offsets), sizes=tuple(sizes))


def _cuts(name: str, tensor: DTensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) of every cut, in the order in which they were made.

    A strided shard is torch's note that its cut came last: `fully_shard` takes what tensor parallelism has left to a
    rank, although its own mesh dimension stands in front. Every cut is one of a contiguous block, so the rest is too.
    """
    cuts, last = [], []
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            cuts.append((mesh_dim, placement.dim))
        elif isinstance(placement, _StridedShard):
            behind = [
                tensor.device_mesh.size(other)
                for other, inner in enumerate(tensor.placements)
                if other > mesh_dim and isinstance(inner, Shard) and inner.dim == placement.dim
            ]
            if prod(behind) != placement.split_factor or last:
                raise CheckpointError(
                    f"tensor {name}: its placements {tensor.placements} are not those of fully_shard over tensor "
                    "parallelism; redistribute it to Shard or Replicate"
                )
            last.append((mesh_dim, placement.dim))
        elif not isinstance(placement, Replicate):
            raise CheckpointError(
                f"tensor {name}: placement {placement} cannot be saved or loaded; redistribute it to Shard or Replicate"
            )
    return cuts + last


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory behind this rank's box; writing to it writes to the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def owned_boxes(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Box]:
    """The non-empty boxes that this rank writes. Over all ranks every element is owned exactly once.

    Replicas are shared out largest first, each to the replica with the fewest bytes so far, so that all of them write
    about as much. Ranks that hold the same replicas see the same sizes and therefore agree without a word.
    """
    boxes = {name: local_box(name, tensor) for name, tensor in tensors.items()}
    loads: defaultdict[Any, list[int]] = defaultdict(list)
    owned = {}
    for name in sorted(boxes, key=lambda name: (-boxes[name].numel * tensors[name].element_size(), name)):
        mesh, index, count = _replica(tensors[name], rank, world_size)
        load = loads[mesh]
        load.extend([0] * (count - len(load)))
        owner = min(range(count), key=load.__getitem__)
        load[owner] += boxes[name].numel * tensors[name].element_size()
        if owner == index and boxes[name].numel:
            owned[name] = boxes[name]
    return owned


class Staging:
    """Host memory that holds one copy of what this rank writes, kept from save to save.

    A thread may then write it while training changes the originals. On CUDA the memory is pinned, so that all copies
    are in flight at once, and pinning (which is slow) happens once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU; they stay valid until the next call."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return dict(self._buffers)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == like.shape and old.dtype == like.dtype:
            return old
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's chunks; they must be on the CPU or are copied there now."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)  # as readable as its folder; safetensors gives it to its owner alone


def fill(folder: Path, manifest: Manifest, tensors: Mapping[str, Tensor], prefixes: tuple[str, ...] | None) -> None:
    """Copy the saved state into `tensors` in place, reading only the slices this rank holds.

    With `prefixes`, only saved tensors whose name starts with one of them take part. `CheckpointError` on any missing
    or surplus name, shape or dtype, before anything is changed.
    """
    saved = {name: t for name, t in manifest.tensors.items() if prefixes is None or name.startswith(prefixes)}
    _check_fit(folder, saved, tensors)
    reads: defaultdict[str, list[tuple[str, Tensor, Box, Box, Box]]] = defaultdict(list)
    for name, tensor in tensors.items():
        mine, memory = local_box(name, tensor), local_tensor(tensor)
        if mine.numel == 0:
            continue
        for file, box in saved[name].chunks:
            if common := mine.overlap(box):
                reads[file].append((name, memory, mine, box, common))
    for file in sorted(reads):
        with torch.no_grad(), safe_open(str(folder / file), framework="pt") as shard:
            for name, memory, mine, box, common in reads[file]:
                memory[common.slices_within(mine)].copy_(shard.get_slice(name)[common.slices_within(box)])


def read_whole(folder: Path, name: str, saved: SavedTensor) -> Tensor:
    """One full tensor on the CPU, without any process group."""
    tensor = torch.empty(saved.shape, dtype=saved.dtype)
    whole = Box(offsets=(0,) * len(saved.shape), sizes=saved.shape)
    for file, box in saved.chunks:
        with safe_open(str(folder / file), framework="pt") as shard:
            tensor[box.slices_within(whole)].copy_(shard.get_tensor(name))
    return tensor


def _replica(tensor: Tensor, rank: int, world_size: int) -> tuple[Any, int, int]:
    """(what identifies the set of replicas, this rank's index in it, their number)."""
    if not isinstance(tensor, DTensor):
        return None, rank, world_size
    mesh = tensor.device_mesh
    dims = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
    index, count = 0, 1
    for dim in dims:
        index = index * mesh.size(dim) + mesh.get_local_rank(dim) if mesh.get_coordinate() is not None else 0
        count *= mesh.size(dim)
    return (mesh, dims), index, count


def _check_fit(folder: Path, saved: Mapping[str, SavedTensor], tensors: Mapping[str, Tensor]) -> None:
    if missing := sorted(tensors.keys() - saved.keys()):
        raise CheckpointError(
            f"{folder}: the checkpoint lacks {_some(missing)}, which the model needs; load it with the configuration "
            "it was saved with"
        )
    if surplus := sorted(saved.keys() - tensors.keys()):
        raise CheckpointError(
            f"{folder}: the checkpoint holds {_some(surplus)}, which the model does not have; load it with the "
            "configuration it was saved with, or load fewer prefixes"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != saved[name].shape:
            raise CheckpointError(
                f"{folder}: tensor {name} has shape {list(saved[name].shape)} in the checkpoint but "
                f"{list(tensor.shape)} in the model; load it with the configuration it was saved with"
            )
        if tensor.dtype != saved[name].dtype:
            raise CheckpointError(
                f"{folder}: tensor {name} is {saved[name].dtype} in the checkpoint but {tensor.dtype} in the model; "
                "load it at the precision it was saved with and convert afterwards"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")

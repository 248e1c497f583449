"""A model on disk, read a tensor at a time: what keeps a merge within the memory of one layer.

Shards are mapped and let go with the tensor that was asked for, so that pages of one layer do not add up to the next.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.errors import ConfigError, DataError
from llm.moe.architectures import MoeShape, layer_prefix, moe_shape, read_config
from llm.moe.experts import Experts

_FLOATS = {"F64", "F32", "F16", "BF16"}
_INDEX = "model.safetensors.index.json"
_ALONE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checked checkpoint. Its files are never written to."""

    folder: Path
    config: Any  # of transformers
    shape: MoeShape
    shards: dict[str, str]  # file of each entry

    def tensor(self, name: str) -> Tensor:
        """A copy of an entry, on the CPU, as it is stored."""
        with _opened(self.folder / self.shards[name]) as file:
            return file.get_tensor(name).clone()

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows int64 [n] of a matrix; the others are not read."""
        with _opened(self.folder / self.shards[name]) as file:
            return file.get_tensor(name)[rows]

    def experts(self, layer: int) -> Experts:
        """The experts of a MoE layer, fused. Memory: the layer and one matrix."""
        architecture, shape = self.shape.architecture, self.shape
        count, width, inner = shape.num_experts, shape.width, shape.inner_width
        dtype = self.tensor(architecture.expert(layer, 0, "down")).dtype
        gate_up = torch.empty(count, 2 * inner, width, dtype=dtype)
        down = torch.empty(count, width, inner, dtype=dtype)
        for expert in range(count):
            for matrix, place in (
                ("gate", gate_up[expert, :inner]),
                ("up", gate_up[expert, inner:]),
                ("down", down[expert]),
            ):
                name = architecture.expert(layer, expert, matrix)
                with _opened(self.folder / self.shards[name]) as file:
                    place.copy_(file.get_tensor(name))
        return Experts(gate_up=gate_up, down=down)

    def is_expert(self, name: str) -> bool:
        """Whether an entry belongs to the routed experts."""
        return name in self._expert_names

    @cached_property
    def _expert_names(self) -> frozenset[str]:
        return frozenset(expert_names(self.shape))

    def layer_entries(self, layer: int) -> list[str]:
        """All entries of a layer but its experts'."""
        prefix = layer_prefix(layer)
        return [name for name in self.shards if name.startswith(prefix) and not self.is_expert(name)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and the names, types, shapes and sizes of all entries, not over the weights."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in sorted(set(self.shards.values())):
            path = self.folder / file
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                digest.update(file.encode() + stream.read(length))
            digest.update(str(path.stat().st_size).encode())
        return digest.hexdigest()


def expert_names(shape: MoeShape) -> Iterator[str]:
    for layer in shape.moe_layers:
        for expert in range(shape.num_experts):
            for matrix in ("gate", "up", "down"):
                yield shape.architecture.expert(layer, expert, matrix)


def open_source(folder: Path) -> Source:
    """The checkpoint in `folder`, after a look at every shard's list of entries.

    ConfigError for another architecture, no experts, or quantised weights; DataError for a shard or an entry that is
    missing or torn.
    """
    config = read_config(folder)
    shape = moe_shape(config, folder)
    shards = _entries(folder)
    wanted = [*expert_names(shape), *(shape.architecture.router(layer) for layer in shape.moe_layers)]
    missing = [name for name in wanted if name not in shards]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{folder} has no entry {missing[0]}{more}, but config.json says {shape.num_experts} experts in "
            f"{len(shape.moe_layers)} layers; fetch the checkpoint again"
        )
    return Source(folder=folder, config=config, shape=shape, shards=shards)


def check_length(source: Source, length: int, what: str) -> None:
    """ConfigError that begins with `what`, a setting, if texts of `length` tokens are longer than the model takes."""
    if length > (most := source.config.max_position_embeddings):
        raise ConfigError(f"{what}; {source.folder} takes {most} tokens at most")


def _entries(folder: Path) -> dict[str, str]:
    """The file of each entry, by the files themselves; the index only says which files there should be."""
    index = folder / _INDEX
    if index.is_file():
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif (folder / _ALONE).is_file():
        listed = {}
    else:
        raise DataError(
            f"{folder} has neither {_INDEX} nor {_ALONE}; only safetensors are read, so convert other weights with "
            "transformers' save_pretrained"
        )
    files = sorted(set(listed.values())) or [_ALONE]
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise DataError(f"{folder} lacks the shard {absent[0]} of {len(files)} that {_INDEX} lists; fetch it again")
    found: dict[str, str] = {}
    for file in files:
        with _opened(folder / file) as shard:
            for name in shard.keys():  # noqa: SIM118  (not a mapping)
                if (dtype := shard.get_slice(name).get_dtype()) not in _FLOATS:
                    raise DataError(
                        f"{folder / file} stores {name} as {dtype}; merge weights of {', '.join(sorted(_FLOATS))} and "
                        "quantise the result"
                    )
                found[name] = file
    if lost := [name for name in listed if name not in found]:
        raise DataError(f"{folder}/{listed[lost[0]]} has no entry {lost[0]}, which {_INDEX} lists; fetch it again")
    return found


def _opened(path: Path) -> Any:
    """safe_open, with an error that names the file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no whole safetensors file ({error}); fetch it again") from None

"""A merged model as a folder that loads, in one of three formats, with the memory of one layer and one file.

format     what it computes                         size      opened by
compact    exactly the merged layers                smaller   llm.moe.modeling, or trust_remote_code
expanded   exactly the merged layers                original  stock classes: every expert has its merged one's weights
shrunk     with a router of r rows: approximately   smaller   stock classes, which know one number of experts only
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from launch.checkpoint import layout, publish, write_safetensors
from launch.checkpoint.commit import size
from launch.errors import CheckpointError, ConfigError
from llm.moe import modeling
from llm.moe.architectures import layer_prefix
from llm.moe.choices import check_choice
from llm.moe.experts import Experts, MergedLayer
from llm.moe.source import Source

Format = Literal["compact", "expanded", "shrunk"]
REPORT = "merge_report.json"
CODE = "modeling.py"  # in a compact folder: what `trust_remote_code` runs
_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
           "merges.txt", "chat_template*", "LICENSE*")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Export:
    """What is to be written. Made by `plan`."""

    source: Source
    format: Format
    experts: dict[int, int]  # r_l of each MoE layer
    top_k: int  # experts that a token selects


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedLayer:
    """One MoE layer on its way to the disk."""

    index: int
    merged: MergedLayer
    router: Tensor | None = None  # [r, d], for `shrunk`; None takes the rows of the experts that a pruning kept


def plan(
    source: Source, form: Format, experts: Mapping[int, int], *, prunes: bool = False, top_k: int | None = None
) -> Export:
    """What will be written, refused now if it cannot be.

    experts: r_l of each MoE layer. prunes: whether experts are dropped. top_k: for `shrunk`, how many experts a token
    selects from now on; None leaves it as it is. ConfigError names a format that can.
    """
    check_choice("format", form, Format)
    shape, counts = source.shape, sorted(set(experts.values()))
    if tuple(sorted(experts)) != shape.moe_layers:
        raise ValueError(f"layers {sorted(experts)} are given, but the model has experts in {list(shape.moe_layers)}")
    if not 1 <= counts[0] <= counts[-1] <= shape.num_experts:
        raise ConfigError(f"{counts} experts a layer were asked for; each layer keeps 1 to {shape.num_experts}")
    if form == "expanded" and prunes:
        raise ConfigError(
            "expanded gives the place of every expert to its merged one, and a pruned expert has none; write shrunk, "
            "or compact"
        )
    if form != "shrunk":
        if top_k is not None:
            raise ConfigError(f"top_k = {top_k} has no meaning for {form}, which routes as before; leave it out")
        return Export(source=source, format=form, experts=dict(experts), top_k=shape.rule.top_k)
    if len(counts) > 1:
        raise ConfigError(
            f"the layers keep {counts[0]} to {counts[-1]} experts, but the stock classes behind shrunk know one number "
            "for all layers; write compact, or keep the same number everywhere"
        )
    selected = shape.rule.top_k if top_k is None else top_k
    if not 1 <= selected <= counts[0]:
        raise ConfigError(
            f"a token cannot select {selected} of the {counts[0]} experts that shrunk keeps; allow a lower top k "
            f"(1 to {counts[0]}), keep more experts, or write compact, which routes as before"
        )
    return Export(source=source, format=form, experts=dict(experts), top_k=selected)


def predicted_bytes(export: Export) -> int:
    """Bytes of all tensors. Files add their tables of contents to it: about 100 bytes a tensor."""
    architecture, shape = export.source.shape.architecture, export.source.shape
    stored = _stored_bytes(export.source)
    total = sum(count for name, count in stored.items() if not export.source.is_expert(name))
    for layer, kept in export.experts.items():
        expert = sum(stored[architecture.expert(layer, 0, matrix)] for matrix in ("gate", "up", "down"))
        total += expert * (shape.num_experts if export.format == "expanded" else kept)
        if export.format == "compact":
            total += shape.num_experts * torch.int64.itemsize  # the map
        elif export.format == "shrunk":
            router = stored[architecture.router(layer)]
            total += router // shape.num_experts * kept - router
    return total


def write(
    export: Export,
    to: Path,
    layers: Iterable[FinishedLayer],
    report: Callable[[Path], Mapping[str, Any]],
    *,
    max_file_bytes: int = 5 * 10**9,
) -> int:
    """Write the new folder `to`; the bytes of its tensors. It comes into being by one rename, or not at all.

    layers: every MoE layer once, in any order; drawn one at a time. report: gets the finished folder before it has its
    name, and returns what merge_report.json shall say. It may verify the folder: an exception leaves nothing behind.
    CheckpointError if the folder exists or the disk is full.
    """
    source = export.source
    if to.resolve().is_relative_to(source.folder.resolve()):
        raise ConfigError(f"{to} lies in the source {source.folder}, which stays as it is; choose another folder")
    needed = predicted_bytes(export)
    try:
        with publish(to) as folder:
            if (free := shutil.disk_usage(folder).free) < needed:
                raise CheckpointError(
                    f"{to} needs {size(needed)}, and {size(free)} are free there; free space, or choose another folder"
                )
            written = write_safetensors(_tensors(export, layers), folder, max_file_bytes=max_file_bytes)
            if written != needed:
                raise AssertionError(f"{written} bytes were written, and {needed} predicted")
            layout.write_synced(folder / "config.json", json.dumps(_config(export), indent=2) + "\n")
            if export.format == "compact":
                shutil.copyfile(modeling.__file__, folder / CODE)
            for file in _companions(source.folder):
                shutil.copyfile(file, folder / file.name)
            layout.write_synced(folder / REPORT, json.dumps(report(folder), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{to} was not written ({error}); it needs {size(needed)} on a disk that takes them, so free space there, "
            "or choose another folder"
        ) from error
    return written


def _stored(source: Source, index: int, layer: MergedLayer) -> MergedLayer:
    """As it will be on disk: its experts in the type that the source has for those of layer `index`."""
    dtype = source.tensor(source.shape.architecture.expert(index, 0, "down")).dtype
    experts = Experts(gate_up=layer.experts.gate_up.to("cpu", dtype), down=layer.experts.down.to("cpu", dtype))
    return MergedLayer(expert_map=layer.expert_map.cpu(), experts=experts)


def _tensors(export: Export, layers: Iterable[FinishedLayer]) -> Iterator[tuple[str, Tensor]]:
    """All entries of the new folder under their names there."""
    source, architecture = export.source, export.source.shape.architecture
    routers = {architecture.router(layer) for layer in export.experts}
    for name in source.shards:
        if source.is_expert(name) or (export.format == "shrunk" and name in routers):
            continue
        compact_name = name.replace(f".{architecture.block}.", ".mlp.", 1)
        yield (compact_name if export.format == "compact" else name), source.tensor(name)
    missing = set(export.experts)
    for layer in layers:
        if layer.index not in missing:
            raise ValueError(f"layer {layer.index} came twice or has no experts; {sorted(missing)} are still to come")
        missing.remove(layer.index)
        _check(export, layer)
        yield from {"compact": _compact, "expanded": _expanded, "shrunk": _shrunk}[export.format](source, layer)
        del layer  # before the next one is made
    if missing:
        raise ValueError(f"layers {sorted(missing)} were never given")


def _compact(source: Source, layer: FinishedLayer) -> Iterator[tuple[str, Tensor]]:
    prefix, merged = f"{layer_prefix(layer.index)}mlp.", _stored(source, layer.index, layer.merged)
    yield f"{prefix}gate.expert_map", merged.expert_map
    yield f"{prefix}experts.gate_up_proj", merged.experts.gate_up
    yield f"{prefix}experts.down_proj", merged.experts.down


def _expanded(source: Source, layer: FinishedLayer) -> Iterator[tuple[str, Tensor]]:
    yield from _by_matrix(source, layer, layer.merged.expert_map.tolist())


def _shrunk(source: Source, layer: FinishedLayer) -> Iterator[tuple[str, Tensor]]:
    name = source.shape.architecture.router(layer.index)
    rows = source.tensor(name)
    if layer.router is not None:
        rows = layer.router.to(rows)
    else:
        kept = layer.merged.kept.nonzero().flatten()  # one for each merged expert, by `_check`
        rows = rows[kept[layer.merged.expert_map[kept].argsort()].cpu()]
    yield name, rows
    yield from _by_matrix(source, layer, list(range(len(layer.merged.experts))))


def _by_matrix(source: Source, layer: FinishedLayer, merged: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Three entries an expert, as the original has them. merged: which merged expert takes each place."""
    experts = _stored(source, layer.index, layer.merged).experts
    for place, index in enumerate(merged):
        # Copies, because files hold no two entries that share memory.
        for matrix, tensor in (("gate", experts.gate), ("up", experts.up), ("down", experts.down)):
            yield source.shape.architecture.expert(layer.index, place, matrix), tensor[index].clone()


def _check(export: Export, layer: FinishedLayer) -> None:
    shape, merged, kept = export.source.shape, layer.merged, export.experts[layer.index]
    found = (len(merged.expert_map), len(merged.experts), merged.experts.width, merged.experts.inner_width)
    if found != (expected := (shape.num_experts, kept, shape.width, shape.inner_width)):
        raise ValueError(f"layer {layer.index} has (E, r, d, f) = {found}; {expected} were planned")
    if export.format == "expanded" and not bool(merged.kept.all()):
        raise ConfigError(
            f"layer {layer.index} has pruned experts, which expanded cannot hold; write shrunk or compact"
        )
    if export.format == "shrunk":
        if layer.router is None and int(merged.kept.sum()) != kept:
            raise ConfigError(
                f"layer {layer.index} merges experts, so shrunk needs a router of {kept} rows; choose a router policy"
            )
        if layer.router is not None and layer.router.shape != (kept, shape.width):
            raise ValueError(
                f"the router of layer {layer.index} is {tuple(layer.router.shape)}, not {(kept, shape.width)}"
            )


def _config(export: Export) -> dict[str, Any]:
    """The config.json of the source with what the format changes."""
    shape = export.source.shape
    config = json.loads((export.source.folder / "config.json").read_text())
    config.pop("auto_map", None)  # its code is not copied
    count = next(iter(export.experts.values())) if export.format == "shrunk" else shape.num_experts
    config |= dict.fromkeys(shape.architecture.count_keys, count) | {"num_experts_per_tok": export.top_k}
    if export.format != "compact":
        return config
    config_class, model_class = modeling.classes(shape.architecture.model_type)
    return config | {
        "model_type": config_class.model_type,
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{Path(CODE).stem}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{Path(CODE).stem}.{model_class.__name__}",
        },
        "merged_experts_per_layer": [export.experts.get(layer, 0) for layer in range(shape.num_layers)],
        "hcsmoe_version": modeling.VERSION,
    }


def _companions(folder: Path) -> list[Path]:
    """Tokenizer, generation settings and licence; no code."""
    found = {file for pattern in _COPIED for file in folder.glob(pattern) if file.is_file() and file.suffix != ".py"}
    return sorted(found)


def _stored_bytes(source: Source) -> dict[str, int]:
    """Of each entry, by the files' tables of contents."""
    found = {}
    for file in set(source.shards.values()):
        with (source.folder / file).open("rb") as stream:
            table = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in table.items() if n in source.shards}
    return found

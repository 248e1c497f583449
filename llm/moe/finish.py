"""From merged layers to a checkpoint that loads, proven by opening it in a fresh process.

What the new checkpoint must compute comes from walking through the merged layers one at a time, which shares no code
with the classes that open the checkpoint.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from launch import config as configs
from launch.errors import ConfigError, DataError
from llm.moe.calibrate import read_calibration, read_layers
from llm.moe.experts import DROPPED, LayerTokens
from llm.moe.formats import FinishedLayer, Format, plan, predicted_bytes, write
from llm.moe.merge import layer_file, load_layer, load_map, read_merge
from llm.moe.router import RouterPolicy, fit_router, router_rows
from llm.moe.source import Source, open_source
from llm.moe.verify import verify
from llm.moe.walk import Walk, start_walk

_BLOCKS, _LENGTH = 2, 256  # of the calibration text, for the comparison of logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishConfig:
    """How merged layers become a checkpoint."""

    format: Format = "compact"
    router: RouterPolicy = "frequency_mean"  # shrunk: the rows of merged experts; "fit" is trained on the calibration
    top_k: int | None = None  # shrunk: experts that a token selects, at most those that are kept; null: as before
    verify: bool = True  # reload in a fresh process, which needs memory for the whole new model


def finish(merged: Path, to: Path, config: FinishConfig, device: torch.device) -> dict[str, Any]:
    """Write the new folder `to`; its merge_report.json.

    ConfigError if the format cannot hold what was merged, DataError if layers are missing, CheckpointError if the disk
    is full or the result does not compute what it should; then nothing is left of it.
    """
    manifest = read_merge(merged)
    source = open_source(Path(manifest["model_folder"]))
    if source.fingerprint != manifest["model"]:
        raise DataError(f"{source.folder} is no longer the model that {merged} was made of; merge it again")
    if missing := [n for n in source.shape.moe_layers if not layer_file(merged, n).exists()]:
        raise DataError(f"{merged} lacks layer {missing[0]}; the same `unmask moe merge` goes on where it was stopped")
    maps = {n: load_map(merged, n) for n in source.shape.moe_layers}
    counts = {n: int(expert_map.max()) + 1 for n, expert_map in maps.items()}
    prunes = any(bool((expert_map == DROPPED).any()) for expert_map in maps.values())
    merges = any(int((expert_map != DROPPED).sum()) > counts[n] for n, expert_map in maps.items())
    export = plan(source, config.format, counts, prunes=prunes, top_k=config.top_k)
    text = read_calibration(Path(manifest["statistics"]), source)
    blocks = dict(enumerate(text.blocks[:_BLOCKS, :_LENGTH]))

    def report(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {
            "format": config.format,
            "recipe": manifest["recipe"],
            "model": Path(manifest["model_folder"]).name,
            "text_sha256": manifest["text_sha256"],
            "experts_before": source.shape.num_experts,
            "experts_after": counts,
            "bytes": predicted_bytes(export),
            "experts_of_a_token": {"before": source.shape.rule.top_k, "after": export.top_k},
            "active_parameters": "unchanged: a merge saves memory, not work"
            if export.top_k == source.shape.rule.top_k
            else f"{(source.shape.rule.top_k - export.top_k) * source.shape.expert_parameters:,} fewer a layer",
            "router": config.router if config.format == "shrunk" and merges else "as before",
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "unmask")},
        }
        if config.verify:
            reference = torch.stack([*_reference(source, merged, blocks, device).values()])
            stored = source.tensor(source.shape.architecture.router(source.shape.moe_layers[0])).dtype
            exact = "float32" if stored == torch.float32 or device.type == "cpu" else "bfloat16"
            found["verification"] = dataclasses.asdict(
                verify(folder, reference, torch.stack([*blocks.values()]), form=config.format, dtype=exact)
            )
        return found

    walk = start_walk(source, dict(enumerate(text.blocks)), device) if _fits_router(config, merges) else None
    finished = _finished(source, merged, Path(manifest["statistics"]), config, merges, walk)
    write(export, to, finished, report)
    return configs.read_yaml(to / "merge_report.json")


def _fits_router(config: FinishConfig, merges: bool) -> bool:
    if config.router not in get_args(RouterPolicy):
        raise ConfigError(f"router = {config.router!r}; one of {', '.join(get_args(RouterPolicy))}")
    return config.format == "shrunk" and config.router == "fit" and merges


def _finished(
    source: Source, merged: Path, statistics: Path, config: FinishConfig, merges: bool, walk: Walk | None
) -> Iterator[FinishedLayer]:
    """Layer by layer, with a router of r rows where the format needs one that is not the old one's rows."""
    frequencies = {n: found.frequency() for n, (found, _) in read_layers(statistics, source).items()}
    for index in range(source.shape.num_layers):
        if index not in source.shape.moe_layers:
            if walk is not None:
                walk.layer(index, None)
            continue
        layer = load_layer(merged, index)
        router = None
        if config.format == "shrunk" and merges:
            weight = source.tensor(source.shape.architecture.router(index))
            router = router_rows(weight, layer.expert_map, config.router, frequencies[index])
            if walk is not None:
                seen: list[LayerTokens] = []
                walk.look(index, lambda _, tokens, seen=seen: seen.append(tokens))
                router = fit_router(router.to(walk.device), seen, layer.expert_map, source.shape.rule)
                walk.layer(index, source.experts(index).to(walk.device))
        yield FinishedLayer(index=index, merged=layer, router=router)


def _reference(source: Source, merged: Path, blocks: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """Logits of the merged layers, by their definition."""
    walk = start_walk(source, blocks, device)
    for index in range(source.shape.num_layers):
        is_merged = index in source.shape.moe_layers
        walk.layer(index, load_layer(merged, index).to(device) if is_merged else None)
    return walk.logits()

"""From a model on disk and the statistics of a calibration to merged layers on disk: a layer in memory at a time.

MERGED/
    merge.json                which model, which statistics, which recipe; a later call goes on only if all are the same
    layer_000.safetensors     the merged experts of a layer and the expert map, written whole or not at all

`unmask moe export` makes checkpoints of it. The model itself is never written to.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from launch import config as configs
from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.moe.calibrate import my_blocks, read_calibration, read_layers
from llm.moe.clustering import check_clusters
from llm.moe.experts import Experts, LayerTokens, MergedLayer
from llm.moe.files import save_json, save_tensors
from llm.moe.recipe import Groups, MergeConfig, group_all, merge_layer
from llm.moe.source import Source
from llm.moe.statistics import measure, weight_gram
from llm.moe.walk import Walk, start_walk

FORMAT = "unmask-moe-merged-1"
_MANIFEST = "merge.json"


def merge(source: Source, statistics: Path, config: MergeConfig, out: Path, runtime: Runtime) -> None:
    """Collective. The merged layers of a model in `out`; those that are there stay.

    Rank 0 merges. Where tokens are read again, each rank takes its blocks of the text through the layers.
    ConfigError or DataError before any work if the recipe does not suit the model, the statistics or the folder.
    """
    check_clusters(config.experts, source.shape.num_experts)
    text = runtime.together(lambda: read_calibration(statistics, source))
    runtime.decide(lambda: _begin(source, statistics, text.sha256, config, out))
    missing = runtime.decide(lambda: [n for n in source.shape.moe_layers if not layer_file(out, n).exists()])
    if not missing:
        return
    groups = [None] * len(source.shape.moe_layers)
    if runtime.is_main and not config.sequential:
        groups = group_all(config, [*read_layers(statistics, source).values()])
    walk = start_walk(source, my_blocks(text, runtime), runtime.device) if config.reads_tokens else None
    layers = range(max(missing) + 1) if walk else missing
    for index in tqdm(layers, "merge", unit="layer", disable=not runtime.is_main):
        if index not in source.shape.moe_layers:
            assert walk is not None
            walk.layer(index, None)
            continue
        experts = source.experts(index).to(runtime.device)
        grouped = groups[source.shape.moe_layers.index(index)]
        if index not in missing:
            assert walk is not None
        elif walk is None:
            runtime.decide(lambda e=experts, g=grouped, i=index: _make(config, source, e, g, [], out, i))
        else:
            tokens = _all_tokens(walk, index, runtime)
            runtime.decide(lambda e=experts, g=grouped, t=tokens, i=index: _make(config, source, e, g, t, out, i))
        if walk is not None:
            behind = load_layer(out, index).to(runtime.device) if config.sequential else experts
            runtime.together(lambda i=index, b=behind: walk.layer(i, b))
            del behind
        del experts  # before the next layer is read


def _make(
    config: MergeConfig,
    source: Source,
    experts: Experts,
    groups: Groups | None,
    tokens: Sequence[LayerTokens],
    out: Path,
    index: int,
) -> None:
    """Rank 0: merge a layer and save it."""
    rule = source.shape.rule
    if config.sequential:
        statistics = [measure(experts, batch, rule) for batch in tokens]
        total = statistics[0]
        for part in statistics[1:]:
            total = total + part
        (groups,) = group_all(config, [(total, weight_gram(experts))])
    save_layer(merge_layer(config, experts, groups, tokens, rule), out, index)


def _all_tokens(walk: Walk, index: int, runtime: Runtime) -> list[LayerTokens]:
    """Collective. What a layer sees of each block of the text, in the order of the text, on rank 0 (else empty)."""
    seen: dict[int, LayerTokens] = {}

    def on_tokens(number: int, tokens: LayerTokens) -> None:
        seen[number] = tokens

    runtime.together(lambda: walk.look(index, on_tokens))
    parts = runtime.gather({number: (tokens.hidden.cpu(), tokens.logits.cpu()) for number, tokens in seen.items()})
    if not runtime.is_main:
        return []
    every = {number: found for part in parts for number, found in part.items()}
    return [
        LayerTokens(hidden=hidden.to(runtime.device), logits=logits.to(runtime.device))
        for _, (hidden, logits) in sorted(every.items())
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.safetensors"


def save_layer(layer: MergedLayer, folder: Path, index: int) -> None:
    """CheckpointError if the disk does not take it."""
    tensors = {"expert_map": layer.expert_map, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
    save_tensors(tensors, layer_file(folder, index))


def load_layer(folder: Path, index: int) -> MergedLayer:
    """DataError if the file is missing or torn."""
    found = _load(folder, index, "expert_map", "gate_up", "down")
    experts = Experts(gate_up=found["gate_up"], down=found["down"])
    return MergedLayer(expert_map=found["expert_map"], experts=experts)


def load_map(folder: Path, index: int) -> Tensor:
    """The expert map of a layer, int64 [E], without its experts. DataError as in `load_layer`."""
    return _load(folder, index, "expert_map")["expert_map"]


def _load(folder: Path, index: int, *names: str) -> dict[str, Tensor]:
    path = layer_file(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run the same `unmask moe merge`") from None


def read_merge(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of merged layers. DataError if it is none."""
    try:
        found = json.loads((folder / _MANIFEST).read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder of `unmask moe merge` ({error}); merge first") from None


def _begin(source: Source, statistics: Path, text_sha256: str, config: MergeConfig, out: Path) -> None:
    mine = {
        "format": FORMAT,
        "model": source.fingerprint,
        "model_folder": str(source.folder.resolve()),
        "statistics": str(statistics.resolve()),
        "text_sha256": text_sha256,
        "recipe": configs.to_dict(config),
    }
    if (out / _MANIFEST).exists():
        found = read_merge(out)
        for key in ("model", "text_sha256", "recipe"):
            if found[key] != mine[key]:
                raise ConfigError(
                    f"{out} was begun with another {key.removesuffix('_sha256')} ({found[key]}); choose another "
                    "folder, or remove it"
                )
        return
    if out.exists() and any(file.name != f"{_MANIFEST}.tmp" for file in out.iterdir()):
        raise ConfigError(f"{out} holds other files; choose another folder")
    save_json(mine, out / _MANIFEST)

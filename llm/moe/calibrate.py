"""One pass of calibration text through a model on disk, and the sums that it leaves: a file a layer.

STATISTICS/
    calibration.json          which model, which text; a later call goes on only if both are the same
    text.safetensors          the blocks of token ids
    layer_000.safetensors     sums over tokens (statistics.py), written whole or not at all

Memory: a layer, its widest expert in the type of the computation, and the hidden states of the text. Sums are added up
block by block in the order of the text, so that any number of ranks gives the same bits.
"""

import json
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.moe.calibration_text import CalibrationText, load_text, save_text
from llm.moe.experts import Experts, LayerTokens
from llm.moe.files import save_json
from llm.moe.source import Source
from llm.moe.statistics import LayerStatistics, load_statistics, measure, save_statistics, weight_gram
from llm.moe.walk import Walk, start_walk

_MANIFEST = "calibration.json"
_TEXT = "text.safetensors"
FORMAT = "unmask-moe-calibration-1"


def calibrate(
    source: Source, make_text: Callable[[], CalibrationText], folder: Path, runtime: Runtime
) -> CalibrationText:
    """Collective. Statistics of all MoE layers in `folder`; those that are there stay. The text that was used.

    ConfigError if the folder belongs to another model or text.
    """
    runtime.decide(lambda: _begin(source, make_text, folder))
    text = load_text(folder / _TEXT)
    missing = runtime.decide(lambda: [n for n in source.shape.moe_layers if not statistics_file(folder, n).exists()])
    if not missing:
        return text
    walk = start_walk(source, my_blocks(text, runtime), runtime.device)
    layers = range(max(missing) + 1)
    for index in tqdm(layers, "calibrate", unit="layer", disable=not runtime.is_main):
        if index not in source.shape.moe_layers:
            runtime.together(lambda index=index: walk.layer(index, None))
            continue
        experts = source.experts(index).to(runtime.device)
        if index not in missing:
            runtime.together(lambda index=index, experts=experts: walk.layer(index, experts))
            del experts
            continue
        statistics = measure_layer(walk, index, experts, runtime)
        runtime.decide(
            lambda index=index, experts=experts, statistics=statistics: save_statistics(
                statistics, weight_gram(experts), statistics_file(folder, index)
            )
        )
        del experts  # before the next layer is read
    return text


def measure_layer(walk: Walk, index: int, experts: Experts, runtime: Runtime) -> LayerStatistics:
    """Collective. Take the walk through a MoE layer, and add up what all ranks have seen, in the order of the text."""
    seen: dict[int, LayerStatistics] = {}

    def on_tokens(number: int, tokens: LayerTokens) -> None:
        seen[number] = measure(experts, tokens, walk.source.shape.rule)

    runtime.together(lambda: walk.look(index, on_tokens))
    runtime.together(lambda: walk.layer(index, experts))
    everyone: dict[int, LayerStatistics] = {}
    for part in runtime.gather(seen):
        everyone |= part
    return reduce(add, (everyone[number] for number in sorted(everyone)))


def my_blocks(text: CalibrationText, runtime: Runtime) -> dict[int, Tensor]:
    """The blocks of this rank, by number."""
    return {number: text.blocks[number] for number in range(runtime.rank, len(text.blocks), runtime.world_size)}


def statistics_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.safetensors"


def read_calibration(folder: Path, source: Source) -> CalibrationText:
    """The text behind a folder of statistics. DataError if it is none, is not complete, or is of another model."""
    manifest = _manifest(folder)
    if manifest["model"] != source.fingerprint:
        raise DataError(
            f"{folder} holds statistics of {manifest['model_folder']}, whose entries differ from those of "
            f"{source.folder}; calibrate {source.folder} into a folder of its own"
        )
    absent = [n for n in source.shape.moe_layers if not statistics_file(folder, n).exists()]
    if absent:
        raise DataError(
            f"{folder} lacks {len(absent)} of {len(source.shape.moe_layers)} layers, the first is {absent[0]}; the "
            "same `unmask moe calibrate` goes on where it was stopped"
        )
    return load_text(folder / _TEXT)


def read_layers(folder: Path, source: Source) -> dict[int, tuple[LayerStatistics, Tensor]]:
    """Statistics and Gram matrix of the weights, by MoE layer."""
    return {n: load_statistics(statistics_file(folder, n)) for n in source.shape.moe_layers}


def _begin(source: Source, make_text: Callable[[], CalibrationText], folder: Path) -> None:
    """Rank 0: the folder with its text; the text is made even if it is there, to see that it is the same."""
    text = make_text()
    mine = {
        "format": FORMAT,
        "model": source.fingerprint,
        "model_folder": str(source.folder),
        "text_sha256": text.sha256,
        "blocks": len(text.blocks),
        "block_length": text.blocks.shape[1],
        "sources": {name: text.sources.count(name) for name in dict.fromkeys(text.sources)},
    }
    if (folder / _MANIFEST).exists():
        found = _manifest(folder)
        if differing := [key for key in ("model", "text_sha256") if found[key] != mine[key]]:
            what = {"model": "model", "text_sha256": "text"}[differing[0]]
            raise ConfigError(
                f"{folder} was begun with another {what} ({found['model_folder']}, {found['blocks']} blocks of "
                f"{found['block_length']}); choose another folder, or remove it"
            )
        return
    save_text(text, folder / _TEXT)
    save_json(mine, folder / _MANIFEST)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder of `unmask moe calibrate` ({error}); calibrate first") from None

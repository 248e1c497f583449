"""From merged layers to a folder that loads: exact formats prove it, others say how far, failures leave nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import CheckpointError, ConfigError, DataError
from launch.runtime import Runtime
from llm.moe import finish as finishing
from llm.moe.assemble import with_merged
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationText
from llm.moe.finish import FinishConfig, finish
from llm.moe.merge import layer_file, load_layer, merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import open_source
from llm.moe.walk import start_walk
from tests import mixtures

TEXT = CalibrationText(blocks=mixtures.tokens(rows=3, length=24), sources=("here",) * 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its statistics, and merges of it."""
    folder = tmp_path_factory.mktemp("merged")
    runtime = Runtime(runtimes.Place(), CPU, None, None)  # type: ignore[arg-type]
    mixtures.mixture("qwen3_moe").save_pretrained(folder / "model")
    source = open_source(folder / "model")
    calibrate(source, lambda: TEXT, folder / "statistics", runtime)
    for name, recipe in {
        "hc": {},
        "uneven": {"allocation": "frequency"},
        "pruned": {"group": "prune"},
    }.items():
        config = configs.from_dict(MergeConfig, {"experts": 6, **recipe}, source="test")
        merge(source, folder / "statistics", config, folder / name, runtime)
    return folder


def test_the_walk_ends_in_the_logits_of_the_model(merged: Path) -> None:
    source = open_source(merged / "model")
    walk = start_walk(source, dict(enumerate(TEXT.blocks)), CPU)
    for index in range(source.shape.num_layers):
        walk.layer(index, source.experts(index))
    found = torch.stack([*walk.logits().values()])
    assert (found - mixtures.logits(mixtures.mixture("qwen3_moe"), TEXT.blocks)).abs().max() < 1e-5


def test_a_model_assembled_in_memory_computes_the_merged_layers(merged: Path) -> None:
    source = open_source(merged / "model")
    layers = {index: load_layer(merged / "pruned", index) for index in (0, 1)}
    found = mixtures.logits(with_merged(mixtures.mixture("qwen3_moe"), source, layers))
    expected = mixtures.logits(mixtures.with_loops(mixtures.mixture("qwen3_moe"), layers))
    assert (found - expected).abs().max() < 1e-5


def test_compact_is_exact_in_a_fresh_process_and_says_so(merged: Path, tmp_path: Path) -> None:
    report = finish(merged / "hc", tmp_path / "compact", FinishConfig(), CPU)
    assert report["verification"]["max_difference"] < 1e-5
    assert report["verification"]["tokens"] == 2 * 24
    assert json.loads((tmp_path / "compact" / "merge_report.json").read_text()) == report


@pytest.mark.parametrize("policy", ["frequency_mean", "fit"])
def test_shrunk_is_smaller_and_says_how_far_it_is(merged: Path, tmp_path: Path, policy: str) -> None:
    config = FinishConfig(format="shrunk", router=policy, top_k=4)  # type: ignore[arg-type]
    report = finish(merged / "hc", tmp_path / policy, config, CPU)
    assert report["router"] == policy
    assert report["verification"]["max_difference"] > 1e-3  # it is another router
    router = load_file(tmp_path / policy / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    assert router.shape == (6, 32)


def test_a_pruned_model_is_exact_with_the_rows_of_its_router(merged: Path, tmp_path: Path) -> None:
    report = finish(merged / "pruned", tmp_path / "shrunk", FinishConfig(format="shrunk"), CPU)
    assert report["router"] == "as before" and report["verification"]["max_difference"] < 1e-5


def test_what_a_format_cannot_hold_is_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write compact"):
        finish(merged / "uneven", tmp_path / "shrunk", FinishConfig(format="shrunk"), CPU)
    with pytest.raises(ConfigError, match="a pruned expert has none"):
        finish(merged / "pruned", tmp_path / "expanded", FinishConfig(format="expanded"), CPU)
    with pytest.raises(DataError, match="is no folder of `unmask moe merge`"):
        finish(merged / "model", tmp_path / "compact", FinishConfig(), CPU)
    assert not list(tmp_path.iterdir())


def test_a_result_that_computes_something_else_leaves_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {
        number: logits + 1
        for number, logits in finishing._reference(
            open_source(merged / "model"), merged / "hc", dict(enumerate(TEXT.blocks[:2])), CPU
        ).items()
    }
    monkeypatch.setattr(finishing, "_reference", lambda *_: other)
    with pytest.raises(CheckpointError, match="it must not be used"):
        finish(merged / "hc", tmp_path / "compact", FinishConfig(), CPU)
    assert not list(tmp_path.iterdir())


def test_missing_layers_and_a_changed_model_are_named(merged: Path, tmp_path: Path) -> None:
    layer_file(merged / "uneven", 1).rename(tmp_path / "away")
    with pytest.raises(DataError, match="lacks layer 1"):
        finish(merged / "uneven", tmp_path / "compact", FinishConfig(), CPU)
    (tmp_path / "away").rename(layer_file(merged / "uneven", 1))

"""From a calibration and a merge to a checkpoint, by the command line and without it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.moe import modeling
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationText
from llm.moe.command_line import main
from llm.moe.experts import LayerTokens, MergedLayer
from llm.moe.finish import FinishConfig, finish
from llm.moe.formats import Format
from llm.moe.merge import load_layer, merge, save_layer
from llm.moe.recipe import MergeConfig
from llm.moe.router import router_agreement, router_rows
from llm.moe.source import open_source
from llm.moe.verify import compare
from tests import mixtures

TEXT = CalibrationText(blocks=mixtures.tokens(rows=5, length=24), sources=("here",) * 5)
RECIPES = {"merged": {}, "pruned": {"group": "prune"}}
CPU = torch.device("cpu")


def alone() -> Runtime:
    return Runtime(runtimes.Place(), CPU, None, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE with one dense layer, its statistics, merges to six experts, and one that is uneven."""
    folder = tmp_path_factory.mktemp("exported")
    mixtures.mixture("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]).save_pretrained(folder / "model")
    source = open_source(folder / "model")
    calibrate(source, lambda: TEXT, folder / "statistics", alone())
    for name, recipe in RECIPES.items():
        config = configs.from_dict(MergeConfig, {"experts": 6, **recipe}, source="test")
        merge(source, folder / "statistics", config, folder / name, alone())
    shutil.copytree(folder / "merged", folder / "uneven")
    block = mixtures.blocks_of(opened(folder / "model"))[2]
    save_layer(mixtures.merge_means(block, mixtures.groups(16, 7)), folder / "uneven", 2)
    return folder


def written(folder: Path, to: Path, form: Format, merged: str = "merged", **settings: Any) -> dict[str, Any]:
    return finish(folder / merged, to, FinishConfig(format=form, verify=False, **settings), CPU)


def opened(folder: Path) -> transformers.PreTrainedModel:
    modeling.register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def expected(folder: Path, merged: str = "merged") -> Tensor:
    """Logits of the calibration text by the definition of a merged layer, in a whole model."""
    layers = {layer: load_layer(folder / merged, layer) for layer in (0, 2)}
    return mixtures.logits(mixtures.with_loops(opened(folder / "model"), layers), TEXT.blocks)


def test_the_command_writes_verifies_and_reports(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(folder / "merged"), "--to", str(tmp_path / "new")]) == 0
    assert "reloaded: logits differ by at most" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "merge_report.json").read_text())
    assert report["verification"]["max_difference"] < 1e-5 and report["verification"]["top1_agreement"] == 1.0
    assert report["recipe"]["linkage"] == "average" and report["text_sha256"] == TEXT.sha256
    assert report["experts_after"] == {"0": 6, "2": 6}
    assert opened(tmp_path / "new").config.merged_experts_per_layer == [6, 0, 6]


@pytest.mark.parametrize("merged", ["merged", "pruned", "uneven"])
def test_compact_computes_what_was_merged(folder: Path, merged: str, tmp_path: Path) -> None:
    report = written(folder, tmp_path / "new", "compact", merged)
    assert compare(opened(tmp_path / "new"), expected(folder, merged), TEXT.blocks).max_difference < 1e-5
    assert sum(report["experts_after"].values()) == (13 if merged == "uneven" else 12)


@pytest.mark.parametrize("policy", ["representative", "mean", "frequency_mean"])
def test_shrunk_has_the_rows_of_its_policy(folder: Path, policy: Any, tmp_path: Path) -> None:
    report = written(folder, tmp_path / "new", "shrunk", router=policy)
    assert report["router"] == policy and report["experts_of_a_token"] == {"before": 4, "after": 4}
    source = open_source(folder / "model")
    weight, expert_map = source.tensor("model.layers.2.mlp.gate.weight"), load_layer(folder / "merged", 2).expert_map
    frequency = load_file(folder / "statistics" / "layer_002.safetensors")["selections"]
    expected = router_rows(weight, expert_map, policy, frequency)
    assert torch.equal(opened(tmp_path / "new").model.layers[2].mlp.gate.weight, expected)


def test_a_fitted_router_is_nearer_to_the_gates_of_every_layer_than_where_it_started(
    folder: Path, tmp_path: Path
) -> None:
    for policy in ("frequency_mean", "fit"):
        written(folder, tmp_path / policy, "shrunk", router=policy)
    seen: dict[int, list[LayerTokens]] = {0: [], 2: []}
    original = opened(folder / "model")
    for layer, batches in seen.items():
        original.model.layers[layer].mlp.gate.register_forward_hook(
            lambda _module, inputs, found, batches=batches: batches.append(
                LayerTokens(hidden=inputs[0], logits=found[0])
            )
        )
    mixtures.logits(original, TEXT.blocks)
    rule = open_source(folder / "model").shape.rule
    for layer, batches in seen.items():
        expert_map = load_layer(folder / "merged", layer).expert_map
        divergence = {}
        for policy in ("frequency_mean", "fit"):
            rows = load_file(tmp_path / policy / "model.safetensors")[f"model.layers.{layer}.mlp.gate.weight"]
            divergence[policy] = router_agreement(rows, batches, expert_map, rule).divergence
        assert divergence["fit"] < 0.95 * divergence["frequency_mean"]


def test_fewer_experts_than_a_token_selects_need_a_lower_top_k(folder: Path, tmp_path: Path) -> None:
    config = MergeConfig(experts=3, group="prune")
    merge(open_source(folder / "model"), folder / "statistics", config, folder / "three", alone())
    with pytest.raises(ConfigError, match="cannot select 4 of the 3 experts"):
        written(folder, tmp_path / "new", "shrunk", "three")
    assert written(folder, tmp_path / "new", "shrunk", "three", top_k=3)["experts_of_a_token"]["after"] == 3
    assert opened(tmp_path / "new").config.num_experts_per_tok == 3
    assert compare(opened(tmp_path / "new"), expected(folder, "three"), TEXT.blocks).max_difference < 1e-5


@pytest.mark.parametrize("order", [[0, 2], [2, 0]])
def test_a_pruning_that_spares_some_layers_is_one(folder: Path, order: list[int], tmp_path: Path) -> None:
    """As pruning over all layers may do: one layer keeps all its experts, whichever is first."""
    shutil.copytree(folder / "pruned", tmp_path / "pruned")
    whole = MergedLayer(expert_map=torch.arange(16), experts=open_source(folder / "model").experts(order[0]))
    save_layer(whole, tmp_path / "pruned", order[0])
    with pytest.raises(ConfigError, match="a pruned expert has none"):
        written(tmp_path, tmp_path / "new", "expanded", "pruned")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("form", "merged", "settings", "sentence"),
    [
        ("shrunk", "uneven", {"router": "mean"}, "one number for all layers; write compact"),
        ("expanded", "pruned", {}, "a pruned expert has none; write shrunk, or compact"),
        ("shrunk", "merged", {"router": "freqency_mean"}, "one of .*frequency_mean"),
        ("compat", "merged", {}, "did you mean 'compact'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    folder: Path, form: Any, merged: str, settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        written(folder, tmp_path / "new", form, merged, **settings)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_a_merge_that_was_stopped_is_refused(folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(folder / "merged", merged)
    manifest = (merged / "merge.json").read_text()
    (merged / "merge.json").write_text(json.dumps(json.loads(manifest) | {"model": "another"}))
    with pytest.raises(DataError, match=r"is no longer the model that .* was made of"):
        finish(merged, tmp_path / "new", FinishConfig(), CPU)
    (merged / "merge.json").write_text(manifest)
    (merged / "layer_002.safetensors").unlink()
    with pytest.raises(DataError, match="lacks layer 2"):
        finish(merged, tmp_path / "new", FinishConfig(), CPU)
    assert not (tmp_path / "new").exists()

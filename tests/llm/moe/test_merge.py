"""Merged layers on disk: by every recipe, at any number of ranks, across kills, and what is refused."""

from pathlib import Path

import pytest
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationText
from llm.moe.experts import DROPPED
from llm.moe.merge import layer_file, load_layer, merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import Source, open_source
from tests import mixtures
from tests.processes import spawn

TEXT = CalibrationText(blocks=mixtures.tokens(rows=5, length=24), sources=("here",) * 5)
RECIPES = {
    "hc-smoe": {},
    "single": {"linkage": "single"},
    "two representations": {"representation": "0.5*output+weights"},
    "by dendrogram": {"allocation": "dendrogram"},
    "by frequency, protected": {"allocation": "frequency", "protect": 4},
    "k-means": {"group": "k_means"},
    "m-smoe": {"group": "one_shot", "scope": "global"},
    "ream": {"group": "ream", "combine": "permutation", "ingredients": "both", "sequential": True},
    "fix-dominant": {"combine": "fix_dominant"},
    "zipit": {"combine": "zipit"},
    "permuted by weights": {"combine": "permutation", "ingredients": "weights"},
    "protected": {"protect": 2},
    "f-prune": {"group": "prune", "saliency": "frequency"},
    "s-prune over all layers": {"group": "prune", "saliency": "probability", "scope": "global"},
    "reap": {"group": "prune"},
    "o-prune": {"group": "o_prune", "subsets": 20},
    "sequential": {"sequential": True},
    "fitted to clusters": {"fit": "mixture"},
    "chosen neurons of balanced groups": {"group": "balanced", "combine": "neurons", "fit": "layer"},
    "fitted to coefficients": {"fit": "coefficients"},
    "pruned and fitted to the layer": {"group": "prune", "fit": "layer", "sweeps": 2},
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


def alone() -> Runtime:
    return Runtime(runtimes.Place(), torch.device("cpu"), None, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its statistics."""
    folder = tmp_path_factory.mktemp("calibrated")
    mixtures.mixture("qwen2_moe").save_pretrained(folder / "model", max_shard_size="60KB")
    calibrate(open_source(folder / "model"), lambda: TEXT, folder / "statistics", alone())
    return folder


def merged(calibrated: Path, out: Path, **recipe: object) -> Source:
    source = open_source(calibrated / "model")
    config = configs.from_dict(MergeConfig, {"experts": 5, **recipe}, source="test")
    merge(source, calibrated / "statistics", config, out, alone())
    return source


@recipes
def test_every_recipe_merges_weights_in_half_precision(recipe: dict[str, object], tmp_path: Path) -> None:
    """They are computed with in single precision, which is where types could meet that do not mix."""
    mixtures.mixture("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    calibrate(source, lambda: TEXT, tmp_path / "statistics", alone())
    merged(tmp_path, tmp_path / "merged", **recipe)
    for index in source.shape.moe_layers:
        layer = load_layer(tmp_path / "merged", index)
        assert layer.experts.down.dtype == layer.experts.gate_up.dtype == torch.bfloat16
        assert layer.experts.down.isfinite().all() and layer.experts.gate_up.isfinite().all()


@recipes
def test_every_recipe_leaves_as_many_experts_as_were_asked_for(
    recipe: dict[str, object], calibrated: Path, tmp_path: Path
) -> None:
    source = merged(calibrated, tmp_path / "merged", **recipe)
    layers = [load_layer(tmp_path / "merged", index) for index in source.shape.moe_layers]
    uniform = recipe.get("allocation", "uniform") == "uniform" and recipe.get("scope", "layer") == "layer"
    counts = [len(layer.experts) for layer in layers]
    assert sum(counts) == 10 and (not uniform or counts == [5, 5])
    for layer in layers:
        assert layer.expert_map.shape == (12,)
        assert layer.experts.down.isfinite().all() and layer.experts.gate_up.isfinite().all()
        drops = (layer.expert_map == DROPPED).any()
        assert drops == (recipe.get("group") in ("prune", "o_prune", "ream"))


def merge_as_rank(calibrated: str, out: str, recipe: dict[str, object]) -> None:
    runtime = runtimes.start(device="cpu", timeout_seconds=60)
    config = configs.from_dict(MergeConfig, {"experts": 5, **recipe}, source="test")
    merge(open_source(Path(calibrated) / "model"), Path(calibrated) / "statistics", config, Path(out), runtime)
    runtime.close()


@pytest.mark.parametrize("name", ["hc-smoe", "fix-dominant", "sequential"])
def test_two_and_four_ranks_leave_the_same_bytes_as_one(name: str, calibrated: Path, tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        spawn(merge_as_rank, ranks, str(calibrated), str(tmp_path / str(ranks)), RECIPES[name], group=False)
    for layer in (0, 1):
        one, two, four = (layer_file(tmp_path / name, layer).read_bytes() for name in "124")
        assert one == two == four


@pytest.mark.parametrize("name", ["hc-smoe", "zipit", "sequential"])
def test_a_later_call_makes_the_missing_layers_only(name: str, calibrated: Path, tmp_path: Path) -> None:
    merged(calibrated, tmp_path, **RECIPES[name])
    files = [layer_file(tmp_path, index) for index in (0, 1)]
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    first = files[0].stat().st_mtime_ns
    merged(calibrated, tmp_path, **RECIPES[name])
    assert files[0].stat().st_mtime_ns == first
    assert [file.read_bytes() for file in files] == whole


def test_sequential_statistics_are_those_behind_the_merged_layers(calibrated: Path, tmp_path: Path) -> None:
    merged(calibrated, tmp_path / "at once")
    merged(calibrated, tmp_path / "in turn", sequential=True)
    first, second = ([load_layer(tmp_path / name, index) for name in ("at once", "in turn")] for index in (0, 1))
    assert torch.equal(first[0].experts.down, first[1].experts.down)  # nothing is merged before it
    assert not torch.equal(second[0].experts.down, second[1].experts.down)


def test_all_experts_kept_are_the_model_itself(calibrated: Path, tmp_path: Path) -> None:
    source = merged(calibrated, tmp_path, experts=12)
    for index in source.shape.moe_layers:
        layer, experts = load_layer(tmp_path, index), source.experts(index)
        assert layer.expert_map.tolist() == list(range(12))
        assert torch.equal(layer.experts.down, experts.down) and torch.equal(layer.experts.gate_up, experts.gate_up)


def test_another_recipe_is_refused_where_one_was_begun(calibrated: Path, tmp_path: Path) -> None:
    merged(calibrated, tmp_path / "merged")
    with pytest.raises(ConfigError, match="begun with another recipe"):
        merged(calibrated, tmp_path / "merged", linkage="single")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        merged(calibrated, tmp_path / "else")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"group": "hirarchical"}, "did you mean 'hierarchical'?"),
        ({"representation": "router-logits"}, "router_logits"),
        ({"representation": "0*output"}, "no positive number"),
        ({"experts": 13}, "13"),
        ({"experts": 0}, "experts = 0"),
        ({"group": "prune", "linkage": "single"}, "linkage = single works with group = hierarchical"),
        ({"sweeps": 2}, "sweeps = 2 works with fit = layer"),
        ({"fit": "coefficients", "group": "prune"}, "and fit=layer"),
        ({"protect": 5}, "protect = 5; of experts = 5"),
        ({"sequential": True, "allocation": "dendrogram"}, "use allocation=uniform"),
    ],
)
def test_a_recipe_without_meaning_is_refused_before_any_work(
    recipe: dict[str, object], words: str, calibrated: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refusal:
        merged(calibrated, tmp_path / "merged", **recipe)
    assert words in str(refusal.value)
    assert not (tmp_path / "merged").exists()


def test_a_torn_layer_is_named(calibrated: Path, tmp_path: Path) -> None:
    merged(calibrated, tmp_path)
    layer_file(tmp_path, 1).write_bytes(layer_file(tmp_path, 1).read_bytes()[:-8])
    with pytest.raises(DataError, match=r"layer_001.safetensors cannot be read"):
        load_layer(tmp_path, 1)

"""Calibration layer by layer: sums of a whole model, at any number of ranks, across kills; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch import runtime as runtimes
from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm.moe import calibrate as calibration
from llm.moe.calibrate import calibrate, read_calibration, read_layers, statistics_file
from llm.moe.calibration_text import CalibrationText
from llm.moe.experts import LayerTokens
from llm.moe.source import open_source
from llm.moe.statistics import LayerStatistics, measure
from tests import mixtures
from tests.processes import spawn

architectures = pytest.mark.parametrize("architecture", mixtures.ARCHITECTURES)
TEXT = CalibrationText(blocks=mixtures.tokens(rows=5, length=24), sources=("here",) * 5)


def text() -> CalibrationText:
    return TEXT


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(runtimes.Place(), torch.device("cpu"), None, None)  # type: ignore[arg-type]


def saved(folder: Path, architecture: str, **changes: object) -> Path:
    """A model in several shards."""
    mixtures.mixture(architecture, **changes).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def by_hooks(folder: Path) -> dict[int, LayerStatistics]:
    """The statistics of a whole model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[int, list[Tensor]] = {}
    for layer, block in mixtures.blocks_of(model).items():
        block.gate.register_forward_hook(
            lambda _module, inputs, found, layer=layer: seen.setdefault(layer, []).extend([inputs[0], found[0]])
        )
    mixtures.logits(model, TEXT.blocks)
    rule = open_source(folder).shape.rule
    return {
        layer: measure(
            mixtures.experts_of(mixtures.blocks_of(model)[layer]), LayerTokens(hidden=hidden, logits=logits), rule
        )
        for layer, (hidden, logits) in seen.items()
    }


@architectures
def test_sums_of_a_model_read_in_layers_are_those_of_the_whole_model(
    architecture: str, tmp_path: Path, runtime: Runtime
) -> None:
    source = open_source(saved(tmp_path / "model", architecture))
    calibrate(source, text, tmp_path / "statistics", runtime)
    expected = by_hooks(source.folder)
    for layer, (found, _) in read_layers(tmp_path / "statistics", source).items():
        for name, value in vars(found).items():
            torch.testing.assert_close(value, getattr(expected[layer], name), rtol=1e-4, atol=1e-4, msg=name)


def test_layers_without_experts_are_passed_and_have_no_statistics(tmp_path: Path, runtime: Runtime) -> None:
    source = open_source(saved(tmp_path / "model", "qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1]))
    calibrate(source, text, tmp_path / "statistics", runtime)
    assert source.shape.moe_layers == (0, 2)
    assert set(read_layers(tmp_path / "statistics", source)) == {0, 2}
    found, expected = read_layers(tmp_path / "statistics", source)[2][0], by_hooks(source.folder)[2]
    assert (found.output_sum - expected.output_sum).abs().max() < 1e-5


def calibrate_as_rank(model: str, folder: str) -> None:
    runtime = runtimes.start(device="cpu", timeout_seconds=60)
    calibrate(open_source(Path(model)), text, Path(folder), runtime)
    runtime.close()


def test_two_and_three_ranks_leave_the_same_bytes_as_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "qwen3_moe")
    for ranks in (1, 2, 3):
        spawn(calibrate_as_rank, ranks, str(model), str(tmp_path / str(ranks)), group=False)
    for layer in (0, 1):
        one, two, three = (statistics_file(tmp_path / name, layer).read_bytes() for name in "123")
        assert one == two == three


def test_a_later_call_measures_the_missing_layers_only(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = open_source(saved(tmp_path / "model", "mixtral")), tmp_path / "statistics"
    calibrate(source, text, folder, runtime)
    whole = [statistics_file(folder, layer).read_bytes() for layer in (0, 1)]
    statistics_file(folder, 1).unlink()
    measured: list[int] = []
    measure_layer = calibration.measure_layer
    monkeypatch.setattr(
        calibration,
        "measure_layer",
        lambda walk, index, *rest: (measured.append(index), measure_layer(walk, index, *rest))[1],
    )
    with pytest.raises(DataError, match="lacks 1 of 2 layers, the first is 1"):
        read_calibration(folder, source)
    calibrate(source, text, folder, runtime)
    assert measured == [1]
    assert [statistics_file(folder, layer).read_bytes() for layer in (0, 1)] == whole


def test_a_torn_file_of_sums_is_named(tmp_path: Path, runtime: Runtime) -> None:
    source, folder = open_source(saved(tmp_path / "model", "mixtral")), tmp_path / "statistics"
    calibrate(source, text, folder, runtime)
    file = statistics_file(folder, 1)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"layer_001.safetensors cannot be read .*; remove it"):
        read_layers(folder, source)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no layer with experts"):
        open_source(change_config(saved(tmp_path / "model", "qwen2_moe"), mlp_only_layers=[0, 1]))


def test_a_folder_of_another_text_or_model_is_refused(tmp_path: Path, runtime: Runtime) -> None:
    source, folder = open_source(saved(tmp_path / "model", "mixtral")), tmp_path / "statistics"
    calibrate(source, text, folder, runtime)
    with pytest.raises(ConfigError, match="begun with another text"):
        calibrate(source, lambda: CalibrationText(blocks=TEXT.blocks[:3], sources=("here",) * 3), folder, runtime)
    other = open_source(saved(tmp_path / "other", "mixtral", num_local_experts=4))
    with pytest.raises(ConfigError, match="begun with another model"):
        calibrate(other, text, folder, runtime)
    with pytest.raises(DataError, match=r"calibrate .*other into a folder of its own"):
        read_calibration(folder, other)


# --- what is refused before any work ---------------------------------------------------------------------------------


def change_config(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(DataError, match=f"lacks the shard {gone.name}"):
        open_source(folder)


def test_a_torn_shard_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    torn = sorted(folder.glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{torn.name} is no whole safetensors file"):
        open_source(folder)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    mixtures.mixture("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"no entry model.layers.1.block_sparse_moe.experts.3.w2.weight, but"):
        open_source(tmp_path)


def test_quantised_weights_are_refused_by_configuration_and_by_type(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="as I8; merge weights of"):
        open_source(folder)
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match=r"quantised \(fp8\)"):
        open_source(folder)


def test_another_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="'llama' model; those of mixtral, qwen2_moe, qwen3_moe"):
        open_source(tmp_path)


def test_calibration_never_writes_to_the_model(tmp_path: Path, runtime: Runtime) -> None:
    folder = saved(tmp_path / "model", "mixtral")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calibrate(open_source(folder), text, tmp_path / "statistics", runtime)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

"""A run of llm.moe.train as a stock Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import cli
from launch import config as configs
from launch.errors import CheckpointError
from launch.random import generator, stream_key
from launch.stop import EXIT_USER_ERROR
from llm.data import tokenizers
from llm.moe import export as exporting
from llm.moe.config import MoeExperiment
from llm.moe.export import export
from llm.moe.source import open_source
from llm.moe.task import Mixture, MoeTask
from tests.llm.moe.conftest import TinyMixtures
from tests.runs import VOCAB_SIZE, Tiny, state

CPU = torch.device("cpu")


def batch() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch()).logits


@pytest.fixture
def as_if_trained(tiny_mixtures: TinyMixtures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run folder, the model of its one checkpoint, and lets `export` read the weights of that model."""

    def make(kind: str, *overrides: str) -> tuple[Path, Mixture]:
        config = configs.load(MoeExperiment, getattr(tiny_mixtures, kind), overrides)[0]
        task, run = MoeTask(config, CPU), tmp_path / "run"
        run.mkdir()
        (run / "config.yaml").write_text(configs.dump(config))
        task.keep_files(run)
        model = task.build_model()
        for name, parameter in model.named_parameters():
            model.init_parameter(name, parameter.data, generator(stream_key(0, "init", name)))
            parameter.data.mul_(5.0)
        weights = sorted((name, p.detach()) for name, p in model.named_parameters())
        monkeypatch.setattr(exporting, "stream", lambda _checkpoint, prefix: iter(weights))
        return run, model

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_export_opens_in_transformers_with_the_logits_of_the_run(
    as_if_trained: Any, kind: str, tied: bool, tmp_path: Path
) -> None:
    run, model = as_if_trained(kind, f"model.tied={str(tied).lower()}")
    assert export(run, tmp_path / "new", step=6) == 6
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert opened.config.model_type == kind and opened.config.architectures == [type(opened).__name__]
    assert torch.equal(logits(opened), logits(model.model))
    source = open_source(tmp_path / "new")  # and so `unmask moe` does
    assert source.shape.moe_layers == ((0, 1) if kind == "mixtral" else (1,))
    assert ("lm_head.weight" in source.shards) != tied
    assert torch.equal(source.experts(1).down, model.model.model.layers[1].mlp.experts.down_proj)


def test_half_precision_rounds_the_weights_and_says_so(as_if_trained: Any, tmp_path: Path) -> None:
    run, model = as_if_trained("mixtral")
    export(run, tmp_path / "new", step=1, dtype=torch.bfloat16)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert opened.dtype == torch.bfloat16
    assert torch.equal(logits(opened), logits(model.model.to(torch.bfloat16)))


def test_a_run_is_exported_with_its_averaged_weights_and_its_tokenizer_when_its_data_are_gone(
    tiny: Tiny, tiny_mixtures: TinyMixtures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    sources = f"data.sources=[{{path: {tmp_path / 'data'}}}]"
    run = tiny_mixtures.train("qwen3_moe", 1, tmp_path / "run", "engine.ema_decay=0.5", sources)
    shutil.rmtree(tmp_path / "data")
    assert cli.main(["export", str(run), "--to", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: step 6; next: unmask moe calibrate")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    saved = state(run, 6)
    table = opened.model.embed_tokens.weight
    assert torch.equal(table, saved["ema.model.model.embed_tokens.weight"])
    assert not torch.equal(table, saved["model.model.model.embed_tokens.weight"])
    ours = tokenizers.load(run)
    stock = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "Redistribution and use in source forms"
    assert [stock(text)["input_ids"]] == ours.encode_batch([text])
    assert (opened.config.eos_token_id, opened.config.bos_token_id) == (ours.eos_id, ours.bos_id)
    assert stock.eos_token_id == ours.eos_id

    capsys.readouterr()  # transformers' bars
    assert cli.main(["eval", str(run)]) == EXIT_USER_ERROR
    answer = capsys.readouterr().err
    assert answer.count("\n") == 1 and answer.startswith("error: there is no `unmask eval` for runs of llm.moe.train")
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, tmp_path / "new")
    assert cli.main(["export", str(run), "--to", str(tmp_path / "other"), "--step", "5"]) == EXIT_USER_ERROR
    assert "step_00000005" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_export_that_transformers_cannot_open_leaves_nothing_behind(
    as_if_trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = as_if_trained("mixtral")
    whole = exporting.on_disk
    without = "model.layers.1.block_sparse_moe.gate.weight"
    monkeypatch.setattr(exporting, "on_disk", lambda *a: ((n, t) for n, t in whole(*a) if n != without))
    with pytest.raises(AssertionError, match=r"missing_keys.*layers.1.mlp.gate.weight"):
        export(run, tmp_path / "new", step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_configuration_is_plain_data(as_if_trained: Any, tmp_path: Path) -> None:
    run, _ = as_if_trained("qwen2_moe")
    export(run, tmp_path / "new", step=1)
    described = json.loads((tmp_path / "new" / "config.json").read_text())
    assert described["dtype"] == "float32" and described["num_experts"] == 4 and described["mlp_only_layers"] == [0]
    assert described["shared_expert_intermediate_size"] == 12 and described["max_position_embeddings"] == 16
    assert described["initializer_range"] == 0.02

"""Every kind of model opens by the same call, and no two share a fingerprint."""

import json
from pathlib import Path

import pytest
import torch

from launch.errors import ConfigError
from llm.evals.models import HuggingFaceTokenizer, open_scorable
from llm.moe.experts import MergedLayer
from llm.moe.formats import FinishedLayer, plan, write
from llm.moe.source import open_source
from llm.pretrained import export
from tests.runs import Tiny
from tests.shape_true import write_shape

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["ar", "mdm", "prime"])
def test_a_run_and_its_export_are_the_same_model(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs[family], tmp_path / "out")
    run, exported = open_scorable(runs[family], CPU), open_scorable(tmp_path / "out", CPU)
    assert run.family == exported.family == family
    assert run.fingerprint == exported.fingerprint
    assert run.max_length == 16 and run.add_bos and run.first_token == run.tokenizer.eos_id
    assert run.is_causal == (family == "ar")
    assert not any(p.requires_grad for p in run.model.parameters()) and not run.model.training


def test_other_weights_have_another_fingerprint(runs: dict[str, Path]) -> None:
    averaged, last = (open_scorable(runs["prime"], CPU, weights=weights) for weights in ("ema", "model"))
    half = open_scorable(runs["prime"], CPU, dtype=torch.bfloat16)
    others = [open_scorable(runs[family], CPU).fingerprint for family in ("ar", "mdm")]
    assert len({averaged.fingerprint, last.fingerprint, half.fingerprint, *others}) == 5
    assert half.dtype == torch.bfloat16


def test_one_changed_number_changes_the_fingerprint(runs: dict[str, Path]) -> None:
    from llm.evals.models import weights_fingerprint

    model = open_scorable(runs["mdm"], CPU).model
    before = weights_fingerprint(model, {})
    assert before == weights_fingerprint(model, {}) != weights_fingerprint(model, {"rope_base": 1})
    next(model.parameters()).data.view(-1)[0] += 1e-3
    assert weights_fingerprint(model, {}) != before


def test_a_stock_folder_opens_as_a_hugging_face_model(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(runs["ar"], tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "stock")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "stock" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    (tmp_path / "stock" / "config.json").write_text(
        (tmp_path / "stock" / "config.json").read_text().replace("unmask_config", "their_config")
    )
    found = open_scorable(tmp_path / "stock", CPU)
    assert found.family == "huggingface" and found.language is None and found.is_causal
    assert found.max_length == 17 and found.dtype == torch.float32
    assert isinstance(found.tokenizer, HuggingFaceTokenizer) and not found.add_bos
    text = "Licensed under the terms"
    ours = open_scorable(runs["ar"], CPU).tokenizer
    assert found.tokenizer.encode_batch([text]) == ours.encode_batch([text])
    assert found.tokenizer.decode(found.tokenizer.encode_batch([text])[0]) == text


def test_a_folder_that_holds_no_model_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} is neither a run folder"):
        open_scorable(tmp_path, CPU)


def test_a_model_of_merged_experts_opens_with_our_classes_and_not_with_the_code_it_brings(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = open_source(write_shape(tmp_path / "source", "mixtral-8x7b", layers=1, **small))
    merged = MergedLayer(expert_map=torch.arange(8) % 2, experts=source.experts(0).take(torch.tensor([0, 1])))
    write(plan(source, "compact", {0: 2}), tmp_path / "compact", [FinishedLayer(index=0, merged=merged)], lambda _: {})
    settings = tmp_path / "compact" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "!"}))
    (tmp_path / "compact" / "modeling.py").write_text("raise AssertionError('this code was run')")
    opened = open_scorable(tmp_path / "compact", CPU)
    assert opened.family == "huggingface"
    assert opened.model.model.layers[0].mlp.experts.down_proj.shape == (2, 32, 48)  # type: ignore[union-attr]

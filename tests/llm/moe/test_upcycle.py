"""A mixture out of a dense Llama: the same function, other parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from launch.errors import CheckpointError, ConfigError
from llm.moe.source import open_source
from llm.moe.upcycle import UpcycleConfig, upcycle
from tests import mixtures
from tests.runs import Tiny

_DENSE = {"vocab_size": mixtures.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}


def dense(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**_DENSE, **_HEADS, **changes}), dtype=dtype)
    model.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "upcycling",
    [
        UpcycleConfig(),
        UpcycleConfig(experts=5, top_k=3),
        UpcycleConfig(kind="qwen2_moe"),
        UpcycleConfig(kind="qwen2_moe", every=2, expert_width=8, experts=6, top_k=4),
    ],
    ids=["mixtral", "mixtral of 5", "qwen2_moe", "qwen2_moe every second layer"],
)
def test_a_mixture_computes_what_the_dense_model_does(upcycling: UpcycleConfig, tied: bool, tmp_path: Path) -> None:
    scaled = {"rope_type": "default", "rope_theta": 500.0}  # that positions are taken over
    dense(tmp_path / "dense", tie_word_embeddings=tied, rope_parameters=scaled, rms_norm_eps=1e-5, head_dim=12)
    config = upcycle(tmp_path / "dense", tmp_path / "mixture", upcycling)
    found = opened(tmp_path / "mixture")
    difference = mixtures.logits(found) - mixtures.logits(opened(tmp_path / "dense"))
    assert difference.abs().max() < 1e-5
    shape = open_source(tmp_path / "mixture").shape
    assert (shape.num_experts, shape.rule.top_k) == (upcycling.experts, upcycling.top_k)
    assert shape.moe_layers == ((1, 3) if upcycling.every == 2 else (0, 1, 2, 3))
    assert config["model_type"] == upcycling.kind == found.config.model_type
    if upcycling.kind == "qwen2_moe":
        assert shape.inner_width == (upcycling.expert_width or 48 // upcycling.top_k)


def test_new_routed_experts_count_once_their_down_projections_move(tmp_path: Path) -> None:
    """They are not dead: gradients of their down projections are not zero, and neither is what reaches these."""
    dense(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleConfig(kind="qwen2_moe"))
    model = opened(tmp_path / "mixture")
    text = mixtures.tokens(rows=8, length=32)  # enough to come to all experts
    model(text, labels=text).loss.backward()
    experts = model.model.layers[2].mlp.experts
    assert experts.down_proj.grad.abs().amax((1, 2)).min() > 0
    matrix = opened(tmp_path / "dense").model.layers[2].mlp.gate_proj.weight.detach()
    spread = experts.gate_up_proj.detach().std() / matrix.std()
    assert 0.9 < float(spread) < 1.1
    assert experts.gate_up_proj[0].ne(experts.gate_up_proj[1]).all()


def test_noise_has_the_stated_size_is_different_for_each_expert_and_comes_from_the_seed(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    noisy = UpcycleConfig(noise=0.25, seed=3)
    for name, upcycling in (("one", noisy), ("same", noisy), ("other", UpcycleConfig(noise=0.25, seed=4))):
        upcycle(tmp_path / "dense", tmp_path / name, upcycling)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    original = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(one[name], same[name]) for name in one) and one.keys() == same.keys()
    places = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    noises = []
    for layer in range(4):
        for expert in range(8):
            for matrix, place in places.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                before = original[f"model.layers.{layer}.mlp.{place}.weight"]
                noise = (one[name] - before) / before.std()
                assert abs(float(noise.std()) / 0.25 - 1) < 4 / (2 * noise.numel()) ** 0.5
                assert abs(float(noise.mean())) < 4 * 0.25 / noise.numel() ** 0.5
                assert not torch.equal(one[name], other[name])
                noises.append(noise.flatten())
    together = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert together.abs().max() < 5.5 / noises[0].numel() ** 0.5
    kept = [name for name in original if ".mlp." not in name]
    assert len(kept) == 4 * 6 + 3 and all(torch.equal(one[name], original[name]) for name in kept)


def test_without_noise_all_experts_are_equal_and_routers_are_not(tmp_path: Path) -> None:
    upcycle(dense(tmp_path / "dense"), tmp_path / "mixture", UpcycleConfig())
    source = open_source(tmp_path / "mixture")
    experts, routers = source.experts(1), [source.tensor(source.shape.architecture.router(n)) for n in range(4)]
    assert all(torch.equal(experts.gate_up[0], experts.gate_up[j]) for j in range(8))
    assert not torch.equal(routers[0], routers[1])
    assert all(abs(float(rows.std()) / 0.02 - 1) < 0.2 for rows in routers)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_weights_keep_the_type_they_are_stored_in(kind: Any, tmp_path: Path) -> None:
    dense(tmp_path / "dense", dtype=torch.bfloat16)
    upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleConfig(kind=kind))
    assert {t.dtype for t in load_file(tmp_path / "mixture" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "mixture" / "config.json").read_text())["dtype"] == "bfloat16"
    single = [AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("dense", "mixture")]
    assert (mixtures.logits(single[0]) - mixtures.logits(single[1])).abs().max() < 1e-5  # doubling is exact


def test_the_tokenizer_comes_along(tiny: Tiny, tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).write_bytes((tiny.data / name).read_bytes())
    upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleConfig())
    text = "Redistribution and use"
    found, expected = (
        AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"] for name in ("mixture", "dense")
    )
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 9}, "--top-k 9; a token selects 1 to 8 experts"),
        ({"top_k": 0}, "--top-k 0"),
        ({"noise": -0.1}, "--noise -0.1; the smallest is 0"),
        ({"every": 0}, "--every 0; the smallest is 1"),
        ({"every": 2}, "--every 2 has no meaning for mixtral"),
        ({"expert_width": 8}, "--expert-width 8 has no meaning for mixtral"),
        ({"kind": "qwen2_moe", "noise": 0.1}, "--noise 0.1 has no meaning for qwen2_moe"),
        ({"kind": "qwen2_moe", "expert_width": 0}, "--expert-width 0; the smallest is 1"),
        ({"kind": "qwen2_moe", "expert_width": 12}, "--expert-width 12; grouped matrix products take multiples of 8"),
        ({"kind": "qwen2_moe", "top_k": 4}, "--expert-width 12; grouped matrix products take multiples of 8"),
        ({"kind": "qwen2_moe", "every": 5}, "--every 5 gives experts to none of the 4 layers"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    with pytest.raises(ConfigError) as refusal:
        upcycle(tmp_path / "dense", tmp_path / "mixture", UpcycleConfig(**changes))
    assert words in str(refusal.value)
    assert not (tmp_path / "mixture").exists()


def test_what_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    mixtures.mixture("mixtral").save_pretrained(tmp_path / "mixtral")
    dense(tmp_path / "biased", attention_bias=True)
    dense(tmp_path / "gelu", hidden_act="gelu")
    for name in ("mixtral", "biased", "gelu"):
        with pytest.raises(ConfigError, match="only a Llama with silu and without biases"):
            upcycle(tmp_path / name, tmp_path / "mixture", UpcycleConfig())
    with pytest.raises(ConfigError, match=r"has no config.json"):
        upcycle(tmp_path / "nowhere", tmp_path / "mixture", UpcycleConfig())
    assert not (tmp_path / "mixture").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(tmp_path / "dense", tmp_path / "dense", UpcycleConfig())
    assert opened(tmp_path / "dense").config.model_type == "llama"

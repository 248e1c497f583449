"""The merged model classes compute what the definition of a merged layer says, whatever kernel runs the experts."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llm.moe import modeling
from llm.moe.experts import DROPPED, MergedLayer
from tests.mixtures import (
    ARCHITECTURES,
    blocks_of,
    compact,
    experts_of,
    groups,
    logits,
    merge_means,
    mixture,
    plant_duplicates,
    tokens,
    with_loops,
)

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def merges(model: transformers.PreTrainedModel, *counts: int) -> dict[int, MergedLayer]:
    """Random groups of each layer, averaged."""
    return {
        layer: merge_means(block, groups(block.experts.num_experts, count, seed=layer))
        for count, (layer, block) in zip(counts, blocks_of(model).items(), strict=True)
    }


@architectures
@implementations
def test_merging_equal_experts_changes_no_logit(architecture: str, implementation: str) -> None:
    model = mixture(architecture)
    merged = compact(model, plant_duplicates(model, 3))
    merged.set_experts_implementation(implementation)
    assert (logits(merged) - logits(model)).abs().max() < 1e-6


@architectures
@implementations
def test_layers_of_different_numbers_of_experts_compute_the_definition(architecture: str, implementation: str) -> None:
    model = mixture(architecture)
    layers = merges(model, 5, 2)
    merged = compact(model, layers)
    merged.set_experts_implementation(implementation)
    assert [block.experts.num_experts for block in blocks_of(merged).values()] == [5, 2]
    found = logits(merged)
    assert (found - logits(with_loops(model, layers))).abs().max() < 1e-5
    assert (found - logits(mixture(architecture))).abs().max() > 0.1  # the merge does change the model


@architectures
@implementations
def test_experts_that_collide_add_their_gates(architecture: str, implementation: str) -> None:
    model = mixture(architecture)
    layers = merges(model, 1, 1)  # so all selected experts of every token collide
    merged = compact(model, layers)
    merged.set_experts_implementation(implementation)
    block, hidden = blocks_of(merged)[0], torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    _, gates, slots = block.gate(hidden)
    found, expected = block.experts(hidden, slots, gates), layers[0].experts.output(0, hidden)
    assert torch.equal(slots, torch.zeros_like(slots))
    assert (found - gates.sum(-1, keepdim=True) * expected).abs().max() < 1e-6
    if architecture == "qwen2_moe":  # its gates are not normalised
        assert gates.sum(-1).max() < 0.99
    else:
        assert (found - expected).abs().max() < 1e-6


@architectures
@implementations
def test_a_pruned_expert_is_out_before_the_softmax(architecture: str, implementation: str) -> None:
    model = mixture(architecture)
    layers = {}
    for layer, block in blocks_of(model).items():
        expert_map = torch.arange(block.experts.num_experts) % 5
        expert_map[5:7] = DROPPED
        layers[layer] = merge_means(block, expert_map)
    merged = compact(model, layers)
    merged.set_experts_implementation(implementation)
    assert (logits(merged) - logits(with_loops(model, layers))).abs().max() < 1e-5


@architectures
@implementations
def test_fewer_experts_than_the_router_selects_are_all_selected(architecture: str, implementation: str) -> None:
    model = mixture(architecture)
    layers = {}
    for layer, block in blocks_of(model).items():
        expert_map = torch.full((block.experts.num_experts,), DROPPED)
        expert_map[6] = 0
        layers[layer] = MergedLayer(expert_map=expert_map, experts=experts_of(block).take(torch.tensor([6])))
    merged = compact(model, layers)
    merged.set_experts_implementation(implementation)
    assert (logits(merged) - logits(with_loops(model, layers))).abs().max() < 1e-5


@architectures
def test_router_logits_and_the_load_balancing_loss_keep_the_original_experts(architecture: str) -> None:
    model = mixture(architecture)
    merged = compact(model, plant_duplicates(model, 3))
    found = merged(tokens(), output_router_logits=True)
    expected = model(tokens(), output_router_logits=True)
    assert len(found.router_logits) == 2
    for mine, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert mine.shape == (tokens().numel(), model.config.num_experts)
        assert (mine - theirs).abs().max() < 1e-5
    assert torch.isclose(found.aux_loss, expected.aux_loss)


@architectures
def test_greedy_text_of_a_lossless_merge_is_the_same(architecture: str) -> None:
    model = mixture(architecture)
    merged = compact(model, plant_duplicates(model, 3))
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(), **settings)
    assert expected.shape == (2, 48)
    assert torch.equal(merged.generate(tokens(), **settings), expected)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("dense", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_dense_layers_and_shared_experts_stay(architecture: str, dense: dict) -> None:
    model = mixture(architecture, num_hidden_layers=4, **dense)
    merged = compact(model, plant_duplicates(model, 3))
    assert len(blocks_of(merged)) == len(blocks_of(model)) == (3 if "mlp_only_layers" in dense else 2)
    assert (logits(merged) - logits(model)).abs().max() < 1e-6
    untouched = {name: t for name, t in model.state_dict().items() if ".experts." not in name}
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())
    kinds = ("shared_expert." if architecture == "qwen2_moe" else "mlp.gate_proj", "mlp.gate_proj")
    assert all(any(kind in name for name in untouched) for kind in kinds)


@architectures
def test_a_saved_compact_model_comes_back_the_same(architecture: str, tmp_path: Path) -> None:
    model = mixture(architecture)
    merged = compact(model, merges(model, 5, 2))
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(merged)
    assert again.config.merged_experts_per_layer == [5, 2]
    assert torch.equal(logits(again), logits(merged))
    for mine, theirs in zip(blocks_of(again).values(), blocks_of(merged).values(), strict=True):
        assert mine.gate.expert_map.dtype == torch.int64
        assert torch.equal(mine.gate.expert_map, theirs.gate.expert_map)
    names = load_file(tmp_path / "model.safetensors")
    assert names["model.layers.1.mlp.experts.gate_up_proj"].shape[0] == 2
    again.save_pretrained(tmp_path / "again")  # as its own source of code, too
    assert (tmp_path / "again" / "modeling.py").read_text() == Path(modeling.__file__).read_text()


def test_half_precision_leaves_the_map_whole(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    merged = compact(model, plant_duplicates(model, 3))
    merged.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].mlp.gate.expert_map, merged.model.layers[0].mlp.gate.expert_map)
    assert (logits(half) - logits(model.to(torch.bfloat16))).abs().max() < 2e-2


@pytest.mark.parametrize("lost", ["experts.down_proj", "gate.expert_map"])
def test_a_tensor_that_is_missing_is_not_made_up(lost: str, tmp_path: Path) -> None:
    model = mixture("mixtral")
    compact(model, plant_duplicates(model, 3)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"lacks model.layers.1.mlp.{lost}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merged_experts_per_layer": [3, 0]}, "says 0 for layer 1, which is a mixture"),
        ({"merged_experts_per_layer": [3, 3], "mlp_only_layers": [1]}, "says 3 for layer 1, which is dense"),
        ({"hcsmoe_version": 2}, "has version 2, but this code reads up to 1"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict, sentence: str) -> None:
    fields = mixture("qwen3_moe").config.to_dict() | changes
    del fields["model_type"]
    with pytest.raises(ValueError, match=sentence):
        modeling.HCSMoEQwen3MoeForCausalLM(modeling.HCSMoEQwen3MoeConfig(**fields))

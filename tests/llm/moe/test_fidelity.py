"""What a report says about a layer, by hand."""

import pytest
import torch

from llm.moe.experts import DROPPED, Experts, LayerTokens, MergedLayer, RoutingRule
from llm.moe.fidelity import judge_layer

RULE = RoutingRule(top_k=2, normalise=True)


def experts(scales: list[float]) -> Experts:
    """Expert j maps the token 1 to scales[j], on a model of width 1."""
    gate_up = torch.ones(len(scales), 2, 1)
    down = torch.tensor(scales)[:, None, None] / torch.nn.functional.silu(torch.ones(()))
    return Experts(gate_up=gate_up, down=down)


LOGITS = torch.tensor([[2.0, 2.0, -9.0, -9.0], [2.0, -9.0, 2.0, -9.0], [-9.0, -9.0, 2.0, 2.0], [2.0, 2.0, -9.0, -9.0]])
TOKENS = LayerTokens(hidden=torch.ones(4, 1), logits=LOGITS)


def test_a_merge_of_equals_has_no_error_and_counts_its_collisions() -> None:
    layer = MergedLayer(expert_map=torch.tensor([0, 0, 1, 2]), experts=experts([3.0, 5.0, 7.0]))
    found = judge_layer(0, experts([3.0, 3.0, 5.0, 7.0]), layer, [TOKENS], RULE)
    assert found.relative_error == pytest.approx(0.0, abs=1e-6)
    assert (found.experts, found.largest_cluster, found.singletons) == (3, 2, 2)
    assert found.collisions == 0.5  # tokens 0 and 3 select experts 0 and 1
    assert found.distinct_experts == 1.5
    assert found.dropped_mass == 0.0


def test_the_error_of_a_layer_is_relative_to_its_output() -> None:
    layer = MergedLayer(expert_map=torch.tensor([0, 0, 0, 0]), experts=experts([2.0]))
    before = torch.tensor([3.0, 4.0, 6.0, 3.0])  # means of the two selected experts
    found = judge_layer(0, experts([3.0, 3.0, 5.0, 7.0]), layer, [TOKENS], RULE)
    assert found.relative_error == pytest.approx(float((before - 2).norm() / before.norm()), abs=1e-5)
    assert found.distinct_experts == 1.0 and found.collisions == 1.0


def test_a_pruned_layer_reports_what_the_router_has_lost() -> None:
    layer = MergedLayer(expert_map=torch.tensor([0, DROPPED, 1, 2]), experts=experts([3.0, 5.0, 7.0]))
    found = judge_layer(0, experts([3.0, 3.0, 5.0, 7.0]), layer, [TOKENS], RULE)
    assert found.dropped_mass == pytest.approx(0.25, abs=1e-4)  # half of the mass of two of four tokens
    assert found.distinct_experts == 2.0 and found.collisions == 0.0

import itertools

import pytest
import torch

from launch.errors import ConfigError
from llm.moe.alignment import aligned_average, permutations, permuted
from llm.moe.experts import RoutingRule
from llm.moe.matching import ClusterTokens
from llm.moe.merging import weighted_experts
from tests.llm.moe.made_up_layers import random_experts, random_tokens, shuffled_copies

TOKENS = ClusterTokens(batches=[random_tokens(200)], rule=RoutingRule(top_k=2, normalise=True))
ONE_CLUSTER = torch.zeros(4, dtype=torch.int64)
SHARES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("ingredients", ["activations", "weights", "both"])
def test_alignment_undoes_permutations_of_inner_features(ingredients):
    experts, _ = shuffled_copies(4)
    order = permutations(experts, ONE_CLUSTER, torch.tensor([2]), TOKENS, ingredients)
    assert order[2].tolist() == list(range(experts.inner_width))
    aligned = permuted(experts, order)
    for expert in range(4):
        torch.testing.assert_close(aligned.gate_up[expert], experts.gate_up[2])
        torch.testing.assert_close(aligned.down[expert], experts.down[2])
    merged = aligned_average(experts, ONE_CLUSTER, order, SHARES)
    torch.testing.assert_close(merged.down[0], experts.down[2])
    assert (weighted_experts(experts, ONE_CLUSTER, SHARES).down[0] - experts.down[2]).norm() > 0.1


def test_a_permuted_expert_is_the_same_function():
    experts, hidden = random_experts(), TOKENS.batches[0].hidden
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    found = permuted(experts, order)
    for expert in range(4):
        torch.testing.assert_close(found.output(expert, hidden), experts.output(expert, hidden))
        torch.testing.assert_close(found.inner(expert, hidden), experts.inner(expert, hidden)[:, order[expert]])


def test_alignment_by_weights_finds_the_permutation_of_the_least_distance():
    experts = random_experts(2, inner=5)
    order = permutations(experts, torch.zeros(2, dtype=torch.int64), torch.tensor([0]), TOKENS, "weights")

    def distance(tried):
        other = permuted(experts, torch.stack([torch.arange(5), torch.tensor(tried)]))
        return float(
            (other.gate_up[1] - experts.gate_up[0]).square().sum() + (other.down[1] - experts.down[0]).square().sum()
        )

    assert tuple(order[1].tolist()) == min(itertools.permutations(range(5)), key=distance)


def test_experts_align_with_the_dominant_one_of_their_own_cluster():
    copies, _ = shuffled_copies(2, seed=5)
    other, _ = shuffled_copies(2, seed=6, inner=6)
    experts = type(copies)(
        gate_up=torch.stack([copies.gate_up[0], 2 * other.gate_up[1], copies.gate_up[1], 2 * other.gate_up[0]]),
        down=torch.stack([copies.down[0], other.down[1], copies.down[1], other.down[0]]),
    )
    labels = torch.tensor([0, 1, 0, 1])
    merged = aligned_average(
        experts, labels, permutations(experts, labels, torch.tensor([2, 1]), TOKENS), torch.full((4,), 0.5)
    )
    torch.testing.assert_close(merged.down, experts.down[[2, 1]])
    torch.testing.assert_close(merged.gate_up, experts.gate_up[[2, 1]])


def test_an_unknown_cost_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'activations'"):
        permutations(random_experts(), ONE_CLUSTER, torch.tensor([0]), TOKENS, "activation")  # type: ignore[arg-type]

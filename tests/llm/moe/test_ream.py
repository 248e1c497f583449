import dataclasses

import pytest
import torch
from torch.nn import functional

from launch.errors import ConfigError
from llm.moe.alignment import aligned_average, permutations
from llm.moe.experts import LayerTokens, MergedLayer, RoutingRule, merged_output
from llm.moe.matching import ClusterTokens
from llm.moe.merging import weighted_experts
from llm.moe.pruning import pruned_map
from llm.moe.ream import ream_groups, ream_similarity
from llm.moe.saliency import saliency
from llm.moe.statistics import measure
from tests.llm.moe.made_up_layers import random_experts, random_tokens, shuffled_copies

EXPERTS = random_experts(8)
TOKENS = random_tokens(60, experts=8)
RULE = RoutingRule(top_k=2, normalise=True)
STATISTICS = measure(EXPERTS, TOKENS, RULE)


def with_reap(*scores):
    """Statistics whose REAP saliencies are these."""
    wanted = torch.tensor(scores, dtype=torch.float64)
    return dataclasses.replace(STATISTICS, gated_norm_sum=wanted * STATISTICS.selections)


def test_similarity_is_the_mean_of_output_cosines_and_distances_of_router_logits():
    outputs = [EXPERTS.output(j, TOKENS.hidden) for j in range(8)]
    units = functional.normalize(TOKENS.logits.T, dim=1)
    apart = torch.tensor([[float((a - b).norm()) for b in units] for a in units])
    expected = torch.empty(8, 8)
    for i in range(8):
        for j in range(8):
            cosine = functional.cosine_similarity(outputs[i], outputs[j]).mean()
            expected[i, j] = ((cosine + 1) / 2 + 1 - apart[i, j] / apart.max()) / 2
    torch.testing.assert_close(torch.from_numpy(ream_similarity(STATISTICS)).float(), expected, rtol=1e-5, atol=1e-5)


def test_centroids_absorb_the_most_similar_from_the_most_salient_on():
    statistics = with_reap(0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.15, 0.7)
    groups = ream_groups(statistics, 3, group_size=4)
    assert groups.centroids.tolist() == [1, 3, 7]
    alike, left = ream_similarity(statistics), {0, 2, 4, 5, 6}
    expected = dict(zip([1, 3, 7], range(3), strict=True))
    for centroid, label in ((3, 1), (7, 2), (1, 0)):
        for expert in sorted(left, key=lambda e: -alike[centroid, e])[:3]:
            expected[expert] = label
            left.remove(expert)
    assert groups.labels.tolist() == [expected[e] for e in range(8)]
    assert groups.labels.bincount().tolist() == [1, 4, 3]


def test_shares_are_in_proportion_to_saliency_within_each_group():
    statistics = with_reap(0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.15, 0.7)
    groups, scores = ream_groups(statistics, 3, group_size=4), saliency(statistics, "reap")
    for label in range(3):
        inside = groups.labels == label
        torch.testing.assert_close(groups.shares[inside], scores[inside] / scores[inside].sum())


def test_as_many_groups_as_experts_change_nothing():
    groups = ream_groups(STATISTICS, 8, group_size=1)
    assert groups.labels.tolist() == list(range(8))
    assert groups.expert_map.tolist() == list(range(8))


def test_the_router_forgets_all_but_the_centroids():
    groups = ream_groups(with_reap(0.1, 0.5, 0.2, 0.9, 0.3, 0.4, 0.15, 0.7), 3)
    merged = weighted_experts(EXPERTS, groups.labels, groups.shares)
    layer = MergedLayer(expert_map=groups.expert_map, experts=merged)
    assert layer.expert_map.tolist() == [-1, 0, -1, 1, -1, -1, -1, 2]
    pruned = MergedLayer(expert_map=pruned_map(layer.kept), experts=EXPERTS.take(groups.centroids))
    assert torch.equal(layer.expert_map, pruned.expert_map)
    # Centroid 3 absorbed all others: the other two centroids are unchanged, and so are tokens that select only them.
    assert torch.equal(layer.experts.down[[0, 2]], pruned.experts.down[[0, 2]])
    changed = (merged_output(layer, TOKENS, RULE) - merged_output(pruned, TOKENS, RULE)).abs().amax(1) > 1e-9
    selected = TOKENS.logits[:, [1, 3, 7]].topk(2).indices
    assert torch.equal(changed, (selected == 1).any(1))


def test_groups_too_small_for_all_experts_are_refused():
    with pytest.raises(ConfigError, match=r"3 groups of at most 2 cannot hold 8 experts; keep at least 4 experts"):
        ream_groups(STATISTICS, 3, group_size=2)


def test_a_group_of_one_function_in_different_orders_of_features_stays_that_function():
    experts, _ = shuffled_copies(3)
    tokens = LayerTokens(hidden=TOKENS.hidden, logits=TOKENS.logits[:, :3])
    groups = ream_groups(measure(experts, tokens, RULE), 1)
    sample = ClusterTokens(batches=[tokens], rule=RULE)
    order = permutations(experts, groups.labels, groups.centroids, sample, "both")
    merged = aligned_average(experts, groups.labels, order, groups.shares)
    layer = MergedLayer(expert_map=groups.expert_map, experts=merged)
    expected = experts.output(0, tokens.hidden)  # one expert is left, and its gate is 1
    torch.testing.assert_close(merged_output(layer, tokens, RULE), expected, rtol=0, atol=1e-6)

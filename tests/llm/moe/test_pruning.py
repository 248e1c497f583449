import itertools

import pytest
import torch

from launch.errors import ConfigError
from llm.moe import pruning
from llm.moe.experts import LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.pruning import candidate_subsets, pruned_map, subset_errors
from tests.llm.moe.made_up_layers import random_experts, random_tokens

EXPERTS = random_experts(6)
BATCHES = [random_tokens(12, experts=6, seed=seed) for seed in (1, 2, 3)]
RULES = [RoutingRule(top_k=k, normalise=normalise) for k in (1, 2, 4) for normalise in (True, False)]


def prune(experts, kept):
    return MergedLayer(expert_map=pruned_map(kept), experts=experts.take(kept.nonzero()[:, 0]))


def by_hand(batch, rule, kept):
    """|Y - Y_K| token by token, from exponentials of logits in plain Python."""
    total = 0.0
    for hidden, logits in zip(batch.hidden, batch.logits, strict=True):
        outputs = []
        for available in (range(6), kept):
            weights = {j: float(logits[j].exp()) for j in available}
            best = sorted(weights, key=lambda j: -weights[j])[: rule.top_k]
            mass = sum(weights[j] for j in (best if rule.normalise else available))
            outputs.append(sum(weights[j] / mass * EXPERTS.output(j, hidden[None])[0] for j in best))
        total += float((outputs[0] - outputs[1]).square().sum())
    return total**0.5


def test_a_pruned_layer_keeps_its_experts_in_order_and_never_selects_the_others():
    kept = torch.tensor([False, True, False, True, True, False])
    layer = prune(EXPERTS, kept)
    assert layer.expert_map.tolist() == [-1, 0, -1, 1, 2, -1]
    assert torch.equal(layer.experts.down, EXPERTS.down[[1, 3, 4]])
    few = LayerTokens(hidden=BATCHES[0].hidden, logits=BATCHES[0].logits[:, kept])
    for rule in RULES:
        small = RoutingRule(top_k=min(rule.top_k, 3), normalise=rule.normalise)
        expected = mixture(layer.experts, few.hidden, route(few.logits, small))
        torch.testing.assert_close(merged_output(layer, BATCHES[0], rule), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_exhaustive_pruning_equals_brute_force(rule, count):
    subsets = candidate_subsets(6, count, samples=None, key=0)
    found = torch.stack([subset_errors(EXPERTS, batch, rule, subsets) for batch in BATCHES]).sum(0)
    every = list(itertools.combinations(range(6), count))
    assert sorted(tuple(subset.nonzero().flatten().tolist()) for subset in subsets) == every
    expected = {kept: sum(by_hand(batch, rule, kept) for batch in BATCHES) for kept in every}
    for subset, error in zip(subsets, found, strict=True):
        assert float(error) == pytest.approx(expected[tuple(subset.nonzero().flatten().tolist())], rel=1e-6, abs=1e-9)
    best = tuple(subsets[found.argmin()].nonzero().flatten().tolist())
    assert best == min(every, key=lambda kept: expected[kept])


def test_the_error_of_a_subset_is_that_of_the_pruned_layer():
    for rule in RULES:
        subsets = candidate_subsets(6, 4, samples=None, key=0)
        errors = subset_errors(EXPERTS, BATCHES[0], rule, subsets)
        whole = mixture(EXPERTS, BATCHES[0].hidden, route(BATCHES[0].logits, rule))
        expected = torch.stack([(merged_output(prune(EXPERTS, s), BATCHES[0], rule) - whole).norm() for s in subsets])
        torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_the_work_do_not_show_in_the_result(monkeypatch):
    subsets = candidate_subsets(6, 3, samples=None, key=0)
    whole = subset_errors(EXPERTS, BATCHES[0], RULES[2], subsets)
    monkeypatch.setattr(pruning, "_ELEMENTS", 100)  # 2 tokens, and 12 or fewer subsets, at a time
    torch.testing.assert_close(subset_errors(EXPERTS, BATCHES[0], RULES[2], subsets), whole, rtol=1e-12, atol=0)


def test_subsets_of_different_sizes_are_compared_in_one_call():
    subsets = torch.tensor([[True] * 6, [True] * 5 + [False], [True] + [False] * 5])
    errors = subset_errors(EXPERTS, BATCHES[0], RULES[2], subsets)
    assert errors[0] == 0
    for subset, error in zip(subsets, errors, strict=True):
        assert float(error) == pytest.approx(
            by_hand(BATCHES[0], RULES[2], subset.nonzero().flatten().tolist()), rel=1e-6, abs=1e-12
        )


def test_samples_are_seeded_subsets_of_the_right_size_and_more_of_them_begin_with_the_same():
    few, many = (candidate_subsets(12, 5, samples=n, key=7) for n in (50, 80))
    assert torch.equal(few, many[:50])
    assert many.sum(1).unique().tolist() == [5]
    assert not torch.equal(few, candidate_subsets(12, 5, samples=50, key=8))
    counts = candidate_subsets(20, 5, samples=2000, key=7).sum(0)  # binomial: mean 500, standard deviation 19.4
    assert (counts - 500).abs().max() < 5 * 19.4


def test_as_many_samples_as_there_are_subsets_are_all_subsets():
    assert torch.equal(candidate_subsets(6, 4, samples=15, key=0), candidate_subsets(6, 4, samples=None, key=0))
    assert len(candidate_subsets(6, 4, samples=14, key=0)) == 14


def test_too_many_subsets_are_refused_with_their_number_and_the_remedy():
    with pytest.raises(ConfigError, match=r"30 of 60 experts .* 118,264,581,564,861,424 ways.*100,000.*samples"):
        candidate_subsets(60, 30, samples=None, key=0)
    with pytest.raises(ConfigError, match="9 experts cannot be kept of 8"):
        candidate_subsets(8, 9, samples=None, key=0)

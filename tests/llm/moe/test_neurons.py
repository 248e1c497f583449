import pytest
import torch

from llm.moe.alignment import permuted
from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule
from llm.moe.least_squares import equations, least_squares
from llm.moe.merging import normalised, weighted_experts
from llm.moe.neurons import choose_neurons, greedy_features
from tests.llm.moe.made_up_layers import random_experts, random_tokens

LABELS = torch.tensor([0, 1, 0, 1])
RULE = RoutingRule(top_k=2, normalise=True)


def averaged(experts):
    return MergedLayer(
        expert_map=LABELS, experts=weighted_experts(experts, LABELS, normalised(LABELS, torch.ones(len(LABELS))))
    )


def sums(features, aims):
    return equations(features, aims, aims)


def plain_greedy(features, aims, count, ridge):
    """Fit every set of one feature more, keep the best: sets of ridge regressions, one at a time."""
    shrinkage = ridge * features.square().sum(0).mean()
    chosen = []
    for _ in range(count):
        losses = {}
        for feature in set(range(features.shape[1])) - set(chosen):
            some = features[:, [*chosen, feature]]
            gram = some.T @ some + shrinkage * torch.eye(len(chosen) + 1, dtype=torch.float64)
            cross = some.T @ aims
            losses[feature] = -float((cross * torch.linalg.solve(gram, cross)).sum())
        chosen.append(min(losses, key=losses.__getitem__))
    return sorted(chosen)


@pytest.mark.parametrize("block", [1, 2, 64])
def test_greedy_choice_takes_at_each_step_the_feature_that_lowers_the_objective_most(block):
    source = torch.Generator().manual_seed(0)
    features = torch.randn(40, 12, generator=source, dtype=torch.float64)
    features[:, 6:] += features[:, :6]
    aims = features @ torch.randn(12, 3, generator=source, dtype=torch.float64)
    # A block of 2 sees the 8 best of 12; here these hold what the plain search picks.
    found = greedy_features(sums(features, aims), 5, block=block, ridge=1e-4)
    assert found.tolist() == plain_greedy(features, aims, 5, 1e-4)


def test_of_two_equal_features_only_one_is_chosen():
    source = torch.Generator().manual_seed(1)
    features = torch.randn(50, 4, generator=source, dtype=torch.float64)
    aims = features @ torch.tensor([[9.0], [5.0], [0.2], [0.1]], dtype=torch.float64)
    both = torch.cat([features, features], dim=1)
    found = greedy_features(sums(both, aims), 4, ridge=1e-8)
    assert sorted(int(feature) % 4 for feature in found) == [0, 1, 2, 3]


def test_members_that_share_the_features_of_one_expert_are_merged_without_loss():
    """Two members with f / 2 live features each: the f live ones are the merge, which no average is."""
    experts = random_experts()
    experts.down[:2, :, 3:] = 0
    experts.down[2:, :, :3] = 0
    # Tokens reach both members of a cluster with equal gates, so the target is one function of x.
    batch = random_tokens()
    logits = torch.zeros(64, 4, dtype=torch.float64)
    logits[:32, [1, 3]] = -9.0
    logits[32:, [0, 2]] = -9.0
    tokens = LayerTokens(hidden=batch.hidden, logits=logits)
    start = averaged(experts)
    merged, fits = choose_neurons(experts, start, [tokens], RULE, ridges=[1e-9])
    for label, fit in enumerate(fits):
        assert fit.after < 1e-10 * fit.energy < 1e-4 * fit.before
        reached = tokens.hidden[:32] if label == 0 else tokens.hidden[32:]
        cluster = (label == LABELS).nonzero()[:, 0].tolist()
        mean = sum(experts.output(j, reached) for j in cluster) / 2
        torch.testing.assert_close(merged.experts.output(label, reached), mean, rtol=0, atol=1e-5)
    fitted = least_squares(experts, start, [tokens], RULE)[1]
    assert all(chosen.after < 0.01 * average.after for chosen, average in zip(fits, fitted, strict=True))


def test_every_chosen_feature_is_one_of_a_member():
    experts = random_experts()
    merged, fits = choose_neurons(experts, averaged(experts), [random_tokens()], RULE)
    for label, fit in enumerate(fits):
        assert fit.after < fit.before
        known = [
            torch.cat([experts.gate[j, q], experts.up[j, q]])
            for j in (label, label + 2)
            for q in range(experts.inner_width)
        ]
        for gate, up in zip(merged.experts.gate[label], merged.experts.up[label], strict=True):
            assert any(torch.equal(torch.cat([gate, up]), row) for row in known)


def test_the_order_of_inner_features_does_not_matter():
    experts, tokens = random_experts(), random_tokens()
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    start = averaged(experts)
    outputs = [
        choose_neurons(these, start, [tokens], RULE)[0].experts.output(0, tokens.hidden)
        for these in (experts, permuted(experts, order))
    ]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_equal_members_and_clusters_of_one_keep_the_start():
    experts = random_experts()
    start = averaged(experts.take(LABELS))
    merged, _ = choose_neurons(experts.take(LABELS), start, [random_tokens()], RULE)
    assert torch.equal(merged.experts.down, start.experts.down)
    alone = MergedLayer(expert_map=torch.arange(4), experts=experts)
    merged, fits = choose_neurons(experts, alone, [random_tokens()], RULE)
    assert torch.equal(merged.experts.gate_up, experts.gate_up)
    assert all(fit.after == 0 for fit in fits)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_tokens_never_make_the_start_worse(count):
    experts = random_experts(inner=24)
    _, fits = choose_neurons(experts, averaged(experts), [random_tokens(count)], RULE)
    assert all(fit.after <= fit.before for fit in fits)


def test_a_narrow_pool_and_batches_and_ranks_agree_with_the_whole():
    experts, whole = random_experts(), random_tokens()
    parts = [LayerTokens(hidden=whole.hidden[i : i + 16], logits=whole.logits[i : i + 16]) for i in range(0, 64, 16)]
    start = averaged(experts)
    once = choose_neurons(experts, start, [whole], RULE, ridges=[1e-4])[0].experts
    apart = choose_neurons(experts, start, parts, RULE, ridges=[1e-4], reduce=lambda v: 2 * v)[0].experts
    torch.testing.assert_close(apart.down, once.down)
    assert torch.equal(apart.gate_up, once.gate_up)
    narrow, fits = choose_neurons(experts, start, [whole], RULE, pool=1)
    assert isinstance(narrow.experts, Experts) and all(fit.after <= fit.before for fit in fits)

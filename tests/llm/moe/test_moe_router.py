import pytest
import torch

from launch.errors import ConfigError
from llm.moe.experts import LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.pruning import pruned_map
from llm.moe.router import cluster_gates, fit_router, router_agreement, router_rows, small_rule
from tests.llm.moe.made_up_layers import random_experts

WIDTH = 8
NORMS = pytest.mark.parametrize("normalise", [True, False])
POLICIES = ("representative", "mean", "frequency_mean")


def tokens_of(weight, count=64, seed=1):
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=source, dtype=torch.float64)
    hidden[:, 0] = 1.0  # a row can lower a logit for all tokens
    return LayerTokens(hidden=hidden, logits=hidden @ weight.T)


def random_router(count, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=source, dtype=torch.float64)


def shrunk_output(layer, rows, tokens, rule):
    return mixture(layer.experts, tokens.hidden, route(tokens.hidden @ rows.T, rule))


def gap(layer, rows, tokens, rule, small):
    return float((shrunk_output(layer, rows, tokens, small) - merged_output(layer, tokens, rule)).abs().max())


@NORMS
@pytest.mark.parametrize("policy", POLICIES)
def test_clusters_of_one_expert_are_exact(normalise, policy):
    weight, order = random_router(6), torch.tensor([3, 1, 0, 5, 4, 2])
    layer = MergedLayer(expert_map=order, experts=random_experts(6))
    rows, rule = router_rows(weight, order, policy, torch.ones(6)), RoutingRule(top_k=2, normalise=normalise)
    assert torch.equal(rows[order], weight)
    assert gap(layer, rows, tokens_of(weight), rule, small_rule(rule, 6)) < 1e-6


@NORMS
def test_clusters_of_which_one_member_alone_is_ever_selected_are_exact_with_its_row(normalise):
    weight, rule = random_router(6), RoutingRule(top_k=2, normalise=normalise)
    never = [0, 4, 5]
    weight[never, 0] -= 200
    expert_map = torch.tensor([0, 0, 1, 2, 2, 1])
    layer, tokens = MergedLayer(expert_map=expert_map, experts=random_experts(3)), tokens_of(weight)
    selections = route(tokens.logits, rule).selected.flatten().bincount(minlength=6).double()
    assert selections[never].sum() == 0
    for policy in ("representative", "frequency_mean"):
        rows = router_rows(weight, expert_map, policy, selections)
        assert torch.equal(rows, weight[[1, 2, 3]])
        assert gap(layer, rows, tokens, rule, small_rule(rule, 3)) < 1e-6
    mean = router_rows(weight, expert_map, "mean", selections)
    assert gap(layer, mean, tokens, rule, small_rule(rule, 3)) > 0.1


@NORMS
def test_equal_members_with_equal_rows_in_clusters_of_one_size_are_exact_with_a_smaller_top_k(normalise):
    expert_map = torch.arange(12) % 4  # clusters of 3, and 6 selected: 2 whole clusters
    weight = random_router(4)[expert_map]
    layer, tokens = MergedLayer(expert_map=expert_map, experts=random_experts(4)), tokens_of(weight)
    rule = RoutingRule(top_k=6, normalise=normalise)
    for policy in POLICIES:
        rows = router_rows(weight, expert_map, policy, torch.ones(12))
        assert gap(layer, rows, tokens, rule, RoutingRule(top_k=2, normalise=normalise)) < 1e-6
        assert gap(layer, rows, tokens, rule, small_rule(rule, 4)) > 0.1


@NORMS
@pytest.mark.parametrize("top_k", [2, 5])
def test_a_pruned_layer_is_exact_with_the_rows_that_are_left(normalise, top_k):
    weight, rule = random_router(6), RoutingRule(top_k=top_k, normalise=normalise)
    kept = torch.tensor([True, False, True, False, False, True])
    layer = MergedLayer(expert_map=pruned_map(kept), experts=random_experts(6).take(kept.nonzero()[:, 0]))
    for policy in POLICIES:
        rows = router_rows(weight, layer.expert_map, policy, torch.ones(6))
        assert torch.equal(rows, weight[[0, 2, 5]])
        assert gap(layer, rows, tokens_of(weight), rule, small_rule(rule, 3)) < 1e-6


def test_rows_are_means_of_the_members_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0], [9.0, 9.0]])
    expert_map, frequency = torch.tensor([0, 1, 0, -1]), torch.tensor([3.0, 5.0, 1.0, 7.0])
    assert router_rows(weight, expert_map, "representative", frequency).tolist() == [[1, 0], [0, 2]]
    assert router_rows(weight, expert_map, "mean", frequency).tolist() == [[2.5, 2], [0, 2]]
    assert router_rows(weight, expert_map, "frequency_mean", frequency).tolist() == [[1.75, 1], [0, 2]]


def test_an_unknown_policy_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"router policy = 'representativ'.*did you mean 'representative'"):
        router_rows(random_router(2), torch.tensor([0, 0]), "representativ", torch.ones(2))


def test_gates_of_a_cluster_are_the_sum_of_those_of_its_selected_members():
    weight, rule = random_router(6), RoutingRule(top_k=3, normalise=False)
    expert_map = torch.tensor([0, 1, 0, -1, 1, 2])
    tokens = tokens_of(weight)
    found = cluster_gates(tokens, expert_map, rule)
    for token, logits in enumerate(tokens.logits):
        weights = {j: float(logits[j].exp()) for j in range(6) if j != 3}
        for cluster in range(3):
            best = [j for j in sorted(weights, key=lambda j: -weights[j])[:3] if expert_map[j] == cluster]
            expected = sum(weights[j] for j in best) / sum(weights.values())
            assert float(found[token, cluster]) == pytest.approx(expected, abs=1e-6)


def clustered_layer(top_k, normalise):
    """8 experts in 3 clusters of unlike sizes, tokens to fit on and others."""
    weight = random_router(8)
    expert_map = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    rule = RoutingRule(top_k=top_k, normalise=normalise)
    return weight, expert_map, rule, tokens_of(weight, 600), tokens_of(weight, 600, seed=9)


@NORMS
def test_a_fit_comes_nearer_to_the_exact_router_on_other_tokens_too(normalise):
    weight, expert_map, rule, tokens, others = clustered_layer(2, normalise)
    start = router_rows(weight, expert_map, "fit", torch.ones(8))
    rows = fit_router(start, [tokens], expert_map, rule)
    before, after = (router_agreement(r, [others], expert_map, rule) for r in (start, rows))
    assert after.divergence < 0.6 * before.divergence
    assert after.misplaced < before.misplaced
    assert after.top1 > before.top1
    if normalise:
        assert after.gate_ratio == pytest.approx(1, abs=1e-6)
    else:
        assert abs(after.gate_ratio - 1) < abs(before.gate_ratio - 1)
    assert torch.equal(rows, fit_router(start, [tokens], expert_map, rule))


def test_a_fit_to_gates_that_reach_every_cluster_and_leave_a_rest_ends_where_the_cross_entropy_is_flat():
    weight, expert_map = random_router(4), torch.tensor([0, 1, 0, 1])
    rule, tokens = RoutingRule(top_k=3, normalise=False), tokens_of(weight, 200)
    gates = cluster_gates(tokens, expert_map, rule)
    assert bool((gates > 0).all()) and float(gates.sum(1).min()) < 0.95
    rows = fit_router(
        router_rows(weight, expert_map, "fit", torch.ones(4)), [tokens], expert_map, rule
    ).requires_grad_()
    (-(gates * torch.log_softmax(tokens.hidden @ rows.T, -1)).sum(1).mean()).backward()
    assert rows.grad.abs().max() < 1e-5


def test_batches_do_not_show_in_a_fit_nor_in_an_agreement():
    weight, expert_map, rule, tokens, _ = clustered_layer(3, False)
    start = router_rows(weight, expert_map, "fit", torch.ones(8)).float()
    parts = [LayerTokens(hidden=tokens.hidden[p], logits=tokens.logits[p]) for p in (slice(0, 100), slice(100, 600))]
    whole, split = (fit_router(start, batches, expert_map, rule, iterations=5) for batches in ([tokens], parts))
    torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-4)
    one, two = (router_agreement(whole, batches, expert_map, rule) for batches in ([tokens], parts))
    for name in ("misplaced", "divergence", "top1", "gate_ratio"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-6)


def test_a_fit_that_brings_nothing_nearer_returns_its_start():
    weight, expert_map, rule, tokens, _ = clustered_layer(2, True)
    start = router_rows(weight, expert_map, "fit", torch.ones(8))
    assert torch.equal(fit_router(start, [tokens], expert_map, rule, iterations=0), start)


def test_where_every_expert_is_selected_a_fit_of_single_experts_stays_exact():
    weight, expert_map, rule = random_router(4), torch.arange(4), RoutingRule(top_k=4, normalise=True)
    tokens = tokens_of(weight)
    agreement = router_agreement(fit_router(weight, [tokens], expert_map, rule), [tokens], expert_map, rule)
    assert agreement.divergence < 1e-6 and agreement.top1 == 1 and agreement.gate_ratio == pytest.approx(1, abs=1e-6)


def test_agreement_is_zero_divergence_for_the_exact_router_and_by_hand_otherwise():
    weight = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    tokens = LayerTokens(hidden=(hidden := torch.tensor([[1.0, 1.0], [1.0, -2.0]])), logits=hidden @ weight.T)
    rule, single = RoutingRule(top_k=2, normalise=True), torch.arange(2)
    exact = router_agreement(weight, [tokens], single, rule)
    assert exact.divergence == pytest.approx(0, abs=1e-7) and exact.top1 == 1
    assert exact.misplaced == pytest.approx(0, abs=1e-7)
    flat = router_agreement(torch.zeros(2, 2), [tokens], single, rule)
    p = torch.softmax(tokens.logits, -1).double()
    assert flat.divergence == pytest.approx(float((p * (2 * p).log()).sum(-1).mean()), rel=1e-5)
    assert flat.top1 == 0.5  # equal logits name the first
    assert flat.misplaced == pytest.approx(float((p.amax(-1) - 0.5).mean()), rel=1e-6)
    one = RoutingRule(top_k=1, normalise=False)
    assert router_agreement(weight, [tokens], single, one).misplaced == 0
    assert router_agreement(torch.zeros(2, 2), [tokens], single, one).gate_ratio == pytest.approx(
        float((p.amax(-1) / 0.5).mean()), rel=1e-6
    )

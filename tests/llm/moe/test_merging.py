import dataclasses
import logging

import pytest
import torch

from launch.errors import ConfigError
from llm.moe import merging
from llm.moe.experts import LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.merging import coefficients, members, normalised, weighted_experts
from llm.moe.statistics import measure
from tests.llm.moe.made_up_layers import random_experts, random_tokens

LABELS = torch.tensor([0, 1, 0, 1])
RULE = RoutingRule(top_k=2, normalise=True)


def logits_of_ranking(*rankings):
    """Logits [T, 4] that put the experts of each token in this order."""
    logits = torch.empty(len(rankings), 4, dtype=torch.float64)
    for token, ranking in enumerate(rankings):
        logits[token, list(ranking)] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    return logits


def counted(top_k, *rankings):
    logits = logits_of_ranking(*rankings)
    hidden = random_tokens(len(rankings)).hidden
    return measure(
        random_experts(), LayerTokens(hidden=hidden, logits=logits), RoutingRule(top_k=top_k, normalise=True)
    )


def test_an_average_gives_equal_shares():
    assert coefficients(LABELS, counted(2, (0, 1, 2, 3)), "average").tolist() == [0.5] * 4


def test_frequencies_are_the_shares_of_selections_within_a_cluster():
    statistics = counted(2, (0, 1, 2, 3), (0, 1, 3, 2), (0, 3, 1, 2), (2, 1, 0, 3))  # selected 3, 3, 1, 1 times
    assert coefficients(LABELS, statistics, "frequency").tolist() == [3 / 4, 3 / 4, 1 / 4, 1 / 4]


def test_the_count_of_the_official_code_stops_at_two_experts_where_a_model_selects_three():
    statistics = counted(
        3, (0, 1, 2, 3), (0, 1, 2, 3), (2, 3, 1, 0)
    )  # 2, 3, 3, 1 times; among the first two 2, 2, 1, 1
    assert coefficients(LABELS, statistics, "frequency").tolist() == [2 / 5, 3 / 4, 3 / 5, 1 / 4]
    assert coefficients(LABELS, statistics, "frequency_top2").tolist() == [2 / 3, 2 / 3, 1 / 3, 1 / 3]


def test_a_cluster_that_no_token_reaches_becomes_the_mean_with_a_warning_and_never_zeros(caplog):
    statistics = counted(2, (0, 2, 1, 3))
    with caplog.at_level(logging.WARNING, logger="llm.moe.merging"):
        alpha = coefficients(LABELS, statistics, "frequency")
    assert alpha.tolist() == [0.5] * 4
    assert "cluster 1 (experts [1, 3])" in caplog.text
    experts = random_experts()
    assert torch.equal(weighted_experts(experts, LABELS, alpha).down[1], (experts.down[1] + experts.down[3]) / 2)


def test_gate_aware_shares_are_those_of_the_squared_gates_where_members_never_fire_together():
    statistics = counted(2, (0, 1, 2, 3), (3, 2, 0, 1), (0, 3, 1, 2))
    squares = statistics.gate_gram.diagonal()
    alpha = coefficients(LABELS, statistics, "gate_aware")
    torch.testing.assert_close(alpha[0], squares[0] / (squares[0] + squares[2]))
    torch.testing.assert_close(alpha[1], squares[1] / (squares[1] + squares[3]))


def test_gate_aware_shares_minimise_the_error_of_one_constant_mixture_for_uncorrelated_members():
    gates = torch.rand(500, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    statistics = dataclasses.replace(counted(2, (0, 1, 2, 3)), gate_gram=gates.T @ gates)
    alpha = coefficients(torch.tensor([0, 0]), statistics, "gate_aware")

    def error(first):  # E|sum_j (g_j - G alpha_j) f_j|^2 with <f_i, f_j> = 1 if i = j else 0
        shares = torch.stack([first, 1 - first])
        return (gates - gates.sum(1, keepdim=True) * shares).square().sum()

    best = alpha[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(error(best), best)
    assert abs(float(slope)) < 1e-9 * float(error(best.detach()))


def test_coefficients_sum_to_one_in_every_cluster_and_are_zero_for_dropped_experts():
    statistics = measure(random_experts(), random_tokens(), RULE)
    for rule in ("average", "frequency", "frequency_top2", "gate_aware"):
        alpha = coefficients(torch.tensor([0, 1, -1, 0]), statistics, rule)
        assert alpha[2] == 0
        torch.testing.assert_close(alpha[[0, 3]].sum(), torch.ones((), dtype=torch.float64))
        assert alpha[1] == 1


def test_an_unknown_rule_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'frequency'"):
        coefficients(LABELS, measure(random_experts(), random_tokens(), RULE), "freqency")  # type: ignore[arg-type]


def test_clusters_of_one_return_their_experts_bit_for_bit():
    experts = random_experts(dtype=torch.bfloat16)
    labels = torch.tensor([2, 0, 3, 1])
    merged = weighted_experts(experts, labels, normalised(labels, torch.ones(4)))
    for label, cluster in enumerate(members(labels)):
        assert torch.equal(merged.gate_up[label], experts.gate_up[cluster[0]])
        assert torch.equal(merged.down[label], experts.down[cluster[0]])


def test_one_cluster_of_all_is_the_weighted_mean():
    experts, shares = random_experts(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    merged = weighted_experts(experts, torch.zeros(4, dtype=torch.int64), shares)
    torch.testing.assert_close(merged.gate_up[0], sum(a * w for a, w in zip(shares, experts.gate_up, strict=True)))
    torch.testing.assert_close(merged.down[0], sum(a * w for a, w in zip(shares, experts.down, strict=True)))


def test_a_sum_in_slices_is_the_whole_sum(monkeypatch):
    experts, alpha = random_experts(), normalised(LABELS, torch.rand(4, generator=torch.Generator().manual_seed(4)))
    whole = weighted_experts(experts, LABELS, alpha)
    monkeypatch.setattr(merging, "_ELEMENTS", 1)
    sliced = weighted_experts(experts, LABELS, alpha)
    assert torch.equal(whole.gate_up, sliced.gate_up) and torch.equal(whole.down, sliced.down)


def test_sums_are_rounded_to_the_stored_type_once():
    experts = random_experts(dtype=torch.bfloat16)
    labels = torch.zeros(4, dtype=torch.int64)
    exact = experts.down.double().mean(0)
    assert torch.equal(weighted_experts(experts, labels, torch.full((4,), 0.25)).down[0], exact.bfloat16())


def test_merging_equal_experts_changes_nothing_whatever_the_routers_do():
    experts, tokens = random_experts(), random_tokens()
    experts = experts.take(LABELS)  # experts 0 and 2 are equal, and 1 and 3
    statistics = measure(experts, tokens, RULE)
    for rule in ("average", "frequency", "gate_aware"):
        merged = weighted_experts(experts, LABELS, coefficients(LABELS, statistics, rule))
        found = merged_output(MergedLayer(expert_map=LABELS, experts=merged), tokens, RULE)
        torch.testing.assert_close(
            found, mixture(experts, tokens.hidden, route(tokens.logits, RULE)), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("normalise", [True, False])
def test_gates_that_fall_into_one_cluster_add_up(normalise):
    rule = RoutingRule(top_k=2, normalise=normalise)
    tokens = random_tokens()
    tokens = LayerTokens(hidden=tokens.hidden, logits=logits_of_ranking(*[(0, 2, 1, 3), (3, 1, 0, 2)] * 32))
    merged = weighted_experts(random_experts(), LABELS, normalised(LABELS, torch.ones(4)))
    found = merged_output(MergedLayer(expert_map=LABELS, experts=merged), tokens, rule)
    total = route(tokens.logits, rule).gates.sum(1).double()
    if normalise:
        torch.testing.assert_close(total, torch.ones(64, dtype=torch.float64))
    expected = torch.where(
        (torch.arange(64) % 2 == 0)[:, None], merged.output(0, tokens.hidden), merged.output(1, tokens.hidden)
    )
    torch.testing.assert_close(found, total[:, None] * expected, rtol=1e-6, atol=1e-6)


def test_the_order_of_experts_does_not_matter():
    experts, tokens, order = random_experts(), random_tokens(), torch.tensor([2, 0, 3, 1])
    shuffled = LayerTokens(hidden=tokens.hidden, logits=tokens.logits[:, order])
    outputs = []
    for these, labels, batch in ((experts, LABELS, tokens), (experts.take(order), LABELS[order], shuffled)):
        merged = weighted_experts(these, labels, coefficients(labels, measure(these, batch, RULE), "frequency"))
        outputs.append(merged_output(MergedLayer(expert_map=labels, experts=merged), batch, RULE))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)

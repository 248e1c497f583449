"""Distances between experts, against loops over tokens and against groups that were planted."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from launch.errors import ConfigError, DataError
from llm.moe.clustering import dendrogram, labels
from llm.moe.experts import Experts, LayerTokens, RoutingRule, route
from llm.moe.representations import combined, distances, mean_distance, router_similarity
from llm.moe.statistics import measure, no_statistics, weight_gram

TOKENS, WIDTH, INNER = 96, 10, 6
RULE = RoutingRule(top_k=2, normalise=True)
ALL = ("output", "output_routed", "output_tokenwise", "output_cosine", "router_logits", "weights")


def random_experts(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Experts(
        gate_up=torch.randn(count, 2 * INNER, WIDTH, generator=draw),
        down=torch.randn(count, WIDTH, INNER, generator=draw),
    ).to(torch.float64)


def random_tokens(router, seed=1):
    """Tokens around a mean that is not 0; router: [E, d]."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64) + 0.5
    return LayerTokens(hidden=hidden, logits=hidden @ router.T)


def random_router(count, seed=2):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(group, noise=1e-3):
    """Experts and router rows of one base per group, told apart by noise."""
    group = torch.tensor(group)
    bases, differences = random_experts(int(group.max()) + 1), random_experts(len(group), seed=3)
    experts = Experts(
        gate_up=bases.gate_up[group] + noise * differences.gate_up, down=bases.down[group] + noise * differences.down
    )
    router = random_router(int(group.max()) + 1)[group] + noise * random_router(len(group), seed=4)
    return experts, random_tokens(router)


def all_distances(experts, batch, rule=RULE):
    statistics, weights = measure(experts, batch, rule), weight_gram(experts)
    return {name: distances(statistics, weights, name) for name in ALL}


def slow_distance(name, experts, batch, i, j):
    """By its definition, from single tokens."""
    outputs = [experts.output(e, batch.hidden) for e in (i, j)]
    chosen = route(batch.logits, RULE).selected
    routed = [y[(chosen == e).any(1)] for y, e in zip(outputs, (i, j), strict=True)]
    thetas = [torch.cat([experts.gate_up[e].flatten(), experts.down[e].flatten()]) for e in (i, j)]
    return {
        "output": lambda: (outputs[0].mean(0) - outputs[1].mean(0)).norm(),
        "output_routed": lambda: (routed[0].mean(0) - routed[1].mean(0)).norm(),
        "output_tokenwise": lambda: (outputs[0] - outputs[1]).square().sum(1).mean().sqrt(),
        "output_cosine": lambda: 1 - functional.cosine_similarity(*outputs, dim=1).mean(),
        "router_logits": lambda: (batch.logits[:, i] - batch.logits[:, j]).square().mean().sqrt(),
        "weights": lambda: (thetas[0] - thetas[1]).norm(),
    }[name]().item()


@pytest.mark.parametrize("name", ALL)
def test_distances_from_sums_are_those_from_single_tokens(name):
    experts, batch = random_experts(5), random_tokens(random_router(5))
    found = all_distances(experts, batch)[name]
    for i in range(5):
        for j in range(5):
            expected = 0.0 if i == j else slow_distance(name, experts, batch, i, j)
            assert found[i, j] == pytest.approx(expected, rel=1e-9)
    assert found.dtype == np.float64 and (found == found.T).all() and (found.diagonal() == 0).all()


@pytest.mark.parametrize("linkage", ["single", "complete", "average", "ward"])
def test_planted_groups_are_found_by_every_representation_and_linkage(linkage):
    group = [0, 1, 2, 0, 3, 1, 0, 2, 3, 0]
    for name, found in all_distances(*planted(group), RoutingRule(top_k=4, normalise=True)).items():
        assert labels(dendrogram(found, linkage), 4).tolist() == group, name


def test_router_logits_alone_do_not_see_what_experts_compute():
    group = [0, 1, 0, 1, 0, 1]
    experts, batch = planted(group)
    batch = LayerTokens(hidden=batch.hidden, logits=batch.hidden @ random_router(6).T)
    found = all_distances(experts, batch)
    assert labels(dendrogram(found["output"], "average"), 2).tolist() == group
    assert labels(dendrogram(found["router_logits"], "average"), 2).tolist() != group


def test_the_order_of_experts_permutes_the_distances_and_nothing_else():
    experts, router = random_experts(7), random_router(7)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    before = all_distances(experts, random_tokens(router))
    after = all_distances(experts.take(order), random_tokens(router[order]))
    for name in ALL:
        np.testing.assert_allclose(after[name], before[name][np.ix_(order, order)], rtol=1e-10, err_msg=name)


def test_the_order_of_inner_features_is_seen_by_the_weights_only():
    experts, batch = random_experts(4), random_tokens(random_router(4))
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    gate_up, down = experts.gate_up.clone(), experts.down.clone()
    gate_up[1] = torch.cat([experts.gate[1][order], experts.up[1][order]])
    down[1] = down[1][:, order]
    before, after = all_distances(experts, batch), all_distances(Experts(gate_up=gate_up, down=down), batch)
    for name in ALL[:-1]:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-9, err_msg=name)
    assert abs(after["weights"][0, 1] - before["weights"][0, 1]) > 0.1


def test_experts_that_differ_on_every_token_and_agree_on_average_are_apart_token_by_token_only():
    hidden = torch.eye(2, dtype=torch.float64)
    ones = torch.ones(1, 2, 2, dtype=torch.float64)
    down = torch.tensor([[[1.0, 0], [0, 0]], [[0, 1.0], [0, 0]]], dtype=torch.float64)
    gate_up = torch.cat([ones, torch.eye(2, dtype=torch.float64)[None]], dim=1).expand(2, -1, -1)
    experts = Experts(gate_up=gate_up, down=down)  # expert 0 answers the first token, expert 1 the second, alike
    batch = LayerTokens(hidden=hidden, logits=torch.zeros(2, 2, dtype=torch.float64))
    found = all_distances(experts, batch)
    assert found["output"][0, 1] == 0
    assert found["output_tokenwise"][0, 1] == pytest.approx(1 / (1 + np.exp(-1)))


def test_copies_are_exactly_nowhere_apart_by_their_mean_outputs():
    experts = random_experts(3).take(torch.tensor([0, 1, 0, 2]))
    assert all_distances(experts, random_tokens(random_router(4)))["output"][0, 2] == 0


def test_an_expert_that_no_token_selects_stands_by_its_mean_over_all_tokens():
    experts, router = random_experts(4), random_router(4)
    batch = random_tokens(router)
    batch.logits[:, 2] = -100.0
    found = all_distances(experts, batch)["output_routed"]
    everywhere = experts.output(2, batch.hidden).mean(0)
    routed = experts.output(0, batch.hidden)[(route(batch.logits, RULE).selected == 0).any(1)].mean(0)
    assert found[0, 2] == pytest.approx((everywhere - routed).norm().item())
    assert found[2, 2] == 0


def test_a_single_expert_has_no_distance():
    rule = RoutingRule(top_k=1, normalise=True)
    for name, found in all_distances(random_experts(1), random_tokens(random_router(1)), rule).items():
        assert found.tolist() == [[0.0]], name


def test_a_combination_weighs_distances_in_units_of_their_own_mean():
    experts, batch = random_experts(5), random_tokens(random_router(5))
    single = all_distances(experts, batch)
    found = combined(measure(experts, batch, RULE), weight_gram(experts), {"output": 2.0, "weights": 0.5})
    off = ~np.eye(5, dtype=bool)
    expected = sum(share * d / d[off].mean() for share, d in ((2, single["output"]), (0.5, single["weights"])))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert mean_distance(found) == pytest.approx(2.5)


def test_equal_experts_combine_to_no_distance():
    experts = random_experts(1).take(torch.zeros(3, dtype=torch.int64))
    found = combined(measure(experts, random_tokens(random_router(3)), RULE), weight_gram(experts), {"output": 1.0})
    assert not found.any()


def test_router_similarity_is_a_cosine_between_0_and_1():
    hidden = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = hidden @ random_router(3).T
    logits = torch.cat([logits, -logits[:, :1], torch.zeros(20, 1)], dim=1)  # the opposite of the first; nothing
    found = router_similarity(measure(random_experts(5), LayerTokens(hidden=hidden, logits=logits), RULE))
    cosine = functional.cosine_similarity(logits[:, 0], logits[:, 1], dim=0).item()
    assert found[0, 1] == pytest.approx((cosine + 1) / 2)
    assert found[0, 3] == pytest.approx(0, abs=1e-12) and found[0, 4] == 0.5
    assert (found == found.T).all() and (found.diagonal() == 1).all() and found.min() >= 0


def test_errors_name_the_value_and_the_remedy():
    experts, batch = random_experts(3), random_tokens(random_router(3))
    statistics, weights = measure(experts, batch, RULE), weight_gram(experts)
    with pytest.raises(ConfigError, match=r"'outputs' is unknown.*did you mean 'output'"):
        distances(statistics, weights, "outputs")
    with pytest.raises(ConfigError, match=r"'output': 0\.0.*above 0"):
        combined(statistics, weights, {"output": 0.0})
    with pytest.raises(ConfigError, match="at least one"):
        combined(statistics, weights, {})
    with pytest.raises(DataError, match=r"0 tokens.*calibrate"):
        distances(no_statistics(3, WIDTH), weights, "output")


@pytest.mark.parametrize("name", ["output", "output_tokenwise", "weights"])
def test_an_expert_that_overflowed_is_named(name):
    experts = random_experts(4)
    experts.down[2] = torch.inf
    with pytest.raises(DataError, match=r"experts \[2\].*float32"):
        distances(measure(experts, random_tokens(random_router(4)), RULE), weight_gram(experts), name)

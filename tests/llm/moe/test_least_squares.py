import pytest
import torch

from launch.errors import ConfigError
from llm.moe.experts import DROPPED, Experts, LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.least_squares import RIDGES, NormalEquations, best_change, equations, least_squares, solve
from llm.moe.merging import coefficients, normalised, weighted_experts
from llm.moe.statistics import measure
from tests.llm.moe.made_up_layers import random_experts, random_tokens

LABELS = torch.tensor([0, 1, 0, 1])
RULE = RoutingRule(top_k=2, normalise=True)
ALPHA = normalised(LABELS, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def averaged(experts, labels=LABELS):
    return MergedLayer(expert_map=labels, experts=weighted_experts(experts, labels, ALPHA))


def error(experts, layer, tokens):
    y = mixture(experts, tokens.hidden, route(tokens.logits, RULE))
    return float((y - merged_output(layer, tokens, RULE)).square().sum())


def by_hand(experts, layer, label, tokens, target):
    """Sum over tokens of w |t - W a|^2, in a loop over tokens and members."""
    total = 0.0
    routing = route(tokens.logits, RULE)
    for hidden, gates in zip(tokens.hidden, routing.dense_gates().double(), strict=True):
        weights = ALPHA if target == "coefficients" else gates
        cluster = [j for j in range(4) if layer.expert_map[j] == label]
        share = sum(float(weights[j]) for j in cluster)
        if share > 0:
            aim = sum(weights[j] / share * experts.output(j, hidden[None])[0] for j in cluster)
            total += share**2 * float((aim - layer.experts.output(label, hidden[None])[0]).square().sum())
    return total


@pytest.mark.parametrize("target", ["mixture", "coefficients"])
def test_the_objective_is_the_weighted_distance_to_the_target_before_and_after(target):
    experts, tokens = random_experts(), random_tokens()
    start = averaged(experts)
    layer, fits = least_squares(
        experts, start, [tokens], RULE, target=target, alpha=ALPHA if target == "coefficients" else None
    )
    for label, fit in enumerate(fits):
        assert fit.before == pytest.approx(by_hand(experts, start, label, tokens, target), rel=1e-6)
        assert fit.after == pytest.approx(by_hand(experts, layer, label, tokens, target), rel=1e-6)
        assert fit.after < 0.9 * fit.before < fit.energy


@pytest.mark.parametrize("target", ["mixture", "coefficients", "layer"])
@pytest.mark.parametrize("count", [1, 3, 64])
@pytest.mark.parametrize("ridges", [(1e-4,), (0.0,), RIDGES])
def test_the_objective_never_rises_even_with_three_tokens_for_24_features(target, count, ridges):
    experts, tokens = random_experts(inner=24), random_tokens(count)
    alpha = ALPHA if target == "coefficients" else None
    layer, fits = least_squares(experts, averaged(experts), [tokens], RULE, target=target, alpha=alpha, ridges=ridges)
    assert all(fit.after <= fit.before for fit in fits)
    if target == "layer":
        assert error(experts, layer, tokens) <= error(experts, averaged(experts), tokens) * (1 + 1e-6)


@pytest.mark.parametrize("target", ["mixture", "coefficients"])
def test_equal_members_give_back_the_start(target):
    experts = random_experts().take(LABELS)
    start = averaged(experts)
    alpha = ALPHA if target == "coefficients" else None
    layer, fits = least_squares(experts, start, [random_tokens()], RULE, target=target, alpha=alpha)
    torch.testing.assert_close(layer.experts.down, start.experts.down, rtol=0, atol=1e-10)
    assert all(fit.after < 1e-25 for fit in fits)


def test_without_a_ridge_the_slope_of_the_objective_is_zero():
    experts, tokens = random_experts(), random_tokens(200)
    layer, _ = least_squares(experts, averaged(experts), [tokens], RULE, ridges=[1e-12])
    down = layer.experts.down[0].clone().requires_grad_()
    gates = route(tokens.logits, RULE).dense_gates().double()[:, LABELS == 0]
    aim = sum(g[:, None] * experts.output(j, tokens.hidden) for g, j in zip(gates.T, (0, 2), strict=True))
    found = gates.sum(1, keepdim=True) * layer.experts.inner(0, tokens.hidden) @ down.T
    (slope,) = torch.autograd.grad((aim - found).square().sum(), down)
    assert float(slope.norm()) < 1e-8


def test_batches_and_ranks_add_up():
    experts, whole = random_experts(), random_tokens()
    parts = [LayerTokens(hidden=whole.hidden[i : i + 9], logits=whole.logits[i : i + 9]) for i in range(0, 64, 9)]
    once = least_squares(experts, averaged(experts), [whole], RULE)[0].experts.down
    torch.testing.assert_close(least_squares(experts, averaged(experts), parts, RULE)[0].experts.down, once)
    # Two ranks of the same tokens: sums double, the solution stays.
    doubled = least_squares(experts, averaged(experts), parts, RULE, reduce=lambda values: 2 * values)[0]
    torch.testing.assert_close(doubled.experts.down, once)


def test_an_indefinite_gram_matrix_is_solved_by_its_eigenvectors():
    features = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    sums = equations(features, torch.ones(2, 1), torch.ones(2, 1))
    broken = NormalEquations(
        gram=sums.gram - 1e-3 * torch.eye(2), cross=sums.cross, start=sums.start, energy=sums.energy
    )
    change = solve(broken, 1e-6)
    torch.testing.assert_close(change, torch.full((1, 2), 3 / 10, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_fit_to_the_layer_lowers_its_error_further_than_fits_to_clusters():
    experts, tokens = random_experts(), random_tokens(500)
    start = averaged(experts)
    alone = least_squares(experts, start, [tokens], RULE)[0]
    together = least_squares(experts, start, [tokens], RULE, target="layer", sweeps=5)[0]
    assert error(experts, together, tokens) < error(experts, alone, tokens) < error(experts, start, tokens)


def test_a_fit_to_the_layer_repairs_pruning():
    experts, tokens = random_experts(), random_tokens(500)
    pruned = MergedLayer(expert_map=torch.tensor([0, DROPPED, 1, 2]), experts=experts.take(torch.tensor([0, 2, 3])))
    repaired, fits = least_squares(experts, pruned, [tokens], RULE, target="layer")
    assert len(fits) == 3
    assert torch.equal(repaired.expert_map, pruned.expert_map)
    assert error(experts, repaired, tokens) < 0.9 * error(experts, pruned, tokens)
    kept_only = LayerTokens(hidden=tokens.hidden, logits=tokens.logits.index_fill(1, torch.tensor([1]), -1e9))
    untouched, _ = least_squares(experts, pruned, [kept_only], RULE, target="layer")
    torch.testing.assert_close(untouched.experts.down, pruned.experts.down, rtol=0, atol=1e-6)


def test_a_ridge_chosen_on_unseen_tokens_serves_new_tokens_where_the_smallest_one_overfits():
    experts, few, new = (
        random_experts(width=16, inner=24),
        random_tokens(40, width=16),
        random_tokens(500, width=16, seed=9),
    )
    start = averaged(experts)
    smallest = least_squares(experts, start, [few], RULE, ridges=[1e-8])[0]
    chosen = least_squares(experts, start, [few], RULE, ridges=[1e-8, *RIDGES])[0]
    assert error(experts, chosen, new) < error(experts, smallest, new)


def test_the_start_is_left_as_it_was_and_the_stored_type_is_kept():
    experts = random_experts()
    experts = Experts(gate_up=experts.gate_up.bfloat16(), down=experts.down.bfloat16())
    tokens = random_tokens(dtype=torch.bfloat16)
    start = averaged(experts)
    before = start.experts.down.clone()
    layer, _ = least_squares(experts, start, [tokens], RULE)
    assert torch.equal(start.experts.down, before)
    assert layer.experts.down.dtype == torch.bfloat16 and not torch.equal(layer.experts.down, before)


def test_an_unknown_target_is_refused():
    experts = random_experts()
    with pytest.raises(ConfigError, match="did you mean 'mixture'"):
        least_squares(experts, averaged(experts), [], RULE, target="mixtures")  # type: ignore[arg-type]


def test_coefficients_of_a_layer_serve_as_target():
    experts, tokens = random_experts(), random_tokens()
    alpha = coefficients(LABELS, measure(experts, tokens, RULE), "gate_aware")
    start = MergedLayer(expert_map=LABELS, experts=weighted_experts(experts, LABELS, alpha))
    _, fits = least_squares(experts, start, [tokens], RULE, target="coefficients", alpha=alpha)
    assert all(fit.ridge == 1e-4 for fit in fits)


def test_a_solution_that_raises_the_objective_is_refused(monkeypatch):
    features = torch.eye(2, dtype=torch.float64)
    sums = equations(features, features, features)
    monkeypatch.setattr("llm.moe.least_squares.solve", lambda total, ridge: 100 * total.cross)
    change, fit = best_change(sums, None, [1e-4])
    assert not change.any()
    assert (fit.before, fit.after, fit.ridge) == (2.0, 2.0, 0.0)

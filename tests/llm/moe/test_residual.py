import torch

from llm.moe.experts import DROPPED, Experts, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.merging import normalised, weighted_experts
from llm.moe.residual import constants_output, residual_constants
from tests.llm.moe.made_up_layers import random_experts, random_tokens

LABELS = torch.tensor([0, 1, 0, 1])
RULE = RoutingRule(top_k=2, normalise=True)


def averaged(experts):
    alpha = normalised(LABELS, torch.ones(4))
    return MergedLayer(expert_map=LABELS, experts=weighted_experts(experts, LABELS, alpha))


def error(experts, layer, tokens, constants=None):
    y = mixture(experts, tokens.hidden, route(tokens.logits, RULE))
    found = merged_output(layer, tokens, RULE)
    if constants is not None:
        found = found + constants_output(constants, tokens, RULE)
    return float((y - found).square().sum())


def test_constants_output_is_the_gated_sum_of_the_constants_of_the_selected_experts():
    tokens, constants = random_tokens(5), torch.arange(32, dtype=torch.float64).view(4, 8)
    routing = route(tokens.logits, RULE)
    found = constants_output(constants, tokens, RULE)
    for row, selected, gates in zip(found, routing.selected, routing.gates.double(), strict=True):
        torch.testing.assert_close(row, gates[0] * constants[selected[0]] + gates[1] * constants[selected[1]])


def test_members_that_differ_by_a_constant_output_are_merged_without_loss():
    """Feature 0 yields silu(1) x 1 on each token, for tokens whose last number is 1: its down column is a constant."""
    experts, tokens = random_experts().take(LABELS), random_tokens(200)
    tokens.hidden[:, -1] = 1.0
    experts.gate_up[:, [0, experts.inner_width]] = 0
    experts.gate_up[:, [0, experts.inner_width], -1] = 1.0
    offsets = torch.randn(4, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    experts.down[:, :, 0] = offsets
    start = averaged(experts)
    constants, fit = residual_constants(experts, start, [tokens], RULE, ridges=[1e-10])
    assert error(experts, start, tokens) > 1
    assert error(experts, start, tokens, constants) < 1e-8
    means = (offsets[[0, 1]] + offsets[[2, 3]]) / 2
    expected = torch.nn.functional.silu(torch.ones(())) * (offsets - means[LABELS])
    torch.testing.assert_close(constants, expected, rtol=0, atol=1e-5)
    assert fit.after < 1e-8 < 1 < fit.before


def test_constants_lower_the_error_by_what_the_fit_says_also_where_experts_are_dropped():
    experts, tokens = random_experts(), random_tokens(400)
    pruned = MergedLayer(expert_map=torch.tensor([0, DROPPED, 1, DROPPED]), experts=experts.take(torch.tensor([0, 2])))
    for layer in (averaged(experts), pruned):
        constants, fit = residual_constants(experts, layer, [tokens], RULE, ridges=[1e-4])
        assert abs(error(experts, layer, tokens) / fit.before - 1) < 1e-6
        assert abs(error(experts, layer, tokens, constants) / fit.after - 1) < 1e-6
        assert fit.after < fit.before


def test_a_lossless_merge_gets_no_constants():
    experts = random_experts().take(LABELS)
    constants, fit = residual_constants(experts, averaged(experts), [random_tokens()], RULE)
    assert float(constants.abs().max()) < 1e-6
    assert fit.after <= fit.before < 1e-9


def test_batches_and_ranks_add_up():
    experts, tokens = random_experts(), [random_tokens(seed=s) for s in (1, 2)]
    layer = averaged(experts)
    every, _ = residual_constants(experts, layer, tokens, RULE)
    doubled, _ = residual_constants(experts, layer, tokens, RULE, reduce=lambda values: 2 * values)
    torch.testing.assert_close(doubled, every)
    assert isinstance(layer.experts, Experts)

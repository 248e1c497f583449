from typing import get_args

import pytest
import torch

from launch.errors import ConfigError
from llm.moe.experts import LayerTokens, RoutingRule
from llm.moe.saliency import Saliency, keep, most_salient, saliency
from llm.moe.statistics import measure, no_statistics
from tests.llm.moe.made_up_layers import random_experts, random_tokens

EXPERTS = random_experts(6)
TOKENS = random_tokens(50, experts=6)


def by_hand(rule):
    """Every saliency, token by token, from exponentials of logits in plain Python."""
    found = {kind: [0.0] * 6 for kind in get_args(Saliency)}
    selections = [0] * 6
    for hidden, logits in zip(TOKENS.hidden, TOKENS.logits, strict=True):
        weights = [float(w) for w in logits.exp()]
        best = sorted(range(6), key=lambda j: -weights[j])[: rule.top_k]
        total = sum(weights[j] for j in best) if rule.normalise else sum(weights)
        for j in range(6):
            found["probability"][j] += weights[j] / sum(weights) / len(TOKENS.hidden)
        for j in best:
            norm = float(EXPERTS.output(j, hidden[None]).norm())
            selections[j] += 1
            found["frequency"][j] += 1 / (rule.top_k * len(TOKENS.hidden))
            found["gate"][j] += weights[j] / total / len(TOKENS.hidden)
            found["ean"][j] += norm
            found["reap"][j] += weights[j] / total * norm
    found["reap"] = [total / count for total, count in zip(found["reap"], selections, strict=True)]
    return found


@pytest.mark.parametrize("normalise", [True, False])
def test_every_saliency_equals_a_loop_over_single_tokens(normalise):
    rule = RoutingRule(top_k=3, normalise=normalise)
    sums, expected = measure(EXPERTS, TOKENS, rule), by_hand(rule)
    for kind in get_args(Saliency):
        assert saliency(sums, kind).tolist() == pytest.approx(expected[kind], rel=1e-6), kind


def test_frequency_and_probability_order_experts_differently():
    # Expert 0 wins often and barely; expert 1 wins seldom and clearly, and is close behind where it loses.
    logits = torch.tensor([[1.0, 0.9, -9.0]] * 3 + [[-9.0, 9.0, -8.0]])
    tokens = LayerTokens(hidden=torch.ones(4, 8), logits=logits)
    sums = measure(random_experts(3, dtype=torch.float32), tokens, RoutingRule(top_k=1, normalise=True))
    assert saliency(sums, "frequency").tolist() == [0.75, 0.25, 0]
    assert saliency(sums, "probability").argsort(descending=True).tolist() == [1, 0, 2]


def test_reap_and_ean_order_experts_differently():
    # Expert 0 is selected always, with small gates; expert 1 once, with nearly all. REAP is a mean, EAN a sum.
    logits = torch.tensor([[0.0, -9.0, 5.0]] * 3 + [[-8.0, 9.0, -9.0]])
    same = random_experts(1, dtype=torch.float32).take(torch.tensor([0, 0, 0]))
    tokens = LayerTokens(hidden=torch.ones(4, 8), logits=logits)
    sums = measure(same, tokens, RoutingRule(top_k=2, normalise=True))
    assert saliency(sums, "ean").argsort(descending=True, stable=True).tolist() == [0, 2, 1]
    assert saliency(sums, "reap").argsort(descending=True, stable=True).tolist() == [1, 2, 0]


def test_an_expert_that_is_never_selected_has_no_saliency_and_no_nan():
    tokens = LayerTokens(hidden=torch.ones(1, 8), logits=torch.tensor([[2.0, 1.0, 0.0]]))
    sums = measure(random_experts(3, dtype=torch.float32), tokens, RoutingRule(top_k=2, normalise=True))
    for kind in ("frequency", "gate", "ean", "reap"):
        assert saliency(sums, kind)[2] == 0


def test_an_unknown_saliency_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"saliency = 'frequancy'.*did you mean 'frequency'"):
        saliency(no_statistics(2, 2), "frequancy")


def test_the_most_salient_are_kept_and_of_equals_the_first():
    assert most_salient(torch.tensor([0.1, 0.4, 0.3, 0.4, 0.3]), 3).tolist() == [False, True, True, True, False]


def test_more_experts_than_there_are_cannot_be_kept():
    with pytest.raises(ConfigError, match="7 experts cannot be kept of 6"):
        most_salient(torch.ones(6), 7)


SCORES = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.3, 0.3, 0.2, 0.2], [0.4, 0.35, 0.15, 0.1]])


def test_within_layers_every_layer_keeps_the_same_number():
    assert keep(SCORES, 2).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_across_layers_the_best_pairs_are_kept_exactly_as_many_as_asked():
    # One each first: 0.7, 0.3, 0.4. Then 0.35, 0.3, and of the five with 0.2 or less the one of the first layer.
    kept = keep(SCORES, 2, scope="global")
    assert kept.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert keep(SCORES, 3, scope="global").sum(1).tolist() == [2, 4, 3]


def test_across_layers_no_layer_keeps_less_than_a_quarter_of_the_average():
    scores = torch.tensor([[0.01, 0.02, 0.0, 0.0], [0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]])
    kept = keep(scores, 2, scope="global")
    assert kept.nonzero().tolist() == [[0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0]]


def test_an_unknown_scope_is_refused():
    with pytest.raises(ConfigError, match=r"scope = 'globl'.*did you mean 'global'"):
        keep(SCORES, 2, scope="globl")

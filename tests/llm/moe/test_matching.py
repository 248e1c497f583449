import pytest
import torch

from launch.errors import ConfigError
from llm.moe.experts import Experts, LayerTokens, RoutingRule, route
from llm.moe.matching import ClusterTokens, correlation, fix_dominant, zip_places, zipit
from tests.llm.moe.made_up_layers import random_experts, random_tokens, shuffled_copies

RULE = RoutingRule(top_k=2, normalise=True)
EQUAL = torch.ones(4, dtype=torch.float64)
ONE_CLUSTER = torch.zeros(4, dtype=torch.int64)
FIRST = torch.tensor([0])


def tokens_of(count=200, experts=4, **options):
    return ClusterTokens(batches=[random_tokens(count, experts=experts)], rule=RULE, **options)


def output(experts, hidden, expert=0):
    return experts.output(expert, hidden)


def dense_zip(similarity, places, damping):
    """ZipIt as it is told: the largest entry of the whole matrix, then one row and column less."""
    similarity = similarity.clone().fill_diagonal_(-1)
    groups = [[feature] for feature in range(len(similarity))]
    while len(groups) > places:
        p, q = sorted(divmod(int(similarity.flatten().argmax()), len(groups)))
        new = damping * torch.minimum(similarity[p], similarity[q])
        similarity[p], similarity[:, p] = new, new
        similarity[p, p] = -1
        groups[p] += groups.pop(q)
        rest = [i for i in range(len(similarity)) if i != q]
        similarity = similarity[rest][:, rest]
    return [next(place for place, group in enumerate(groups) if f in group) for f in range(sum(map(len, groups)))]


def test_correlation_is_numpys_and_zero_for_a_constant_column():
    import numpy

    source = torch.Generator().manual_seed(0)
    first, second = torch.rand(30, 4, generator=source), torch.rand(30, 3, generator=source)
    first[:, 2] = 0.7
    found = correlation(first, second)
    assert (found[2] == 0).all()
    expected = torch.from_numpy(numpy.corrcoef(first[:, [0, 1, 3]].T, second.T)[:3, 3:]).float()
    torch.testing.assert_close(found[[0, 1, 3]], expected, rtol=1e-4, atol=1e-5)


def test_a_cluster_gets_each_token_once_for_every_selected_member():
    tokens = tokens_of()
    selected = route(tokens.batches[0].logits, RULE).selected
    found = tokens.of(torch.tensor([0, 2]))
    for hidden, choices in zip(tokens.batches[0].hidden, selected.tolist(), strict=True):
        times = int((found == hidden).all(1).sum())
        assert times == sum(choice in (0, 2) for choice in choices)


def test_a_sample_does_not_depend_on_the_size_of_batches():
    whole = random_tokens(200)
    parts = [LayerTokens(hidden=whole.hidden[i : i + 7], logits=whole.logits[i : i + 7]) for i in range(0, 200, 7)]
    cluster = torch.tensor([1, 3])
    found = [ClusterTokens(batches=b, rule=RULE, limit=20).of(cluster) for b in ([whole], parts)]
    assert len(found[0]) == 20
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], ClusterTokens(batches=parts, rule=RULE, limit=20, seed=1).of(cluster))


def test_zipit_of_a_large_matrix_takes_the_steps_of_the_plain_algorithm():
    for seed, damping in ((0, 0.1), (1, 0.3), (2, 1.0)):
        features = torch.randn(12, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        similarity = torch.corrcoef(features.T)
        assert zip_places(similarity.clone(), 9, damping).tolist() == dense_zip(similarity, 9, damping)


@pytest.mark.parametrize("ingredients", ["activations", "weights", "both"])
@pytest.mark.parametrize("down_scale", ["mean", "sum_over_members"])
def test_fix_dominant_of_equal_experts_returns_that_expert(ingredients, down_scale):
    experts = random_experts().take(torch.tensor([1, 1, 1, 1]))
    merged = fix_dominant(
        experts, ONE_CLUSTER, FIRST, EQUAL, tokens_of(), ingredients=ingredients, down_scale=down_scale
    )
    torch.testing.assert_close(merged.gate_up[0], experts.gate_up[0])
    torch.testing.assert_close(merged.down[0], experts.down[0])


@pytest.mark.parametrize("ingredients", ["activations", "weights", "both"])
def test_fix_dominant_undoes_permutations_of_inner_features(ingredients):
    experts, _ = shuffled_copies(4)
    merged = fix_dominant(experts, ONE_CLUSTER, torch.tensor([2]), EQUAL, tokens_of(), ingredients=ingredients)
    torch.testing.assert_close(merged.gate_up[0], experts.gate_up[2])
    torch.testing.assert_close(merged.down[0], experts.down[2])


def test_fix_dominant_is_the_merge_by_a_matrix():
    """Section 3.3 in its own words: rows of M select features, are divided by their sums, and multiply the weights."""
    experts, alpha = random_experts(3), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    labels, tokens = torch.zeros(3, dtype=torch.int64), tokens_of(experts=3)
    hidden, inner = tokens.of(torch.arange(3)), experts.inner_width
    matrix = torch.zeros(inner, 3 * inner, dtype=torch.float64)
    matrix[:, inner : 2 * inner] = alpha[1] * torch.eye(inner)
    for member in (0, 2):
        for q in range(inner):
            pairs = [
                torch.corrcoef(torch.stack([experts.inner(1, hidden)[:, p], experts.inner(member, hidden)[:, q]]))[0, 1]
                for p in range(inner)
            ]
            matrix[int(torch.stack(pairs).argmax()), member * inner + q] = alpha[member]
    summed = matrix / alpha.sum()
    matrix = matrix / matrix.sum(1, keepdim=True)
    merged = fix_dominant(experts, labels, torch.tensor([1]), alpha, tokens)
    torch.testing.assert_close(merged.gate[0], matrix @ experts.gate.flatten(0, 1))
    torch.testing.assert_close(merged.up[0], matrix @ experts.up.flatten(0, 1))
    torch.testing.assert_close(merged.down[0].T, matrix @ experts.down.mT.flatten(0, 1))
    merged = fix_dominant(experts, labels, torch.tensor([1]), alpha, tokens, down_scale="sum_over_members")
    torch.testing.assert_close(merged.down[0].T, summed @ experts.down.mT.flatten(0, 1))


def test_adding_the_down_columns_at_a_place_keeps_the_mean_of_experts_that_repeat_a_feature():
    """One feature of the second expert is split into two halves of equal direction: a place with three features."""
    first = random_experts(1, inner=6)
    gate, up, down = first.gate[0].clone(), first.up[0].clone(), first.down[0].clone()
    gate[5], up[5], down[:, 4] = gate[4], up[4], down[:, 4] / 2
    down[:, 5] = down[:, 4]
    first.down[0, :, 5] = 0  # so that both are the same function
    experts = Experts(
        gate_up=torch.stack([first.gate_up[0], torch.cat([gate, up])]), down=torch.stack([first.down[0], down])
    )
    tokens = ClusterTokens(batches=[random_tokens(experts=2)], rule=RULE)
    hidden = tokens.batches[0].hidden
    expected = experts.output(0, hidden)
    torch.testing.assert_close(experts.output(1, hidden), expected)
    labels = torch.zeros(2, dtype=torch.int64)
    errors = {
        scale: float(
            (
                fix_dominant(experts, labels, FIRST, EQUAL[:2], tokens, down_scale=scale).output(0, hidden) - expected
            ).norm()
        )
        for scale in ("mean", "sum_over_members")
    }
    assert errors["sum_over_members"] < 1e-12 < 0.05 < errors["mean"]


@pytest.mark.parametrize(("copies", "damping"), [(2, 0.1), (4, 0.1), (3, 1.0)])
@pytest.mark.parametrize("down_scale", ["mean", "sum_over_members"])
def test_zipit_of_permuted_copies_returns_their_function(copies, damping, down_scale):
    experts, _ = shuffled_copies(copies)
    labels, tokens = torch.zeros(copies, dtype=torch.int64), tokens_of(experts=copies)
    merged = zipit(experts, labels, EQUAL[:copies], tokens, damping=damping, down_scale=down_scale)
    hidden = tokens.batches[0].hidden
    torch.testing.assert_close(merged.output(0, hidden), experts.output(0, hidden))


def test_a_feature_that_never_varies_keeps_its_index():
    experts, _ = shuffled_copies(2)
    experts.gate_up[:, 0] = 0  # feature 0 of both experts yields 0 on all tokens
    labels, tokens = torch.zeros(2, dtype=torch.int64), tokens_of(experts=2)
    merged = fix_dominant(experts, labels, FIRST, EQUAL[:2], tokens)
    torch.testing.assert_close(merged.up[0, 0], experts.up[:, 0].mean(0))


def test_a_cluster_that_no_token_reaches_is_averaged_by_index():
    batch = LayerTokens(hidden=random_tokens(5).hidden, logits=torch.tensor([[9.0, 8.0, 0.0, 0.0]]).repeat(5, 1))
    tokens, labels = ClusterTokens(batches=[batch], rule=RULE), torch.tensor([0, 1, 2, 2])
    experts = random_experts()
    for merged in (
        zipit(experts, labels, EQUAL, tokens),
        fix_dominant(experts, labels, torch.tensor([0, 1, 3]), EQUAL, tokens),
    ):
        assert torch.equal(merged.down[:2], experts.down[:2])
        torch.testing.assert_close(merged.down[2], experts.down[2:].mean(0))


def test_unknown_names_are_refused_before_any_token_is_read():
    nothing = ClusterTokens(batches=[], rule=RULE)
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        fix_dominant(random_experts(), ONE_CLUSTER, FIRST, EQUAL, nothing, ingredients="weight")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="down_scale"):
        zipit(random_experts(), ONE_CLUSTER, EQUAL, nothing, down_scale="sum")  # type: ignore[arg-type]

"""Plans of masks and answers of packed inputs, against enumeration."""

import math

import pytest
import torch
from torch import Tensor

from llm.diffusion import likelihood, masking, regions
from llm.diffusion.codec import build_codec
from llm.diffusion.regions import Questions
from tests.llm.diffusion import enumeration as exact


def refuse(count: int) -> Tensor:
    raise AssertionError("an exact plan draws nothing")


def noise(draws: int, seed: int = 0):
    return lambda count: torch.rand(draws, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["nelbo_token", "nelbo_subtoken", "loss_ce_joint"])
@pytest.mark.parametrize(("length", "granularity"), [(1, 1), (3, 1), (2, 2)])
def test_every_mask_is_listed_with_its_weight_where_that_takes_no_more_than_the_draws(
    name: regions.RegionName, length: int, granularity: int
) -> None:
    units = length * (1 if name == "nelbo_token" else granularity)
    plan = regions.plan(name, length, granularity, draws=2**units - 1, uniform=refuse)
    expected = {tuple(mask.tolist()): exact.subset_weight(int(mask.sum()), units) for mask in exact.all_masks(units)}
    found = {tuple(m.flatten().tolist()): float(w) for m, w in zip(plan.masks, plan.weights[0], strict=True)}
    assert found == pytest.approx(expected) and plan.exact
    assert torch.equal(plan.charged, plan.masks.any(-1))


@pytest.mark.parametrize("estimator", ["E1", "E2"])
def test_drawn_masks_and_weights_are_those_of_the_evaluators_with_equal_ones_listed_once(
    estimator: likelihood.Estimator,
) -> None:
    draws, length = 40, 4
    plan = regions.plan("nelbo_subtoken", length, 2, draws=draws, uniform=noise(draws), estimator=estimator)
    uniform, units = noise(draws)(1 + 8), torch.tensor([8])
    for draw in range(draws):
        mask, weight = likelihood.weighted_mask(uniform[draw : draw + 1], units, draw, draws, estimator, per_token=2)
        assert torch.equal(plan.masks[plan.mask_of[draw, 0]], mask[0])
        assert float(plan.weights[draw, 0]) == pytest.approx(float(weight), rel=1e-12)
    assert len(plan.masks) == len(plan.masks.flatten(1).unique(dim=0)) < draws and not plan.exact


def test_counts_are_stratified_and_places_are_even() -> None:
    draws, length = 2400, 12
    plan = regions.plan("nelbo_token", length, 1, draws=draws, uniform=noise(draws))
    masks = plan.masks[plan.mask_of[:, 0], :, 0]
    assert masks.sum(-1).bincount().tolist() == [0] + [200] * length
    assert plan.weights[:, 0].tolist() == pytest.approx([length / int(mask.sum()) for mask in masks])
    by_place, share = masks.double().mean(0), (length + 1) / (2 * length)
    assert (by_place - share).abs().max() < 4 * math.sqrt(0.25 / draws)


def test_a_shorter_region_shares_the_ranks_of_a_longer_one() -> None:
    uniform = noise(9)(20)
    for length in (5, 6):
        plan = regions.plan("nelbo_token", length, 1, draws=9, uniform=lambda count: uniform[:, :count])
        for draw in range(9):
            mask = plan.masks[plan.mask_of[draw, 0], :, 0]
            smallest = uniform[draw, 1 : 1 + length].argsort()[: int(mask.sum())]
            assert set(mask.nonzero()[:, 0].tolist()) == set(smallest.tolist())


def test_the_chain_hides_what_is_to_come_and_charges_one_token_a_row() -> None:
    plan = regions.plan("nll_chain", 3, 2, draws=1, uniform=refuse)
    assert plan.masks[..., 0].int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert plan.charged.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert plan.draws(torch.tensor([[1.0, 2.0, 4.0]])).values.tolist() == [[7.0]]


def test_each_layer_hides_all_that_is_behind_it_and_charges_what_it_hides_of_its_own() -> None:
    plan = regions.plan("nelbo_layered", 2, 3, draws=3, uniform=refuse)
    found = zip(plan.masks.int().tolist(), plan.charged.int().tolist(), plan.weights[0].tolist(), strict=True)
    assert list(found) == [
        ([[hidden * (j == layer) + (j > layer) for j in range(3)] for hidden in charged], charged, 0.5)
        for layer in range(3)
        for charged in ([1, 0], [0, 1], [1, 1])
    ]


@pytest.mark.parametrize("estimator", ["E1", "E2"])
def test_the_plan_in_layers_is_the_layered_evaluator(estimator: likelihood.Estimator) -> None:
    draws, length, codec = 12, 4, build_codec(7, 3)
    uniform, model = noise(draws), exact.random_model(codec, length, seed=4)
    backbone, tokens = exact.as_backbone(model, 7), torch.tensor([[3, 1, 6, 0]])

    def of_layer(draw: int, count: int) -> Tensor:
        return uniform(3 * count)[draw // 3, draw % 3 :: 3].unsqueeze(0)

    expected = likelihood.nelbo_layered(backbone, tokens, codec, of_layer, draws=draws, estimator=estimator).values
    plan = regions.plan("nelbo_layered", length, 3, draws=draws, uniform=uniform, estimator=estimator)
    assert len(plan.masks) < 3 * draws
    inputs = masking.hide(codec.encode(tokens), plan.masks, codec)
    asked = Questions.of(plan.charged.flatten().nonzero()[:, 0], tokens.expand(len(inputs), -1)[plan.charged])
    answers = regions.ask_digits(backbone, inputs, asked, codec, "first_digit")[:, 0]
    charges = torch.zeros(len(inputs), dtype=torch.float64).index_add_(0, plan.charged.nonzero()[:, 0], answers)
    torch.testing.assert_close(plan.draws(charges.unsqueeze(0)).values, expected, atol=1e-9, rtol=0.0)


def test_one_place_may_be_asked_for_many_tokens_in_any_order_and_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = build_codec(5, 1)
    model = exact.random_model(codec, 3, seed=1)
    inputs = torch.tensor([[[5], [1], [5]], [[2], [5], [5]]])
    places = torch.tensor([5, 0, 2, 0, 5, 4, 0])
    tokens = torch.tensor([1, 4, 0, 2, 3, 3, 4])
    log_probs = model(inputs).log_softmax(-1).flatten(0, 1)
    for chunk in (1, 2**20):
        monkeypatch.setattr("llm.diffusion.head.CPU_CHUNK_BYTES", chunk)
        found = regions.ask_tokens(exact.as_backbone(model, 5), inputs, Questions.of(places, tokens), modes=True)
        torch.testing.assert_close(found[:, 0], -log_probs[places, tokens])
        assert found[:, 1].bool().tolist() == (log_probs.argmax(-1)[places] == tokens).tolist()


@pytest.mark.parametrize("joint", [False, True])
def test_digits_are_charged_as_the_evaluators_charge_them(joint: bool) -> None:
    codec = build_codec(5, 3)
    model, tokens = exact.random_model(codec, 2, seed=2), torch.tensor([[3, 1], [0, 4]])
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]]).bool()
    backbone, inputs = exact.as_backbone(model, 5), masking.hide(codec.encode(tokens), mask, codec)
    places = mask.any(-1).flatten().nonzero()[:, 0]
    asked = Questions.of(places, tokens.flatten()[places])
    found = regions.ask_digits(backbone, inputs, asked, codec, "token" if joint else "digits")[:, 0]
    charge = likelihood.token_nll if joint else likelihood.digit_nll
    expected = charge(backbone, tokens, mask, codec)
    assert [float(found[0]), float(found[1] + found[2])] == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("granularity", [1, 2])
def test_one_sequence_in_all_is_filled_in_greedily(granularity: int) -> None:
    codec = build_codec(4, granularity)
    backbone, tokens = exact.as_backbone(exact.random_model(codec, 3, seed=3), 4), exact.all_sequences(4, 3)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    greedy = likelihood.fills_greedily(backbone, tokens, codec, scored=everything)
    assert int(greedy.sum()) == 1
    (chosen,) = tokens[greedy]
    last = torch.tensor([False, False, True]).expand_as(tokens)
    of_last = likelihood.fills_greedily(backbone, tokens, codec, scored=last)
    assert of_last.view(16, 4).sum(-1).tolist() == [1] * 16
    chain = likelihood.nll_chain(backbone, chosen.unsqueeze(0), codec, order="confidence").values
    others = likelihood.nll_chain(backbone, tokens, codec, order="confidence").values
    assert float(chain) <= float(others.median())

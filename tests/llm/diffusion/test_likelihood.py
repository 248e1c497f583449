"""The evaluators against exact enumeration, and the number that must never become a perplexity."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.diffusion import likelihood, masking
from llm.diffusion.codec import Codec, build_codec
from llm.diffusion.likelihood import Draws, Estimate, JointLoss
from tests.llm.diffusion import enumeration as exact


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def expectation(charge: Callable[..., Tensor], predict: exact.Predict, codec: Codec, tokens: Tensor, *, whole: bool):
    """Nats [B]: the exact mean of E2 over all masks, with the library's own charge of each mask."""
    backbone, length = exact.as_backbone(predict, codec.vocab_size), tokens.shape[1]
    units = length if whole else length * codec.granularity
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for mask in exact.all_masks(units):
        hidden = mask.view(1, length, -1).expand(len(tokens), length, codec.granularity)
        total += exact.subset_weight(int(mask.sum()), units) * charge(backbone, tokens, hidden, codec)
    return total


def mean_of_all(predict: exact.Predict, codec: Codec, joint: Tensor) -> tuple[float, float, float]:
    """(nelbo_subtoken, nelbo_token, loss_ce_joint) averaged over the data law."""
    weight = joint.flatten()
    seen = weight > 0
    tokens = exact.all_sequences(codec.vocab_size, joint.dim())[seen]
    cases = ((likelihood.digit_nll, False), (likelihood.token_nll, True), (likelihood.token_nll, False))
    values = [expectation(charge, predict, codec, tokens, whole=whole) for charge, whole in cases]
    return tuple(float((weight[seen] * value).sum()) for value in values)  # type: ignore[return-value]


INDEPENDENT_BITS = torch.outer(table(0.6, 0.4), table(0.7, 0.3)).flatten()
KNOWN = {
    "O-A": (table(0.4, 0.1, 0.1, 0.4), 2, 1.193550, 1.097177),
    "O-A with one digit": (table(0.4, 0.1, 0.1, 0.4), 1, 1.193550, 1.193550),
    "O-A2": (table(0.5, 0.0, 0.0, 0.5), 2, 0.693147, 0.346574),
    "O-B": (table(0.25, 0.25, 0.25, 0.25), 2, 1.386294, 1.386294),
    "O-B2": (INDEPENDENT_BITS, 2, 1.283876, 1.283876),
    "O-C": (table(0.7, 0.15, 0.1, 0.05), 2, 0.914286, 0.909873),
    "O-D": (exact.copy_joint(), 2, 1.973795, 1.963351),
    "O-D with one digit": (exact.copy_joint(), 1, 1.973795, 1.973795),
    "O-F": (table(0.5, 0.3, 0.2), 2, 1.029653, 0.988846),
}


# The perfect predictor: every bound is the entropy, the joint loss is not


@pytest.mark.parametrize("name", KNOWN)
def test_with_the_perfect_predictor_both_bounds_are_the_entropy_and_the_joint_loss_is_the_known_number(name: str):
    joint, granularity, entropy, joint_loss = KNOWN[name]
    codec = build_codec(joint.shape[0], granularity)
    subtoken, token, loss = mean_of_all(exact.posterior(joint, codec), codec, joint)
    assert exact.entropy(joint) == pytest.approx(entropy, abs=1e-6)
    assert subtoken == pytest.approx(exact.entropy(joint), abs=1e-12)
    assert token == pytest.approx(exact.entropy(joint), abs=1e-12)
    assert loss == pytest.approx(joint_loss, abs=1e-6)


def test_two_tokens_that_differ_in_both_bits_cost_half_their_entropy_in_the_joint_loss():
    joint = table(0.5, 0.0, 0.0, 0.5)
    codec = build_codec(4, 2)
    assert mean_of_all(exact.posterior(joint, codec), codec, joint)[2] == pytest.approx(0.5 * math.log(2), abs=1e-14)


def test_two_tokens_that_differ_in_seven_bits_cost_a_seventh_of_a_bit_in_the_joint_loss_and_one_bit_in_the_bound():
    codec = build_codec(128, 7)
    joint = torch.zeros(128, dtype=torch.float64)
    joint[0] = joint[127] = 0.5
    subtoken, token, loss = mean_of_all(exact.posterior(joint, codec), codec, joint)
    assert loss / math.log(2) == pytest.approx(1 / 7, abs=1e-12)
    assert subtoken / math.log(2) == pytest.approx(1.0, abs=1e-12)
    assert token / math.log(2) == pytest.approx(1.0, abs=1e-12)


def test_the_joint_loss_depends_on_the_permutation_of_the_codes_and_the_bounds_do_not():
    joint = table(0.7, 0.15, 0.1, 0.05)
    losses = {}
    for order in itertools.permutations(range(4)):
        codec = build_codec(4, 2, permutation=np.array(order))
        subtoken, token, losses[order] = mean_of_all(exact.posterior(joint, codec), codec, joint)
        assert subtoken == pytest.approx(0.914286, abs=1e-6) and token == pytest.approx(0.914286, abs=1e-6)
    counts = {
        value: sum(abs(loss - value) < 1e-6 for loss in losses.values()) for value in (0.909873, 0.878906, 0.840060)
    }
    assert counts == {0.909873: 8, 0.878906: 8, 0.840060: 8}
    assert losses[0, 1, 2, 3] == pytest.approx(0.909873, abs=1e-6)
    assert losses[0, 1, 3, 2] == pytest.approx(0.878906, abs=1e-6)
    assert losses[0, 3, 1, 2] == pytest.approx(0.840060, abs=1e-6)


@pytest.mark.parametrize(
    ("vocab_size", "granularity", "length"), [(4, 1, 2), (4, 2, 2), (8, 3, 2), (16, 4, 1)], ids=str
)
def test_on_random_data_the_joint_loss_is_below_the_entropy_exactly_when_a_token_has_several_digits(
    vocab_size: int, granularity: int, length: int
):
    generator = torch.Generator().manual_seed(length)
    joint = torch.rand((vocab_size,) * length, generator=generator, dtype=torch.float64) ** 3
    joint /= joint.sum()
    codec = build_codec(vocab_size, granularity)
    subtoken, token, loss = mean_of_all(exact.posterior(joint, codec), codec, joint)
    assert subtoken == pytest.approx(exact.entropy(joint), abs=1e-10)
    assert token == pytest.approx(exact.entropy(joint), abs=1e-10)
    if granularity == 1:
        assert loss == pytest.approx(exact.entropy(joint), abs=1e-10)
    else:
        assert loss < exact.entropy(joint) - 1e-3


def test_a_model_that_knows_only_the_filter_pays_the_logarithm_of_the_vocabulary():
    codec = build_codec(4, 2)
    values = mean_of_all(exact.uniform_model(codec), codec, exact.copy_joint())
    assert values == pytest.approx((2 * math.log(4),) * 3, abs=1e-12)


# Any model: the bounds hold for every sequence


@pytest.mark.parametrize(
    ("length", "vocab_size", "granularity"), [(1, 4, 2), (2, 4, 2), (2, 3, 2), (1, 7, 3), (3, 4, 1)]
)
def test_the_bound_is_the_mean_over_orders_and_never_below_the_likelihood_of_the_random_order_sampler(
    length: int, vocab_size: int, granularity: int
):
    codec = build_codec(vocab_size, granularity)
    model = exact.random_model(codec, length, seed=vocab_size)
    tokens = exact.all_sequences(vocab_size, length)
    orders = exact.all_orders(length, granularity)
    bound = expectation(likelihood.digit_nll, model, codec, tokens, whole=False)
    torch.testing.assert_close(bound, exact.nelbo_over_orders(model, codec, tokens, orders), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(bound, exact.nelbo_subtoken(model, codec, tokens), atol=1e-12, rtol=0.0)
    nll = exact.nll_over_orders(model, codec, tokens, orders)
    assert (bound >= nll - 1e-12).all() and (bound - nll).max() > 1e-3
    assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-13)


def test_the_bound_is_tight_when_all_orders_agree():
    codec, joint = build_codec(4, 2), exact.copy_joint()
    model, tokens = exact.posterior(joint, codec), exact.all_sequences(4, 2)
    nll = -joint.flatten().log()
    torch.testing.assert_close(expectation(likelihood.digit_nll, model, codec, tokens, whole=False), nll)
    torch.testing.assert_close(exact.nll_over_orders(model, codec, tokens, exact.all_orders(2, 2)), nll)


def test_the_joint_loss_is_below_the_likelihood_of_some_model_on_some_sequence():
    codec, joint = build_codec(4, 2), table(0.5, 0.0, 0.0, 0.5)
    model, tokens = exact.posterior(joint, codec), torch.tensor([[0], [3]])
    loss = expectation(likelihood.token_nll, model, codec, tokens, whole=False)
    assert (loss < exact.nll_over_orders(model, codec, tokens, exact.all_orders(1, 2)) - 0.3).all()


def test_the_token_bound_of_a_digit_model_is_the_masked_diffusion_bound_of_the_same_conditional():
    codec, plain = build_codec(4, 2), build_codec(4, 1)
    model = exact.random_model(codec, 2, seed=3)

    def whole_tokens(ids: Tensor) -> Tensor:  # [B, L, 1] with 4 where masked
        hidden = ids == 4
        return model(torch.where(hidden, codec.mask_symbol, codec.encode((ids * ~hidden).squeeze(-1))))

    tokens = exact.all_sequences(4, 2)
    of_digits = expectation(likelihood.token_nll, model, codec, tokens, whole=True)
    of_tokens = expectation(likelihood.digit_nll, whole_tokens, plain, tokens, whole=False)
    torch.testing.assert_close(of_digits, of_tokens, atol=1e-12, rtol=0.0)
    torch.testing.assert_close(of_digits, exact.nelbo_token(model, codec, tokens), atol=1e-12, rtol=0.0)


# Layers: all first digits before any second one


def layered_expectation(predict: exact.Predict, codec: Codec, tokens: Tensor) -> Tensor:
    """Nats [B]: the exact mean of nelbo_layered over the masks of every layer, with the library's own states."""
    backbone, length = exact.as_backbone(predict, codec.vocab_size), tokens.shape[1]
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for index in range(codec.granularity):
        layer = torch.full((len(tokens),), index)
        for mask in exact.all_masks(length):
            own = mask.view(1, length, 1).expand(len(tokens), -1, -1)
            hidden = masking.layered(own, layer, codec.granularity)
            due = own & (torch.arange(codec.granularity) == index)
            weight = exact.subset_weight(int(mask.sum()), length)
            total += weight * likelihood.group_nll(backbone, tokens, hidden, due, codec)
    return total


@pytest.mark.parametrize(("length", "vocab_size", "granularity"), [(1, 4, 2), (2, 4, 2), (2, 3, 2), (2, 7, 3)])
def test_the_layered_bound_is_the_mean_over_layered_orders_and_never_below_the_likelihood_of_their_sampler(
    length: int, vocab_size: int, granularity: int
):
    codec = build_codec(vocab_size, granularity)
    model, tokens = exact.random_model(codec, length, seed=4), exact.all_sequences(vocab_size, length)
    orders = exact.layered_orders(length, granularity)
    bound, nll = layered_expectation(model, codec, tokens), exact.nll_over_orders(model, codec, tokens, orders)
    torch.testing.assert_close(bound, exact.nelbo_over_orders(model, codec, tokens, orders), atol=1e-12, rtol=0.0)
    assert (bound >= nll - 1e-12).all()
    assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-13)


def test_with_the_perfect_predictor_the_layered_bound_is_the_negative_log_likelihood_whatever_the_code():
    joint, tokens = exact.copy_joint(), exact.all_sequences(4, 2)
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        codec = build_codec(4, 2, permutation=np.array(order))
        bound = layered_expectation(exact.posterior(joint, codec), codec, tokens)
        torch.testing.assert_close(bound, -joint.flatten().log(), atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("estimator", ["E1", "E2"])
def test_the_layered_estimators_have_the_enumerated_mean(estimator: likelihood.Estimator):
    codec = build_codec(7, 3)
    model, tokens = exact.random_model(codec, 2, seed=6), exact.all_sequences(7, 2)[[3, 20, 41]]
    generator = torch.Generator().manual_seed(0)
    draws = likelihood.nelbo_layered(
        exact.as_backbone(model, 7),
        tokens.repeat(2000, 1),
        codec,
        lambda draw, count: torch.rand(6000, count, generator=generator, dtype=torch.float64),
        draws=1,
        estimator=estimator,
    )
    values = draws.values.view(2000, 3)
    error = values.std(0) / math.sqrt(2000)
    assert ((values.mean(0) - layered_expectation(model, codec, tokens)).abs() < 4 * error).all()
    assert draws.name == "nelbo_layered" and isinstance(draws.estimate(), Estimate)


def test_the_layers_of_a_region_leave_its_context_visible():
    codec, seen = build_codec(4, 2), []
    tokens, scored = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])

    def spy(digits: Tensor, readout: Callable) -> Tensor:
        seen.append(digits.clone())
        return exact.as_backbone(exact.uniform_model(codec), 4)(digits, readout)

    value = likelihood.nelbo_layered(
        spy, tokens, codec, lambda draw, n: torch.full((1, n), 0.7), draws=1, scored=scored
    )
    assert all(torch.equal(digits[:, 0], codec.encode(tokens[:, 0])) for digits in seen)
    assert [int((digits == 2).sum()) for digits in seen] == [4, 2]  # both first digits and all second; the second alone
    assert float(value.values) == pytest.approx(2 * math.log(4), abs=1e-12)


FINITE_STEPS = {  # steps: nats on O-D with l = 1 and l = 2
    1: (2.772589, 2.772589),
    2: (2.373192, 2.381025),
    4: (2.173494, 2.178389),
    8: (2.073644, 2.076215),
    16: (2.023720, 2.025020),
}


def steps_expectation(predict: exact.Predict, codec: Codec, tokens: Tensor, steps: int) -> Tensor:
    """Nats [B]: the exact mean of nelbo_steps over states and revealed sets, with the library's charge of each pair."""
    backbone, shape = exact.as_backbone(predict, codec.vocab_size), (*tokens.shape, codec.granularity)
    weights: dict[tuple, float] = {}
    for weight, mask, group in exact.step_pairs(shape[1] * shape[2], steps):
        key = (tuple(mask.tolist()), tuple(group.tolist()))
        weights[key] = weights.get(key, 0.0) + weight
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for (mask, group), weight in weights.items():
        hidden, shown = (torch.tensor(x).view(1, *shape[1:]).expand(shape) for x in (mask, group))
        total += weight * likelihood.group_nll(backbone, tokens, hidden, shown, codec)
    return total


@pytest.mark.parametrize("granularity", [1, 2])
def test_the_bound_of_the_sampler_of_few_steps_falls_to_the_entropy_as_known(granularity: int):
    codec, joint = build_codec(4, granularity), exact.copy_joint()
    model, tokens = exact.posterior(joint, codec), exact.all_sequences(4, 2)
    for steps, known in FINITE_STEPS.items():
        value = float((joint.flatten() * steps_expectation(model, codec, tokens, steps)).sum())
        assert value == pytest.approx(known[granularity - 1], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_one_token_alone_pays_its_entropy_however_many_steps_reveal_it(steps: int):
    codec, joint = build_codec(4, 2), table(0.7, 0.15, 0.1, 0.05)
    value = steps_expectation(exact.posterior(joint, codec), codec, exact.all_sequences(4, 1), steps)
    assert float((joint * value).sum()) == pytest.approx(0.914286, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_bound_of_few_steps_is_never_below_the_likelihood_of_the_sampler_of_as_many_steps(steps: int):
    codec = build_codec(3, 2)
    model, tokens = exact.random_model(codec, 2, seed=9), exact.all_sequences(3, 2)
    law = exact.sampler_law(model, codec, 2, steps)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (steps_expectation(model, codec, tokens, steps) >= -law.log() - 1e-12).all()


# Exact evaluators


@pytest.mark.parametrize("order", ["left_to_right", "confidence"])
@pytest.mark.parametrize(("length", "vocab_size", "granularity"), [(2, 5, 3), (3, 4, 2), (3, 4, 1)])
def test_a_chain_is_a_normalised_law_equal_to_the_product_of_its_conditionals(
    order: likelihood.Order, length: int, vocab_size: int, granularity: int
):
    codec = build_codec(vocab_size, granularity)
    model, tokens = exact.random_model(codec, length, seed=2), exact.all_sequences(vocab_size, length)
    draws = likelihood.nll_chain(exact.as_backbone(model, vocab_size), tokens, codec, order=order)
    values = draws.values[:, 0]
    assert float(torch.exp(-values).sum()) == pytest.approx(1.0, abs=1e-12)

    expected = torch.zeros(len(tokens), dtype=torch.float64)
    for row, sequence in enumerate(tokens):
        hidden = torch.ones(length, dtype=torch.bool)
        for _ in range(length):
            state = torch.where(hidden.unsqueeze(-1), codec.mask_symbol, codec.encode(sequence)).unsqueeze(0)
            probs = model(state)[0].softmax(-1)
            score = probs.amax(-1) if order == "confidence" else -torch.arange(length, dtype=torch.float64)
            chosen = int(score.masked_fill(~hidden, -torch.inf).argmax())
            expected[row] -= probs[chosen, sequence[chosen]].log()
            hidden[chosen] = False
    torch.testing.assert_close(values, expected)


def test_a_chain_under_the_perfect_predictor_is_the_likelihood():
    codec, joint = build_codec(4, 2), exact.copy_joint()
    backbone, tokens = exact.as_backbone(exact.posterior(joint, codec), 4), exact.all_sequences(4, 2)
    for order in ("left_to_right", "confidence"):
        values = likelihood.nll_chain(backbone, tokens, codec, order=order).values[:, 0]
        torch.testing.assert_close(values, -joint.flatten().log())


def test_a_chain_over_a_region_is_conditional_on_the_rest():
    codec = build_codec(4, 2)
    model = exact.random_model(codec, 3, seed=4)
    backbone, tokens = exact.as_backbone(model, 4), exact.all_sequences(4, 3)
    scored = torch.tensor([False, True, True]).expand_as(tokens)
    draws = likelihood.nll_chain(backbone, tokens, codec, scored=scored)
    mass = torch.exp(-draws.values[:, 0]).view(4, 16).sum(-1)  # over the two scored tokens, for each first token
    torch.testing.assert_close(mass, torch.ones(4, dtype=torch.float64))
    assert draws.num_tokens.tolist() == [2] * 64


def test_regions_of_different_sizes_share_a_batch():
    codec = build_codec(4, 2)
    backbone, tokens = exact.as_backbone(exact.random_model(codec, 3, seed=4), 4), exact.all_sequences(4, 3)[:2]
    scored = torch.tensor([[False, False, True], [True, True, True]])
    for order in ("left_to_right", "confidence"):
        together = likelihood.nll_chain(backbone, tokens, codec, scored=scored, order=order).values
        for row in (0, 1):
            part = slice(row, row + 1)
            alone = likelihood.nll_chain(backbone, tokens[part], codec, scored=scored[part], order=order).values
            torch.testing.assert_close(together[part], alone)


def test_the_autoregressive_evaluator_sums_the_cross_entropy_of_every_token():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([[3, 1, 2], [0, 4, 4]])
    seen = []

    def predict(inputs: Tensor, readout):
        seen.append(inputs.tolist())
        return readout(logits, torch.eye(5, dtype=torch.float64), None)

    draws = likelihood.nll_ar(predict, tokens, bos=5)
    expected = -logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(draws.values[:, 0], expected)
    assert seen == [[[5, 3, 1], [5, 0, 4]]] and draws.exact


# Monte Carlo


def counter_noise(batch: int, seed: int = 0) -> likelihood.Noise:
    def noise(draw: int, count: int) -> Tensor:
        return torch.rand(batch, count, generator=torch.Generator().manual_seed(seed * 10007 + draw))

    return noise


@pytest.mark.parametrize("evaluator", ["nelbo_subtoken", "nelbo_token", "loss_ce_joint"])
@pytest.mark.parametrize("estimator", ["E1", "E2"])
def test_the_estimators_have_the_enumerated_mean(evaluator: str, estimator: likelihood.Estimator):
    codec, copies = build_codec(4, 2), 1250
    model = exact.random_model(codec, 2, seed=6)
    tokens = exact.all_sequences(4, 2)
    oracle = {
        "nelbo_subtoken": exact.nelbo_subtoken,
        "nelbo_token": exact.nelbo_token,
        "loss_ce_joint": exact.joint_loss,
    }[evaluator](model, codec, tokens)
    draws = getattr(likelihood, evaluator)(
        exact.as_backbone(model, 4),
        tokens.repeat(copies, 1),
        codec,
        counter_noise(16 * copies),
        draws=1,
        estimator=estimator,
    )
    values = draws.values.view(copies, 16)
    z = (values.mean(0) - oracle) / (values.std(0) / copies**0.5)
    assert z.abs().max() < 4.0


def test_drawing_the_number_of_masked_units_has_less_variance_than_drawing_the_time():
    codec, joint = build_codec(4, 2), exact.copy_joint()
    generator = torch.Generator().manual_seed(0)
    tokens = exact.all_sequences(4, 2)[torch.multinomial(joint.flatten(), 20000, replacement=True, generator=generator)]
    backbone = exact.as_backbone(exact.posterior(joint, codec), 4)
    spread = {}
    for estimator in ("E1", "E2"):
        draws = likelihood.nelbo_subtoken(
            backbone, tokens, codec, counter_noise(20000, seed=1), draws=1, estimator=estimator
        )
        spread[estimator] = float(draws.values.var())
        error = float(draws.values.std()) / 20000**0.5
        assert abs(float(draws.values.mean()) - 1.973795) < 4 * error
    assert spread["E2"] < 0.5 * spread["E1"]


def test_the_estimate_of_few_steps_has_the_enumerated_mean():
    codec, copies = build_codec(3, 2), 1500
    model, tokens = exact.random_model(codec, 2, seed=8), exact.all_sequences(3, 2)
    draws = likelihood.nelbo_steps(
        exact.as_backbone(model, 3), tokens.repeat(copies, 1), codec, counter_noise(9 * copies), steps=3, draws=3
    )
    values = draws.values.mean(-1).view(copies, 9)
    z = (values.mean(0) - exact.steps_bound(model, codec, tokens, 3)) / (values.std(0) / copies**0.5)
    assert z.abs().max() < 4.0


def test_stratified_draws_of_the_count_visit_every_count_once():
    codec, seen = build_codec(4, 2), []

    def predict(digits: Tensor, readout):
        seen.append((digits == codec.mask_symbol).flatten(1).sum(-1).tolist())
        return readout(torch.zeros(*digits.shape[:2], 4), torch.eye(4), None)

    tokens = torch.zeros(3, 2, dtype=torch.long)
    likelihood.nelbo_subtoken(predict, tokens, codec, counter_noise(3), draws=4)
    assert seen == [[1] * 3, [2] * 3, [3] * 3, [4] * 3]


def test_a_region_of_one_token_needs_a_single_draw_to_be_exact():
    codec = build_codec(4, 2)
    model, tokens = exact.random_model(codec, 3, seed=4), exact.all_sequences(4, 3)
    scored = torch.tensor([False, False, True]).expand_as(tokens)
    backbone = exact.as_backbone(model, 4)
    one = likelihood.nelbo_token(backbone, tokens, codec, counter_noise(64), draws=1, scored=scored)
    torch.testing.assert_close(one.values, likelihood.nll_chain(backbone, tokens, codec, scored=scored).values)


@pytest.mark.parametrize("granularity", [1, 2])
def test_the_bound_does_not_depend_on_the_noise_schedule(granularity: int):
    codec, joint = build_codec(4, granularity), exact.copy_joint()
    tokens, weight = exact.all_sequences(4, 2), joint.flatten()
    backbone = exact.as_backbone(exact.posterior(joint, codec), 4)
    units = 2 * granularity
    by_count = np.zeros(units + 1)  # nats of all masks of k units together
    for mask in exact.all_masks(units):
        hidden = mask.view(1, 2, granularity).expand(16, -1, -1)
        charge = likelihood.digit_nll(backbone, tokens, hidden, codec)
        by_count[int(mask.sum())] += float((weight * charge).sum())
    nodes, gauss = np.polynomial.legendre.leggauss(60)
    t, k = (nodes + 1) / 2, np.arange(1, units + 1)[:, None]
    schedules = {
        "linear": (1 - t, -np.ones_like(t)),
        "cosine": (np.cos(np.pi * t / 2), -np.pi / 2 * np.sin(np.pi * t / 2)),
        "cubic": ((1 - t) ** 3, -3 * (1 - t) ** 2),
    }
    for alpha, slope in schedules.values():
        integrand = -slope / (1 - alpha) * (by_count[1:, None] * (1 - alpha) ** k * alpha ** (units - k)).sum(0)
        assert float((gauss * integrand).sum() / 2) == pytest.approx(exact.entropy(joint), abs=1e-9)


# What may become a perplexity


def draws_named(name: str, *, exact_values: bool = False) -> Draws:
    values = table(1.0, 3.0, 2.0, 6.0).view(2, 2)
    return Draws(
        name=name,
        estimator="E2",
        values=values.mean(-1, keepdim=True) if exact_values else values,
        num_tokens=torch.tensor([2, 4]),
        exact=exact_values,
    )


def test_a_bound_carries_its_perplexity_bits_and_errors():
    result = draws_named("nelbo_token").estimate()
    assert isinstance(result, Estimate)
    assert result.nats == 6.0 and result.num_tokens == 6 and result.draws == 2
    assert result.ppl == pytest.approx(math.e)
    assert result.ppl_per_word(3) == pytest.approx(math.exp(2))
    assert result.ppl_per_word(0.001) == math.inf
    assert result.bits_per_byte(24) == pytest.approx(0.25 / math.log(2))
    assert result.standard_error == pytest.approx(0.0)  # both sequences cost one nat a token
    assert result.monte_carlo_error == pytest.approx(math.sqrt(2.0 / 2 + 8.0 / 2))
    assert result.ppl_standard_error == pytest.approx(0.0)
    single = draws_named("nll_chain", exact_values=True).estimate()
    assert isinstance(single, Estimate) and single.monte_carlo_error == 0.0 and single.nats == 6.0


def test_moments_add_up_over_batches_and_ranks():
    values = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([3, 1, 8, 5, 5, 2])
    whole = Draws(name="nelbo_token", estimator="E2", values=values, num_tokens=tokens)
    parts = [
        Draws(name="nelbo_token", estimator="E2", values=values[rows], num_tokens=tokens[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    pooled = likelihood.estimate("nelbo_token", "E2", draws=3, moments=parts[0].moments() + parts[1].moments())
    one = whole.estimate()
    assert isinstance(pooled, Estimate) and isinstance(one, Estimate)
    assert pooled.nats == pytest.approx(one.nats) and pooled.standard_error == pytest.approx(one.standard_error)
    residual = values.mean(-1) - one.nats_per_token * tokens
    assert one.standard_error == pytest.approx(float((residual.square().sum() * 6 / 5).sqrt()))


def test_a_single_draw_or_sequence_does_not_pretend_to_know_its_error():
    one = Draws(name="nelbo_token", estimator="E2", values=torch.ones(1, 1).double(), num_tokens=torch.tensor([4]))
    result = one.estimate()
    assert isinstance(result, Estimate)
    assert math.isnan(result.standard_error) and math.isnan(result.monte_carlo_error)


def test_the_joint_loss_can_never_be_exported_as_a_perplexity():
    codec = build_codec(4, 2)
    backbone = exact.as_backbone(exact.uniform_model(codec), 4)
    tokens = torch.zeros(3, 2, dtype=torch.long)
    draws = likelihood.loss_ce_joint(backbone, tokens, codec, counter_noise(3), draws=2)
    result = draws.estimate()
    assert isinstance(result, JointLoss) and result.loss_per_token > 0
    for name in ("ppl", "ppl_per_word", "bits_per_byte", "nats_per_token", "nats"):
        with pytest.raises(AttributeError):
            getattr(result, name)
        with pytest.raises(AttributeError):
            getattr(draws, name)
    with pytest.raises(TypeError, match="loss_ce_joint is not a likelihood"):
        Estimate(
            name="loss_ce_joint",  # type: ignore[arg-type]
            estimator="E2",
            draws=2,
            num_tokens=6,
            nats=1.0,
            standard_error=0.0,
            monte_carlo_error=0.0,
        )
    with pytest.raises(TypeError, match="is not a likelihood"):
        likelihood.estimate("joint", "E2", draws=2, moments=draws.moments())

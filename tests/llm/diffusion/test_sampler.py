"""The samplers against their exact laws, and the invariants that hold for every network, order and unit."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.random import stream_key, uniform
from llm.diffusion import reveal
from llm.diffusion.codec import Codec, build_codec
from llm.diffusion.groups import consistent, filtered_log_probs
from llm.diffusion.sampler import (
    Draw,
    Predict,
    SamplerConfig,
    Samples,
    categorical,
    sample,
    sample_left_to_right,
    start,
    tempered,
)
from tests.llm.diffusion.enumeration import (
    all_sequences,
    copy_joint,
    layered_orders,
    nll_over_orders,
    posterior,
    random_model,
    sampler_law,
)

ORDERS = [
    ("ancestral", "digit"),
    ("ancestral", "token"),
    ("ancestral", "schedule"),
    ("layers", "digit"),
    ("random", "digit"),
    ("random", "token"),
    ("left_to_right", "digit"),
    ("left_to_right", "token"),
    ("confidence", "digit"),
    ("confidence", "token"),
]


def correctors(order: str, passes: int) -> int:
    """A corrector hides digits in any order, which layers do not know."""
    return 0 if order == "layers" else passes


def at_positions(dense) -> Predict:
    """The samplers' interface over a model that predicts every position."""
    return lambda digits, where: dense(digits)[where]


def streams(batch: int, seed: int = 0) -> Draw:
    return lambda step, count: uniform(stream_key(seed, "sample", step), torch.arange(batch), count, torch.float64)


def nothing_given(batch: int, length: int, codec: Codec) -> tuple[Tensor, Tensor]:
    frozen = torch.zeros(batch, length, dtype=torch.bool)
    return start(torch.zeros(batch, length, dtype=torch.int64), frozen, codec), frozen


def generate(codec: Codec, predict: Predict, batch: int, length: int, seed: int = 0, **options) -> Samples:
    digits, frozen = nothing_given(batch, length, codec)
    config = SamplerConfig(**options)
    return sample(digits, frozen, codec=codec, predict=predict, draw=streams(batch, seed), config=config)


def recorded(predict: Predict, calls: list[tuple[Tensor, Tensor]]) -> Predict:
    def wrapped(digits: Tensor, where: Tensor) -> Tensor:
        calls.append((digits.clone(), where.clone()))
        return predict(digits, where)

    return wrapped


# The law of T steps


def finite_step_law(dense, codec: Codec, length: int, steps: int) -> Tensor:
    """float64 [V] * L: the Markov chain over all partial states, from the sampler's own token distribution and rule.

    Before step k a hidden digit is revealed with probability 1 / (T - k); test_the_plan_... ties the plan to that.
    """
    symbols = codec.base + 1
    token_states = torch.tensor(list(product(range(symbols), repeat=codec.granularity)))  # [M, l]
    states = torch.tensor(list(product(range(len(token_states)), repeat=length)))  # [M**L, L]
    digits = token_states[states]
    logits = dense(digits).flatten(0, 1)
    probs = tempered(filtered_log_probs(logits.nan_to_num(neginf=-1e9), digits.flatten(0, 1), codec), 1.0, 1.0)
    probs = probs.view(*states.shape, -1)
    place = symbols ** torch.arange(codec.granularity - 1, -1, -1)
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[-1] = 1.0  # all masked
    for step in range(steps):
        rate = torch.tensor(1 / (steps - step), dtype=torch.float64)
        moves = torch.zeros(*states.shape, len(token_states), dtype=torch.float64)  # [S, L, M]
        for shown in product((False, True), repeat=codec.granularity):
            picked = torch.tensor(shown)
            hidden = digits == codec.mask_symbol
            reveals = torch.where(hidden, rate, 0.0)
            chance = torch.where(picked, reveals, 1 - reveals).prod(-1)
            for token in range(codec.vocab_size):
                after = (torch.where(picked, codec.codes[token], digits) * place).sum(-1, keepdim=True)
                moves.scatter_add_(2, after, (chance * probs[..., token]).unsqueeze(-1))
        if length == 1:
            mass = torch.einsum("s,sa->a", mass, moves[:, 0])
        else:
            mass = torch.einsum("s,sa,sb->ab", mass, moves[:, 0], moves[:, 1]).flatten()
    finals = (codec.codes * place).sum(-1)
    return mass.view([len(token_states)] * length)[torch.meshgrid([finals] * length, indexing="ij")]


ONE_DIGIT = {1: 0.25, 2: 0.55, 4: 0.70, 8: 0.775, 16: 0.8125, 64: 0.840625}
TWO_DIGITS = {1: 0.25, 2: 0.500556, 4: 0.662986, 8: 0.753429, 16: 0.800949, 64: 0.837594}


@pytest.mark.parametrize(("granularity", "agreement"), [(1, ONE_DIGIT), (2, TWO_DIGITS)])
def test_the_law_after_T_steps_has_the_exact_agreement_and_distance_from_the_data(granularity, agreement):
    joint, codec = copy_joint(), build_codec(4, granularity)
    for steps, expected in agreement.items():
        law = finite_step_law(posterior(joint, codec), codec, 2, steps)
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        assert float(law.trace()) == pytest.approx(expected, abs=5e-7)
        assert float((law - joint).abs().sum() / 2) == pytest.approx(0.85 - expected, abs=5e-7)


def test_the_law_of_the_samplers_own_functions_is_that_of_a_separate_enumeration():
    codec = build_codec(4, 2, shuffle_seed=3)
    model = random_model(codec, 2, seed=5)
    law = finite_step_law(model, codec, 2, 3)
    torch.testing.assert_close(law.flatten(), sampler_law(model, codec, 2, 3), rtol=0, atol=1e-12)


def test_one_token_is_sampled_exactly_for_every_number_of_steps_and_every_permutation_of_its_codes():
    p = torch.tensor([0.7, 0.15, 0.1, 0.05], dtype=torch.float64)
    for permutation in permutations(range(4)):
        codec = build_codec(4, 2, permutation=np.array(permutation))
        for steps in (1, 2, 3, 10):
            torch.testing.assert_close(finite_step_law(posterior(p, codec), codec, 1, steps), p, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("group", ["digit", "token"])
def test_running_the_sampler_on_every_noise_of_a_grid_gives_its_law_without_monte_carlo(steps, group):
    """With l = 1 the outcome is constant on the cells of a grid: T reveal steps and twentieths, the unit of all of the
    conditional probabilities, so cell midpoints enumerate the law of the code as it runs."""
    codec = build_codec(4, 1)
    when, what = torch.arange(steps), torch.arange(20)
    cells = torch.cartesian_prod(when, when, what, what).double() + 0.5
    plan, tokens = cells[:, :2] / steps, cells[:, 2:] / 20

    def draw(step: int, count: int) -> Tensor:
        return torch.cat([plan, plan], 1) if step == 0 else tokens

    digits, frozen = nothing_given(len(cells), 2, codec)
    config = SamplerConfig(steps=steps, group=group)
    predict = at_positions(posterior(copy_joint(), codec))
    out = sample(digits, frozen, codec=codec, predict=predict, draw=draw, config=config).tokens
    same = float((out[:, 0] == out[:, 1]).double().mean())
    assert same == pytest.approx(ONE_DIGIT[steps], abs=1e-12)
    assert torch.equal(out[:, 0].bincount(), torch.full((4,), len(cells) // 4))


@pytest.mark.parametrize("granularity", [1, 2])
def test_twenty_thousand_chains_of_four_steps_agree_with_the_exact_law(granularity):
    codec, chains = build_codec(4, granularity), 20_000
    dense = posterior(copy_joint(), codec)
    law = finite_step_law(dense, codec, 2, 4)
    out = generate(codec, at_positions(dense), chains, 2, seed=1, steps=4).tokens
    agreement, expected = float((out[:, 0] == out[:, 1]).double().mean()), float(law.trace())
    assert abs(agreement - expected) < 4 * (expected * (1 - expected) / chains) ** 0.5
    frequency = (out[:, 0] * 4 + out[:, 1]).bincount(minlength=16) / chains
    assert bool(((frequency - law.flatten()).abs() < 4 * (law.flatten() * (1 - law.flatten()) / chains).sqrt()).all())


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_plan_reveals_what_is_still_hidden_at_step_k_with_probability_one_in_T_minus_k(steps):
    u = (torch.arange(steps * 10, dtype=torch.float64) + 0.5) / (steps * 10)
    token, digit = torch.full((1, len(u)), 0.5, dtype=torch.float64), u.view(1, -1, 1)
    at_step = reveal.ancestral_plan(token, digit, steps, whole_token_steps=0).flatten().bincount(minlength=steps)
    hidden = len(u) - at_step.cumsum(0) + at_step
    torch.testing.assert_close(at_step / hidden, 1 / (steps - torch.arange(steps).float()))


def test_layers_reveal_every_first_digit_before_any_second_one():
    codec = build_codec(27, 3)
    calls: list[tuple[Tensor, Tensor]] = []
    digits, frozen = nothing_given(4, 6, codec)
    model = recorded(at_positions(lambda d: torch.zeros(*d.shape[:2], 27, dtype=torch.float64)), calls)
    sample(digits, frozen, codec=codec, predict=model, draw=streams(4), config=SamplerConfig(steps=30, order="layers"))
    for state, _ in calls:
        hidden = (state == codec.mask_symbol).any(1)  # [B, l], of any token
        shown = (state != codec.mask_symbol).any(1)
        assert not (hidden[:, :-1] & shown[:, 1:]).any()


def test_layers_in_many_steps_have_the_law_of_layered_orders():
    codec, steps = build_codec(3, 2), 200
    model, tokens = random_model(codec, 2, seed=8), all_sequences(3, 2)
    expected = torch.exp(-nll_over_orders(model, codec, tokens, layered_orders(2, 2)))
    digits, frozen = nothing_given(20_000, 2, codec)
    config = SamplerConfig(steps=steps, order="layers")
    drawn = sample(digits, frozen, codec=codec, predict=at_positions(model), draw=streams(20_000), config=config)
    found = torch.bincount((drawn.tokens * torch.tensor([3, 1])).sum(-1), minlength=9) / 20_000
    # both digits of a layer in one of its 100 steps: probability 1/100, hence the slack of 0.01
    assert ((found - expected).abs() < 0.01 + 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_a_schedule_reveals_whole_tokens_above_its_chunk_point_and_independent_digits_below():
    steps, chunk_point = 8, 0.5
    whole = reveal.token_steps(steps, chunk_point)
    assert [1 - k / steps > chunk_point for k in range(steps)] == [k < whole for k in range(steps)]
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    cells = torch.cartesian_prod(grid, grid, grid)
    plan = reveal.ancestral_plan(cells[:, :1], cells[:, None, 1:], steps, whole)[:, 0]  # [512, 2]
    together = plan[:, 0] < whole
    assert torch.equal(plan[together][:, 0], plan[together][:, 1])
    assert plan[together][:, 0].bincount().tolist() == [64] * 4
    pairs = (plan[~together] - whole) @ torch.tensor([4, 1])
    assert pairs.bincount().tolist() == [16] * 16  # the second half of the time, uniform and independent


def test_the_ends_of_the_chunk_point_are_whole_tokens_always_and_never():
    codec = build_codec(16, 4)
    predict = at_positions(random_model(codec, 2, seed=1))
    for chunk_point, group in ((0.0, "token"), (1.0, "digit")):
        schedule = generate(codec, predict, 64, 2, steps=5, group="schedule", chunk_point=chunk_point)
        assert torch.equal(schedule.tokens, generate(codec, predict, 64, 2, steps=5, group=group).tokens)


@pytest.mark.parametrize("order", ["left_to_right", "random"])
def test_one_token_at_a_time_with_the_perfect_posterior_gives_the_data_law(order):
    codec = build_codec(4, 1)
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(20), torch.arange(20)).double()
    first = torch.stack([cells[:, 0], 1 - cells[:, 0]], 1) / 2  # either token first
    digits, frozen = nothing_given(len(cells), 2, codec)
    out = sample(
        digits,
        frozen,
        codec=codec,
        predict=at_positions(posterior(copy_joint(), codec)),
        draw=lambda step, count: torch.cat([first, first], 1) if step == 0 else (cells[:, 1:] + 0.5) / 20,
        config=SamplerConfig(steps=2, order=order, group="token"),
    ).tokens
    frequency = (out[:, 0] * 4 + out[:, 1]).bincount(minlength=16).double() / len(cells)
    torch.testing.assert_close(frequency, copy_joint().flatten(), rtol=0, atol=1e-12)


# What holds for every network


@pytest.mark.parametrize(("order", "group"), ORDERS)
@pytest.mark.parametrize("vocab_size", [3, 5])
def test_some_token_fits_every_state_and_every_result_is_a_token_though_codes_are_unused(order, group, vocab_size):
    codec = build_codec(vocab_size, 2)
    dense = random_model(codec, 3, seed=2)

    def predict(digits: Tensor, where: Tensor) -> Tensor:
        assert bool(consistent(digits.flatten(0, 1), codec).any(-1).all())
        return dense(digits)[where]

    options = {"order": order, "group": group, "corrector_steps": correctors(order, 3), "corrector_fraction": 0.4}
    for steps in (1, 2, 7):
        out = generate(codec, predict, 200, 3, steps=steps, **options)
        assert bool(((out.tokens >= 0) & (out.tokens < vocab_size)).all())


@pytest.mark.parametrize(("order", "group"), ORDERS)
def test_prefix_infix_and_suffix_never_change_not_even_in_correctors(order, group):
    codec = build_codec(5, 2, shuffle_seed=1)
    dense, batch = random_model(codec, 3, seed=3), 64
    given = torch.randint(5, (batch, 3), generator=torch.Generator().manual_seed(0))
    frozen = torch.rand(batch, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    known = codec.encode(given)[frozen]
    calls: list[tuple[Tensor, Tensor]] = []
    config = SamplerConfig(
        steps=4, order=order, group=group, corrector_steps=correctors(order, 4), corrector_fraction=0.5, block_length=1
    )
    predict = recorded(at_positions(dense), calls)
    digits = start(given, frozen, codec)
    out = sample(digits, frozen, codec=codec, predict=predict, draw=streams(batch), config=config)
    assert torch.equal(out.tokens[frozen], given[frozen])
    for state, where in calls:
        assert torch.equal(state[frozen], known)
        assert not bool((where & frozen).any())


@pytest.mark.parametrize(("order", "group"), ORDERS)
def test_visible_digits_never_change_and_only_hidden_ones_are_asked_about(order, group):
    codec = build_codec(16, 4)
    batch = 50
    true = codec.encode(torch.randint(16, (batch, 2), generator=torch.Generator().manual_seed(4)))
    hidden = torch.rand(true.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    digits = torch.where(hidden, codec.mask_symbol, true)
    calls: list[tuple[Tensor, Tensor]] = []
    predict = recorded(at_positions(random_model(codec, 2, seed=6)), calls)
    config = SamplerConfig(steps=6, order=order, group=group)
    frozen = torch.zeros(batch, 2, dtype=torch.bool)
    out = sample(digits, frozen, codec=codec, predict=predict, draw=streams(batch), config=config)
    assert torch.equal(codec.encode(out.tokens)[~hidden], true[~hidden])
    states = [state for state, _ in calls] + [codec.encode(out.tokens)]
    for (before, where), after in zip(calls, states[1:], strict=True):
        visible = before != codec.mask_symbol
        assert torch.equal(after[visible], before[visible])
        assert bool((~visible).any(-1)[where].all())


@pytest.mark.parametrize(("order", "group"), ORDERS)
def test_skipping_idle_steps_and_caching_give_the_samples_of_evaluating_every_step(order, group):
    codec = build_codec(8, 3)
    dense, cache, misses = random_model(codec, 2, seed=7), [], []

    def cached(digits: Tensor, where: Tensor) -> Tensor:
        """MDLM's cache: a new evaluation only when the state has changed."""
        if not cache or not torch.equal(cache[-1], digits):
            misses.append(1)
            cache.append(digits)
        return dense(digits)[where]

    options = {"steps": 12, "order": order, "group": group}
    every = generate(codec, at_positions(dense), 2, 2, skip_idle=False, **options)
    jumps = generate(codec, at_positions(dense), 2, 2, **options)
    reuse = generate(codec, cached, 2, 2, skip_idle=False, **options)
    assert torch.equal(every.tokens, jumps.tokens) and torch.equal(every.tokens, reuse.tokens)
    assert torch.equal(every.idle_steps, jumps.idle_steps)
    assert jumps.evaluations == jumps.steps - jumps.batch_idle_steps == len(misses)
    assert jumps.evaluations <= every.evaluations <= every.steps


def test_the_network_is_asked_about_each_unit_at_most_once_when_the_order_is_a_plan():
    codec, calls = build_codec(8, 3), []
    predict = recorded(at_positions(random_model(codec, 2, seed=7)), calls)
    generate(codec, predict, 30, 2, steps=1000)
    assert sum(int(where.sum()) for _, where in calls) <= 30 * 2 * 3


def test_a_sequence_does_not_depend_on_the_batch_it_is_generated_in():
    codec, batch = build_codec(5, 2), 6
    dense = at_positions(random_model(codec, 3, seed=8))
    frozen = torch.tensor([[True, True, False], [False, False, False]] * 3)
    digits = start(torch.full((batch, 3), 2), frozen, codec)
    for order, group in ORDERS:
        config = SamplerConfig(steps=3, order=order, group=group, block_length=2, corrector_steps=correctors(order, 2))
        whole = sample(digits, frozen, codec=codec, predict=dense, draw=streams(batch), config=config).tokens
        for row in range(2):
            alone = sample(
                digits[row : row + 1],
                frozen[row : row + 1],
                codec=codec,
                predict=dense,
                draw=lambda step, count, row=row: streams(batch)(step, count)[row : row + 1],
                config=config,
            )
            assert torch.equal(alone.tokens[0], whole[row])


# Idle steps


@pytest.mark.parametrize(("group", "units"), [("digit", 8 * 3), ("token", 8)])
def test_the_idle_ratio_is_that_of_the_formula(group, units):
    codec, steps, chains = build_codec(8, 3), 24, 2000

    def predict(digits: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(int(where.sum()), 8)

    out = generate(codec, predict, chains, 8, seed=3, steps=steps, group=group)
    error = float(out.idle_steps.double().std()) / steps / chains**0.5
    assert abs(out.idle_ratio - reveal.predicted_idle_ratio(steps, units)) < 3 * error
    assert out.batch_idle_steps == 0  # two thousand sequences leave no step unused


def test_the_predicted_idle_ratios_of_1024_tokens_in_1024_steps_are_the_published_ones():
    percent = {1: 36.77, 2: 13.52, 3: 4.97, 4: 1.83, 6: 0.247, 8: 0.033}
    for granularity, expected in percent.items():
        assert 100 * reveal.predicted_idle_ratio(1024, 1024 * granularity) == pytest.approx(expected, abs=0.006)


# Counted orders, confidence and blocks


def test_counted_orders_spread_the_units_evenly_with_the_remainder_first():
    codec, calls = build_codec(8, 3), []
    predict = recorded(at_positions(random_model(codec, 3, seed=9)), calls)
    for order in ("random", "left_to_right", "confidence"):
        calls.clear()
        out = generate(codec, predict, 5, 3, steps=4, order=order, group="digit")
        hidden = [(state == codec.mask_symbol).flatten(1).sum(1).tolist() for state, _ in calls]
        assert hidden == [[9] * 5, [6] * 5, [4] * 5, [2] * 5]  # 3, 2, 2 and 2 of the nine digits
        assert out.evaluations == 4


def test_the_plan_of_a_counted_order_holds_the_counts_of_every_block():
    units = torch.ones(1, 7, 3, dtype=torch.bool)
    block = reveal.blocks(units.any(-1), 4)
    key = uniform(stream_key(0), torch.arange(1), 21, torch.float64).view(1, 7, 3)
    for steps in (1, 2, 5, 20):
        plan = reveal.counted_plan(units, key, block, steps)
        for index, total in ((0, 12), (1, 9)):
            expected = [int(reveal.reveal_count(torch.tensor(total), step, steps)) for step in range(steps)]
            assert plan[block == index].flatten().bincount(minlength=steps).tolist() == expected


def test_left_to_right_over_as_many_steps_as_tokens_is_the_chain():
    codec, calls = build_codec(5, 2), []
    predict = recorded(at_positions(random_model(codec, 3, seed=9)), calls)
    generate(codec, predict, 4, 3, steps=3, order="left_to_right", group="token")
    assert [where.int().argmax(1).tolist() for _, where in calls] == [[0] * 4, [1] * 4, [2] * 4]
    assert all(int(where.sum()) == 4 for _, where in calls)


def test_confidence_reveals_the_surest_token_first_and_the_surest_digit_first():
    codec = build_codec(4, 2)
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0], [3.0, 3.1, 0.0, 0.0]])  # [L, V]
    calls: list[tuple[Tensor, Tensor]] = []
    predict = recorded(lambda digits, where: logits.expand(len(digits), -1, -1)[where], calls)
    options = {"temperature": 0, "order": "confidence"}
    tokens = generate(codec, predict, 1, 3, steps=3, group="token", **options).tokens
    assert tokens.tolist() == [[1, 3, 1]]
    assert [where[0].tolist() for _, where in calls] == [[True] * 3, [True, False, True], [True, False, False]]
    calls.clear()
    tokens = generate(codec, predict, 1, 3, steps=6, group="digit", **options).tokens
    hidden = [(state[0] == codec.mask_symbol).tolist() for state, _ in calls]
    # Token 3 is sure of both digits; of the others, the leading digit of the last is (marginal 0.95, its token 0.5).
    assert hidden[2] == [[True, True], [False, False], [True, True]]
    assert hidden[3] == [[True, True], [False, False], [False, True]]


def test_greedy_decoding_by_confidence_does_not_depend_on_the_noise():
    codec = build_codec(8, 3)
    predict = at_positions(random_model(codec, 2, seed=10))
    for group in ("digit", "token"):
        options = {"steps": 3, "temperature": 0.0, "order": "confidence", "group": group}
        first, second = (generate(codec, predict, 4, 2, seed=seed, **options).tokens for seed in (1, 2))
        assert torch.equal(first, second)
        assert torch.equal(first, first[:1].expand(4, 2))


def test_greedy_decoding_takes_the_most_likely_consistent_token_whatever_the_token_noise():
    codec = build_codec(8, 3)
    predict, config = at_positions(random_model(codec, 2, seed=10)), SamplerConfig(steps=5, temperature=0)
    digits, frozen = nothing_given(40, 2, codec)
    outs = [
        sample(
            digits,
            frozen,
            codec=codec,
            predict=predict,
            draw=lambda step, count, seed=seed: streams(40, seed if step else 0)(step, count),  # one plan, two noises
            config=config,
        ).tokens
        for seed in (1, 2)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize(("order", "group"), ORDERS)
def test_a_block_starts_when_the_block_before_it_is_complete_and_prompts_do_not_shift_blocks(order, group):
    codec = build_codec(4, 2)
    length, calls = 6, []
    frozen = torch.tensor([[True, True, False, False, False, False], [True, False, True, True, False, False]])
    digits = start(torch.ones(2, length, dtype=torch.int64), frozen, codec)
    config = SamplerConfig(steps=4, order=order, group=group, block_length=2, skip_idle=False)
    predict = recorded(lambda digits, where: torch.zeros(int(where.sum()), 4), calls)
    out = sample(digits, frozen, codec=codec, predict=predict, draw=streams(2), config=config)
    assert out.steps == 8  # two blocks of four steps: four and three hidden tokens
    blocks = [[2, 3], [4, 5]], [[1, 4], [5]]
    for state, _ in calls:
        for row, (first, second) in enumerate(blocks):
            hidden = (state[row] == codec.mask_symbol).any(-1)
            touched = (state[row] != codec.mask_symbol).any(-1)
            assert not (bool(hidden[first].any()) and bool(touched[second].any()))


def test_a_sequence_with_nothing_to_generate_costs_nothing():
    codec = build_codec(4, 2)
    frozen = torch.ones(2, 3, dtype=torch.bool)
    given = torch.tensor([[0, 1, 2], [3, 3, 3]])

    def predict(digits: Tensor, where: Tensor) -> Tensor:
        raise AssertionError("nothing to ask")

    for order, group in ORDERS:
        config = SamplerConfig(steps=5, order=order, group=group, corrector_steps=correctors(order, 2))
        out = sample(start(given, frozen, codec), frozen, codec=codec, predict=predict, draw=streams(2), config=config)
        assert torch.equal(out.tokens, given)
        assert (out.evaluations, out.idle_steps.tolist(), out.batch_idle_steps) == (0, [5, 5], 5)


# Correctors


def test_a_corrector_pass_moves_the_law_as_computed_by_hand():
    """From independent tokens (agreement 1/4), one pass that hides each token with probability f leaves both, redraws
    one given the other (agreement 0.85), or redraws both independently (1/4)."""
    codec, chains, fraction = build_codec(4, 1), 20_000, 0.5
    predict = at_positions(posterior(copy_joint(), codec))
    options = {"steps": 1, "corrector_fraction": fraction}
    expected = 0.25
    for passes in (1, 2):
        expected = (1 - fraction) ** 2 * expected + 2 * fraction * (1 - fraction) * 0.85 + fraction**2 * 0.25
        out = generate(codec, predict, chains, 2, seed=4, corrector_steps=passes, **options)
        agreement = float((out.tokens[:, 0] == out.tokens[:, 1]).double().mean())
        assert abs(agreement - expected) < 4 * (expected * (1 - expected) / chains) ** 0.5
        assert out.evaluations == 1 + passes
        assert out.steps == 1


def test_a_corrector_hides_whole_tokens_or_single_digits_as_the_group_says():
    codec = build_codec(16, 4)
    for group in ("token", "digit"):
        calls: list[tuple[Tensor, Tensor]] = []
        predict = recorded(at_positions(random_model(codec, 2, seed=11)), calls)
        generate(codec, predict, 100, 2, steps=1, group=group, corrector_steps=1, corrector_fraction=0.5)
        hidden = calls[-1][0] == codec.mask_symbol
        partly = hidden.any(-1) & ~hidden.all(-1)
        assert bool(partly.any()) == (group == "digit")


# Distributions: guidance, nucleus, temperature, categorical draws


def test_guidance_mixes_the_logits_with_those_of_a_masked_prompt_and_costs_nothing_at_zero():
    codec, cells = build_codec(4, 2), 1000
    dense = random_model(codec, 2, seed=12)
    frozen = torch.tensor([[True, False]]).expand(cells, 2)
    digits = start(torch.full((cells, 2), 3), frozen, codec)
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells

    def draw(step: int, count: int) -> Tensor:
        return u.unsqueeze(-1).expand(cells, count)

    hidden = torch.full((1, 2, 2), codec.mask_symbol)
    given, blind = dense(digits[:1])[0, 1], dense(hidden)[0, 1]
    for scale, passes in ((0.0, 1), (1.5, 2)):
        calls: list[tuple[Tensor, Tensor]] = []
        predict, config = recorded(at_positions(dense), calls), SamplerConfig(steps=1, cfg_scale=scale)
        out = sample(digits, frozen, codec=codec, predict=predict, draw=draw, config=config)
        assert out.evaluations == len(calls) == passes
        expected = (given + scale * (given - blind)).softmax(-1) * cells
        assert bool(((out.tokens[:, 1].bincount(minlength=4) - expected).abs() <= 1).all())
        assert torch.equal(calls[0][0], digits)
    assert bool((calls[1][0] == codec.mask_symbol).all())


def test_the_nucleus_keeps_what_fits_under_its_mass_and_always_the_likeliest():
    log_probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64).log()
    for top_p, kept in ((1.0, [0.1, 0.5, 0.15, 0.25]), (0.91, [0, 5, 1.5, 2.5]), (0.8, [0, 5, 0, 2.5])):
        expected = torch.tensor([kept], dtype=torch.float64)
        torch.testing.assert_close(tempered(log_probs, 1.0, top_p), expected / expected.sum())
    for top_p in (0.5, 0.3, 1e-9):
        assert tempered(log_probs, 1.0, top_p).tolist() == [[0, 1, 0, 0]]


def test_temperature_sharpens_down_to_the_argmax_and_never_overflows():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(tempered(p.log(), 0.5, 1.0), p**2 / (p**2).sum())
    for temperature in (0, 5e-324, 1e-4):
        assert tempered(p.log(), temperature, 1.0).tolist() == [[1, 0, 0, 0]]
    flat = tempered(p.log(), 1e9, 1.0)
    assert float(flat[0, 3]) == 0  # an excluded token stays excluded
    torch.testing.assert_close(flat[0, :3], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_a_draw_inverts_the_cumulative_distribution_and_never_returns_an_impossible_token():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64).expand(8, 6)
    u = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    assert categorical(probs, u).tolist() == [1, 1, 3, 3, 3, 3, 4, 4]
    edges = torch.tensor([0.0, 0.25, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert categorical(probs[:4], edges).tolist() == [1, 3, 4, 4]


def test_draws_reach_the_tail_that_float32_would_lose():
    """Two tokens of probability 1e-10 each: float32 noise has steps of 6e-8 and its sums would round them away."""
    probs = torch.tensor([[1e-10, 1 - 2e-10, 1e-10]], dtype=torch.float64)
    for value, token in ((5e-11, 0), (2e-10, 1), (1 - 5e-11, 2)):
        assert categorical(probs, torch.tensor([value], dtype=torch.float64)).tolist() == [token]


# Left to right with a causal network


def test_left_to_right_sampling_has_the_law_of_its_conditionals():
    table = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)  # next given last
    cells = torch.cartesian_prod(torch.arange(20), torch.arange(20)).double()

    def predict(tokens: Tensor, where: Tensor) -> Tensor:
        return table.log()[tokens[where]]

    out = sample_left_to_right(
        torch.zeros(400, 3, dtype=torch.int64),
        torch.tensor([True, False, False]).expand(400, 3),
        predict=predict,
        draw=lambda step, count: (cells[:, step - 1 : step] + 0.5) / 20,
    )
    frequency = (out.tokens[:, 1] * 3 + out.tokens[:, 2]).bincount(minlength=9).view(3, 3).double() / 400
    torch.testing.assert_close(frequency, table[:1].T * table, rtol=0, atol=1e-12)
    assert (out.evaluations, out.steps) == (2, 2)


def test_left_to_right_sampling_keeps_the_prompt_skips_what_is_given_and_is_greedy_at_temperature_zero():
    given = torch.tensor([[1, 2, 0, 0, 0], [2, 2, 2, 0, 0]])
    frozen = torch.tensor([[True, True, False, False, True], [True, True, True, False, True]])
    calls: list[tuple[Tensor, Tensor]] = []

    def predict(tokens: Tensor, where: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((tokens[where] + 1) % 3, 3).float()  # likeliest: one more than the last

    predict = recorded(predict, calls)
    out = sample_left_to_right(given, frozen, predict=predict, draw=streams(2), temperature=0)
    assert out.tokens.tolist() == [[1, 2, 0, 1, 0], [2, 2, 2, 0, 0]]
    assert [tokens.shape[1] for tokens, _ in calls] == [2, 3]
    assert (out.evaluations, out.idle_steps.tolist(), out.batch_idle_steps) == (2, [2, 3], 2)
    with pytest.raises(ValueError, match="Give a first token"):
        sample_left_to_right(given, ~frozen, predict=predict, draw=streams(2))


# Refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("chunk_point", 1.5),
        ("block_length", 0),
        ("cfg_scale", -0.5),
        ("corrector_steps", -1),
        ("corrector_fraction", 0.0),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_path(field, value):
    with pytest.raises(ValueError, match=rf"^run\.sampler\.{field} = {value} is .*\. Use|^run\.\w+\.block_length = 0"):
        SamplerConfig(**{field: value}).check("run.sampler")


def test_a_schedule_of_groups_is_refused_where_counts_are_fixed():
    with pytest.raises(ValueError, match=r"group = schedule .*\.order = confidence"):
        SamplerConfig(group="schedule", order="confidence").check()


def test_starts_noise_and_logits_that_cannot_be_used_are_refused():
    codec = build_codec(3, 2)
    digits, frozen = nothing_given(2, 2, codec)
    noise = streams(2)

    def run(digits=digits, frozen=frozen, draw=noise, logit=0.0, **options):
        def predict(digits: Tensor, where: Tensor) -> Tensor:
            return torch.full((int(where.sum()), 3), logit)

        sample(digits, frozen, codec=codec, predict=predict, draw=draw, config=SamplerConfig(steps=2, **options))

    with pytest.raises(ValueError, match="nothing would reveal"):
        run(frozen=torch.ones_like(frozen))
    with pytest.raises(ValueError, match=r"must have the shapes \[B, L, 2\]"):
        run(digits=digits[..., :1])
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        run(digits=digits + 1)
    with pytest.raises(ValueError, match="no token is frozen"):
        run(cfg_scale=1.0)
    with pytest.raises(ValueError, match="float32 noise"):
        run(draw=lambda step, count: noise(step, count).float())
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            run(logit=float("nan"), temperature=temperature)

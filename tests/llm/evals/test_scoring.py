"""Scores against exact enumeration, and against everything that must not change them."""

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.errors import ConfigError
from launch.random import stream_key, uniform
from llm.diffusion import likelihood
from llm.diffusion.codec import Codec, build_codec
from llm.evals.models import Scorable
from llm.evals.scoring import Request, ScoringConfig, score, windows
from tests.llm.diffusion import enumeration as exact
from tests.llm.evals.oracles import known, tiny, tiny_huggingface
from tests.processes import spawn

MASKED = ("mdm", "prime")


def joint_table(vocab_size: int, length: int, seed: int = 0) -> Tensor:
    table = torch.rand((vocab_size,) * length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    return table / table.sum()


def values(scorable: Scorable, requests: list[Request], **settings: Any) -> Tensor:
    return torch.tensor([s.value for s in score(scorable, requests, ScoringConfig(**settings))], dtype=torch.float64)


def everything(vocab_size: int, length: int, context: int) -> list[Request]:
    """Every sequence, cut after `context` tokens."""
    sequences = exact.all_sequences(vocab_size, length).tolist()
    return [Request(context=tuple(s[:context]), continuation=tuple(s[context:]), group="all") for s in sequences]


def conditional(joint: Tensor, context: int) -> Tensor:
    """log p(rest | the first `context` tokens) of every sequence."""
    rows = joint.flatten(context).reshape(-1, joint.shape[0] ** (joint.dim() - context))
    return (rows / rows.sum(-1, keepdim=True)).log().flatten()


# --- known laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 1, 2])
@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("estimator", ["nelbo_token", "nelbo_subtoken", "nelbo_layered", "nll_chain"])
def test_with_the_perfect_predictor_every_valid_score_is_the_log_likelihood(
    context: int, granularity: int, estimator: str
) -> None:
    codec, joint = build_codec(3, granularity), joint_table(3, 4)
    scorable = known(exact.posterior(joint, codec), codec, family="mdm" if granularity == 1 else "prime")
    found = values(scorable, everything(3, 4, context), estimator=estimator, draws=255)
    torch.testing.assert_close(found, conditional(joint, context), atol=1e-12, rtol=0.0)


def layered_bound(predict: exact.Predict, codec: Codec, tokens: Tensor) -> Tensor:
    """Nats [B] by listing every order in which all first digits come before any second one."""
    return exact.nelbo_over_orders(predict, codec, tokens, exact.layered_orders(tokens.shape[1], codec.granularity))


ORACLES = {"nelbo_token": exact.nelbo_token, "nelbo_subtoken": exact.nelbo_subtoken, "nelbo_layered": layered_bound}


@pytest.mark.parametrize(
    ("estimator", "granularity"),
    [("nelbo_token", 1), ("nelbo_token", 2), ("nelbo_subtoken", 2), ("nelbo_layered", 1), ("nelbo_layered", 2)],
)
def test_scores_of_any_model_are_the_enumerated_bounds(estimator: str, granularity: int) -> None:
    codec = build_codec(4, granularity)
    model = exact.random_model(codec, 3, seed=5)
    found = values(known(model, codec, family="prime"), everything(4, 3, 0), estimator=estimator, draws=63)
    torch.testing.assert_close(
        found, -ORACLES[estimator](model, codec, exact.all_sequences(4, 3)), atol=1e-12, rtol=0.0
    )


@pytest.mark.parametrize(
    ("estimator", "orders"), [("nelbo_subtoken", exact.all_orders(2, 2)), ("nelbo_layered", exact.layered_orders(2, 2))]
)
def test_the_bound_lies_above_the_enumerated_likelihood(estimator: str, orders: list[tuple[int, ...]]) -> None:
    codec = build_codec(4, 2)
    model = exact.random_model(codec, 2, seed=6)
    nll = exact.nll_over_orders(model, codec, exact.all_sequences(4, 2), orders)
    bound = -values(known(model, codec, family="prime"), everything(4, 2, 0), estimator=estimator)
    assert (bound >= nll - 1e-12).all() and (bound - nll).max() > 1e-3


def test_the_layered_score_after_a_context_is_the_enumerated_bound_above_the_likelihood_given_it() -> None:
    codec, length, context = build_codec(4, 2), 3, 1
    model, sequences = exact.random_model(codec, length, seed=9), exact.all_sequences(4, length)
    orders = [tuple(unit + 2 * context for unit in order) for order in exact.layered_orders(length - context, 2)]
    bound = -values(known(model, codec, family="prime"), everything(4, length, context), estimator="nelbo_layered")
    expected = exact.nelbo_over_orders(model, codec, sequences, orders)  # the context is in none: it is visible
    torch.testing.assert_close(bound, expected, atol=1e-12, rtol=0.0)
    nll = exact.nll_over_orders(model, codec, sequences, orders)
    assert (bound >= nll - 1e-12).all() and (bound - nll).max() > 1e-3


def test_a_model_that_reveals_digits_in_layers_is_scored_so_unless_told_otherwise() -> None:
    codec = build_codec(4, 2)
    model, requests = exact.random_model(codec, 2, seed=6), everything(4, 2, 0)
    scorable = known(model, codec, family="prime", order="layers")
    assert ScoringConfig().settings(scorable)["estimator"] == "nelbo_layered"
    assert torch.equal(values(scorable, requests), values(scorable, requests, estimator="nelbo_layered"))
    assert ScoringConfig(estimator="nelbo_token").name_for(scorable) == "nelbo_token"


def test_the_chain_sums_to_one_and_every_score_of_one_token_does() -> None:
    codec = build_codec(4, 2)
    model, requests = exact.random_model(codec, 2, seed=6), everything(4, 2, 0)
    scorable = known(model, codec, family="prime")
    assert float(values(scorable, requests, estimator="nll_chain").exp().sum()) == pytest.approx(1.0, abs=1e-12)
    given = values(scorable, everything(4, 2, 1), estimator="auto").exp().view(4, 4)  # one token: every bound is exact
    torch.testing.assert_close(given.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_the_joint_score_falls_below_the_entropy_and_the_valid_ones_do_not() -> None:
    codec, joint = build_codec(4, 2), torch.tensor([0.4, 0.1, 0.1, 0.4], dtype=torch.float64)
    scorable, requests = known(exact.posterior(joint, codec), codec, family="prime"), everything(4, 1, 0)
    mean = {
        name: -float((joint * values(scorable, requests, estimator=name)).sum())
        for name in ("ce_joint", "nelbo_subtoken", "nelbo_token", "nelbo_layered", "nll_chain")
    }
    assert mean.pop("ce_joint") == pytest.approx(1.097177, abs=1e-6)
    assert list(mean.values()) == pytest.approx([exact.entropy(joint)] * 4, abs=1e-12)


@pytest.mark.parametrize("variant", ["E1", "E2"])
@pytest.mark.parametrize("estimator", ORACLES)
def test_drawn_masks_have_the_enumerated_mean_and_an_honest_error(variant: Any, estimator: str) -> None:
    codec = build_codec(4, 2)
    model = exact.random_model(codec, 4, seed=7, scale=0.7)
    scorable, sequence = known(model, codec, family="prime"), (3, 0, 2, 1)
    truth = -float(ORACLES[estimator](model, codec, torch.tensor([sequence])))
    copies = [Request(context=(), continuation=sequence, group=str(i)) for i in range(500)]
    found = score(scorable, copies, ScoringConfig(estimator=estimator, draws=4, variant=variant))  # type: ignore[arg-type]
    sample = torch.tensor([s.value for s in found], dtype=torch.float64)
    assert abs(float(sample.mean()) - truth) < 4 * float(sample.std()) / len(sample) ** 0.5
    mean_error = float(torch.tensor([s.standard_error for s in found]).double().square().mean().sqrt())
    assert mean_error > 0.9 * float(sample.std())  # stratified draws: the error errs on the safe side


def test_counted_masks_vary_less_than_timed_ones() -> None:
    codec = build_codec(4, 1)
    scorable = known(exact.random_model(codec, 5, seed=7, scale=0.7), codec)
    copies = [Request(context=(), continuation=(3, 0, 2, 1, 1), group=str(i)) for i in range(200)]
    spread = {v: float(values(scorable, copies, draws=8, variant=v).std()) for v in ("E1", "E2")}
    assert spread["E2"] < 0.5 * spread["E1"]


# --- the same as the evaluators of the library -----------------------------------------------------------------------


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("name", ["nelbo_token", "nelbo_subtoken", "nelbo_layered", "ce_joint"])
def test_scores_equal_the_evaluators_of_held_out_text_under_the_same_noise(family: Any, name: str) -> None:
    scorable, draws = tiny(family), 6
    assert scorable.language is not None
    codec = scorable.language.codec
    context, continuation = (5, 80, 33, 7, 120), (90, 2, 61, 255, 18)
    layers = codec.granularity if name == "nelbo_layered" else 1
    per_token = codec.granularity if name in ("nelbo_subtoken", "ce_joint") else 1
    tokens = torch.tensor([(*context, *continuation)])
    scored = torch.arange(10).unsqueeze(0) >= 5

    def noise(draw: int, count: int) -> Tensor:
        numbers = uniform(stream_key(3, "score", "q"), torch.arange(draws), layers * (1 + 5 * per_token))
        mine = numbers[draw // layers, draw % layers :: layers]
        return torch.cat([mine[:1], torch.zeros(5 * per_token), mine[1:]]).unsqueeze(0)

    evaluator = getattr(likelihood, {"ce_joint": "loss_ce_joint"}.get(name, name))
    expected = evaluator(scorable.language.predictor(scorable.model), tokens, codec, noise, draws=draws, scored=scored)
    config = ScoringConfig(estimator=name, draws=draws, seed=3)  # type: ignore[arg-type]
    (found,) = score(scorable, [Request(context=context, continuation=continuation, group="q")], config)
    assert found.value == pytest.approx(-float(expected.values.mean()), abs=1e-5)
    assert found.standard_error == pytest.approx(float(expected.variance().sqrt()), abs=1e-5)


def test_an_autoregressive_score_is_the_evaluators_too() -> None:
    scorable = tiny("ar")
    tokens = (7, 80, 33, 90, 2)
    expected = likelihood.nll_ar(scorable.model, torch.tensor([tokens]), bos=scorable.first_token)
    found = values(scorable, [Request(context=(), continuation=tokens, group="")])
    assert float(found) == pytest.approx(-float(expected.values), abs=1e-5)


# --- what must not change a score ------------------------------------------------------------------------------------


def questions(count: int, *, seed: int = 0, longest: int = 9) -> list[Request]:
    """Questions with 1 to 4 options of 1 to 6 tokens, some equal, after contexts of 0 to `longest` tokens."""
    draw = random.Random(seed)
    requests = []
    for i in range(count):
        context = tuple(draw.randrange(270) for _ in range(draw.randrange(longest + 1)))
        for _ in range(draw.randrange(1, 5)):
            continuation = tuple(draw.randrange(270) for _ in range(draw.randrange(1, 7)))
            requests.append(Request(context=context, continuation=continuation, group=f"q{i}"))
    return requests + requests[:3]


def of_family(family: str) -> Scorable:
    return tiny_huggingface(family) if family in ("llama", "mixtral") else tiny(family)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "estimator"),
    [(family, "auto") for family in ("mdm", "prime", "ar", "llama", "mixtral")]
    + [
        ("prime", "nelbo_subtoken"),
        ("prime", "nelbo_layered"),
        ("prime", "ce_joint"),
        ("mdm", "nll_chain"),
        ("prime", "nll_chain"),
    ],
)
def test_neither_batch_nor_padding_nor_order_nor_company_changes_a_score(family: str, estimator: str) -> None:
    scorable, requests = of_family(family), questions(8)
    settings: dict[str, Any] = {"estimator": estimator, "draws": 16}
    together = values(scorable, requests, **settings)
    for batch_tokens in (1, 70):
        torch.testing.assert_close(
            values(scorable, requests, **settings, batch_tokens=batch_tokens), together, atol=1e-5, rtol=0.0
        )
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = values(scorable, [requests[i] for i in order], **settings)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0.0)
    alone = torch.cat([values(scorable, [request], **settings) for request in requests[:10]])
    torch.testing.assert_close(alone, together[:10], atol=1e-5, rtol=0.0)


def test_the_transformer_of_mdlm_is_padded_without_a_trace() -> None:
    scorable, requests = tiny("mdm", kind="dit", init="mdlm"), questions(6)
    together = values(scorable, requests, draws=8)
    torch.testing.assert_close(values(scorable, requests, draws=8, batch_tokens=1), together, atol=1e-5, rtol=1e-6)


def _scores_of_rank(family: str, requests: list[Request]) -> list[tuple[int, float]]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(len(requests)))[rank::world]
    found = score(of_family(family), [requests[i] for i in mine], ScoringConfig(draws=8))
    return [(i, s.value) for i, s in zip(mine, found, strict=True)]


@pytest.mark.parametrize("family", ["mdm", "ar"])
def test_the_number_of_processes_changes_no_score(family: str) -> None:
    requests = questions(6)
    single = values(of_family(family), requests, draws=8)
    parts = dict(pair for part in spawn(_scores_of_rank, 2, family, requests) for pair in part)
    found = torch.tensor([parts[i] for i in range(len(requests))], dtype=torch.float64)
    torch.testing.assert_close(found, single, atol=1e-5, rtol=0.0)


def test_another_seed_or_group_changes_drawn_scores_and_leaves_exact_ones() -> None:
    scorable = tiny("mdm")
    long, short = (5, 6, 7, 8, 9, 10, 11), (5, 6)

    def at(group: str, seed: int) -> list[float]:
        requests = [Request(context=(1, 2), continuation=x, group=group) for x in (long, short)]
        return values(scorable, requests, draws=8, seed=seed).tolist()

    base, group, seed = at("a", 0), at("b", 0), at("a", 1)
    assert len({base[0], group[0], seed[0]}) == 3
    assert group[1] == seed[1] == base[1]


def test_options_of_one_question_see_the_same_masks() -> None:
    scorable = known(exact.uniform_model(build_codec(8, 1)), build_codec(8, 1))
    options = [(1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1), (1, 2, 3, 4, 5)]
    masks = []
    for option in options:
        scorable.model.seen.clear()  # type: ignore[union-attr]
        score(scorable, [Request(context=(0,), continuation=option, group="q")], ScoringConfig(draws=12))
        rows = torch.cat(scorable.model.seen)  # type: ignore[arg-type]
        masks.append({tuple(row) for row in (rows[:, 1:, 0] == 8).tolist()})
    assert masks[0] == masks[1]
    assert len({m[:5] for m in masks[0]} & masks[2]) > len(masks[2]) / 3  # shorter: the same ranks as far as it goes


# --- what the network sees -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["nelbo_token", "nelbo_subtoken", "nelbo_layered", "nll_chain", "ce_joint"])
def test_the_context_is_never_masked_and_the_hidden_tokens_do_not_show(estimator: str) -> None:
    codec = build_codec(8, 3)
    scorable = known(exact.uniform_model(codec), codec, family="prime")
    context, option = (1, 7, 2), (3, 4, 0, 6)
    values(scorable, [Request(context=context, continuation=option, group="")], estimator=estimator, draws=9)
    rows = torch.cat(scorable.model.seen)  # type: ignore[arg-type]
    assert (rows[:, :3] == codec.encode(torch.tensor(context))).all()
    region = rows[:, 3:]
    assert ((region == codec.mask_symbol) | (region == codec.encode(torch.tensor(option)))).all()
    assert (region == codec.mask_symbol).any(-1).any(-1).all()


def test_one_row_serves_all_options_of_one_token_and_every_repetition() -> None:
    codec = build_codec(8, 1)
    scorable = known(exact.uniform_model(codec), codec)
    requests = [Request(context=(1, 2), continuation=(i,), group="q") for i in range(4)] * 3
    found = score(scorable, requests, ScoringConfig())
    assert sum(len(rows) for rows in scorable.model.seen) == 1  # type: ignore[arg-type, union-attr]
    assert all(s.standard_error == 0.0 and s.rows == 1 for s in found)


def test_drawn_masks_that_repeat_are_read_once() -> None:
    codec = build_codec(8, 1)
    scorable = known(exact.uniform_model(codec), codec)
    requests = [Request(context=(1,), continuation=tuple(range(8)), group="q")]
    (found,) = score(scorable, requests, ScoringConfig(draws=128))
    distinct = torch.cat(scorable.model.seen).flatten(1)  # type: ignore[arg-type]
    assert len(distinct) == len(distinct.unique(dim=0)) == found.rows < 100


def test_causal_inputs_that_begin_another_are_read_off_it() -> None:
    scorable = tiny("ar")
    seen: list[int] = []
    scorable.model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    requests = [Request(context=(3, 4, 5), continuation=(i,), group="") for i in range(4)]
    requests.append(Request(context=(3, 4, 5), continuation=(6, 7, 8), group=""))
    requests.append(Request(context=(3,), continuation=(4, 5), group=""))
    found = values(scorable, requests)
    assert seen == [1]
    alone = torch.cat([values(scorable, [request]) for request in requests])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0.0)


def test_a_batch_that_does_not_fit_is_read_in_halves() -> None:
    scorable, requests = tiny("mdm"), questions(5)
    expected = values(scorable, requests, draws=8)
    sizes: list[int] = []

    def refuse(_: Any, arguments: tuple[Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))
        if sizes[-1] > 7:
            raise torch.OutOfMemoryError("pretended")

    scorable.model.register_forward_pre_hook(refuse)
    torch.testing.assert_close(values(scorable, requests, draws=8), expected, atol=1e-5, rtol=0.0)
    assert max(sizes) > 7 and min(sizes) <= 7


def test_padding_hidden_from_attention_is_what_makes_scores_independent_of_company() -> None:
    scorable = tiny("mdm")
    forward = scorable.model.forward
    requests = questions(6)
    expected = values(scorable, requests, draws=8)
    scorable.model.forward = lambda inputs, readout, attention_mask=None: forward(inputs, readout)  # type: ignore[method-assign]
    assert (values(scorable, requests, draws=8) - expected).abs().max() > 1e-3


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2])
def test_greedy_is_what_filling_in_the_most_confident_first_gives(granularity: int) -> None:
    codec = build_codec(4, granularity)
    model = exact.random_model(codec, 3, seed=8)
    expected = [0, 0, 0]
    hidden = [True, True, True]
    while any(hidden):
        state = torch.where(torch.tensor(hidden).unsqueeze(-1), codec.mask_symbol, codec.encode(torch.tensor(expected)))
        probs = model(state.unsqueeze(0))[0].softmax(-1)
        place = max((i for i in range(3) if hidden[i]), key=lambda i: float(probs[i].max()))
        expected[place], hidden[place] = int(probs[place].argmax()), False
    requests = [dataclasses.replace(r, check_greedy=True) for r in everything(4, 3, 0)]
    found = score(known(model, codec, family="prime"), requests, ScoringConfig())
    assert [r.continuation for r, s in zip(requests, found, strict=True) if s.is_greedy] == [tuple(expected)]


def test_greedy_is_not_looked_for_unless_asked() -> None:
    codec = build_codec(4, 1)
    scorable = known(exact.random_model(codec, 3, seed=8), codec)
    assert not any(s.is_greedy for s in score(scorable, everything(4, 3, 0), ScoringConfig()))


def test_a_causal_model_knows_for_every_score_whether_it_is_greedy() -> None:
    scorable = tiny("ar")
    logits = scorable.model(torch.tensor([[4, 9]]), lambda hidden, weight, bias: hidden @ weight.T)[0, -1]
    best = int(logits.argmax())
    options = [Request(context=(4, 9), continuation=(token,), group="") for token in (best, (best + 1) % 270)]
    assert [s.is_greedy for s in score(scorable, options, ScoringConfig())] == [True, False]


# --- guidance and temperature ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("estimator", ["nelbo_token", "nelbo_subtoken", "nelbo_layered"])
def test_guidance_runs_from_no_context_over_none_to_beyond(family: Any, estimator: str) -> None:
    scorable, requests = tiny(family), questions(5)
    assert scorable.language is not None
    settings: dict[str, Any] = {"estimator": estimator, "draws": 8}
    plain = values(scorable, requests, **settings)
    torch.testing.assert_close(values(scorable, requests, **settings, guidance=0.0), plain, atol=1e-6, rtol=0.0)
    assert (values(scorable, requests, **settings, guidance=0.7) - plain).abs().max() > 1e-2
    blind = values(scorable, requests, **settings, guidance=-1.0)
    other = [dataclasses.replace(r, context=tuple((t + 1) % 270 for t in r.context)) for r in requests]
    torch.testing.assert_close(values(scorable, other, **settings, guidance=-1.0), blind, atol=1e-5, rtol=0.0)


def test_guided_logits_are_the_published_combination() -> None:
    codec = build_codec(4, 1)
    model = exact.random_model(codec, 2, seed=3)
    cond = model(torch.tensor([[[1], [4]]]))[0, 1]
    blind = model(torch.tensor([[[4], [4]]]))[0, 1]
    expected = ((blind + 1.5 * (cond - blind)) / 0.7).log_softmax(-1)
    requests = [Request(context=(1,), continuation=(i,), group="") for i in range(4)]
    found = values(known(model, codec), requests, guidance=0.5, temperature=0.7)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("family", ["ar", "llama"])
def test_temperature_divides_the_logits_of_causal_models(family: str) -> None:
    scorable = of_family(family)
    options = [Request(context=(4, 9), continuation=(i,), group="") for i in range(270)]
    warm = (values(scorable, options) / 2.0).log_softmax(-1)
    torch.testing.assert_close(values(scorable, options, temperature=2.0), warm, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("ar", {"guidance": 0.5}, "scoring.guidance = 0.5"),
        ("ar", {"estimator": "nelbo_token"}, "masks nothing; use auto"),
        ("mdm", {"estimator": "nll_ar"}, "needs a causal model"),
        ("mdm", {"draws": 0}, "draws = 0"),
        ("mdm", {"temperature": 0.0}, "temperature = 0.0 above 0"),
        ("mdm", {"guidance": -2.0}, "guidance = -2.0 must be finite and at least -1"),
        ("mdm", {"max_length": 1}, "max_length = 1 leaves no room"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(family: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        score(tiny(family), [], ScoringConfig(**settings))


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"temperature": 0.5}, {"estimator": "ce_joint"}])
def test_what_only_ranks_is_refused_as_a_likelihood(settings: dict[str, Any]) -> None:
    ScoringConfig().check_likelihood("rolling")
    with pytest.raises(ConfigError, match="rolling reports a likelihood"):
        ScoringConfig(**settings).check_likelihood("rolling")
    assert ScoringConfig(estimator="ce_joint").settings(tiny("prime"))["estimator"] == "score_joint"


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_windows_score_every_token_once_given_as_much_as_fits() -> None:
    assert windows((9,), (1, 2), 4) == [((9,), (1, 2))]
    assert windows((8, 9), (1, 2, 3), 4) == [((9,), (1, 2, 3))]  # the context is cut, the continuation is whole
    assert windows((9,), (1, 2, 3, 4, 5), 4) == [((9,), (1, 2, 3)), ((2, 3), (4, 5))]
    assert windows((), (1, 2, 3, 4, 5), 4) == [((), (1, 2, 3, 4)), ((2, 3, 4), (5,))]
    assert windows((9,), (), 4) == []


def test_causal_windows_are_those_of_the_harness() -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in range(1, 15):
        tokens = list(range(count))
        for longest in (1, 2, 5, 20):
            theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 99, longest, 1))
            expected = [(tuple(context), tuple(part)) for context, part in theirs]
            assert windows((99,), tuple(tokens), longest + 1) == expected


def test_a_context_that_does_not_fit_loses_its_beginning_and_that_is_told() -> None:
    scorable = tiny("mdm", max_length=6)
    whole = Request(context=(7, 8, 9, 10, 11), continuation=(1, 2, 3), group="")
    (cut,) = score(scorable, [whole], ScoringConfig())
    (short,) = score(scorable, [dataclasses.replace(whole, context=(9, 10, 11))], ScoringConfig())
    assert (cut.value, cut.cut, short.cut) == (pytest.approx(short.value, abs=1e-6), 2, 0)


def test_nothing_to_score_costs_nothing() -> None:
    (found,) = score(tiny("mdm"), [Request(context=(1,), continuation=(), group="")], ScoringConfig())
    assert (found.value, found.standard_error, found.is_greedy, found.rows) == (0.0, 0.0, True, 0)


def test_a_score_that_is_no_number_stops_the_evaluation() -> None:
    codec = build_codec(4, 1)
    broken = known(lambda digits: torch.full((*digits.shape[:2], 4), math.nan, dtype=torch.float64), codec)
    with pytest.raises(FloatingPointError, match="a continuation of 2 tokens after 1 scored nan"):
        score(broken, [Request(context=(0,), continuation=(1, 2), group="")], ScoringConfig())

"""Differences against a reference, by hand."""

import dataclasses
import math

import pytest

from llm.scaling import summary
from llm.scaling.difference import compare
from llm.scaling.laws import best_bound, choose
from llm.scaling.point import Estimated, Point, Result

SIZES = {"s": 1000, "m": 2000, "l": 4000}


def result(name: str, **values: float) -> Result:
    """`name` is family/size-budget-seed; `values` are nats per token by bound, with a standard error of 0.03."""
    family, _, rest = name.partition("/")
    size, budget, seed = rest.split("-")
    point = Point(
        name=name,
        family=family,
        size=size,
        seed=int(seed),
        budget=float(budget),
        parameters=SIZES[size],
        tokens=100,
        flops=float(budget),
        flops_6nd=6.0 * SIZES[size] * 100,
    )

    def estimated(nats: float, error: float = 0.03) -> Estimated:
        return Estimated(nats_per_token=nats, standard_error=error, estimator="E2", draws=2)

    return Result(
        point=point,
        estimates={bound: estimated(nats) for bound, nats in values.items()},
        joint=estimated(0.5) if family != "mdm" else None,
        bytes_per_token=1.0,
        seconds=1.0,
        steps=100,
    )


STUDY = [
    result("mdm/s-1e12-0", nelbo_token=3.0),
    result("mdm/s-1e12-1", nelbo_token=3.1),
    result("mdm/m-1e12-0", nelbo_token=2.9),
    result("mdm/m-1e12-1", nelbo_token=3.0),
    result("mdm/m-2e12-0", nelbo_token=2.8),
    result("prime/s-1e12-0", nelbo_token=3.9, nelbo_layered=3.02),
    result("prime/s-1e12-1", nelbo_token=3.9, nelbo_layered=3.16),
    result("prime/m-1e12-0", nelbo_token=3.9, nelbo_layered=3.1),
    result("prime/m-1e12-1", nelbo_token=3.9, nelbo_layered=3.1),
    result("prime/m-2e12-0", nelbo_token=3.9, nelbo_layered=2.5),
    result("prime/l-2e12-0", nelbo_token=3.9, nelbo_layered=2.6),
    result("prime/m-4e12-0", nelbo_token=3.9, nelbo_layered=2.4),
]


def found(results=STUDY):
    return compare(results, choose(results, None), "mdm")


def test_same_sizes_are_paired_seed_by_seed_under_the_best_bound_of_each_family() -> None:
    by = {(one.size, one.budget): one for one in found().sizes}
    assert set(by) == {("s", 1e12), ("m", 1e12), ("m", 2e12)}
    small = by["s", 1e12]
    assert small.bound == "nelbo_layered" and small.seeds == 2
    assert small.value == pytest.approx((0.02 + 0.06) / 2)
    assert small.spread == pytest.approx(0.04 / math.sqrt(2))  # of 0.02 and 0.06
    assert small.standard_error == pytest.approx(0.03 * math.sqrt(2))  # two evaluations; seeds share their text
    alone = by["m", 2e12]
    assert (alone.value, alone.seeds, alone.spread) == (pytest.approx(-0.3), 1, None)


def test_the_best_sizes_of_a_budget_are_compared_with_each_other() -> None:
    by = {one.budget: one for one in found().best}
    low = by[1e12]
    assert (low.size, low.reference_size, low.edge) == ("s", "m", "smallest")  # 3.09 < 3.1, 2.95 < 3.05
    assert low.value == pytest.approx(((3.02 - 2.9) + (3.16 - 3.0)) / 2)
    assert low.spread == pytest.approx(0.04 / math.sqrt(2))
    assert (by[2e12].size, by[2e12].edge, by[2e12].value) == ("m", "smallest", pytest.approx(-0.3))
    assert found().unmatched == ("prime at 4e+12 FLOPs",)


def test_the_spread_over_seeds_is_pooled_over_the_sizes_of_a_family_and_borrowed_by_one_without_seeds() -> None:
    # Sizes s: 0.02, 0.06; m: 0.2, 0.1. Variances 0.0008 and 0.005, of one degree of freedom each.
    pooled = math.sqrt((0.0008 + 0.005) / 2)
    assert found().spread() == pytest.approx(pooled) == found().spread("prime")
    other = [result("quiet/s-1e12-0", nelbo_token=3.0), result("quiet/s-1e12-1", nelbo_token=3.1)]
    single = [result("single/s-1e12-0", nelbo_token=3.0)]
    more = found([*STUDY, *other, *single])
    assert (more.spread("quiet"), more.spread("single")) == (pytest.approx(0), None)
    assert more.spread() == pytest.approx(math.sqrt((0.0008 + 0.005 + 0) / 3))
    noise = {one.family: more.noise(one) for one in more.best if one.budget == 1e12}
    both = 2 * 0.03 * math.sqrt(2)
    assert noise["prime"] == pytest.approx(both + pooled) and noise["quiet"] == pytest.approx(both)
    assert noise["single"] == pytest.approx(both + (more.spread() or 0.0))


def test_a_difference_counts_only_beyond_two_standard_errors_and_the_spread() -> None:
    low, high = found().best
    assert found().verdict(low) == "worse"  # 0.14 against 0.0849 + 0.0539
    assert found().verdict(dataclasses.replace(low, value=0.138)) == "within noise"
    assert found().verdict(dataclasses.replace(low, value=-0.138)) == "within noise"
    assert found().verdict(high) == "better"


def test_the_words_say_which_differences_count_and_how_many_seeds_there_are() -> None:
    words = summary.difference_words(found())
    best, _, sizes = words.partition("Size by size")
    assert "- better, beyond noise: prime at 2e+12.\n- worse, beyond noise: prime at 1e+12." in best
    assert "- worse, beyond noise: prime at 1e+12.\n- not told apart: prime at 1e+12.\n" in sizes  # m; s
    assert "Seeds that both have: 1 at 2e+12 FLOPs; 2 at 1e+12 FLOPs." in words
    assert "prime at 4e+12 FLOPs" in words and "all families (0.0539)" in words
    single = summary.difference_words(found([one for one in STUDY if one.point.seed == 0]))
    assert "unknown, as no two seeds meet" in single and "accident of one seed" in single


def test_the_tables_hold_differences_and_no_joint_loss() -> None:
    best = summary.best_difference_table(found())
    assert "| 1e+12 | prime | nelbo_layered | s (smallest) | m | +0.1400 (0.0424) | 2 | 0.0283 | worse |" in best
    sizes = summary.size_difference_table(found())
    assert (
        "| prime | nelbo_layered | m | +0.1500 (0.0424; 2 seeds, 0.0707) worse | -0.3000 (0.0424) **better** |" in sizes
    )
    assert "0.5" not in best + sizes and "joint" not in best + sizes


def test_seeds_without_a_partner_are_left_out() -> None:
    lone = [one for one in STUDY if one.point.name not in ("mdm/s-1e12-1", "mdm/m-2e12-0")]
    by = {(one.size, one.budget): one for one in found(lone).sizes}
    assert by["s", 1e12].seeds == 1 and by["s", 1e12].value == pytest.approx(0.02)
    assert ("m", 2e12) not in by and "prime at 2e+12 FLOPs" in found(lone).unmatched


def test_costly_bounds_are_best_only_where_there_is_no_other() -> None:
    rows = [result("prime/s-1e12-0", nll_chain=1.0, nelbo_token=2.0, nelbo_subtoken=2.1)]
    assert best_bound(rows, "prime") == "nelbo_token"
    assert best_bound([result("prime/s-1e12-0", nll_chain=1.0)], "prime") == "nll_chain"
    partly = [*rows, result("prime/m-1e12-0", nelbo_subtoken=2.1), result("prime/l-1e12-0", nelbo_subtoken=2.1)]
    assert best_bound(partly, "prime") == "nelbo_subtoken"

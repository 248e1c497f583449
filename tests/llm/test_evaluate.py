"""`unmask eval`: the same figures however they are computed, valid names only, and a record of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError
from llm.evaluate import RECORD, format_table, main
from tests.processes import RankFailed, spawn


def evaluate(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def recorded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / RECORD).read_text().splitlines()]


def last(run: Path, count: int) -> dict[str, dict[str, Any]]:
    return {row["estimate"]: row for row in recorded(run)[-count:]}


@pytest.fixture(scope="module")
def reference(runs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    evaluate(str(runs["prime"]), "--draws", "2", "--sequences", "9", "--batch", "9")
    return last(runs["prime"], 3)


@pytest.mark.parametrize(("world", "batch"), [(1, "2"), (2, "4"), (3, "1")])
def test_neither_the_number_of_processes_nor_the_batch_changes_a_figure(
    runs: dict[str, Path], reference: dict[str, dict[str, Any]], world: int, batch: str
) -> None:
    arguments = (str(runs["prime"]), "--draws", "2", "--sequences", "9", "--batch", batch)
    spawn(evaluate, world, *arguments, group=False)
    for name, row in last(runs["prime"], 3).items():
        for key in (name, f"{name}_se"):
            assert row[key] == pytest.approx(reference[name][key], rel=1e-6), key
        assert {k: row[k] for k in ("draws", "blocks", "tokens", "step", "weights", "estimator")} == {
            k: reference[name][k] for k in ("draws", "blocks", "tokens", "step", "weights", "estimator")
        }


def test_only_valid_estimates_have_a_perplexity_and_bits(reference: dict[str, dict[str, Any]]) -> None:
    for name, row in reference.items():
        assert ("ppl" in row) == (f"{name}_bits_per_byte" in row) == (name != "loss_ce_joint")
    joint = next(line for line in format_table(list(reference.values())).splitlines() if "loss_ce_joint" in line)
    assert "not a likelihood" in joint


def test_a_bound_lies_above_the_chain_that_it_bounds_on_average(runs: dict[str, Path]) -> None:
    """Exact for left to right, an upper bound for random orders: hardly trained, the two are close to each other."""
    bounds = ("--bounds", "nll_chain", "nelbo_token", "nelbo_steps", "--steps", "16", "--draws", "16")
    evaluate(str(runs["mdm"]), *bounds, "--sequences", "4")
    found = last(runs["mdm"], 3)
    assert found["nll_chain"]["estimator"] == "left_to_right" and found["nll_chain"]["draws"] == 1
    assert found["nelbo_steps"]["estimator"] == "T=16"
    for name in ("nelbo_token", "nelbo_steps"):
        assert found[name][name] == pytest.approx(found["nll_chain"]["nll_chain"], rel=0.05)
    evaluate(str(runs["mdm"]), "--bounds", "nll_chain", "--order", "confidence", "--sequences", "4")
    assert last(runs["mdm"], 1)["nll_chain"]["estimator"] == "confidence"


def test_an_autoregressive_model_has_one_exact_value(runs: dict[str, Path]) -> None:
    evaluate(str(runs["ar"]), "--sequences", "3", "--split", "test")
    (row,) = last(runs["ar"], 1).values()
    assert (row["estimate"], row["estimator"], row["split"], row["blocks"]) == ("nll_ar", "exact", "test", 3)


def test_every_estimate_is_kept(runs: dict[str, Path]) -> None:
    before = recorded(runs["prime"]) if (runs["prime"] / RECORD).exists() else []
    evaluate(str(runs["prime"]), "--bounds", "nelbo_token", "--sequences", "2")
    assert recorded(runs["prime"])[:-1] == before


@pytest.mark.parametrize("flag", ["--draws", "--sequences", "--batch", "--steps"])
def test_a_number_below_one_is_refused_by_its_flag(runs: dict[str, Path], flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag.strip('-')} = 0; the smallest is 1"):
        main([str(runs["prime"]), flag, "0"])


def test_a_folder_without_data_is_refused_by_its_name(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=str(tmp_path)):
        spawn(evaluate, 2, str(runs["prime"]), "--data", str(tmp_path), group=False)

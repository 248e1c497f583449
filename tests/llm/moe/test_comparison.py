"""Recipes side by side: what is judged once stays, and a table's figures are means over the models of a group."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.moe import comparison
from llm.moe.comparison import ComparisonConfig, Result, compare, table
from llm.moe.judge import Generation, Likelihood, repeated_4grams, unigram_entropy
from tests.shape_true import write_shape

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def alone() -> Runtime:
    return Runtime(runtimes.Place(), torch.device("cpu"), None, None)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> ComparisonConfig:
    write_shape(tmp_path / "model", "mixtral-8x7b", layers=2, **SMALL)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": str(i), "text": f"{i} sheep " * 20}) + "\n" for i in range(400)))
    tree = {
        "models": {"small": [str(tmp_path / "model")]},
        "experts": [4, 2],
        "recipes": {"hc": {}, "reap": {"group": "prune"}},
        "calibration": {"data": [str(text)], "blocks": 2, "block_length": 64},
        "judging": {"blocks": 3, "block_length": 32, "continuations": 2, "beginning": 8, "length": 6},
    }
    return configs.from_dict(ComparisonConfig, tree, source="test")


def test_every_recipe_is_judged_once_beside_the_original(
    config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = compare(config, tmp_path / "out", alone())
    names = [(result.recipe, result.experts) for result in results]
    assert names == [("original", 8), ("hc", 4), ("reap", 4), ("hc", 2), ("reap", 2)]
    assert results[0].likelihood.divergence == 0.0 and results[0].likelihood.agreement == 1.0
    assert all(result.likelihood.divergence > 0 for result in results[1:])
    assert [result.parameters for result in results[:4:2]] == [
        results[0].parameters,
        results[0].parameters - 2 * 4 * 3 * 32 * 48,
    ]
    (tmp_path / "out" / "small" / "model" / "reap-r2" / "result.json").unlink()
    judged: list[str] = []
    merge = comparison.merge
    monkeypatch.setattr(comparison, "merge", lambda *a: (judged.append(a[3].parent.name), merge(*a))[1])
    again = compare(config, tmp_path / "out", alone())
    assert judged == ["reap-r2"]
    assert [replace(r, seconds=0.0) for r in again] == [replace(r, seconds=0.0) for r in results]


def test_more_experts_than_a_model_has_are_refused_before_any_work(config: ComparisonConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="9"):
        compare(replace(config, experts=(9,)), tmp_path / "out", alone())
    assert not (tmp_path / "out").exists()


def test_a_table_shows_means_and_deviations_over_models() -> None:
    def result(nats: float) -> Result:
        return Result(
            model="tiny",
            folder=str(nats),
            recipe="hc",
            experts=4,
            likelihood=Likelihood(nats_per_token=nats, standard_error=0.5, divergence=0.25, agreement=0.5),
            generation=Generation(
                nats_under_original=nats, standard_error=0.1, unigram_entropy=2.0, repeated_4grams=0.125
            ),
            tasks={},
            task_errors={},
            parameters=1000,
            seconds=2.0,
        )

    (row,) = table([result(1.0), result(3.0)]).splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["tiny", "4", "hc", "2.0000 (1.4142)", "7.39", "0.2500 (0.0000)"]
    assert cells[7:] == ["2.00", "0.125", "1,000", "2.0"]
    (row,) = table([result(1.0)]).splitlines()[2:]
    assert "1.0000 (0.5000)" in row  # of one model: its standard error


def test_entropy_and_repetition_of_a_text_by_hand() -> None:
    assert unigram_entropy([7, 7, 8, 8]) == pytest.approx(0.6931471805599453)
    assert unigram_entropy([5, 5, 5]) == pytest.approx(0.0)
    assert repeated_4grams([1, 2, 3, 4, 5]) == 0.0
    assert repeated_4grams([1, 2, 1, 2, 1, 2, 1]) == 0.5  # 1212 2121 1212 2121
    assert repeated_4grams([1, 2]) == 0.0

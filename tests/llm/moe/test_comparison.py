"""Recipes side by side: what is judged once stays, and a table's figures are means over the models of a group."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.moe import comparison
from llm.moe.comparison import ComparisonConfig, Result, compare, table
from llm.moe.judge import Generation, Likelihood
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


class Killed(BaseException):
    pass


def test_a_comparison_that_is_killed_goes_on_with_what_it_has_merged_and_judged(
    config: ComparisonConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = compare(config, tmp_path / "whole", alone())
    out, judge, calls = tmp_path / "out", comparison.judge_likelihood, []

    def killed_at_the_third(*arguments: Any) -> Likelihood:
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return judge(*arguments)

    monkeypatch.setattr(comparison, "judge_likelihood", killed_at_the_third)
    with pytest.raises(Killed):
        compare(config, out, alone())
    place = out / "small" / "model"
    assert sorted(path.parent.name for path in place.rglob("result.json")) == ["hc-r4", "original"]
    layer = place / "reap-r4" / "merged" / "layer_000.safetensors"
    made = layer.stat().st_mtime_ns
    (place / "hc-r4" / "merged").mkdir()  # as a kill before its removal leaves it behind
    loaded: list[int] = []
    load = comparison.load_layer
    monkeypatch.setattr(
        comparison,
        "load_layer",
        lambda folder, n: (loaded.append(layer.stat().st_mtime_ns) if "reap-r4" in str(folder) else 0, load(folder, n))[
            1
        ],
    )
    found = compare(config, out, alone())
    assert loaded == [made, made] and len(calls) == 6  # the third was judged again
    assert [replace(r, seconds=0.0) for r in found] == [replace(r, seconds=0.0) for r in expected]
    assert not list(out.rglob("merged"))


def test_results_of_another_calibration_judging_recipe_or_model_are_refused(
    config: ComparisonConfig, tmp_path: Path
) -> None:
    small = replace(config, experts=(4,), recipes={"hc": {}})
    out = tmp_path / "out"
    compare(small, out, alone())
    for other, words in (
        (replace(small, calibration=replace(small.calibration, seed=1)), "another calibration"),
        (replace(small, judging=replace(small.judging, blocks=2)), "another judging"),
        (replace(small, recipes={"hc": {"linkage": "single"}}), r"another recipes\.hc"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(other, out, alone())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "model")
    moved = replace(small, models={"small": [str(tmp_path / "elsewhere" / "model")]})
    with pytest.raises(ConfigError, match=r"is of .*model, not of .*elsewhere/model"):
        compare(moved, out, alone())
    (tmp_path / "elsewhere" / "model").rename(tmp_path / "model")
    more = compare(replace(small, experts=(4, 3), recipes={"reap": {"group": "prune"}}), out, alone())
    assert [(r.recipe, r.experts) for r in more] == [("original", 8), ("reap", 4), ("reap", 3)]
    with pytest.raises(ConfigError, match=r"another recipes\.hc"):  # it is still known
        compare(replace(small, recipes={"hc": {"linkage": "single"}}), out, alone())


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("", {"models": {}}, "one of them is empty"),
        ("", {"models": {"a": "models/one"}}, "it is a list of folders"),
        ("", {"models": {"a": ["runs/0/hf", "runs/1/hf"]}}, "has 2 folders called 'hf'"),
        ("", {"recipes": {"original": {}}}, "stands for the model itself"),
        ("", {"recipes": {"a": "hc"}}, "it holds keys of a recipe"),
        ("", {"recipes": {"a": {"group": "hirarchical"}}}, "did you mean 'hierarchical'"),
        ("", {"recipes": {"a": {"protect": 2}}}, "protect = 2; of experts = 2"),  # fits 4, not 2
        ("judging", {"continuations": 4}, "judging.continuations = 4"),
        ("judging", {"beginning": 33}, "judging.beginning = 33"),
        ("judging", {"block_length": 1}, "judging.block_length = 1"),
        ("judging", {"length": 0}, "judging.length = 0"),
    ],
)
def test_comparisons_without_meaning_are_refused(
    config: ComparisonConfig, section: str, changes: dict[str, Any], words: str
) -> None:
    tree = configs.to_dict(config)
    changed = tree | changes if not section else tree | {section: tree[section] | changes}
    with pytest.raises(ConfigError) as refusal:
        configs.from_dict(ComparisonConfig, changed, source="test")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"block_length": 65}}, r"calibration.block_length = 65; .* takes 64 tokens"),
        ({"judging": {"block_length": 65}}, r"judging.block_length = 65; .* takes 64 tokens"),
        ({"judging": {"length": 57}}, r"judging.beginning \+ judging.length = 65; .* takes 64 tokens"),
    ],
)
def test_texts_that_are_longer_than_a_model_takes_are_refused_before_any_work(
    config: ComparisonConfig, changes: dict[str, dict[str, int]], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 64}))
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    with pytest.raises(ConfigError, match=words):
        compare(replace(config, **sections), tmp_path / "out", alone())
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

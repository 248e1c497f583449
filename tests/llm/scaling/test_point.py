"""Results of points: what they may claim, and how they are kept."""

import dataclasses
import json
from pathlib import Path

import pytest

from launch.errors import DataError
from llm.scaling.point import Estimated, Point, Result, read_hash, read_result, read_results, write_result

POINT = Point(
    name="mdm/small-1e12-s0",
    family="mdm",
    size="small",
    seed=0,
    budget=1e12,
    parameters=1000,
    tokens=2048,
    flops=1.01e12,
    flops_6nd=12288000.0,
)
ESTIMATED = Estimated(nats_per_token=2.5, standard_error=0.01, estimator="E2", draws=2)
RESULT = Result(
    point=POINT, estimates={"nelbo_token": ESTIMATED}, joint=ESTIMATED, bytes_per_token=1.9, seconds=3.5, steps=4
)


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_result(tmp_path / "mdm" / "small-1e12-s0", RESULT, config_hash="abc")
    without_joint = dataclasses.replace(RESULT, joint=None, point=dataclasses.replace(POINT, name="mdm/a"))
    write_result(tmp_path / "mdm" / "a", without_joint, config_hash="abc")
    assert read_results(tmp_path) == [without_joint, RESULT]
    assert read_hash(tmp_path / "mdm" / "a" / "result.json") == "abc"
    assert read_hash(tmp_path / "mdm" / "b" / "result.json") is None


def test_the_joint_loss_is_no_estimate() -> None:
    with pytest.raises(TypeError, match="loss_ce_joint is not a likelihood"):
        dataclasses.replace(RESULT, estimates={"loss_ce_joint": ESTIMATED})


def test_a_file_that_claims_a_likelihood_under_another_name_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, RESULT, config_hash="abc")
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace("nelbo_token", "ppl"))
    with pytest.raises(DataError, match="ppl is not a likelihood"):
        read_result(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"point": {}})[:5])
    with pytest.raises(DataError, match=r"result\.json cannot be read"):
        read_result(path)
    path.write_text('{"point": {}}')
    with pytest.raises(DataError, match=r"point\.name is required"):
        read_result(path)


def test_a_study_without_results_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unmask scaling run"):
        read_results(tmp_path)

"""`unmask scaling fit` and `report` on whole and partial studies of made-up results."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import config as configs
from launch.errors import ConfigError, DataError
from llm.scaling import laws, report, surface
from llm.scaling.point import Estimated, Point, Result, read_results, write_result

SIZES = {"s": 1e6, "m": 2e6, "l": 4e6, "xl": 8e6}


def result(family: str, size: str, budget: float, *, seed: int = 0, valid: tuple[str, ...], joint: bool) -> Result:
    """Loss 2 + 300 / N^0.4 + 900 / D^0.4 for ARM; others pay 0.3 nats more, and their joint loss lies 2 nats lower."""
    n = SIZES[size]
    d = budget / (6 * n)
    loss = 2 + 300 * n**-0.4 + 900 * d**-0.4 + (0 if family == "arm" else 0.3) + 0.001 * seed
    flops = 6 * n * d * (1 + 2000 / n**0.6)  # a rule that charges the head
    point = Point(
        name=f"{family}/{size}-{budget:.0e}-s{seed}",
        family=family,
        size=size,
        seed=seed,
        budget=budget,
        parameters=int(n),
        tokens=int(d),
        flops=flops,
        flops_6nd=6 * n * d,
    )

    def estimated(nats: float) -> Estimated:
        return Estimated(nats_per_token=nats, standard_error=0.002, estimator="E2", draws=2)

    return Result(
        point=point,
        estimates={name: estimated(loss + 0.1 * i) for i, name in enumerate(valid)},
        joint=estimated(loss - 2) if joint else None,
        bytes_per_token=4.0,
        seconds=1.0,
        steps=100,
    )


def whole_study() -> list[Result]:
    rows = [
        result("arm", size, budget, seed=seed, valid=("nll_ar",), joint=False)
        for budget in (4e14, 1e15, 2e15)
        for size in SIZES
        for seed in ((0, 1) if budget == 4e14 else (0,))
    ]
    bounds = ("nelbo_token", "nelbo_subtoken", "nll_chain")
    rows += [result("prime", s, b, valid=bounds, joint=True) for b in (4e14, 1e15, 2e15) for s in SIZES]
    return [*rows, result("few", "s", 4e14, valid=("nelbo_token",), joint=False)]


def write(results: list[Result], folder: Path) -> Path:
    for r in results:
        write_result(folder / r.point.name, r, config_hash="x")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_starts() -> Iterator[None]:
    """Three hundred are for real studies, and for tests/llm/scaling/test_surface.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface, "STARTS", 12)
        yield


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = write(whole_study(), tmp_path_factory.mktemp("study"))
    assert report.main_report([str(study), "--draws", "20", "--predict", "4e15"]) == 0
    return study / "report"


def test_the_report_has_tables_of_everything_and_all_figures(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    for title in ("Laws", "Surface", "Compute for equal loss", "Prediction at 4e+15", "Best of each", "All points"):
        assert f"## {title}" in text
    for name in ("difference", "isoflop", "frontier", "size", "bounds"):
        assert f"![{name}]({name}.png)" in text
        assert (reported / f"{name}.png").stat().st_size > 5000 and (reported / f"{name}.svg").exists()
    assert len(re.findall(r"^\| (arm|prime|few)/", text, re.M)) == len(whole_study())


def test_the_report_says_which_family_has_too_few_points(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    assert "| few | nelbo_token | 4e+14 | 1 | - | - | - | 1 of 3 sizes, no curve |" in text
    assert "no surface: 1 of 3 budgets, 1 of 3 sizes, 1 of 6 points |" in text
    assert "no law: 1 of 3 budgets, 1 of 3 sizes, 1 of 6 points |" in text
    assert re.search(r"Fewer than 3 sound minima, so no law: .*few", text)
    assert re.search(r"No ratio to arm, which needs sound surfaces or 3 sound minima of both families: few", text)


def test_seeds_have_a_spread_and_single_ones_say_so(reported: Path) -> None:
    rows = [line for line in (reported / "report.md").read_text().splitlines() if line.startswith("| arm | nll_ar | ")]
    assert any("0.0007 (2 seeds)" in row for row in rows)  # 0.001 / sqrt 2
    assert any("one seed" in row for row in rows)


def test_the_joint_loss_stands_only_under_words_that_say_what_it_is_not(reported: Path) -> None:
    text = (reported / "report.md").read_text()
    assert re.findall(r"[^|]*joint[^|]*", text) == [" loss_ce_joint (no likelihood) "]
    assert "loss_ce_joint: no likelihood" in (reported / "bounds.svg").read_text()
    for name in ("difference", "isoflop", "frontier", "size"):
        assert "joint" not in (reported / f"{name}.svg").read_text()


def test_a_report_of_its_own_results_file_is_the_same_to_the_byte(reported: Path, tmp_path: Path) -> None:
    arguments = [str(reported / "results.jsonl"), "--draws", "20", "--predict", "4e15", "--out", str(tmp_path)]
    assert report.main_report(arguments) == 0
    names = sorted(path.name for path in reported.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names and len(names) == 12
    for name in names:
        assert (tmp_path / name).read_bytes() == (reported / name).read_bytes(), name


def section(folder: Path, title: str) -> list[list[str]]:
    """Cells of the table under a title of report.md, without its head."""
    text = (folder / "report.md").read_text().partition(f"## {title}")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_a_prediction_has_size_tokens_steps_and_loss_and_says_how_far_it_extrapolates(reported: Path) -> None:
    rows = {row[0]: row for row in section(reported, "Prediction")}
    family, bound, size, tokens, steps, loss, by, beyond = rows["arm"]
    assert (family, bound, by) == ("arm", "nll_ar", "surface")
    assert beyond.startswith("extrapolated: 2 times the largest budget")
    n, d = (float(cell.split(" [")[0]) for cell in (size, tokens))
    assert 6 * n * d * (1 + 2000 / n**0.6) == pytest.approx(4e15, rel=0.02)
    assert float(loss.split(" [")[0]) == pytest.approx(2 + 300 * n**-0.4 + 900 * d**-0.4, abs=0.002)
    # Of 100 steps each, the tokens of a step are the median of those of the sizes at the largest budget.
    assert int(steps.replace(",", "")) == pytest.approx(d / ((2e15 / 6 / 2e6 + 2e15 / 6 / 4e6) / 2 / 100), rel=0.01)
    assert all(mark in cell for cell in (size, tokens, loss) for mark in ("[", ", ", "]"))


def test_a_minimum_outside_the_measured_sizes_is_called_extrapolated_and_enters_no_law(tmp_path: Path) -> None:
    far = [r for r in whole_study() if r.point.family == "arm" and (r.point.budget < 2e15 or r.point.size != "xl")]
    found = laws.fit_law(far, "arm", "nll_ar", method="converged", draws=10, seed=0)
    assert [parabola.flaw for parabola in found.isoflop.parabolas] == [None, None, "extrapolated"]  # 4.6e6 > 4e6
    assert found.isoflop.loss is None and found.isoflop.parameters is None  # two sound minima are left
    assert report.main_report([str(write(far, tmp_path / "study")), "--draws", "10", "--out", str(tmp_path)]) == 0
    row = section(tmp_path, "Minima")[2]
    assert row[4:] == ["> 4e+06", "-", "-", "extrapolated"]
    assert section(tmp_path, "Laws of the minima")[0][4:] == ["-", "-", "-"]


def test_fit_writes_plain_json_of_every_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write(whole_study(), tmp_path)
    arguments = ["--draws", "10", "--bound", "nelbo_token", "--bound", "nll_chain", "--flops-rule", "six_nd"]
    assert report.main_fit([str(study), *arguments]) == 0
    found = json.loads((study / "fit.json").read_text())["laws"]
    assert [(law["family"], law["bound"]) for law in found] == [
        ("few", "nelbo_token"),
        ("prime", "nelbo_token"),
        ("prime", "nll_chain"),
    ]
    assert found[0]["surface"] is None and found[0]["parabolas"] == []
    fit = found[1]["surface"]
    truth = [2.3, 300, 900, 0.4, 0.4]
    names = ("irreducible", "size_scale", "token_scale", "size_exponent", "token_exponent")
    assert [fit[name] for name in names] == pytest.approx(truth, rel=0.02) and fit["flaw"] is None
    assert [o["extrapolated"] for o in fit["optimum"]] == [False] * 3
    assert [6 * o["parameters"] * o["tokens"] for o in fit["optimum"]] == pytest.approx([4e14, 1e15, 2e15])
    assert "prime | nll_chain" in capsys.readouterr().out


def test_the_official_method_is_reported_as_not_converged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write([r for r in whole_study() if r.point.family == "arm"], tmp_path)
    assert report.main_fit([str(study), "--draws", "5", "--method", "official"]) == 0
    assert "not converged: 1 of 1 starts" in capsys.readouterr().out


def test_one_point_makes_a_report(tmp_path: Path) -> None:
    one = [result("few", "s", 4e14, valid=("nelbo_token",), joint=False)]
    arguments = ["--draws", "5", "--predict", "1e15"]
    assert report.main_report([str(write(one, tmp_path / "study")), *arguments, "--out", str(tmp_path)]) == 0
    assert "no ratio" in (tmp_path / "report.md").read_text()


def test_the_cost_rule_is_read_off_the_points() -> None:
    points = laws.gather(whole_study(), "arm", "nll_ar")
    cost = laws.fit_cost(points)
    assert cost(3e6) == pytest.approx(6 * (1 + 2000 / 3e6**0.6), rel=1e-6)
    plain = dataclasses.replace(points, flops=8 * points.parameters * points.tokens)
    assert laws.fit_cost(plain)(3e6) == pytest.approx(8)


def test_bounds_that_are_none_are_refused(tmp_path: Path) -> None:
    study = write(whole_study()[-1:], tmp_path)
    with pytest.raises(ConfigError, match="loss_ce_joint is not a likelihood"):
        report.main_fit([str(study), "--bound", "loss_ce_joint"])
    with pytest.raises(DataError, match="no result holds an estimate named nll_ar"):
        report.main_fit([str(study), "--bound", "nll_ar"])
    with pytest.raises(ConfigError, match="--reference mdm has no result; families of the study: few"):
        report.main_report([str(study), "--draws", "5", "--reference", "mdm"])


def test_a_damaged_line_of_a_results_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    good = json.dumps(configs.to_dict(whole_study()[0]))
    path.write_text(f"{good}\n{good.replace('nll_ar', 'ppl')}\n")
    with pytest.raises(DataError, match=r"results.jsonl, line 2 is not a result: .*ppl is not a likelihood"):
        report.read(path)
    path.write_text(good + "\n")
    assert report.read(path) == whole_study()[:1] == read_results(write(whole_study()[:1], tmp_path / "study"))

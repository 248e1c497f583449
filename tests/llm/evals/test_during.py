"""Tasks while a model trains: on their steps, at any number of processes, without a trace in the training."""

from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.metrics import read_metrics
from llm.evals.during import figures_of
from tests.runs import Tiny, train

TASKS = ("evaluation.tasks=[heldout]", "evaluation.task_limit=3", "evaluation.task_draws=4")


def rows(run: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in read_metrics(run / "metrics.jsonl") if key in row}


def test_tasks_are_scored_on_their_steps_and_change_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    often = ("train.evaluate_every=2", "evaluation.tasks_every=4")
    plain = train(tiny.mdm, 1, tmp_path / "plain", "train.evaluate_every=2")
    alone = train(tiny.mdm, 1, tmp_path / "alone", *often, *TASKS)
    pair = train(tiny.mdm, 2, tmp_path / "pair", *often, *TASKS)
    key = "val/task/heldout/bits_per_byte"
    assert list(rows(alone, key)) == [4, 6]  # the last evaluation always has them
    assert rows(pair, key) == pytest.approx(rows(alone, key), rel=1e-4)
    assert rows(alone, f"{key}_se")[6] > 0
    assert rows(alone, "loss") == rows(plain, "loss")
    assert rows(alone, "val/nelbo_token") == rows(plain, "val/nelbo_token")


def test_a_misspelt_task_ends_the_run_before_it_begins(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    from launch import config as configs
    from llm.config import LanguageConfig
    from llm.task import LanguageTask

    config, _ = configs.load(LanguageConfig, tiny.ar, ["evaluation.tasks=[heldouts]"])
    with pytest.raises(ConfigError, match="did you mean heldout"):
        LanguageTask(config, torch.device("cpu"))


def test_metrics_are_named_by_task_and_metric() -> None:
    results = {"piqa": {"name": "piqa", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1_stderr,x": "N/A"}}
    assert figures_of(results) == {"task/piqa/acc": 0.5, "task/piqa/acc_se": 0.1}

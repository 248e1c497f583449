"""Tasks of the harness on one model, over all ranks: the same figures at every number of processes.

Each rank asks the harness for every world_size-th document as if it were alone, and the samples are then put together
by document and added up by the task's own metrics. So no collective hides inside the harness: a rank without a document
has nothing to do, and one that fails takes the others along in an orderly way.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.metrics import bits_per_byte, mean, mean_stderr, perplexity, weighted_perplexity
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from launch.runtime import Runtime
from llm.evals.generation import GenerationConfig
from llm.evals.harness import HarnessModel
from llm.evals.models import Scorable
from llm.evals.scoring import ScoringConfig
from llm.evals.tasks import Selection

_FEWSHOT_SEED = 1234  # the harness's default
Samples = dict[str, list[dict[str, Any]]]
"""Of each task its documents in their order: doc_id, doc, arguments, responses, and the values of its metrics."""


@contextmanager
def untouched_random_states() -> Iterator[None]:
    """The harness and its metrics draw from the global generators; give them back as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def harness_model(
    scorable: Scorable,
    scoring: ScoringConfig,
    runtime: Runtime | None = None,
    cache: Path | None = None,
    generation: GenerationConfig | None = None,
) -> Any:
    """A `HarnessModel`; Any, because the decorator that registers it hides its type."""
    return HarnessModel(scorable, scoring, generation, runtime, cache)  # type: ignore[call-arg]


@untouched_random_states()
def run_tasks(model: Any, selection: Selection, runtime: Runtime, *, limit: int | None = None) -> dict[str, Any]:
    """Collective. Results of every task and group in the harness's layout, with `samples`; the same on every rank.

    limit: documents of each task, the first ones. Random states of python, numpy and torch are as before afterwards.
    """
    begin = time.time()
    parts = runtime.gather(runtime.together(lambda: _evaluate_share(model, selection.tasks, runtime, limit)))
    model.barrier()  # adds up what the ranks have counted
    samples: Samples = {
        name: sorted((s for part in parts for s in part.get(name, [])), key=lambda s: (s["doc_id"], s["filter"]))
        for name in selection.tasks
    }
    metrics = {name: aggregate(task, samples[name]) for name, task in selection.tasks.items()}
    groups = group_metrics(selection, metrics)
    everything = dict(sorted(selection.tasks.items()))
    return {
        "results": metrics | groups,
        "groups": groups,
        "group_subtasks": {name: group.child_names for name, group in selection.groups.items()},
        "configs": {name: dict(task.dump_config()) for name, task in everything.items()},
        "versions": {name: task.VERSION for name, task in everything.items()}
        | {name: group.version for name, group in selection.groups.items()},
        "n-shot": {name: task.get_config("num_fewshot") for name, task in everything.items()},
        "higher_is_better": {name: task.higher_is_better() for name, task in everything.items()},
        "n-samples": {
            name: {"original": len(task.eval_docs), "effective": metrics[name]["sample_len"]}
            for name, task in everything.items()
        },
        "config": {"model": "unmask", "limit": limit, "fewshot_seed": _FEWSHOT_SEED, **model.get_model_info()},
        "date": begin,
        "total_evaluation_time_seconds": str(time.time() - begin),
        "samples": samples,
    }


class _Alone(LM):
    """A rank's model as the harness sees it: the only one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def loglikelihood(self, requests: Any) -> Any:
        return self._model.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: Any) -> Any:
        return self._model.loglikelihood_rolling(requests)

    def generate_until(self, requests: Any) -> Any:
        return self._model.generate_until(requests)


def _evaluate_share(model: Any, tasks: Mapping[str, Task], runtime: Runtime, limit: int | None) -> Samples:
    """This rank's documents of each task. No collectives: ranks may have none, or need more time than others."""
    numbers = {}
    for name, task in tasks.items():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
        if mine := list(range(len(task.eval_docs))[:limit][runtime.rank :: runtime.world_size]):
            numbers[name] = mine
    if not numbers:
        return {}
    chosen: Any = {"tasks": {name: tasks[name] for name in numbers}}
    found: Any = evaluate(lm=_Alone(model), task_dict=chosen, samples=numbers, bootstrap_iters=0)
    return found["samples"]


# --- from documents to figures ---------------------------------------------------------------------------------------


def aggregate(task: Task, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The task's metrics over its documents under the harness's keys, "acc,none" and "acc_stderr,none"."""
    name, aggregations = task.task_name, cast(dict[str, Any], task.aggregation())
    found: dict[str, Any] = {
        "name": name,
        "alias": task.get_config("task_alias") or name,
        "sample_len": len({sample["doc_id"] for sample in samples}),
    }
    for key in sorted({sample["filter"] for sample in samples}):
        filtered = [sample for sample in samples if sample["filter"] == key]
        for metric in filtered[0]["metrics"]:
            values = [sample[metric] for sample in filtered]
            function = aggregations[metric]
            found[f"{metric},{key}"] = function(values)
            error = standard_error(function, values)
            found[f"{metric}_stderr,{key}"] = "N/A" if error is None else error
    return found


def group_metrics(selection: Selection, metrics: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The groups' figures from their tasks', as the harness weights them."""
    return {name: dict(group.aggregate(dict(metrics))) for name, group in selection.groups.items()}  # type: ignore[arg-type]


def standard_error(function: Callable[..., float], values: Sequence[Any]) -> float | None:
    """Over documents, of one of the harness's aggregations: exact for means, to first order for perplexities.

    None where there is none, as for a single document.
    """
    if len(values) < 2:
        return None
    if function is mean:
        return float(mean_stderr(values))
    if function is perplexity:  # exp of minus the mean
        return float(perplexity(values) * mean_stderr(values))
    if function in (weighted_perplexity, bits_per_byte):  # of sum of log-likelihoods over sum of words or bytes
        nats, weights = np.array(values, dtype=float).T
        residuals = nats - nats.sum() / weights.sum() * weights
        error = math.sqrt(len(values) / (len(values) - 1) * (residuals**2).sum()) / weights.sum()
        return float(weighted_perplexity(values) * error if function is weighted_perplexity else error / math.log(2))
    return None

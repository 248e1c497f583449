"""Tasks over ranks: the same figures at every number of processes, and orderly ends."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.group import Group
from lm_eval.api.metrics import bits_per_byte, bootstrap_stderr, mean, perplexity, weighted_perplexity
from lm_eval.config.group import AggMetricConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from launch import runtime as runtimes
from llm.evals.run import aggregate, harness_model, run_tasks, standard_error
from llm.evals.scoring import ScoringConfig
from tests.llm.evals import oracles
from tests.llm.evals.questions import Guesser, choice_task, last_word_task, rolling_task, selection
from tests.processes import spawn

DRAWS = 4


def evaluate(family: str, limit: int | None = None, cache: Path | None = None) -> dict[str, Any]:
    runtime = runtimes.start(device="cpu")
    scorable = oracles.tiny(family)  # type: ignore[arg-type]
    model = harness_model(scorable, ScoringConfig(draws=DRAWS), runtime, cache)
    tasks = choice_task("animals", 7), last_word_task("word", 5), rolling_task("texts", 3)
    results = run_tasks(model, selection(*tasks), runtime, limit=limit)
    runtime.close()
    return results


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Any]]:
    return {family: spawn(evaluate, 1, family, group=False)[0] for family in ("ar", "prime")}


@pytest.mark.parametrize(("family", "world"), [("ar", 2), ("prime", 3)])
def test_the_number_of_processes_changes_no_figure_and_no_sample(
    reference: dict[str, dict[str, Any]], family: str, world: int
) -> None:
    for results in spawn(evaluate, world, family, group=False):
        assert results["samples"].keys() == reference[family]["samples"].keys()
        for task, samples in reference[family]["samples"].items():
            assert [s["doc_id"] for s in results["samples"][task]] == list(range(len(samples)))
            for mine, theirs in zip(results["samples"][task], samples, strict=True):
                assert mine["doc_hash"] == theirs["doc_hash"]
        for task, metrics in reference[family]["results"].items():
            for key, value in metrics.items():
                assert results["results"][task][key] == (
                    pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                ), (task, key)
        assert results["n-samples"] == reference[family]["n-samples"]
        assert results["config"]["requests"] == reference[family]["config"]["requests"]


def test_one_process_gives_what_the_harness_gives_by_itself(reference: dict[str, dict[str, Any]]) -> None:
    model = harness_model(oracles.tiny("ar"), ScoringConfig())
    tasks = [choice_task("animals", 7), last_word_task("word", 5), rolling_task("texts", 3)]
    manager = TaskManager(include_defaults=False)  # its own definitions are 14,000 files
    theirs: Any = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    for task, metrics in theirs["results"].items():
        for key, value in metrics.items():
            if "stderr" not in key:
                assert reference["ar"]["results"][task][key] == (
                    pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
                ), (task, key)
    for key in ("versions", "n-shot", "higher_is_better", "n-samples"):
        assert reference["ar"][key] == theirs[key], key


def test_fewer_documents_than_processes_leave_some_without_work() -> None:
    first, second, third = spawn(evaluate, 3, "ar", 2, group=False)
    assert first["n-samples"]["animals"] == {"original": 7, "effective": 2}
    assert first["results"] == second["results"] == third["results"]


def fail_on_the_last_rank() -> None:
    runtime = runtimes.start(device="cpu")

    class Broken(Guesser):
        def loglikelihood(self, requests: Any) -> Any:
            if runtime.rank == 1:
                raise FloatingPointError("the logits are not finite")
            return super().loglikelihood(requests)

    try:
        run_tasks(Broken(), selection(choice_task("animals", 4)), runtime)
    except Exception as error:
        assert "the logits are not finite" in str(error)
        runtime.barrier()  # all of them are here
        runtime.close()
        return
    raise AssertionError("rank went on without the one that failed")


def test_a_rank_that_fails_is_an_error_of_all_ranks() -> None:
    assert spawn(fail_on_the_last_rank, 2, group=False) == [None, None]


def test_the_global_generators_are_as_before(cpu_runtime: Any) -> None:
    class Drawing(Guesser):
        def loglikelihood(self, requests: Any) -> Any:
            random.random(), np.random.default_rng(), torch.manual_seed(3)
            np.random.set_state(np.random.RandomState(5).get_state())
            return super().loglikelihood(requests)

    tasks = selection(choice_task("animals", 4))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state().clone()  # type: ignore[union-attr]
    run_tasks(Drawing(), tasks, cpu_runtime)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert (torch.get_rng_state() == before[2]).all()


def test_a_cache_serves_another_number_of_processes(tmp_path: Path) -> None:
    (first,) = spawn(evaluate, 1, "mdm", None, tmp_path, group=False)
    again = spawn(evaluate, 2, "mdm", None, tmp_path, group=False)[0]
    assert first["config"]["cached_scores"] == 0
    assert again["config"]["cached_scores"] == again["config"]["requests"] + again["config"]["rolling_requests"]
    assert again["results"] == first["results"]


def test_groups_weigh_their_tasks_by_documents(cpu_runtime: Any) -> None:
    tasks = choice_task("many", 9), choice_task("few", 2)
    group = Group("both", aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
    for task in tasks:
        group.add(task)
    results = run_tasks(Guesser(), selection(*tasks, groups={"both": group}), cpu_runtime)
    right = sum(s["acc"] for task in ("many", "few") for s in results["samples"][task])
    assert results["groups"]["both"]["acc,none"] == pytest.approx(right / 11)
    assert results["group_subtasks"] == {"both": ["many", "few"]}


def test_results_are_json(cpu_runtime: Any) -> None:
    results = run_tasks(Guesser(), selection(choice_task("animals", 3), rolling_task("texts", 2)), cpu_runtime)
    again = json.loads(json.dumps(results))
    assert {"results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= set(
        again
    )
    assert again["results"]["texts"]["word_perplexity_stderr,none"] > 0


# --- errors over documents -------------------------------------------------------------------------------------------


def test_the_error_of_a_mean_and_of_a_perplexity_agree_with_the_bootstrap() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).sub(2.0).tolist()
    for function in (mean, perplexity):
        assert standard_error(function, values) == pytest.approx(bootstrap_stderr(function, values, 1000), rel=0.1)


def test_the_error_of_a_weighted_perplexity_agrees_with_resampling() -> None:
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(5, 50, (200,), generator=draw)
    nats = -words * (2.0 + 0.3 * torch.randn(200, generator=draw))
    pairs = list(zip(nats.tolist(), words.tolist(), strict=True))
    picks = torch.randint(0, 200, (1000, 200), generator=draw).tolist()
    for function in (weighted_perplexity, bits_per_byte):
        resampled = torch.tensor([function([pairs[i] for i in pick]) for pick in picks])
        assert standard_error(function, pairs) == pytest.approx(resampled.std().item(), rel=0.1)


def test_equal_documents_have_no_error_and_one_document_none_that_is_known() -> None:
    assert standard_error(mean, [1.0]) is None
    assert standard_error(weighted_perplexity, [(-2.0, 2), (-4.0, 4)]) == pytest.approx(0.0)
    task = choice_task("one", 1)
    sample = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}
    assert aggregate(task, [sample])["acc_stderr,none"] == "N/A"
    assert math.isclose(aggregate(task, [sample])["acc,none"], 1.0)

"""`unmask eval RUN ... --tasks NAMES`: public tasks on runs, exported folders and Hugging Face models alike."""

import argparse
import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task
from lm_eval.utils import simple_parse_args_string

from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.data.packages import MODELS
from llm.evals.baselines import Unigram, chance_metrics, unigram_metrics, unigram_of_dataset, unigram_of_prose
from llm.evals.generation import GenerationConfig, read_generation
from llm.evals.models import Scorable, is_fetched, open_scorable
from llm.evals.report import SCHEMA, format_comparison, format_table, write_results
from llm.evals.run import harness_model, run_tasks
from llm.evals.scoring import Request, ScoringConfig, score
from llm.evals.tasks import HELDOUT, Selection, select
from llm.pretrained import read_config

_SCORING = ("estimator", "draws", "guidance", "temperature", "seed", "batch_tokens", "max_length")  # flags
_TIMED_DOCUMENTS = 4  # of each task, that --dry-run scores


def evaluate_models(options: argparse.Namespace, runtime: Runtime) -> None:
    """Collective. Score every model on every task, write the results, print the table."""
    datasets.disable_progress_bars()  # of columns and maps; that of the scores is the one to watch
    given = {name: value for name in _SCORING if (value := getattr(options, name)) is not None}
    scoring = ScoringConfig(**given)
    scoring.check("--estimator, --draws, ...")
    generation = read_generation(simple_parse_args_string(options.generation), source="--generation")
    names = [name for name in options.tasks.split(",") if name]
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit {options.limit}; the smallest is 1 document a task")
    selections: dict[Path | None, Selection] = {}
    everything = []
    for run in options.runs:
        data = data_of(run, options.data)
        key = data if HELDOUT in names else None
        if key not in selections:
            selections[key] = runtime.together(lambda k=key: select(names, hub=options.data == "hub", heldout=k))
        selection = selections[key]
        scorable = runtime.together(lambda r=run: open_scorable(r, runtime.device))
        if options.dry_run:
            words = runtime.decide(
                partial(
                    forecast,
                    scorable,
                    scoring,
                    generation,
                    selection,
                    limit=options.limit,
                    processes=runtime.world_size,
                )
            )
            if runtime.is_main:
                print(words)
            continue
        folder = output_folder(run, options.output)
        model = harness_model(scorable, scoring, runtime, folder / "scores", generation)
        results = run_tasks(model, selection, runtime, limit=options.limit)
        path = runtime.decide(partial(record, run, model, selection, results, data, folder))
        if runtime.is_main:
            print(f"{run}: {path}", flush=True)
            everything.append(results)
    if everything:
        print(f"\n{format_table(everything)}")
        for other in everything[1:]:
            print(f"\n{format_comparison(everything[0], other)}")


def record(
    run: str, model: Any, selection: Selection, results: dict[str, Any], data: Path | None, folder: Path
) -> Path:
    """Complete the results of one model, and write them."""
    results["unmask"] = particulars(run, model, selection, results, data)
    of_generation = {f"generation.{name}": value for name, value in dataclasses.asdict(model.generation).items()}
    results["config"]["model_args"] = {"path": str(run), **dataclasses.asdict(model.scoring), **of_generation}
    return write_results(folder, results)


def data_of(run: str, given: str | None) -> Path | None:
    """The prepared data set of a run: --data DIR, or the first that it trained on; None for models that have none."""
    if given not in (None, "hub"):
        return Path(given)
    is_ours = (Path(run) / "config.yaml").exists() or "unmask_config" in _text(Path(run) / "config.json")
    return Path(read_config(Path(run)).data.sources[0].path) if is_ours else None


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def output_folder(run: str, given: str | None) -> Path:
    """DIR/NAME of --output DIR; else RUN/tasks, or evaluations/NAME for a model that is no folder here."""
    name = Path(run).resolve().name if Path(run).exists() else run.replace("/", "__")
    if given is not None:
        return Path(given) / name
    return Path(run) / "tasks" if Path(run).is_dir() else Path("evaluations") / name


def particulars(
    run: str, model: Any, selection: Selection, results: Mapping[str, Any], data: Path | None
) -> dict[str, Any]:
    """What the harness's layout has no place for; rank 0."""
    unigram = _unigram(model, data)
    return {
        "schema": SCHEMA,
        "name": MODELS[run].title if is_fetched(run) else Path(run).name,
        "scoring": model.get_model_info()["scoring"],
        "likelihoods_are": "exact" if model.scorable.is_causal else "bounds, or chains where the estimator says so",
        "chance": chance_metrics(selection, results["samples"]),
        "unigram": {
            "source": unigram.source if unigram else "nothing: fetch prose-21 for a unigram baseline",
            "results": unigram_metrics(unigram, model.encoder, selection, results["samples"]) if unigram else {},
        },
        "suites": {
            name: {"tasks": suite.tasks, "missing": selection.missing[name]} for name, suite in selection.suites.items()
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("lm_eval", "datasets", "torch", "transformers", "unmask")
        },
    }


def _unigram(model: Any, data: Path | None) -> Unigram | None:
    if data is not None and (data / "manifest.json").exists():
        return unigram_of_dataset(data)
    return unigram_of_prose(model.scorable.tokenizer)


# --- before the work -------------------------------------------------------------------------------------------------


def forecast(
    scorable: Scorable,
    scoring: ScoringConfig,
    generation: GenerationConfig,
    selection: Selection,
    *,
    limit: int | None,
    processes: int,
) -> str:
    """Documents, requests, inputs and time of each task, from scoring its first documents. One process."""
    model = harness_model(scorable, scoring, generation=generation)
    lines = ["| task | documents | requests | inputs | time |", "|---|---|---|---|---|"]
    total = 0.0
    for name, task in selection.tasks.items():
        documents = len(range(len(task.eval_docs))[:limit])
        requests, rows, seconds = _measure(model, task, min(documents, _TIMED_DOCUMENTS))
        factor = documents / min(documents, _TIMED_DOCUMENTS)
        total += seconds * factor / processes
        numbers = [f"{requests * factor:,.0f}", f"{rows * factor:,.0f}", _clock(seconds * factor / processes)]
        lines.append(f"| {name} | {documents:,} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "", f"about {_clock(total)} in {processes} processes like this one, from a sample"])


def _measure(model: Any, task: Task, documents: int) -> tuple[int, int, float]:
    """(requests, inputs, seconds) of a task's first documents."""
    task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    task.build_all_requests(samples=list(range(documents)), rank=0, world_size=1)
    if task.OUTPUT_TYPE == "generate_until":
        begin = time.monotonic()
        model.generate_until(task.instances)
        return len(task.instances), 0, time.monotonic() - begin
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        texts = model.encoder.texts([str(instance.args[0]) for instance in task.instances], special=False)
        encoded = [([model.prefix_token_id], ids) for ids in texts]
    else:
        encoded, _ = model.encoder.pairs([instance.args for instance in task.instances])  # type: ignore[misc]
    requests = [Request(context=tuple(c), continuation=tuple(t), group=str(c[-16:])) for c, t in encoded]
    begin = time.monotonic()
    scores = score(model.scorable, requests, model.scoring)
    return len(requests), sum(s.rows for s in scores), time.monotonic() - begin


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"

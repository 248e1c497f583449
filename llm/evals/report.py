"""Results of tasks as files and tables, and the comparison of two models document by document.

    FOLDER/results_TIME.json            the harness's layout, and what is ours under "unmask"
    FOLDER/samples_TASK_TIME.jsonl      a document a line, in the order of doc_id

A score stands beside the chance level and the unigram baseline, always.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list
from torch import Tensor

from launch.random import stream_key, uniform
from llm.evals.run import Samples

SCHEMA = 1  # of what stands under "unmask"
Results = Mapping[str, Any]


def write_results(folder: Path, results: Results) -> Path:
    """Write the results of one model, samples in files of their own; returns the path of results_TIME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    moment = datetime.now().isoformat().replace(":", "-")
    samples: Samples = results["samples"]
    for task, documents in samples.items():
        with (folder / f"samples_{task}_{moment}.jsonl").open("w", encoding="utf-8") as file:
            for sample in documents:
                file.write(json.dumps(_as_harness_writes(sample), default=handle_non_serializable) + "\n")
    hashes = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in documents))
        for task, documents in samples.items()
    }
    everything = {key: value for key, value in results.items() if key != "samples"} | {"task_hashes": hashes}
    path = folder / f"results_{moment}.json"
    path.write_text(json.dumps(everything, indent=2, default=handle_non_serializable, ensure_ascii=False))
    return path


def newest_results(folder: Path) -> dict[str, Any]:
    """What `write_results` wrote last, without the samples."""
    return json.loads(max(folder.glob("results_*.json")).read_text(encoding="utf-8"))


def _as_harness_writes(sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
        for i, values in enumerate(sample["arguments"])
    }
    as_text = {key: sanitize_list(sample[key]) for key in ("resps", "filtered_resps")}  # one type a column
    return {**sample, **as_text, "arguments": arguments, "target": str(sample["target"])}


# --- the table -------------------------------------------------------------------------------------------------------


def format_table(models: Sequence[Results]) -> str:
    """Markdown: a line a task and metric, a column a model, chance and unigram baselines beside them.

    Tasks of a group (the subjects of MMLU) are in the files only. Models of one tokenizer and training set share a
    unigram column.
    """
    first = models[0]
    sources = list(dict.fromkeys(_source(results) for results in models))
    names = [str(results["unmask"]["name"]) for results in models]
    unigrams = ["unigram"] if len(sources) == 1 else [f"unigram {i + 1}" for i in range(len(sources))]
    header = ["task", "metric", "documents", "chance", *unigrams, *names]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    members = {task for group in first["group_subtasks"].values() for task in group}
    inside = {task for task in members if task not in first["group_subtasks"]}
    for task, metrics in first["results"].items():
        if task in inside:
            continue
        for key in _metric_keys(metrics):
            lines.append(_line(models, sources, task, key))
    for suite, stated in first["unmask"]["suites"].items():
        lines.append(_suite_line(models, sources, suite, stated))
    counts = [results["unmask"]["scoring"] for results in models]
    notes = [
        f"Standard errors over documents in brackets. {name}: {c['estimator']}, {c.get('draws', 1)} draws, "
        f"{results['config']['truncations']} contexts cut, {results['config']['boundary_events']} boundary events."
        for name, c, results in zip(names, counts, models, strict=True)
    ]
    notes += [f"{column}: token frequencies of {source}." for column, source in zip(unigrams, sources, strict=True)]
    for suite, stated in first["unmask"]["suites"].items():
        if stated["missing"]:
            notes.append(f"{suite} lacks {', '.join(stated['missing'])}, which need --data hub.")
    return "\n".join([*lines, "", *notes])


def _source(results: Results) -> str:
    return results["unmask"]["unigram"]["source"]


def _metric_keys(metrics: Mapping[str, Any]) -> list[str]:
    return [key for key in metrics if "," in key and not key.partition(",")[0].endswith("_stderr")]


def _line(models: Sequence[Results], sources: Sequence[str], task: str, key: str) -> str:
    def cell(metrics: Mapping[str, Any] | None, *, error: bool = False) -> str:
        value = (metrics or {}).get(key)
        if not isinstance(value, int | float):
            return "-"
        deviation = (metrics or {}).get(key.replace(",", "_stderr,"))
        return _number(value) + (f" ({_number(deviation)})" if error and isinstance(deviation, float) else "")

    first = models[0]
    metric, _, filter_name = key.partition(",")
    baselines = [
        cell(next(r for r in models if _source(r) == source)["unmask"]["unigram"]["results"].get(task))
        for source in sources
    ]
    cells = [
        str(first["results"][task].get("alias", task)).strip(" -"),
        metric if filter_name == "none" else key,
        str(first["results"][task]["sample_len"]),
        cell(first["unmask"]["chance"].get(task)),
        *baselines,
        *(cell(results["results"].get(task), error=True) for results in models),
    ]
    return f"| {' | '.join(cells)} |"


def _suite_line(models: Sequence[Results], sources: Sequence[str], suite: str, stated: Mapping[str, Any]) -> str:
    present = [task for task in stated["tasks"] if task not in stated["missing"]]
    label = suite if not stated["missing"] else f"{suite} ({len(present)} of {len(stated['tasks'])})"
    unigrams = [
        suite_mean(next(r for r in models if _source(r) == source)["unmask"]["unigram"]["results"], present)
        for source in sources
    ]
    scores = [suite_mean(results["results"], present) for results in models]
    chance = suite_mean(models[0]["unmask"]["chance"], present)
    documents = sum(models[0]["results"][task]["sample_len"] for task in present)
    cells = [
        label,
        "mean acc",
        str(documents),
        _number(chance[0]) if chance else "-",
        *(_number(found[0]) if found else "-" for found in unigrams),
        *(f"{_number(found[0])} ({_number(found[1])})" if found else "-" for found in scores),
    ]
    return f"| {' | '.join(cells)} |"


def suite_mean(metrics: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> tuple[float, float] | None:
    """The plain mean of the tasks' acc and its standard error; None unless all of them have one."""
    if not all("acc,none" in metrics.get(task, {}) for task in tasks):
        return None
    errors = [metrics[task].get("acc_stderr,none") for task in tasks]
    spread = math.sqrt(sum(e**2 for e in errors if isinstance(e, float))) / len(tasks)
    return sum(metrics[task]["acc,none"] for task in tasks) / len(tasks), spread


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


# --- two models on the same documents --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two models on the same documents; the difference is second minus first."""

    documents: int
    first: float
    second: float
    difference: float
    low: float  # of the 95% interval of the difference, by bootstrap over documents
    high: float
    only_first: int  # documents that the first alone has right
    only_second: int
    p_value: float  # McNemar's exact test, two-sided: that chance alone makes them differ so


def compare(first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Paired:
    """Of values of the same documents in the same order, 1 where a model is right and 0 where it is wrong."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    count, difference = len(a), b - a
    draws = torch.arange(resamples)
    means = torch.cat([difference[_resample(chunk, count, seed)].mean(1) for chunk in draws.split(100)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    only_first, only_second = int(((a > 0.5) & (b < 0.5)).sum()), int(((b > 0.5) & (a < 0.5)).sum())
    return Paired(
        documents=count,
        first=a.mean().item(),
        second=b.mean().item(),
        difference=difference.mean().item(),
        low=low,
        high=high,
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def _resample(draws: Tensor, count: int, seed: int) -> Tensor:
    """int64 [draws, count]: documents drawn with replacement."""
    return (uniform(stream_key(seed, "bootstrap"), draws, count, dtype=torch.float64) * count).long()


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value: the discordant documents fall to either side like fair coins (McNemar 1947)."""
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**discordant)


def compare_models(first: Samples, second: Samples, metric: str = "acc") -> dict[str, Paired]:
    """Per task, over the documents that both have (told apart by what they say, not by their number)."""
    found = {}
    for task in first:
        theirs = {(s["doc_hash"], s["filter"]): s for s in second.get(task, [])}
        pairs = [(s, theirs[key]) for s in first[task] if (key := (s["doc_hash"], s["filter"])) in theirs]
        pairs = [(a, b) for a, b in pairs if metric in a and metric in b]
        if pairs:
            found[task] = compare([a[metric] for a, _ in pairs], [b[metric] for _, b in pairs])
    return found


def format_comparison(first: Results, second: Results) -> str:
    """Markdown: how the second model differs from the first, task by task."""
    one, other = first["unmask"]["name"], second["unmask"]["name"]
    lines = [
        f"| {other} minus {one} | documents | difference of acc | 95% | only {one} right | only {other} right "
        "| p (McNemar) |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, pair in compare_models(first["samples"], second["samples"]).items():
        lines.append(
            f"| {task} | {pair.documents} | {pair.difference:+.3f} | {pair.low:+.3f} to {pair.high:+.3f} "
            f"| {pair.only_first} | {pair.only_second} | {pair.p_value:.3g} |"
        )
    return "\n".join(lines)

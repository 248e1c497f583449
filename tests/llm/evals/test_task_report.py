"""Files in the harness's layout, a table with baselines beside every score, and two models document by document."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.evals.baselines import Unigram, chance_metrics, num_options, unigram_metrics, unigram_of_dataset
from llm.evals.encoding import Encoder
from llm.evals.report import (
    compare,
    compare_models,
    format_comparison,
    format_table,
    mcnemar,
    newest_results,
    suite_mean,
    write_results,
)
from llm.evals.run import run_tasks
from llm.evals.tasks import Suite
from tests.llm.evals import oracles
from tests.llm.evals.questions import Guesser, choice_task, last_word_task, rolling_task, selection
from tests.runs import Tiny


def uniform_unigram(vocab_size: int) -> Unigram:
    return Unigram(log_probs=np.full(vocab_size, -math.log(vocab_size)), source="nothing")


def results_of(name: str, runtime: Any) -> dict[str, Any]:
    tasks = choice_task("animals", 6), last_word_task("word", 3), rolling_task("texts", 2)
    suites, missing = {"pair": Suite(tasks=("animals", "far"), about="")}, {"pair": ("far",)}
    chosen = selection(*tasks, suites=suites, missing=missing)
    results = run_tasks(Guesser(), chosen, runtime)
    tokens = oracles.tokenizer()
    encoder = Encoder(tokenizer=tokens, prefix=tokens.eos_id, add_bos=False)
    results["unmask"] = {
        "schema": 1,
        "name": name,
        "scoring": {"estimator": "guess"},
        "chance": chance_metrics(chosen, results["samples"]),
        "unigram": {
            "source": "nothing",
            "results": unigram_metrics(uniform_unigram(tokens.vocab_size), encoder, chosen, results["samples"]),
        },
        "suites": {"pair": {"tasks": ["animals", "far"], "missing": ["far"]}},
    }
    return results


def test_files_are_in_the_layout_of_the_harness(tmp_path: Path, cpu_runtime: Any) -> None:
    results = results_of("a", cpu_runtime)
    path = write_results(tmp_path, results)
    assert path.name.startswith("results_") and newest_results(tmp_path)["unmask"]["name"] == "a"
    saved = json.loads(path.read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "task_hashes", "config", "date"} <= set(saved)
    assert "samples" not in saved and set(saved["task_hashes"]) == {"animals", "word", "texts"}
    (samples,) = tmp_path.glob("samples_animals_*.jsonl")
    assert samples.name == path.name.replace("results_", "samples_animals_").replace(".json", ".jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(6))
    question, option = lines[0]["arguments"]["gen_args_1"].values()
    assert (question, option) == ("question 0 of animals: on the mat", " the dog lay")
    assert {"doc", "target", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash", "acc"} <= set(
        lines[0]
    )


def test_chance_and_unigram_stand_beside_every_score(cpu_runtime: Any) -> None:
    table = format_table([results_of("a", cpu_runtime), results_of("b", cpu_runtime)])
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert lines[0] == ["| task", "metric", "documents", "chance", "unigram", "a", "b |"]
    chance = (1 / 2 + 1 / 3 + 1 / 4) / 3  # options go 2, 3, 4, 2, 3, 4
    animals = next(line for line in lines if line[0] == "| animals" and line[1] == "acc")
    assert animals[2:4] == ["6", f"{chance:.3f}"] and "(" in animals[5]
    words = next(line for line in lines if line[1] == "word_perplexity")
    assert words[3] == "-" and words[4] != "-"
    suite = next(line for line in lines if line[1] == "mean acc")
    assert suite[0] == "| pair (1 of 2)" and "pair lacks far, which need --data hub" in table


def test_options_are_those_with_a_context() -> None:
    conditional = [("q", " a"), ("q", " b"), ("q", " c")]
    assert num_options({"arguments": conditional}) == 3
    assert num_options({"arguments": [*conditional, ("", " a"), ("", " b"), ("", " c")]}) == 3  # acc_mutual_info
    assert num_options({"arguments": [("He a", " x"), ("He b", " x")]}) == 2  # winogrande
    assert num_options({"arguments": [("", " a"), ("", " b")]}) == 2


def test_the_unigram_model_prefers_frequent_and_short_answers(cpu_runtime: Any, tiny: Tiny) -> None:
    tokens = oracles.tokenizer()
    encoder = Encoder(tokenizer=tokens, prefix=tokens.eos_id, add_bos=False)
    chosen = selection(choice_task("animals", 12), rolling_task("texts", 2))
    samples = run_tasks(Guesser(), chosen, cpu_runtime)["samples"]
    unigram = uniform_unigram(tokens.vocab_size)
    found = unigram_metrics(unigram, encoder, chosen, samples)
    for sample in samples["animals"]:
        lengths = [len(encoder.pairs([pair])[0][0][1]) for pair in sample["arguments"]]
        sample["expected"] = float(np.argmin(lengths) == sample["doc"]["gold"])
    assert found["animals"]["acc,none"] == pytest.approx(np.mean([s["expected"] for s in samples["animals"]]))
    text = samples["texts"][1]["doc"]["text"], samples["texts"][0]["doc"]["text"]
    ids, size = sum(len(encoder.texts([t], special=False)[0]) for t in text), sum(len(t) for t in text)
    assert found["texts"]["bits_per_byte,none"] == pytest.approx(ids * math.log2(tokens.vocab_size) / size)
    of_data = unigram_of_dataset(tiny.data)
    assert np.exp(of_data.log_probs).sum() == pytest.approx(1.0) and str(tiny.data) in of_data.source


# --- two models ------------------------------------------------------------------------------------------------------


def test_mcnemar_agrees_with_the_binomial_test() -> None:
    from scipy.stats import binomtest

    for only_first, only_second in ((0, 0), (3, 3), (1, 9), (40, 60), (300, 420)):
        total = only_first + only_second
        expected = binomtest(only_first, total).pvalue if total else 1.0
        assert mcnemar(only_first, only_second) == pytest.approx(expected)


def test_a_known_discordance_is_found() -> None:
    first = [1.0] * 60 + [0.0] * 30 + [1.0] * 10  # the second is right on 60 + 30
    second = [1.0] * 60 + [1.0] * 30 + [0.0] * 10
    pair = compare(first, second)
    assert (pair.documents, pair.first, pair.second) == (100, 0.7, 0.9)
    assert (pair.only_first, pair.only_second) == (10, 30)
    assert pair.difference == pytest.approx(0.2) and pair.p_value == pytest.approx(mcnemar(10, 30))
    error = math.sqrt((0.4 - 0.2**2) / 100)  # of a mean of 30 ones, 10 minus ones and 60 zeros
    assert pair.low == pytest.approx(0.2 - 1.96 * error, abs=0.015)
    assert pair.high == pytest.approx(0.2 + 1.96 * error, abs=0.015)
    assert compare(first, second) == pair  # seeded


def test_equal_models_do_not_differ() -> None:
    pair = compare([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (pair.difference, pair.low, pair.high, pair.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_models_are_compared_on_the_documents_that_both_have(cpu_runtime: Any) -> None:
    first, second = (run_tasks(Guesser(), selection(choice_task("a", n)), cpu_runtime, limit=n) for n in (8, 5))
    pair = compare_models(first["samples"], second["samples"])["a"]
    assert pair.documents == 5 and pair.difference == 0.0
    for results, name in ((first, "one"), (second, "other")):
        results["unmask"] = {"name": name}
    assert "| a | 5 | +0.000 |" in format_comparison(first, second)


def test_a_suite_without_all_its_scores_has_no_mean() -> None:
    metrics = {"a": {"acc,none": 0.5, "acc_stderr,none": 0.03}, "b": {"acc,none": 0.7, "acc_stderr,none": 0.04}}
    assert suite_mean(metrics, ["a", "b"]) == (pytest.approx(0.6), pytest.approx(0.025))
    assert suite_mean(metrics, ["a", "c"]) is None

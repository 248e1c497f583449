"""What a judge found in the samples of a run, as files and as a table, beside the same of real text.

RUN/samples/judged_TIME.jsonl    a sample a line: its text, its tokens and nats under the judge, its entropy
RUN/samples/judged_TIME.json     the metrics, and everything that they are to be quoted with
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.metrics import check_name
from llm.evals import text_metrics
from llm.evals.judge import Judge, Judged, features, judge_texts

SCHEMA = 1
_COUNTS = ("texts", "tokens")
_WITHOUT_LINE = (*_COUNTS, "generative_ppl", "unigram_entropy")  # of their own: they are the first line, together


def judge_samples(
    judge: Judge, samples: Sequence[str], reference: tuple[Sequence[str], Sequence[str]] | None, *, seed: int
) -> tuple[Judged, dict[str, Any]]:
    """(the samples under the judge, the metrics of samples and reference).

    reference: real texts, and others like them: what the one half scores against the other is the most that samples
    can hope for at this number of texts. seed: of MAUVE's clusters.
    """
    judged = judge_texts(judge, samples)
    found: dict[str, Any] = {"judge": judge.describe(), "samples": judged.figures(), "reference": None, "notes": []}
    if reference is None:
        return judged, found
    texts, others = reference
    real = judge_texts(judge, texts)
    found["reference"] = real.figures()
    name = f"mauve_{judge.name}"
    if (count := len(samples)) < text_metrics.LEAST_FOR_MAUVE:
        found["notes"].append(
            f"no {name} of {count} texts: it needs {text_metrics.LEAST_FOR_MAUVE} (--count), and becomes steady at "
            "thousands"
        )
        return judged, found
    of_reference = features(judge, texts)
    found["samples"][name] = text_metrics.mauve(features(judge, samples), of_reference, seed=seed)
    if others:
        found["reference"][name] = text_metrics.mauve(features(judge, others), of_reference, seed=seed)
    else:
        found["notes"].append(f"no {name} of real text: the split has fewer than {2 * count} texts")
    return judged, found


def write_judged(folder: Path, judged: Judged, found: Mapping[str, Any]) -> Path:
    """Write both files; returns the path of the metrics. ValueError for a name that would sell them as a likelihood."""
    for side in ("samples", "reference"):
        for name in found[side] or ():
            check_name(f"{side}/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"judged_{datetime.now().isoformat().replace(':', '-')}.json"
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        for text, tokens, nats in zip(judged.texts, judged.tokens, judged.nats, strict=True):
            line = {
                "text": text,
                "judge_tokens": len(tokens),
                "judge_nats": nats,
                "unigram_entropy": text_metrics.unigram_entropy(tokens),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    versions = {name: importlib.metadata.version(name) for name in ("sacrebleu", "mauve-text", "torch", "transformers")}
    everything = {"schema": SCHEMA, **found, "versions": versions}
    path.write_text(json.dumps(everything, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def format_table(found: Mapping[str, Any]) -> str:
    """Markdown: a line a metric. Generative perplexity and entropy share the first: neither means a thing alone."""
    sides = {side: found[side] for side in ("samples", "reference") if found[side] is not None}
    pair = ("generative_ppl", "unigram_entropy")
    shown = {side: " at ".join(_cell(figures, name) for name in pair) for side, figures in sides.items()}
    lines = [
        f"| metric | {' | '.join(sides)} |",
        "|" + "---|" * (len(sides) + 1),
        f"| generative_ppl at unigram_entropy | {' | '.join(shown.values())} |",
    ]
    for name in sides["samples"]:
        if name not in _WITHOUT_LINE and not name.endswith("_se"):
            lines.append(f"| {name} | {' | '.join(_cell(figures, name) for figures in sides.values())} |")
    judge = found["judge"]
    counts = "; ".join(
        f"{figures['texts']} texts ({side}), {figures['tokens']} tokens" for side, figures in sides.items()
    )
    lines += [
        "",
        f"Judge: {judge['name']} ({judge['fingerprint'][:12]}), whose tokens are counted: {counts}. In parentheses "
        "standard errors over texts; entropy in nats; self_bleu_4 of at most "
        f"{text_metrics.BLEU_TEXTS} texts.",
        *(f"Note: {note}." for note in found["notes"]),
    ]
    return "\n".join(lines)


def _cell(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    digits = 1 if name == "generative_ppl" else 4
    error = f" ({figures[f'{name}_se']:.{digits}f})" if f"{name}_se" in figures else ""
    return f"{figures[name]:.{digits}f}{error}"

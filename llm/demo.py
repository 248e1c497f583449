"""The demo: ARM, MDM, Prime and Prime-v2 on real English with equal token budgets: valid bounds, zero-shot tasks.

`make demo` runs this. Every run is an ordinary `unmask train` of a file in configs/llm/tiny; each trains in two
processes, Prime-v2 under FSDP2, and it is killed with SIGKILL half way and resumed. Nothing here is special to the
demo: the same commands work by hand. A second `make demo` picks up whatever the first one left.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.checkpoint import layout
from launch.errors import DataError
from launch.metrics import read_metrics
from launch.stop import EXIT_OK
from llm.data.fetch import package_folder
from llm.diffusion.reveal import predicted_idle_ratio
from llm.evaluate import RECORD
from llm.generate import generate, write_samples
from llm.pretrained import load_pretrained, read_config

DATA = Path("data/prose-21-bpe288")
NAMES = ("arm", "mdm", "prime", "primev2")
TASKS = ("arc_easy", "sciq", "piqa", "boolq")
TITLES = {"arm": "ARM", "mdm": "MDM", "prime": "Prime, l = 4", "primev2": "Prime-v2, binary, shuffled"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llm.demo", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="folder of the four runs")
    parser.add_argument("--sequences", type=int, default=768, help="validation blocks of 64 tokens that are scored")
    parser.add_argument("--draws", type=int, default=2, help="Monte-Carlo draws per block and bound")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, e.g. train.steps=100")
    options = parser.parse_intermixed_args(argv)
    begin = time.monotonic()
    if not DATA.exists():
        _unmask("data", "prepare", "prose-21", "--out", str(DATA), "--tokenizer", "bpe:288")
    for name in NAMES:
        _train(name, options.runs / name, options.nproc, options.overrides, kill=name == "primev2")
    runs = [str(options.runs / name) for name in NAMES]
    limits = ["--draws", str(options.draws), "--sequences", str(options.sequences), "--batch", "64"]
    _unmask("eval", *runs, *limits)
    rows = [_summary(name, options.runs / name) for name in NAMES]
    table = format_table(rows)
    tasks = _zero_shot(runs, options.nproc)
    picture = draw(rows, options.runs)
    samples = "\n\n".join(f"### {TITLES[n]}\n\n{(options.runs / n / 'demo-samples.md').read_text()}" for n in NAMES)
    report = options.runs / "report.md"
    report.write_text(
        f"# Demo\n\n{table}\n\n![bounds]({picture.name})\n\n## Zero-shot tasks\n\n{tasks}\n\n## Samples\n\n{samples}"
    )
    print(f"\n{table}\n\n{tasks}\n\nreport {report}, picture {picture}, {time.monotonic() - begin:.0f} s in all")
    too_high = [row["title"] for row in rows if row["bound"] > row["unigram"] - 0.1]
    if too_high:
        print(f"not well below the unigram entropy: {', '.join(too_high)}", file=sys.stderr)
        return 1
    return EXIT_OK


def _unmask(*arguments: str) -> None:
    print("+ unmask", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "launch", *arguments], check=True)


def _train(name: str, run: Path, nproc: int, overrides: Sequence[str], *, kill: bool) -> None:
    """Train to the end; with `kill`, end all processes with SIGKILL after a checkpoint half way, then resume."""
    config = [f"configs/llm/tiny/{name}.yaml", f"run.dir={run}", *overrides]
    if kill and not (run / "killed").exists() and not (run / "report.md").exists():
        print("+ unmask train", *config, "--nproc", nproc, "  (to be killed)", flush=True)
        command = [sys.executable, "-m", "launch", "train", *config, "--nproc", str(nproc)]
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and not _half_way(run):
            time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks die with their launcher
        process.wait()
        (run / "killed").touch()
        print(
            f"killed with SIGKILL; newest checkpoint: step {layout.committed_steps(run / 'checkpoints')[-1]}",
            flush=True,
        )
        _unmask("resume", str(run), "--nproc", str(nproc))
        return
    _unmask("train", *config, "--nproc", str(nproc))


def _zero_shot(runs: Sequence[str], nproc: int) -> str:
    """A table of a few public tasks. Models this small are at chance: that is what the columns beside them show."""
    try:
        package_folder("eval")
    except DataError as error:
        return f"No zero-shot tasks: {error}."
    _unmask("eval", *runs, "--tasks", ",".join(TASKS), "--limit", "100", "--draws", "8", "--nproc", str(nproc))
    from llm.evals.report import format_table as format_tasks
    from llm.evals.report import newest_results

    return format_tasks([newest_results(Path(run) / "tasks") for run in runs])


def _half_way(run: Path) -> bool:
    """Whether a checkpoint exists and half of the steps are done."""
    if not (run / "checkpoints").exists() or not layout.committed_steps(run / "checkpoints"):
        return False
    rows = read_metrics(run / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] >= read_config(run).train.steps // 2


def _summary(name: str, run: Path) -> dict[str, Any]:
    """What the table and the picture need of one run; draws its samples."""
    loaded = load_pretrained(run, torch.device("cpu"))
    length = loaded.config.data.block_length
    sampler = dataclasses.replace(loaded.config.sampling.sampler, steps=length)
    samples = generate(
        loaded.model, loaded.language, config=sampler, count=32, length=length, seed=0, device=torch.device("cpu")
    )
    shown = dataclasses.replace(samples, tokens=samples.tokens[:3])
    write_samples(run / "demo-samples.md", shown, loaded.tokenizer, language=loaded.language)
    record = map(json.loads, (run / RECORD).read_text().splitlines())
    estimates = {row["estimate"]: row for row in record if "set" not in row}  # on held-out text, the newest of each
    valid = {n: row for n, row in estimates.items() if "ppl" in row}
    best = min(valid, key=lambda n: valid[n][n])
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in row]
    is_diffusion = loaded.language.family != "ar"
    units = length * loaded.language.codec.granularity
    return {
        "title": TITLES[name],
        "estimates": estimates,
        "bound": valid[best][best],
        "unigram": valid[best]["unigram_nats_per_token"],
        "bytes_factor": valid[best][f"{best}_bits_per_byte"] / valid[best][best],
        "tokens": rows[-1]["tokens"],
        "tokens_per_second": sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2],
        "idle": samples.idle_ratio if is_diffusion else None,
        "idle_predicted": predicted_idle_ratio(length, units) if is_diffusion else None,
        "curves": {
            key: [(row["step"], row[key]) for row in read_metrics(run / "metrics.jsonl") if key in row]
            for key in ("val/nll_ar", "val/nelbo_token", "val/nelbo_subtoken")
        },
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown. Valid bounds in nats per token with standard errors; the joint loss in a column of its own."""

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["estimates"].get(name)
        return f"{found[name]:.3f} ({found[f'{name}_se']:.3f})" if found else "-"

    lines = [
        "| model | exact NLL | nelbo_token | nelbo_subtoken | best valid: ppl | bits/byte | loss_ce_joint (no bound) "
        "| idle measured / predicted | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        best = min((r for r in row["estimates"].values() if "ppl" in r), key=lambda r: r["ppl"])
        name = best["estimate"]
        idle = "-" if row["idle"] is None else f"{row['idle']:.4f} / {row['idle_predicted']:.4f}"
        lines.append(
            f"| {row['title']} | {cell(row, 'nll_ar')} | {cell(row, 'nelbo_token')} | {cell(row, 'nelbo_subtoken')} "
            f"| {name} {best['ppl']:.1f} ({best['ppl_se']:.1f}) | {best[f'{name}_bits_per_byte']:.3f} "
            f"| {cell(row, 'loss_ce_joint')} | {idle} | {row['tokens_per_second']:,.0f} |"
        )
    first = rows[0]
    any_bound = next(iter(rows[1]["estimates"].values()))
    lines.append(
        f"\nUnigram entropy {first['unigram']:.3f} nats per token ({first['unigram'] * first['bytes_factor']:.3f} bits "
        f"per byte). Nats per token (standard error) on {any_bound['blocks']} validation blocks, {any_bound['draws']} "
        f"draws a block by {any_bound['estimator']}; each model has read {first['tokens']:,} tokens."
    )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Left: the valid bounds at the end. Right: how they fell during training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {"nll_ar": "tab:blue", "nelbo_token": "tab:orange", "nelbo_subtoken": "tab:green"}
    labels = {"nll_ar": "exact NLL", "nelbo_token": "nelbo_token", "nelbo_subtoken": "nelbo_subtoken"}
    for i, row in enumerate(rows):
        valid = [n for n in colours if n in row["estimates"]]
        for j, name in enumerate(valid):
            found = row["estimates"][name]
            place = i + (j - (len(valid) - 1) / 2) * 0.36
            bars.bar(place, found[name], 0.34, yerr=2 * found[f"{name}_se"], color=colours[name], capsize=3)
    unigram = bars.axhline(rows[0]["unigram"], color="grey", linestyle="--")
    handles = [Patch(color=colour) for colour in colours.values()]
    bars.legend([*handles, unigram], [*labels.values(), "unigram entropy"], loc="lower right", fontsize=8)
    bars.set_xticks(range(len(rows)), [row["title"].replace(", ", "\n") for row in rows])
    bars.set_ylabel("nats per token, validation")
    bars.set_ylim(bottom=0.9 * min(row["bound"] for row in rows))
    bars.set_title("Valid likelihood after equal token budgets (2 s.e.)")
    for row in rows:
        for key, points in row["curves"].items():
            if points:
                curves.plot(*zip(*points, strict=True), marker=".", label=f"{row['title']}: {key.removeprefix('val/')}")
    curves.axhline(rows[0]["unigram"], color="grey", linestyle="--")
    curves.set_xlabel("step")
    curves.set_title("The same bounds during training")
    curves.legend(fontsize=8)
    path = folder / "demo.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    if shutil.which("git") is None:
        print("git is not installed: env.json of the runs will not name the commit", file=sys.stderr)
    sys.exit(main())

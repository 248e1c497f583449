"""`unmask eval RUN ...`: valid likelihood bounds of trained models, side by side.

Perplexities come from valid estimators only and carry their name, standard error and number of draws.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from launch import runtime as runtimes
from launch.runtime import Runtime
from llm.config import EvaluationConfig
from llm.data.shards import Split, TokenDataset
from llm.diffusion.likelihood import Estimate, Order
from llm.heldout import evaluate_bounds, heldout_blocks, unigram_nats
from llm.pretrained import load_pretrained

BOUNDS = ("nelbo_token", "nelbo_subtoken", "nelbo_layered", "nelbo_steps", "nll_chain", "loss_ce_joint")
_OF_CONFIG = ("draws", "batch", "steps", "order")  # flags that stand before the run's own evaluation section
RECORD = "evaluations.jsonl"  # in a run's folder: every estimate ever made of it, a line each, newest last


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask eval",
        description=(
            "Valid likelihood bounds of the models of one or several runs on held-out blocks. ar models have one exact "
            "value; mdm one bound; prime models have several, all of them valid but loss_ce_joint, which is no bound "
            "and therefore has no perplexity."
        ),
        epilog="example: unmask eval runs/tiny-arm runs/tiny-mdm runs/tiny-primev2 --draws 4 --sequences 512",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders or exported folders")
    parser.add_argument(
        "--bounds",
        nargs="+",
        choices=BOUNDS,
        default=["nelbo_token", "nelbo_subtoken", "loss_ce_joint"],
        metavar="NAME",
        help=(
            f"of {', '.join(BOUNDS)} (nelbo_token nelbo_subtoken loss_ce_joint). nelbo_steps bounds the sampler of "
            "--steps; nll_chain is exact and costs a forward per token; ar models have nll_ar alone"
        ),
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="which held-out documents (validation)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="another data set of the same tokenizer (the first of the run)"
    )
    parser.add_argument("--draws", type=int, metavar="N", help="Monte-Carlo draws per block and bound (of the run: 1)")
    parser.add_argument("--steps", type=int, metavar="T", help="sampler steps that nelbo_steps bounds (of the run: 64)")
    parser.add_argument("--order", choices=get_args(Order), help="of nll_chain (of the run: left_to_right)")
    parser.add_argument("--sequences", type=int, metavar="N", help="blocks, spread evenly over the split (all)")
    parser.add_argument("--batch", type=int, metavar="N", help="blocks per forward (of the run: 32)")
    options = parser.parse_args(argv)
    given = {k: v for k in (*_OF_CONFIG, "sequences") if (v := getattr(options, k)) is not None}
    EvaluationConfig(**given).check("evaluation")
    runtime = runtimes.start()
    rows = [row for run in options.runs for row in evaluate_run(run, options, runtime)]
    if runtime.is_main:
        print(format_table(rows))
    runtime.barrier()
    runtime.close()
    return 0


def evaluate_run(run: Path, options: argparse.Namespace, runtime: Runtime) -> list[dict[str, Any]]:
    """Collective. One row for each estimate, also added to RUN/evaluations.jsonl."""
    loaded = load_pretrained(run, runtime.device)
    changes = {k: v for k in _OF_CONFIG if (v := getattr(options, k)) is not None}
    evaluation: EvaluationConfig = dataclasses.replace(loaded.config.evaluation, **changes)
    split: Split = options.split
    path = options.data or Path(loaded.config.data.sources[0].path)
    dataset = TokenDataset.open(path, split, loaded.config.data.block_length)
    blocks = heldout_blocks(dataset, options.sequences)
    names = [
        n for n in loaded.language.bounds(options.bounds) if loaded.language.family == "prime" or n != "loss_ce_joint"
    ]
    train = TokenDataset.open(path, "train", loaded.config.data.block_length)
    unigram = unigram_nats(train, dataset, blocks)
    with tqdm(total=len(blocks), desc=run.name, unit="block", disable=not runtime.is_main) as bar:
        results = evaluate_bounds(
            loaded.model,
            loaded.language,
            dataset,
            blocks,
            names,
            evaluation,
            runtime,
            progress=lambda n: bar.update(n * runtime.world_size),
        )
    rows = []
    for result in results:
        found = result.estimate
        row: dict[str, Any] = {
            "run": run.name,
            "step": loaded.step,
            "data": str(path),
            "split": split,
            "weights": loaded.weights,
            "estimate": found.name,
            "estimator": found.estimator,
            "draws": found.draws,
            "blocks": len(blocks),
            "tokens": found.num_tokens,
            "unigram_nats_per_token": unigram,
            **result.figures(dataset.bytes_per_token),
        }
        if isinstance(found, Estimate):
            row |= {"ppl": found.ppl, "ppl_se": found.ppl_standard_error}
        rows.append(row)
    if runtime.is_main:
        with (run / RECORD).open("a") as record:
            record.writelines(f"{json.dumps(row)}\n" for row in rows)
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line an estimate."""
    lines = [
        "| run | estimate | nats/token (s.e.) | ppl (s.e.) | bits/byte | unigram | estimator, draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["estimate"]
        ppl = f"{row['ppl']:.2f} ({row['ppl_se']:.2f})" if "ppl" in row else "not a likelihood"
        bits = f"{row[f'{name}_bits_per_byte']:.4f}" if f"{name}_bits_per_byte" in row else "-"
        lines.append(
            f"| {row['run']} | {name} | {row[name]:.4f} ({row[f'{name}_se']:.4f}) | {ppl} | {bits} "
            f"| {row['unigram_nats_per_token']:.4f} | {row['estimator']}, {row['draws']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

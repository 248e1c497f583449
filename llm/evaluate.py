"""`unmask eval RUN ...`: valid likelihood bounds of trained models, or zero-shot tasks and texts, side by side.

Perplexities come from valid estimators only and carry their name, standard error and number of draws.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.local import run_local
from launch.runtime import Runtime
from launch.stop import EXIT_OK
from llm.config import EvaluationConfig
from llm.data.shards import Split, TokenDataset
from llm.diffusion.likelihood import Estimate, Order
from llm.heldout import Blocks, evaluate_bounds, heldout_blocks, unigram_baseline
from llm.pretrained import Pretrained, load_pretrained

BOUNDS = ("nelbo_token", "nelbo_subtoken", "nelbo_layered", "nelbo_steps", "nll_chain", "loss_ce_joint")
_OF_CONFIG = ("draws", "batch", "steps", "order")  # flags that stand before the run's own evaluation section
_DEFAULT_BOUNDS = ("nelbo_token", "nelbo_subtoken", "loss_ce_joint")
_ESTIMATORS = ("auto", "nll_ar", "nelbo_token", "nelbo_subtoken", "nelbo_layered", "nll_chain", "ce_joint")
_ONLY_BOUNDS = ("bounds", "split", "steps", "order", "sequences", "batch")
_ONLY_SETS = ("data_root", "packing", "allow_other_text")
_ONLY_TASKS = (
    "limit",
    "estimator",
    "guidance",
    "temperature",
    "seed",
    "batch_tokens",
    "max_length",
    "generation",
    "output",
    "dry_run",
)
_PATIENCE_S = 24 * 3600.0  # ranks meet after hours of work of different lengths
_DESCRIPTION = """\
Valid likelihood bounds of models on held-out blocks; with --sets, on published texts; with --tasks, public zero-shot
tasks instead.

Bounds: ar models have one exact value, mdm one bound; prime models have several, all of them valid but loss_ce_joint,
which is no bound and therefore has no perplexity.

Sets: the texts of published zero-shot perplexities (WikiText, PTB, LM1B, LAMBADA, AG News, arXiv, PubMed), detokenised
as in MDLM's evaluation. They are read from a folder of yours, and refused if they are known to be other texts.

Tasks: prompts and metrics are those of lm-evaluation-harness, documents come from `unmask data fetch eval`. Every score
stands beside the chance level and a unigram model; with several models the first is compared with the others document
by document. Scores are kept as they come: the same command goes on where it was stopped.
"""
_EXAMPLES = """\
examples:
  unmask eval runs/tiny-arm runs/tiny-mdm runs/tiny-primev2 --draws 4 --sequences 512
  unmask eval runs/tiny-arm runs/tiny-mdm --sets lambada --sequences 256      after `unmask data fetch eval`
  unmask eval runs/tiny-mdm --sets wikitext2,ptb --data-root texts      wikitext2.txt and ptb.txt, which you bring
  unmask eval --list-tasks
  unmask eval runs/tiny-mdm --tasks arc_easy,piqa --limit 100 --dry-run       how long it would take
  unmask eval runs/tiny-arm runs/tiny-mdm --tasks arc_easy,piqa,heldout --limit 100 --nproc 2
  unmask eval smollm2 --tasks hellaswag --limit 40      after `unmask data fetch eval smollm2 prose-21`
  unmask eval EleutherAI/pythia-160m --tasks prime8 --data hub      with downloads, from the tasks' own sources
"""
RECORD = "evaluations.jsonl"  # in a run's folder: every estimate ever made of it, a line each, newest last


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    if options.list_tasks:
        _need_harness()
        from llm.evals.tasks import list_tasks

        print(list_tasks())
        return EXIT_OK
    if not options.runs:
        raise ConfigError("unmask eval needs a run folder, or the name of a model for --tasks; see unmask eval --help")
    if options.nproc < 1:
        raise ConfigError(f"--nproc {options.nproc}; the smallest is 1")
    if options.nproc > 1 and "RANK" not in os.environ:
        return run_local([sys.executable, "-m", "launch", "eval", *arguments], options.nproc)
    if options.tasks is None:
        _refuse(options, _ONLY_TASKS, "needs --tasks NAMES")
    else:
        _refuse(options, ("sets", *_ONLY_BOUNDS), "belongs to bounds on blocks of text, which --tasks replaces")
    if options.sets is None:
        _refuse(options, _ONLY_SETS, "needs --sets NAMES")
    else:
        _refuse(options, ("split",), "belongs to the run's own data; each of --sets has a split of its own")
    runtime = runtimes.start(timeout_seconds=_PATIENCE_S)
    try:
        if options.sets is not None:
            from llm.evals.perplexity_sets import evaluate_sets

            _check(options)
            evaluate_sets(options, runtime)
        elif options.tasks is None:
            _check(options)
            rows = [row for run in options.runs for row in evaluate_run(Path(run), options, runtime)]
            if runtime.is_main:
                print(format_table(rows))
        else:
            _need_harness()
            from llm.evals.zero_shot import evaluate_models

            evaluate_models(options, runtime)
        runtime.barrier()
    finally:
        runtime.close()
    return EXIT_OK


def _check(options: argparse.Namespace) -> None:
    """The numbers of the flags of bounds, by the rules of the configuration section that they stand before."""
    given = {k: v for k in (*_OF_CONFIG, "sequences") if (v := getattr(options, k)) is not None}
    EvaluationConfig(**given).check("evaluation")


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness; install it with `pip install 'unmask[eval]'`")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unmask eval",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders or exported folders; with --tasks also Hugging Face folders or names, and smollm2",
    )
    parser.add_argument("--draws", type=int, metavar="N", help="masks a block (of the run: 1), or an answer (128)")
    parser.add_argument(
        "--data",
        metavar="DIR|hub",
        help="another data set of the same tokenizer (the first of the run); hub: downloads for --tasks and --sets",
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (1)")

    bounds = parser.add_argument_group("bounds on held-out blocks, and on --sets")
    bounds.add_argument(
        "--bounds",
        nargs="+",
        choices=BOUNDS,
        metavar="NAME",
        help=(
            f"of {', '.join(BOUNDS)} ({' '.join(_DEFAULT_BOUNDS)}). nelbo_steps bounds the sampler of --steps; "
            "nll_chain is exact and costs a forward per token; ar models have nll_ar alone"
        ),
    )
    bounds.add_argument("--split", choices=("validation", "test"), help="which held-out documents (validation)")
    bounds.add_argument("--steps", type=int, metavar="T", help="sampler steps that nelbo_steps bounds (of the run: 64)")
    bounds.add_argument("--order", choices=get_args(Order), help="of nll_chain (of the run: left_to_right)")
    bounds.add_argument("--sequences", type=int, metavar="N", help="blocks, spread evenly over the split (all)")
    bounds.add_argument("--batch", type=int, metavar="N", help="blocks per forward (of the run: 32)")

    sets = parser.add_argument_group("published texts")
    sets.add_argument(
        "--sets",
        metavar="NAMES",
        help="with commas between them, of wikitext2, wikitext103, ptb, lm1b, lambada, ag_news, arxiv, pubmed",
    )
    sets.add_argument("--data-root", metavar="DIR", help="folder of NAME.jsonl, .jsonl.gz, .parquet, .txt (data/sets)")
    sets.add_argument(
        "--packing",
        choices=("contiguous", "framed"),
        help="blocks cut from the text as in our training, or with BOS and EOS at their ends as in MDLM's (contiguous)",
    )
    sets.add_argument("--allow-other-text", action="store_true", help="take copies that are not the published texts")

    tasks = parser.add_argument_group("zero-shot tasks")
    tasks.add_argument("--tasks", metavar="NAMES", help="with commas between them, such as hellaswag,arc_easy,prime8")
    tasks.add_argument("--list-tasks", action="store_true", help="print the names that --tasks knows, and stop")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task (all)")
    tasks.add_argument(
        "--estimator",
        choices=_ESTIMATORS,
        help="of a continuation's log-likelihood (auto: exact for causal models, a bound for masked ones)",
    )
    tasks.add_argument("--guidance", type=float, metavar="W", help="towards the context; ranks, is no likelihood (0)")
    tasks.add_argument("--temperature", type=float, metavar="T", help="of the logits; ranks, is no likelihood (1)")
    tasks.add_argument("--seed", type=int, metavar="N", help="of the masks (0)")
    tasks.add_argument("--batch-tokens", type=int, metavar="N", help="tokens of a forward (16384)")
    tasks.add_argument("--max-length", type=int, metavar="N", help="tokens of an input (as in training)")
    tasks.add_argument(
        "--generation",
        metavar="KEY=VALUE,...",
        help="of tasks that have an answer written: steps=8,temperature=0.7 and so on, see docs/evaluation.md",
    )
    tasks.add_argument("--output", metavar="DIR", help="results go to DIR/NAME (RUN/tasks, or evaluations/NAME)")
    tasks.add_argument("--dry-run", action="store_true", help="print documents, requests, inputs and time, and stop")
    return parser


def evaluate_run(run: Path, options: argparse.Namespace, runtime: Runtime) -> list[dict[str, Any]]:
    """Collective. One row for each estimate on held-out blocks, also added to RUN/evaluations.jsonl."""
    loaded = load_pretrained(run, runtime.device)
    split: Split = options.split or "validation"
    path = Path(options.data) if options.data else Path(loaded.config.data.sources[0].path)
    dataset = TokenDataset.open(path, split, loaded.config.data.block_length)
    names = [n for n in options.bounds or _DEFAULT_BOUNDS if loaded.language.family == "prime" or n != "loss_ce_joint"]
    unigram = unigram_baseline(path, dataset, options.sequences)
    about = {"data": str(path), "split": split, "unigram_nats_per_token": unigram}
    return record_estimates(run, loaded, dataset, names, options, runtime, about)


def record_estimates(
    run: Path,
    loaded: Pretrained,
    dataset: Blocks,
    bounds: Sequence[str],
    options: argparse.Namespace,
    runtime: Runtime,
    about: Mapping[str, Any],
    *,
    words_per_token: float | None = None,
) -> list[dict[str, Any]]:
    """Collective. A row, with `about` in it, for each of `bounds` that the family has; added to RUN/evaluations.jsonl.

    words_per_token: gives valid estimates a perplexity per word, too.
    """
    changes = {k: v for k in _OF_CONFIG if (v := getattr(options, k)) is not None}
    evaluation: EvaluationConfig = dataclasses.replace(loaded.config.evaluation, **changes)
    blocks = heldout_blocks(dataset, options.sequences)
    title = f"{run.name} on {about['set']}" if "set" in about else run.name
    with tqdm(total=len(blocks), desc=title, unit="block", disable=not runtime.is_main) as bar:
        results = evaluate_bounds(
            loaded.model,
            loaded.language,
            dataset,
            blocks,
            loaded.language.bounds(bounds),
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
            **about,
            "weights": loaded.weights,
            "estimate": found.name,
            "estimator": found.estimator,
            "draws": found.draws,
            "blocks": len(blocks),
            "tokens": found.num_tokens,
            **result.figures(dataset.bytes_per_token),
        }
        if isinstance(found, Estimate):
            row |= {"ppl": found.ppl, "ppl_se": found.ppl_standard_error}
            if words_per_token is not None:
                row["ppl_per_word"] = found.ppl_per_word(found.num_tokens * words_per_token)
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
        unigram = row["unigram_nats_per_token"]
        bits = f"{row[f'{name}_bits_per_byte']:.4f}" if f"{name}_bits_per_byte" in row else "-"
        lines.append(
            f"| {row['run']} | {name} | {row[name]:.4f} ({row[f'{name}_se']:.4f}) | {ppl} | {bits} "
            f"| {'-' if unigram is None else f'{unigram:.4f}'} | {row['estimator']}, {row['draws']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

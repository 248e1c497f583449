"""Variance per unit of compute of the two estimators of the masked bound, on a model trained for a minute.

E1 draws the time t and weighs by 1/t: the form in which most published codes score. E2 draws how many tokens are masked
and weighs by n/k. Same mean, same masks per draw, same network. Both are stratified over the draws of a continuation.
The unit of compute is an input that the network reads; equal masks are read once, and E1's empty ones not at all.
"""

import tempfile
from pathlib import Path

import torch
from corpus import write_corpus
from measure import parser, print_table
from torch import nn

from launch.random import generator
from llm import backbones
from llm.backbones import InputSpec, ModelConfig
from llm.data import tokenizers
from llm.data.shards import TokenDataset
from llm.diffusion import masking
from llm.diffusion.codec import build_codec
from llm.diffusion.likelihood import Estimator
from llm.diffusion.objective import MaskedBatch, MaskedObjective, masked_readout
from llm.evals.models import Scorable
from llm.evals.scoring import Request, Score, ScoringConfig, score
from llm.generate import Language

CONTEXT, CONTINUATION = 40, 24


def trained(folder: Path, steps: int) -> Scorable:
    tokenizer = tokenizers.load(folder)
    codec = build_codec(tokenizer.vocab_size, 1)
    spec = InputSpec(kind="token", num_symbols=codec.vocab_size + 1)
    shape = ModelConfig(layers=2, heads=2, width=64, ffn=192, qk_norm=True)
    model = backbones.build(shape, input_layer=spec, num_classes=codec.vocab_size, causal=False)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, generator(0))
    language = Language(family="mdm", codec=codec, first_token=tokenizer.eos_id)
    data, noise = TokenDataset.open(folder, "train", CONTEXT + CONTINUATION), generator(1)
    optimizer, objective = torch.optim.AdamW(model.parameters(), lr=2e-3), MaskedObjective(terms={"mdm": 1.0})
    for _ in range(steps):
        tokens = data.blocks(torch.randint(len(data), (32,), generator=noise).numpy())
        times = torch.rand(32, generator=noise)
        mask = masking.random_mask(torch.rand(*tokens.shape, 1, generator=noise), times)
        batch = MaskedBatch(tokens=tokens, mask=mask, times=times)
        loss = model(language.inputs(batch.inputs(codec)), masked_readout(objective, batch, codec)).loss_sum
        (loss / tokens.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Scorable(
        family="mdm",
        model=model.eval().requires_grad_(False),
        language=language,
        tokenizer=tokenizer,
        max_length=CONTEXT + CONTINUATION,
        fingerprint="",
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--texts", type=int, default=8, help="continuations that are scored")
    arguments.add_argument("--repeats", type=int, default=64, help="independent estimates of each")
    chosen = arguments.parse_args()
    texts, repeats, steps = (2, 8, 20) if chosen.quick else (chosen.texts, chosen.repeats, 400)
    with tempfile.TemporaryDirectory() as name:
        folder = write_corpus(Path(name) / "data")
        scorable = trained(folder, steps)
        data = TokenDataset.open(folder, "validation", CONTEXT + CONTINUATION)
        blocks = data.blocks(torch.arange(texts).numpy() * (len(data) // texts)).tolist()
    rows = []
    for draws in (1, 8, 32):
        found = {v: estimates(scorable, blocks, draws, repeats, v) for v in ("E1", "E2")}
        variance = {v: mean_variance(scores, repeats) for v, scores in found.items()}
        read = {v: sum(s.rows for s in scores) / len(scores) for v, scores in found.items()}
        mean = {v: -sum(s.value for s in scores) / len(scores) for v, scores in found.items()}
        per_unit = (variance["E1"] * read["E1"]) / (variance["E2"] * read["E2"])
        rows.append(
            (
                f"{draws}",
                *(f"{mean[v]:.2f}" for v in ("E1", "E2")),
                *(f"{variance[v]:.3f}" for v in ("E1", "E2")),
                *(f"{read[v]:.1f}" for v in ("E1", "E2")),
                f"{variance['E1'] / variance['E2']:.1f}",
                f"{per_unit:.1f}",
            )
        )
    header = (
        "draws",
        "E1 nats",
        "E2 nats",
        "E1 variance",
        "E2 variance",
        "E1 inputs",
        "E2 inputs",
        "ratio",
        "per input",
    )
    title = f"{texts} continuations of {CONTINUATION} tokens, {repeats} estimates each (goal: E2 >= 5 times lower)"
    print_table(title, header, rows)


def estimates(scorable: Scorable, blocks: list[list[int]], draws: int, repeats: int, variant: Estimator) -> list[Score]:
    """`repeats` scores of each block under independent noise, block by block."""
    requests = [
        Request(context=tuple(block[:CONTEXT]), continuation=tuple(block[CONTEXT:]), group=f"{i} {repeat}")
        for i, block in enumerate(blocks)
        for repeat in range(repeats)
    ]
    return score(scorable, requests, ScoringConfig(draws=draws, variant=variant))


def mean_variance(scores: list[Score], repeats: int) -> float:
    """Of the estimates of one text, averaged over texts."""
    values = torch.tensor([s.value for s in scores], dtype=torch.float64).view(-1, repeats)
    return float(values.var(-1).mean())


if __name__ == "__main__":
    main()

"""Step time of training on a valid bound (nelbo_subtoken), against the joint cross-entropy (ce_joint).

The same model, batch and masks; binary sub-tokens. The steps (forward, backward, clipping, AdamW) alternate between two
copies of the model, so that each pair of neighbours is one ratio.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from measure import alternate, median, parser, print_table, ratio, timed
from torch import nn

from llm import backbones
from llm.backbones import InputSpec, ModelConfig
from llm.diffusion import masking
from llm.diffusion.codec import Codec, build_codec
from llm.diffusion.objective import MaskedBatch, MaskedObjective, Name, masked_readout


def batches(codec: Codec, count: int, batch: int, length: int) -> list[MaskedBatch]:
    noise = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        tokens = torch.randint(codec.vocab_size, (batch, length), generator=noise)
        times = (torch.rand((), generator=noise) + torch.randperm(batch, generator=noise) / batch) % 1.0
        mask = masking.random_mask(torch.rand(batch, length, codec.granularity, generator=noise), times)
        made.append(MaskedBatch(tokens=tokens, mask=mask, times=times))
    return made


def training_step(name: Name, shape: ModelConfig, codec: Codec, data: list[MaskedBatch]) -> Callable[[], None]:
    spec = InputSpec(
        kind=backbones.resolve_input_kind("auto", granularity=codec.granularity, width=shape.width),
        num_symbols=codec.base + 1,
        granularity=codec.granularity,
    )
    model: Any = backbones.build(shape, input_layer=spec, num_classes=codec.vocab_size, causal=False)
    for parameter_name, parameter in model.named_parameters():
        model.init_parameter(parameter_name, parameter.data, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    objective = MaskedObjective(terms={name: 1.0})
    endless = itertools.cycle(data)

    def step() -> None:
        batch = next(endless)
        loss = model(batch.inputs(codec), masked_readout(objective, batch, codec)).loss_sum
        (loss / batch.tokens.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--turns", type=int, default=25, help="steps of each side")
    chosen = arguments.parse_args()
    turns = 2 if chosen.quick else chosen.turns
    models = {
        "tiny": (ModelConfig(layers=4, heads=4, width=128, ffn=384, qk_norm=True), 1024, 16, 128),
        "d = 256": (ModelConfig(layers=4, heads=4, width=256, ffn=768, qk_norm=True), 32000, 4, 128),
    }
    rows = []
    for label, (shape, vocab, batch, length) in models.items():
        codec = build_codec(vocab, (vocab - 1).bit_length(), shuffle_seed=0)
        data = batches(codec, 8, batch, length)
        sides = {n: timed(training_step(n, shape, codec, data)) for n in ("ce_joint", "nelbo_subtoken")}
        costs = alternate(sides, turns, warmup=2)
        joint, bound = median(costs["ce_joint"]), median(costs["nelbo_subtoken"])
        quotient = ratio(costs["nelbo_subtoken"], costs["ce_joint"])
        times = (f"{1e3 * cost:.0f}" for cost in (joint.wall, bound.wall, joint.cpu, bound.cpu))
        name = f"{label}, V = {vocab}, {codec.granularity} digits, {batch} x {length} tokens"
        rows.append((name, *times, f"{quotient.wall:.3f}", f"{quotient.cpu:.3f}"))
    header = ("model", "ce_joint ms", "nelbo_subtoken ms", "ce_joint CPU ms", "nelbo CPU ms", "ratio (wall)", "(CPU)")
    print_table(f"Training step (goal <= 1.05; median of {turns} pairs)", header, rows)


if __name__ == "__main__":
    main()

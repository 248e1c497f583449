"""Tokens per second of ancestral sampling at many more steps than tokens, with and without the idle steps.

The same model, noise and samples on both sides: a step that reveals nothing changes nothing, so visiting only the steps
that reveal something (first-hitting sampling, `skip_idle`, the default) draws the very same texts; the benchmark checks
that. Without it every step is a pass over all hidden positions, as in published samplers.
"""

from functools import partial
from typing import Any

import torch
from measure import alternate, median, parser, print_table, ratio, timed

from llm import backbones
from llm.backbones import InputSpec, ModelConfig
from llm.diffusion.codec import build_codec
from llm.diffusion.reveal import predicted_idle_ratio
from llm.diffusion.sampler import SamplerConfig, Samples
from llm.generate import Language, generate

CPU = torch.device("cpu")


def language_model(granularity: int, vocab_size: int) -> tuple[Any, Language]:
    codec = build_codec(vocab_size, granularity, shuffle_seed=0 if granularity > 1 else None)
    shape = ModelConfig(layers=2, heads=2, width=64, ffn=192, qk_norm=True)
    spec = InputSpec(
        kind=backbones.resolve_input_kind("auto", granularity=granularity, width=shape.width),
        num_symbols=codec.base + 1,
        granularity=granularity,
    )
    model: Any = backbones.build(shape, input_layer=spec, num_classes=vocab_size, causal=False)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(0))
    family = "mdm" if granularity == 1 else "prime"
    return model.eval(), Language(family=family, codec=codec, first_token=0)


def draw(
    drawn: dict[str, Samples], side: str, model: Any, language: Language, batch: int, length: int, steps: int
) -> None:
    config = SamplerConfig(steps=steps, skip_idle=side == "skipped")
    drawn[side] = generate(model, language, config=config, count=batch, length=length, seed=0, device=CPU)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--turns", type=int, default=3, help="batches of each side")
    chosen = arguments.parse_args()
    turns = 1 if chosen.quick else chosen.turns
    length = 16 if chosen.quick else 64
    rows = []
    for granularity, batch, factor in ((1, 1, 16), (1, 8, 16), (10, 1, 16)):
        model, language = language_model(granularity, 1024)
        steps = factor * length
        drawn: dict[str, Samples] = {}
        sides = {
            name: timed(partial(draw, drawn, name, model, language, batch, length, steps))
            for name in ("visited", "skipped")
        }
        costs = alternate(sides, turns, warmup=0)
        if not torch.equal(drawn["visited"].tokens, drawn["skipped"].tokens):
            raise AssertionError("skipping idle steps changed a text")
        tokens = batch * length
        quotient = ratio(costs["visited"], costs["skipped"])
        rows.append(
            (
                f"l = {granularity}, {batch} x {length} tokens, T = {steps}",
                f"{drawn['skipped'].idle_ratio:.3f} ({predicted_idle_ratio(steps, length * granularity):.3f})",
                *(f"{drawn[side].evaluations}" for side in sides),
                *(f"{tokens / median(costs[side]).wall:.1f}" for side in sides),
                f"{quotient.wall:.2f}",
                f"{quotient.cpu:.2f}",
            )
        )
    header = (
        "texts",
        "idle (predicted)",
        "passes, all steps",
        "passes, skipped",
        "tokens/s, all steps",
        "tokens/s, skipped",
        "ratio (wall)",
        "(CPU)",
    )
    print_table(f"Ancestral sampling, idle steps visited or skipped (median of {turns} pairs)", header, rows)


if __name__ == "__main__":
    main()

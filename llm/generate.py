"""A language model as its users see it: what it reads, which bounds it has, and how text is drawn from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from launch.random import stream_key, uniform
from llm.data.tokenizers import TextTokenizer
from llm.diffusion import sampler
from llm.diffusion.codec import Codec
from llm.diffusion.reveal import predicted_idle_ratio
from llm.diffusion.sampler import SamplerConfig, Samples


@dataclass(frozen=True, kw_only=True)
class Language:
    """The conventions between tokens and a backbone of one family."""

    family: Literal["ar", "mdm", "prime"]
    codec: Codec
    first_token: int  # ar: what stands before the first token of a block
    order: Literal["uniform", "layers"] = "uniform"  # in which digits were revealed in training

    def inputs(self, digits: Tensor) -> Tensor:
        """What the backbone reads for digits [B, L, l]: the ids [B, L] themselves where l = 1."""
        return digits.squeeze(-1) if self.codec.granularity == 1 else digits

    def predictor(self, model: nn.Module) -> Callable[[Tensor, Any], Any]:
        """(digits [B, L, l], readout) -> what the readout makes of the hidden states."""
        return lambda digits, readout: model(self.inputs(digits), readout)

    def bounds(self, wanted: Sequence[str]) -> list[str]:
        """Of the wanted bounds those that say something of their own for this family."""
        if self.family == "ar":
            return ["nll_ar"]
        if self.family == "mdm":  # with one digit per token the two bounds are the same
            same = ("nelbo_subtoken", "nelbo_layered")
            return list(dict.fromkeys("nelbo_token" if name in same else name for name in wanted))
        return list(wanted)

    def sampler(self, config: SamplerConfig) -> SamplerConfig:
        """`config` with an order; one that is left open is that of the digits in training."""
        return replace(config, order=config.order or ("layers" if self.order == "layers" else "ancestral"))


@torch.no_grad()
def generate(
    model: nn.Module,
    language: Language,
    *,
    config: SamplerConfig,
    count: int,
    length: int,
    seed: int,
    device: torch.device,
    prompt: Sequence[int] = (),
    suffix: Sequence[int] = (),
    batch: int | None = None,
) -> Samples:
    """`count` sequences of `length` tokens that begin with `prompt` and end with `suffix` (token ids).

    batch: sequences at a time (None: all); the noise of a sequence does not depend on it.
    """
    parts = []
    for rows in torch.arange(count, device=device).split(batch or count):
        tokens = torch.zeros(len(rows), length, dtype=torch.int64, device=device)
        frozen = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
        for given, place in ((prompt, slice(0, len(prompt))), (suffix, slice(length - len(suffix), length))):
            tokens[:, place] = torch.tensor(list(given), dtype=torch.int64, device=device)
            frozen[:, place] = True
        parts.append(_generate_batch(model, language, tokens, frozen, rows, config, seed))
    return Samples(
        tokens=torch.cat([part.tokens for part in parts]),
        evaluations=sum(part.evaluations for part in parts),
        steps=parts[0].steps,
        idle_steps=torch.cat([part.idle_steps for part in parts]),
        batch_idle_steps=sum(part.batch_idle_steps for part in parts),
    )


def _generate_batch(
    model: nn.Module,
    language: Language,
    tokens: Tensor,
    frozen: Tensor,
    rows: Tensor,
    config: SamplerConfig,
    seed: int,
) -> Samples:
    """Fill in `tokens` [B, L] where not `frozen`; `rows` int64 [B] name the noise of each sequence."""

    def draw(step: int, numbers: int) -> Tensor:
        return uniform(stream_key(seed, "sample", step), rows, numbers, torch.float64)

    if language.family == "ar":
        return _left_to_right(model, language, tokens, frozen, draw, config)

    def predict(digits: Tensor, where: Tensor) -> Tensor:
        return model(language.inputs(digits), lambda hidden, weight, bias: token_logits(hidden[where], weight, bias))

    start = sampler.start(tokens, frozen, language.codec)
    return sampler.sample(
        start, frozen, codec=language.codec, predict=predict, draw=draw, config=language.sampler(config)
    )


def _left_to_right(
    model: nn.Module, language: Language, tokens: Tensor, frozen: Tensor, draw: sampler.Draw, config: SamplerConfig
) -> Samples:
    """An autoregressive model reads `first_token` before the text; the sampler sees it as a given token 0."""
    first = torch.full_like(tokens[:, :1], language.first_token)

    def predict(prefix: Tensor, where: Tensor) -> Tensor:
        return model(prefix, lambda hidden, weight, bias: token_logits(hidden[where], weight, bias))

    drawn = sampler.sample_left_to_right(
        torch.cat([first, tokens], dim=1),
        torch.cat([torch.ones_like(frozen[:, :1]), frozen], dim=1),
        predict=predict,
        draw=draw,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    return Samples(
        tokens=drawn.tokens[:, 1:],
        evaluations=drawn.evaluations,
        steps=drawn.steps,
        idle_steps=drawn.idle_steps,
        batch_idle_steps=drawn.batch_idle_steps,
    )


def token_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 logits [P, V] of hidden states [P, D]."""
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def write_samples(path: Path, samples: Samples, tokenizer: TextTokenizer, *, language: Language) -> None:
    """The texts as markdown, with what they cost and the idle ratio beside its prediction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{samples.evaluations} network evaluations in {samples.steps} steps."]
    if language.family != "ar":
        units = samples.tokens.shape[1] * language.codec.granularity
        predicted = predicted_idle_ratio(samples.steps, units)
        lines.append(f"Idle ratio {samples.idle_ratio:.4f} (predicted for ancestral sampling: {predicted:.4f}).")
    for i, tokens in enumerate(samples.tokens.tolist()):
        text = "\n".join(f"> {line}" for line in tokenizer.decode(tokens).splitlines() or [""])
        lines += ["", f"Sample {i}:", "", text]
    path.write_text("\n".join(lines) + "\n")

"""The next tokens of many texts at once, by the samplers of `llm.diffusion`: one block of every text per call.

B texts, L positions, l digits per token, V tokens. Each row holds a prompt, the room behind it, and padding, so that a
token has the same position, and the same noise, as if its text were alone. Positions to come are hidden from a masked
model and unknown to a causal one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from launch.random import stream_key, uniform
from llm.diffusion import sampler
from llm.diffusion.sampler import Draw, SamplerConfig
from llm.evals.models import Scorable
from llm.generate import token_logits


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is known of B texts. Text i: `prompt[i]` given tokens, then room for `room[i]`."""

    tokens: Tensor  # int64 [B, L]; 0 where nothing is known
    prompt: Tensor  # int64 [B]
    room: Tensor  # int64 [B]
    noise: Tensor  # int64 [B], what the noise of each text is called

    @staticmethod
    def of(
        prompts: Sequence[Sequence[int]], room: Sequence[int], noise: Sequence[int], device: torch.device
    ) -> "Texts":
        length = max(len(prompt) + more for prompt, more in zip(prompts, room, strict=True))
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return Texts(
            tokens=tokens.to(device),
            prompt=torch.tensor([len(prompt) for prompt in prompts], device=device),
            room=torch.tensor(room, device=device),
            noise=torch.tensor(noise, device=device),
        )

    def numbers(self) -> Tensor:
        """int64 [B, L]: which token behind the prompt stands at each position, below 0 in the prompt."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) - self.prompt.unsqueeze(1)

    def select(self, rows: Tensor) -> "Texts":
        """Those of the texts `rows` int64 [K]."""
        return replace(
            self, tokens=self.tokens[rows], prompt=self.prompt[rows], room=self.room[rows], noise=self.noise[rows]
        )


class MaskedFiller:
    """Blocks from a masked model, which sees the prompt, earlier blocks, and the room behind as masks (LLaDA)."""

    def __init__(self, scorable: Scorable, config: SamplerConfig, seed: int) -> None:
        assert scorable.language is not None
        self.model, self.language, self.config, self.seed = scorable.model, scorable.language, config, seed

    def fill(self, texts: Texts, begin: int, end: int) -> Tensor:
        """int64 [B, L]: with tokens begin..end - 1 behind each prompt filled in, as far as there is room."""
        language, codec, number = self.language, self.language.codec, texts.numbers()
        room = number < texts.room.unsqueeze(1)
        now = room & (number >= begin) & (number < end)
        later = (room & (number >= end)).unsqueeze(-1)
        real = None if bool(room.all()) else room

        def predict(digits: Tensor, where: Tensor) -> Tensor:
            inputs = language.inputs(digits.masked_fill(later, codec.mask_symbol))
            return self.model(inputs, lambda h, w, b: token_logits(h[where], w, b), attention_mask=real)

        start = codec.encode(texts.tokens).masked_fill(now.unsqueeze(-1), codec.mask_symbol)
        drawn = sampler.sample(
            start,
            (number < 0) | ~room,  # guidance hides the prompt, and not the blocks written so far
            codec=codec,
            predict=predict,
            draw=_draw(self.seed, begin, texts),
            config=self.config,
        )
        return torch.where(now, drawn.tokens, texts.tokens)

    def select(self, rows: Tensor) -> None:
        """Nothing is remembered of the rows."""


class CausalFiller:
    """Tokens left to right. Rows whose prompt goes on are read along until theirs ends, so that none is padded."""

    def __init__(self, scorable: Scorable, config: SamplerConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.reader = _Recomputing(scorable.model) if scorable.language else _Remembering(scorable.model)

    def fill(self, texts: Texts, begin: int, end: int) -> Tensor:
        """As `MaskedFiller.fill`."""
        number = texts.numbers()
        now = (number >= begin) & (number < torch.clamp(texts.room, max=end).unsqueeze(1))
        last = int(now.any(0).nonzero().max()) + 1
        drawn = sampler.sample_left_to_right(
            texts.tokens[:, :last],
            ~now[:, :last],
            predict=self.reader,
            draw=_draw(self.seed, 0, texts),
            temperature=self.config.temperature,
            top_p=self.config.top_p,
        )
        return torch.cat([drawn.tokens, texts.tokens[:, last:]], dim=1)

    def select(self, rows: Tensor) -> None:
        """The next call has only these rows int64 [K]."""
        self.reader.select(rows)


class _Recomputing:
    """The last logits of our own models, from the whole prefix of the rows that ask."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, prefix: Tensor, where: Tensor) -> Tensor:
        return self.model(prefix[where[:, -1]], lambda h, w, b: token_logits(h[:, -1], w, b))

    def select(self, rows: Tensor) -> None: ...


class _Remembering:
    """The last logits of a Hugging Face model with its keys and values kept for as long as the prefix goes on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.remembers = not getattr(model, "_is_stateful", False)  # state-space models cannot go back to a prefix
        self.past: Any = None
        self.seen: Tensor | None = None  # int64 [B, i], what the keys and values are of

    def __call__(self, prefix: Tensor, where: Tensor) -> Tensor:
        if not self.remembers:
            return self.model(input_ids=prefix, use_cache=False).logits[where[:, -1], -1].float()
        known = self._rewind(prefix)
        out = self.model(input_ids=prefix[:, known:], past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.seen = out.past_key_values, prefix
        return out.logits[where[:, -1], -1].float()

    def _rewind(self, prefix: Tensor) -> int:
        """Forget what is no beginning of `prefix` in every row; how many positions are left, at least one fewer."""
        from transformers import DynamicCache

        if self.seen is None:
            self.past = DynamicCache()
            return 0
        shared = min(self.seen.shape[1], prefix.shape[1] - 1)
        same = (self.seen[:, :shared] == prefix[:, :shared]).all(0)
        known = int(same.long().cumprod(0).sum())
        if known < self.seen.shape[1]:
            self.past.crop(known - self.seen.shape[1])
        return known

    def select(self, rows: Tensor) -> None:
        if self.seen is not None:
            self.seen = self.seen[rows]
            self.past.batch_select_indices(rows)


def _draw(seed: int, begin: int, texts: Texts) -> Draw:
    """Noise by (seed, text, block, step, position): the numbers of a position do not depend on the padding."""
    length = texts.tokens.shape[1]

    def draw(step: int, count: int) -> Tensor:
        """The sampler's plan asks for L numbers of tokens and then L * l of their digits; anything else for L or 1."""
        first = uniform(stream_key(seed, "generate", begin, step), texts.noise, min(count, length), torch.float64)
        if count <= length:
            return first
        rest = uniform(stream_key(seed, "generate", begin, step, "digits"), texts.noise, count - length, torch.float64)
        return torch.cat([first, rest], dim=1)

    return draw

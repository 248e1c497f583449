"""How good a model with fewer experts still is: likelihood, agreement with the original, and texts of its own.

Multiple choice hides what merging does to generation (REAP, arXiv 2510.13999, section 5), so texts are judged, too: the
merged model writes, the original reads. Nats per token of the original alone would reward repetition, so the entropy of
the texts' own words and the share of repeated 4-grams stand beside it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from launch.random import stream_key, uniform


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Of held-out blocks, each token given the earlier ones of its block; the first has none and is not counted."""

    nats_per_token: float
    standard_error: float  # over blocks
    divergence: float  # mean KL(original || this model) of the next token, nats; 0 for the original itself
    agreement: float  # share of tokens where both expect the same next token

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Of sampled continuations of held-out beginnings."""

    nats_under_original: float  # per token, as the original model reads what this one wrote
    standard_error: float  # over continuations
    unigram_entropy: float  # mean over continuations, nats
    repeated_4grams: float  # share of 4-grams that stood in the same continuation before


@torch.no_grad()
def judge_likelihood(model: Any, original: Any, blocks: Tensor, *, batch: int = 4) -> Likelihood:
    """blocks: int64 [N, L]."""
    nats, divergences, agreements = [], [], []
    for tokens in blocks.split(batch):
        own = model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)  # [B, L-1, V]
        reference = (
            own if model is original else original(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        )
        nats.append(-own.gather(-1, tokens[:, 1:, None])[..., 0].double().mean(-1))
        divergences.append(
            functional.kl_div(own, reference, reduction="none", log_target=True).sum(-1).double().mean(-1)
        )
        agreements.append((own.argmax(-1) == reference.argmax(-1)).double().mean(-1))
    values = torch.cat(nats)
    return Likelihood(
        nats_per_token=float(values.mean()),
        standard_error=_standard_error(values),
        divergence=float(torch.cat(divergences).mean()),
        agreement=float(torch.cat(agreements).mean()),
    )


@torch.no_grad()
def judge_generation(
    model: Any, original: Any, beginnings: Tensor, *, length: int, seed: int = 0, batch: int = 16
) -> Generation:
    """beginnings: int64 [N, P]; each is continued by `length` tokens at temperature 1.

    The uniform number that a token is drawn with belongs to its place and beginning, so that models which agree write
    the same text and differences between models are less noisy.
    """
    texts = torch.cat(list(_continuations(model, beginnings, length, seed, batch)))  # [N, length]
    nats = []
    for start, tokens in zip(beginnings.split(batch), texts.split(batch), strict=True):
        read = original(torch.cat([start, tokens], 1), use_cache=False).logits[:, start.shape[1] - 1 : -1]
        nats.append(-read.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double().mean(-1))
    values = torch.cat(nats)
    rows = texts.tolist()
    return Generation(
        nats_under_original=float(values.mean()),
        standard_error=_standard_error(values),
        unigram_entropy=sum(map(unigram_entropy, rows)) / len(rows),
        repeated_4grams=sum(map(repeated_4grams, rows)) / len(rows),
    )


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Of the distribution of a text's own tokens, nats."""
    counts = torch.tensor(list(Counter(tokens).values()), dtype=torch.float64)
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def repeated_4grams(tokens: Sequence[int]) -> float:
    """Share of 4-grams that are not the first of their kind in the text."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _continuations(model: Any, beginnings: Tensor, length: int, seed: int, batch: int) -> Iterator[Tensor]:
    number = 0
    for tokens in beginnings.split(batch):
        rows = torch.arange(number, number + len(tokens))
        number += len(tokens)
        draws = uniform(stream_key(seed, "moe-generation"), rows, length, torch.float64).to(
            tokens.device
        )  # [B, length]
        found, cache, inputs = [], None, tokens
        for place in range(length):
            out = model(inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cumulative = out.logits[:, -1].double().softmax(-1).cumsum(-1)
            inputs = torch.searchsorted(cumulative, draws[:, place, None] * cumulative[:, -1:], right=True)
            inputs = inputs.clamp_max(cumulative.shape[1] - 1)
            found.append(inputs)
        yield torch.cat(found, 1)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

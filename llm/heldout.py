"""Valid bounds of a trained model on held-out blocks, over all ranks, with their standard errors.

The noise of a block belongs to its index, so the figures depend neither on the number of processes nor on the batch,
and every evaluation of a run sees the same masks: differences between them are differences of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from launch.random import stream_key, uniform
from launch.runtime import Runtime
from llm.config import EvaluationConfig
from llm.data.shards import TokenDataset, read_manifest
from llm.diffusion import likelihood
from llm.diffusion.likelihood import Draws, Estimate, JointLoss
from llm.generate import Language


class Blocks(Protocol):
    """What a model is judged on: a `TokenDataset`, or other blocks of tokens in its manner."""

    def __len__(self) -> int: ...

    @property
    def bytes_per_token(self) -> float: ...

    def blocks(self, indices: np.ndarray) -> Tensor:
        """int64 [n, L]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """One estimate on one data set."""

    estimate: Estimate | JointLoss

    def figures(self, bytes_per_token: float) -> dict[str, float]:
        """Metrics by name; a joint loss has no bits and no perplexity."""
        found = self.estimate
        if isinstance(found, JointLoss):
            return {found.name: found.loss_per_token, f"{found.name}_se": found.standard_error / found.num_tokens}
        return {
            found.name: found.nats_per_token,
            f"{found.name}_se": found.standard_error / found.num_tokens,
            f"{found.name}_bits_per_byte": found.bits_per_byte(round(found.num_tokens * bytes_per_token)),
        }


def heldout_blocks(dataset: Blocks, limit: int | None) -> np.ndarray:
    """int64 [N]: indices of at most `limit` blocks, spread evenly over the split."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return np.arange(count, dtype=np.int64) * len(dataset) // count


def evaluate_bounds(
    model: nn.Module,
    language: Language,
    dataset: Blocks,
    blocks: np.ndarray,
    names: Sequence[str],
    config: EvaluationConfig,
    runtime: Runtime,
    progress: Callable[[int], Any] = lambda _: None,
) -> list[Result]:
    """Collective. The estimates called `names` on these blocks, each rank taking every world_size-th of them."""
    mine = blocks[runtime.rank :: runtime.world_size]
    moments = torch.zeros(len(names), 7, dtype=torch.float64)
    estimators = [""] * len(names)
    for start in range(0, len(mine), config.batch):
        indices = mine[start : start + config.batch]
        tokens = dataset.blocks(indices).to(runtime.device)
        for i, name in enumerate(names):
            draws = _evaluate(name, model, language, tokens, torch.from_numpy(indices), config)
            moments[i] += draws.moments().cpu()
            estimators[i] = draws.estimator
        progress(len(indices))
    totals = runtime.all_reduce_sum(moments)
    estimators = max(runtime.gather(estimators))  # a rank without a block does not know them
    return [
        Result(estimate=likelihood.estimate(name, estimator, draws=_draws(name, config), moments=total))
        for name, estimator, total in zip(names, estimators, totals, strict=True)
    ]


def token_counts(train: TokenDataset, limit: int = 20_000_000) -> np.ndarray:
    """float64 [V]: how often each token occurs in the first `limit` training tokens, plus one."""
    size = train.manifest.vocab_size
    counts = np.ones(size)
    for start in range(0, min(len(train), max(1, limit // train.block_length)), 1024):
        stop = min(start + 1024, len(train))
        counts += np.bincount(train.blocks(np.arange(start, stop)).flatten().numpy(), minlength=size)
    return counts


def unigram_nats(train: TokenDataset, heldout: TokenDataset, blocks: np.ndarray) -> float:
    """Nats per held-out token under the token frequencies of the training set.

    What a model knows that knows no context: every trained model should be well below it.
    """
    counts = token_counts(train)
    log_probs = np.log(counts) - np.log(counts.sum())
    seen = np.bincount(heldout.blocks(blocks).flatten().numpy(), minlength=len(counts))
    return float(-(seen * log_probs).sum() / seen.sum())


def unigram_baseline(train: Path, heldout: TokenDataset, limit: int | None) -> float | None:
    """`unigram_nats` by the data set in folder `train`; None if it has no training split of the same tokenizer here."""
    if not (train / "manifest.json").exists():
        return None
    manifest = read_manifest(train)
    if manifest.tokenizer_sha256 != heldout.manifest.tokenizer_sha256 or not manifest.splits["train"]:
        return None
    counted = TokenDataset.open(train, "train", heldout.block_length)
    return unigram_nats(counted, heldout, heldout_blocks(heldout, limit))


def _evaluate(
    name: str, model: nn.Module, language: Language, tokens: Tensor, indices: Tensor, config: EvaluationConfig
) -> Draws:
    codec, predict = language.codec, language.predictor(model)

    def noise(draw: int, count: int) -> Tensor:
        return uniform(stream_key(config.seed, "evaluate", name, draw), indices.to(tokens.device), count)

    if name == "nll_ar":
        return likelihood.nll_ar(model, tokens, bos=language.first_token)
    if name == "nll_chain":
        return likelihood.nll_chain(predict, tokens, codec, order=config.order)
    if name == "nelbo_steps":
        return likelihood.nelbo_steps(predict, tokens, codec, noise, steps=config.steps, draws=config.draws)
    function = {
        "nelbo_subtoken": likelihood.nelbo_subtoken,
        "nelbo_token": likelihood.nelbo_token,
        "nelbo_layered": likelihood.nelbo_layered,
        "loss_ce_joint": likelihood.loss_ce_joint,
    }[name]
    return function(predict, tokens, codec, noise, draws=config.draws)


def _draws(name: str, config: EvaluationConfig) -> int:
    return 1 if name in ("nll_ar", "nll_chain") else config.draws

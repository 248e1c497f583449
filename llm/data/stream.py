"""What a training task reads: weighted data sets in one global order, block by block.

The block at a global position is a pure function of the configuration: the mixture names the source and the position
within it, that source's own keyed order names the block. No state, so a resumed run needs only its step number.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from launch.data import GlobalOrder, Mixture
from launch.errors import ConfigError, DataError
from launch.random import stream_key
from llm.data.shards import Split, TokenDataset
from llm.data.tokenizers import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of a mixture."""

    path: str  # folder written by `unmask data prepare`
    weight: float = 1.0  # share of the training blocks, relative to the other sources

    def check(self, path: str) -> None:
        if not self.path:
            raise ConfigError(f"{path}.path is empty; name a folder written by `unmask data prepare`")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"{path}.weight is {self.weight}; it must be finite and above 0 (drop the source instead)"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens a run trains and evaluates on."""

    sources: tuple[SourceConfig, ...]  # data sets of the mixture; all made with one tokenizer
    block_length: int = 1024  # tokens of a training sequence, documents packed
    vocab_size: int | None = None  # tokens the model is built for; null: those of the data (plans without data need it)
    seed: int = 0  # of the order of the blocks
    verify: bool = False  # compare every shard with its sha256 before the run (reads all of it)

    def check(self, path: str) -> None:
        if not self.sources:
            raise ConfigError(f"{path}.sources is empty; name at least one folder, for example [{{path: data/prose}}]")
        if self.block_length < 1:
            raise ConfigError(f"{path}.block_length is {self.block_length}; it must be at least 1")


_WINDOW = 1024  # positions


class TrainingStream:
    """The training blocks of a run by global position; see launch.data for what a position is."""

    def __init__(self, config: DataConfig) -> None:
        self.datasets = open_datasets(config, "train")
        self.block_length = config.block_length
        self._seed = config.seed
        self._mixture = Mixture(tuple(source.weight for source in config.sources))
        self._orders = [
            GlobalOrder(len(dataset), stream_key(config.seed, "source", number))
            for number, dataset in enumerate(self.datasets)
        ]
        self._windows = [(-1, np.empty(0, dtype=np.int64))] * len(
            self.datasets
        )  # by source: (number, samples) read last

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.datasets[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return self.datasets[0].manifest.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal blocks at every position; a checkpoint keeps it."""
        facts = [self._seed, [str(s) for s in self._mixture.shares], [d.fingerprint for d in self.datasets]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def blocks(self, positions: ArrayLike) -> Tensor:
        """Token ids, int64 [n, L], at global `positions` (int [n])."""
        sources, local = self._mixture.locate(positions)
        out = np.empty((len(sources), self.block_length), dtype=np.int64)
        for number in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == number)
            out[rows] = self.datasets[number].blocks(self._samples(number, local[rows])).numpy()
        return torch.from_numpy(out)

    def _samples(self, source: int, positions: np.ndarray) -> np.ndarray:
        """The order of a source, worked out for a window of neighbours at a time: one costs as much as hundreds."""
        window = int(positions[0]) // _WINDOW
        if int(positions[-1]) // _WINDOW != window or not (np.diff(positions) > 0).all():
            return self._orders[source].samples(positions)
        if self._windows[source][0] != window:
            everyone = np.arange(window * _WINDOW, (window + 1) * _WINDOW)
            self._windows[source] = (window, self._orders[source].samples(everyone))
        return self._windows[source][1][positions - window * _WINDOW]

    def epochs(self, position: int) -> list[float]:
        """How often each data set has been read when the run has come to `position`."""
        counts = [float(position * share) for share in self._mixture.shares]
        return [count / len(dataset) for count, dataset in zip(counts, self.datasets, strict=True)]


def open_datasets(config: DataConfig, split: Split) -> list[TokenDataset]:
    """One split of every source; DataError if they were made with different tokenizers."""
    datasets = [
        TokenDataset.open(source.path, split, config.block_length, verify=config.verify) for source in config.sources
    ]
    first = datasets[0]
    for other in datasets[1:]:
        if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise DataError(
                f"{first.path} and {other.path} were made with different tokenizers ({first.manifest.vocab_size} and "
                f"{other.manifest.vocab_size} entries); prepare both with --tokenizer {first.path}"
            )
    return datasets

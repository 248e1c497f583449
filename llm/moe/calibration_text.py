"""Calibration text: blocks of token ids from documents, as HC-SMoE's code builds them from C4.

Documents are taken in an order that depends on the seed alone, put one behind the other and cut into blocks without
padding. Only documents of the training split are taken (llm/data/documents.py): held-out text of the same corpus stays
held out.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.errors import ConfigError, DataError
from llm.data.documents import Input, split_of
from llm.data.prepare import open_named
from llm.data.shards import Split
from llm.moe.files import save_tensors

_DOCUMENTS_PER_BLOCK = 16  # as the official code takes them, and more if they are short


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Which text calibrates."""

    data: tuple[
        str, ...
    ]  # files, folders or fetched corpora; "PATH=WEIGHT" mixes them, such as c4.jsonl=3 code.jsonl=1
    blocks: int = 32  # of text; 32 x 2048 tokens in the paper
    block_length: int = 2048  # tokens
    seed: int = 42  # of the order of documents
    text_field: str = "text"  # of JSON lines and Parquet

    def check(self, path: str = "calibration") -> None:
        if not self.data:
            raise ConfigError(f"{path}.data is empty: name a file, a folder, or a fetched corpus")
        for name, value in (("blocks", self.blocks), ("block_length", self.block_length)):
            if value < 1:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationText:
    """What went through a model, kept beside its statistics."""

    blocks: Tensor  # int64 [blocks, block_length]
    sources: tuple[str, ...] = field(default=())  # of each block

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.blocks.numpy().astype("<i8").tobytes()).hexdigest()


def build_text(config: CalibrationConfig, tokenizer: Any, *, split: Split = "train") -> CalibrationText:
    """Blocks of all sources, in the order of the sources. DataError if one of them has too little text.

    split: of the documents; "test" is what models are judged by.
    """
    config.check()
    named = [_parse(text) for text in config.data]
    blocks, sources = [], []
    for (name, _), wanted in zip(named, _shares([weight for _, weight in named], config.blocks), strict=True):
        if wanted:
            opened = open_named(name, format=None, text_field=config.text_field)
            blocks.append(_blocks(opened, name, wanted, config, tokenizer, split))
            sources += [name] * wanted
    return CalibrationText(blocks=torch.from_numpy(np.concatenate(blocks)), sources=tuple(sources))


def save_text(text: CalibrationText, path: Path) -> None:
    save_tensors({"blocks": text.blocks}, path, metadata={"sources": "\n".join(text.sources)})


def load_text(path: Path) -> CalibrationText:
    try:
        with safe_open(path, framework="pt") as file:
            sources = tuple((file.metadata() or {}).get("sources", "").splitlines())
            return CalibrationText(blocks=file.get_tensor("blocks"), sources=sources)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); calibrate into another folder") from None


def _parse(text: str) -> tuple[str, float]:
    """("c4.jsonl", 3.0) of "c4.jsonl=3"; the weight is 1 if none is given."""
    name, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not (name and 0 < value < float("inf")):
        raise ConfigError(f"--data {text}: the weight of a source is a positive number, as in c4.jsonl=3")
    return name, value


def _shares(weights: Sequence[float], blocks: int) -> list[int]:
    """Blocks of each source, in proportion to its weight: largest remainders, ties to the first."""
    exact = np.array(weights) / sum(weights) * blocks
    found = np.floor(exact).astype(int)
    order = np.argsort(-(exact - found), kind="stable")
    found[order[: blocks - found.sum()]] += 1
    return found.tolist()


def _blocks(
    opened: Input, name: str, wanted: int, config: CalibrationConfig, tokenizer: Any, split: Split
) -> np.ndarray:
    """int64 [wanted, block_length]."""
    length, limit = config.block_length, wanted * _DOCUMENTS_PER_BLOCK
    while True:
        texts = _first_documents(opened, limit, config.seed, split)
        ids = [token for part in tokenizer(texts)["input_ids"] for token in part] if texts else []
        if len(ids) >= wanted * length:
            return np.array(ids[: wanted * length], dtype=np.int64).reshape(wanted, length)
        if len(texts) < limit:
            raise DataError(
                f"{name} gives {len(ids):,} tokens in {len(texts)} documents of its {split} split, and {wanted} blocks "
                f"of {length} need {wanted * length:,}; ask for fewer or shorter blocks, or add text"
            )
        limit *= 4


def _first_documents(opened: Input, limit: int, seed: int, split: Split) -> list[str]:
    """Texts of the first `limit` documents of a split, in the order of a hash of seed, source and key."""

    def rank(source: str, key: str) -> bytes:
        return hashlib.sha256(f"{seed}:{source}:{key}".encode()).digest()

    documents = opened.read(lambda _: None)
    ranked = (
        (rank(document.source, document.key), document.text)
        for document in documents
        if split_of(document.source, document.key) == split
    )
    return [text for _, text in heapq.nsmallest(limit, ranked)]

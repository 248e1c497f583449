"""Codes that say something: an order of the vocabulary in which neighbours are alike.

A token's digits are those of its place in the order (llm/diffusion/codec.py), so tokens whose places are close share
their first digits. `classes` sorts tokens into classes that foretell one another (word_classes.py), `similarity` orders
them by the contexts they stand in, `frequency` by how often they occur; all look at the training split only. The order
is a small JSON file, made once by `unmask data code` and named in `diffusion.code`; its hash is part of every
checkpoint, and run folders and exported folders carry a copy.
"""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from launch.errors import DataError
from llm.data.shards import TokenDataset
from llm.data.word_classes import by_classes

Kind = Literal["classes", "similarity", "frequency"]
FORMAT = "unmask-code-1"
COPY = "code.json"  # in a run folder and in an exported folder
_BLOCK = 4096  # tokens read at once
_DIMENSIONS = 32  # of the context vectors
_MOST_TOKENS = 20_000_000  # of the training split, from its start
_LARGEST_VOCABULARY = 8192  # bigrams are counted in a full table, of 0.5 GB then


def make_code(data: Path, kind: Kind, out: Path, *, granularity: int = 2) -> np.ndarray:
    """int64 [V]: the place of each token, also written to `out`. DataError if the file exists or the data is empty.

    granularity: digits per token of the models that will use it; of the kinds, only classes depends on it.
    """
    if out.exists():
        raise DataError(f"{out} exists, and models may have been trained with it; choose another --out")
    dataset = TokenDataset.open(data, "train", _BLOCK)
    size = dataset.manifest.vocab_size
    if size > _LARGEST_VOCABULARY:
        raise DataError(
            f"{data} has a vocabulary of {size} tokens, and codes are made for {_LARGEST_VOCABULARY} at most; use "
            "diffusion.shuffle or token ids, or prepare the data with a smaller tokenizer"
        )
    counts = neighbour_counts(dataset)
    match kind:
        case "classes":
            order = by_classes(
                counts, base=next(b for b in count(2) if b**granularity >= size), granularity=granularity
            )
        case "similarity":
            order = by_similarity(counts)
        case "frequency":
            order = np.argsort(-counts.sum(1), kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    content = {
        "format": FORMAT,
        "kind": kind,
        "tokenizer_sha256": dataset.manifest.tokenizer_sha256,
        "places": places.tolist(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.tmp")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(out)
    return places


def read_code(path: Path) -> np.ndarray:
    """int64 [V]: the place of each token. DataError unless `unmask data code` wrote the file."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return np.array(content["places"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"diffusion.code = {path} is no table of codes ({error}); write one: unmask data code DATA --out {path}"
        ) from None


def keep_code(path: Path, folder: Path) -> None:
    """Copy the table of a run into its folder, whole or not at all."""
    if path != folder / COPY:
        partial = folder / f"{COPY}.tmp"
        shutil.copyfile(path, partial)
        partial.replace(folder / COPY)


def neighbour_counts(dataset: TokenDataset) -> np.ndarray:
    """float64 [V, V]: how often token v stands right behind token u, in the training split."""
    size = dataset.manifest.vocab_size
    counts = np.zeros(size * size)
    for start in range(0, min(len(dataset), -(-_MOST_TOKENS // _BLOCK)), 64):
        tokens = dataset.blocks(np.arange(start, min(start + 64, len(dataset)))).numpy().astype(np.int64)
        counts += np.bincount((tokens[:, :-1] * size + tokens[:, 1:]).ravel(), minlength=size * size)
    if not counts.any():
        raise DataError(f"{dataset.path} has no training split of {_BLOCK} tokens; prepare more text")
    return counts.reshape(size, size)


def by_similarity(counts: np.ndarray) -> np.ndarray:
    """int64 [V]: the tokens in an order in which tokens of similar neighbours are close. counts: [V, V], u before v.

    Context vectors are the leading singular vectors of the positive pointwise mutual information with the neighbour on
    the left and on the right. The vocabulary is then halved again and again along the direction in which the vectors of
    the part at hand differ most; each half is turned so that its near end meets its neighbour.
    """
    vectors = context_vectors(counts)
    return _bisect(np.arange(len(vectors)), vectors)


def context_vectors(counts: np.ndarray) -> np.ndarray:
    """float64 [V, dimensions], deterministic."""
    smooth = counts + 0.1
    joint = smooth / smooth.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = np.maximum(np.log(joint / expected), 0.0)
    both_sides = np.concatenate([information, information.T], axis=1)  # right neighbours, left neighbours
    left, scale, _ = np.linalg.svd(both_sides, full_matrices=False)
    kept = min(_DIMENSIONS, len(scale))
    return left[:, :kept] * np.sqrt(scale[:kept])


def _bisect(members: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    if len(members) <= 2:
        return members
    centred = vectors[members] - vectors[members].mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    direction = direction * np.sign(direction[np.abs(direction).argmax()])  # a singular vector has no sign of its own
    ranked = members[np.argsort(centred @ direction, kind="stable")]
    half = len(ranked) // 2
    low, high = (_bisect(part, vectors) for part in (ranked[:half], ranked[half:]))
    ends = [(a, b) for a in (low, low[::-1]) for b in (high, high[::-1])]
    gaps = [np.linalg.norm(vectors[a[-1]] - vectors[b[0]]) for a, b in ends]
    return np.concatenate(ends[int(np.argmin(gaps))])

"""A token data set of invented text, written with the project's own writer: the benchmarks need no download."""

import random
from pathlib import Path

from llm.data.shards import DatasetWriter, Source
from llm.data.tokenizers import train_bpe


def write_corpus(folder: Path, *, vocab_size: int = 1024, documents: int = 600, seed: int = 0) -> Path:
    """Documents of words from a made-up dictionary, frequent words first (Zipf); about 0.3M tokens."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(4000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    texts = [" ".join(rng.choices(words, weights, k=250)) for _ in range(documents)]
    with DatasetWriter(folder, train_bpe(texts, vocab_size), shard_tokens=10**8) as writer:
        writer.add("train", "invented", texts)
        writer.add("validation", "invented", texts[:50])
        writer.publish([Source(name="invented")])
    return folder

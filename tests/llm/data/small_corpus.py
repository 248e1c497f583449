"""Small texts and data sets for the tests of this folder."""

import random
from pathlib import Path

from llm.data.shards import DatasetWriter, Manifest, Source
from llm.data.tokenizers import TextTokenizer

WORDS = ("the", "whale", "sea", "of", "and", "a", "ship", "sailed", "in", "Ahab", "white", "captain", "harpoon", "deck")


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Different short texts, one in ten with characters of several bytes."""
    rng = random.Random(seed)
    endings = [" caf\u00e9 \u9be8." if number % 10 == 0 else "." for number in range(count)]
    return [f"{n}: {' '.join(rng.choices(WORDS, k=rng.randint(3, 40)))}{end}" for n, end in enumerate(endings)]


def write(
    folder: Path, tokenizer: TextTokenizer, texts: dict[str, list[str]], *, shard_tokens: int = 10**6
) -> Manifest:
    """A data set whose train split holds `texts` by source."""
    with DatasetWriter(folder, tokenizer, shard_tokens=shard_tokens) as writer:
        for source, documents in texts.items():
            writer.add("train", source, documents)
        return writer.publish([Source(name=source) for source in texts])

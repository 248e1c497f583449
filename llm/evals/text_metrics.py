"""How varied texts are, and how close to other texts: figures that need no model once there are tokens and features.

A text is a sequence of tokens of one tokenizer (that of a judge, so that models with tokenizers of their own compare).
Everything here depends on how long the texts are and most of it on how many there are: compare sets of one shape only.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from launch.random import stream_key

BLEU_TEXTS = 64  # that are compared with each other: the value grows with their number, the work with its square
LEAST_FOR_MAUVE = 100  # texts on either side; the library makes a bucket of every ten


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error over independent values; nan for a single one)."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), error


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Nats: of the token frequencies within one text, 0 for a text of one token only, at most log(length).

    What published tables put beside generative perplexity (Zheng et al., arXiv 2409.02908).
    """
    counts = np.array(list(Counter(tokens).values()), dtype=np.float64)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log(shares)).sum()) + 0.0  # not -0.0


def repetition(tokens: Sequence[int], n: int) -> float:
    """Share of a text's n-grams that stood in it before, 1 - distinct / all (Welleck et al., arXiv 1908.04319: rep-n).

    0 for a text that is too short to have any.
    """
    found = list(_ngrams(tokens, n))
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def longest_repeat(tokens: Sequence[int]) -> int:
    """Tokens of the longest piece that stands at two places of a text; the two may overlap."""
    ids = np.asarray(tokens, dtype=np.int64)

    def repeats(n: int) -> bool:
        pieces = [ids[i : i + n].tobytes() for i in range(len(ids) - n + 1)]
        return len(set(pieces)) < len(pieces)

    low, high = 0, max(0, len(ids) - 1)  # what repeats at length n repeats at n - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle - 1)
    return low


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all texts together (Li et al., arXiv 1510.03055: distinct-n)."""
    found = [ngram for tokens in texts for ngram in _ngrams(tokens, n)]
    return len(set(found)) / max(1, len(found))


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4, 0 to 1, of each text against all others (Zhu et al., arXiv 1802.01886); 1 where all are the same.

    sacrebleu on words; orders longer than the text are left out. Two texts at least.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score / 100.0 for i, text in enumerate(texts)]
    return min(1.0, sum(scores) / len(scores))  # sacrebleu's own rounding may leave 1 + 1e-16


def mauve(features: np.ndarray, reference: np.ndarray, *, seed: int) -> float:
    """MAUVE, 0 to 1, of texts against reference texts, from their features float32 [N, D] and [M, D].

    mauve-text with its own settings (scaling 5, a bucket for every ten texts) on features that are given, so that it
    downloads nothing. Its value belongs to these features: published ones rest on those of GPT-2 large, and on
    thousands of texts (Pillutla et al., arXiv 2102.01454). ValueError below LEAST_FOR_MAUVE texts on either side.
    """
    if (fewest := min(len(features), len(reference))) < LEAST_FOR_MAUVE:
        raise ValueError(f"MAUVE of {fewest} texts says nothing; it needs {LEAST_FOR_MAUVE}, and published ones 5000")
    from mauve import compute_mauve

    seed = stream_key(seed, "mauve") % 2**31  # of k-means
    return min(1.0, float(compute_mauve(p_features=features, q_features=reference, seed=seed).mauve))


def _ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)

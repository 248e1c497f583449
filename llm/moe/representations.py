"""How far apart two experts of a layer are, by what stands for an expert: [E, E] distances from the calibration sums.

HC-SMoE (arXiv 2410.08589) compares mean outputs and, in its ablation, router logits and weights. A mean hides what
cancels: two experts may differ on every token and still have one mean. The token-wise distances see that.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from launch.errors import ConfigError, DataError
from llm.moe.choices import check_choice
from llm.moe.statistics import LayerStatistics

Array = NDArray[np.float64]

Representation = Literal[
    "output",  # |o_i - o_j| of the mean outputs over all tokens, whoever is selected: the paper's method
    "output_routed",  # the same of means over the tokens that select the expert (REAP, arXiv 2510.13999)
    "output_tokenwise",  # root of the mean over tokens of |E_i(x) - E_j(x)|^2
    "output_cosine",  # 1 - mean over tokens of cos(E_i(x), E_j(x)) (Sub-MoE, arXiv 2506.23266)
    "router_logits",  # root of the mean over tokens of (z_i(x) - z_j(x))^2
    "weights",  # |theta_i - theta_j| of all parameters
]


def distances(statistics: LayerStatistics, weight_gram: Tensor, representation: Representation) -> Array:
    """float64 [E, E]: symmetric, not negative, exactly 0 on the diagonal. weight_gram: [E, E], of `weight_gram`.

    Means are compared by direct differences. The other representations exist as inner products only, and
    |a|^2 + |b|^2 - 2 <a, b> keeps half the digits: experts closer than some 1e-8 of their norm look equal or nearly so.
    Router logits are divided by the root of T, which leaves every clustering as it is.

    ConfigError for another representation; DataError for sums over no tokens or sums that are not finite.
    """
    check_choice("representation", representation, Representation)
    tokens = float(statistics.tokens)
    if tokens == 0:
        raise DataError("the statistics of this layer are sums over 0 tokens; run `unmask moe calibrate` again")
    if representation == "output":
        found = _direct(statistics.mean_output)
    elif representation == "output_routed":
        found = _direct(routed_mean_output(statistics))
    elif representation == "output_tokenwise":
        found = _from_gram(statistics.output_gram / tokens)
    elif representation == "output_cosine":
        found = np.maximum(1 - _symmetric(statistics.cosine_sum / tokens), 0)
    elif representation == "router_logits":
        found = _from_gram(statistics.logit_gram / tokens)
    else:
        found = _from_gram(weight_gram)
    np.fill_diagonal(found, 0)
    finite = np.isfinite(found)
    if not finite.all():
        overflowed = np.flatnonzero(finite.sum(1) == 1).tolist()  # at no finite distance but to themselves
        raise DataError(
            f"distances by {representation} from experts {overflowed} are not finite: they overflowed on the "
            "calibration text; run `unmask moe calibrate` in float32"
        )
    return found


def combined(statistics: LayerStatistics, weight_gram: Tensor, shares: Mapping[Representation, float]) -> Array:
    """Weighted sum of the distances by several representations, each divided by its own mean between two experts.

    The official code takes a second representation in hierarchical clustering and ignores it. ConfigError unless every
    share is positive.
    """
    if not shares or min(shares.values()) <= 0:
        raise ConfigError(f"shares of representations = {dict(shares)}; give at least one, each above 0")
    total = np.zeros_like(weight_gram.numpy(), dtype=np.float64)
    for representation, share in shares.items():
        found = distances(statistics, weight_gram, representation)
        total += share * found / (mean_distance(found) or 1.0)  # all 0 where all experts are equal
    return total


def mean_distance(matrix: Array) -> float:
    """Mean over pairs of two experts, 0 for a single expert."""
    return float(squareform(matrix, checks=False).mean()) if len(matrix) > 1 else 0.0


def routed_mean_output(statistics: LayerStatistics) -> Tensor:
    """Mean output over the tokens that select an expert, float64 [E, d].

    An expert that no token selects is represented by its mean over all tokens, so that it is comparable at all.
    """
    count = statistics.selections[:, None]
    return (statistics.routed_output_sum / count.clamp_min(1)).where(count > 0, statistics.mean_output)


def router_similarity(statistics: LayerStatistics) -> Array:
    """(cos + 1) / 2 of two experts' router logits over all tokens, float64 [E, E], in [0, 1], 1 on the diagonal.

    What one-shot grouping goes by (M-SMoE, arXiv 2310.01334). Logits that are all 0 have cosine 0 with every other.
    """
    gram = _symmetric(statistics.logit_gram)
    norms = np.sqrt(gram.diagonal())
    scale = np.outer(norms, norms)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    similarity = (cosine.clip(-1, 1) + 1) / 2
    np.fill_diagonal(similarity, 1)
    return similarity


def _direct(vectors: Tensor) -> Array:
    """Euclidean distances of [E, d] by differences."""
    return squareform(pdist(vectors.double().numpy())) if len(vectors) > 1 else np.zeros((1, 1))


def _from_gram(gram: Tensor) -> Array:
    """Euclidean distances of vectors that are known by their inner products [E, E]."""
    inner = _symmetric(gram)
    squares = inner.diagonal()
    with np.errstate(invalid="ignore"):  # inf - inf: the caller names the expert
        return np.sqrt(np.maximum(squares[:, None] + squares - 2 * inner, 0))


def _symmetric(matrix: Tensor) -> Array:
    """A matrix product differs from its transpose in the last digits, which would decide ties."""
    full = matrix.double().numpy()
    return (full + full.T) / 2

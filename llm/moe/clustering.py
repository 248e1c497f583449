"""Which experts of a layer go together: agglomerative clustering of their distances (HC-SMoE, arXiv 2410.08589).

Written out, because equal distances are common among experts (copies, symmetric means) and an order among them has to
be promised: the pair with the smallest (first member of A, first member of B) merges first. `scipy.cluster.hierarchy`
promises none; where no two distances are equal it gives the same trees, and it is what the tests compare with.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from launch.errors import ConfigError
from llm.moe.choices import check_choice
from llm.moe.representations import Array, mean_distance

Labels = NDArray[np.int64]

Linkage = Literal[
    "single",
    "complete",
    "average",  # the paper's choice
    "ward",  # reads the distances as Euclidean
    "official_complete",  # what the published code does under the name of complete: the FARTHEST two clusters merge
    "official_ward",  # the published code's |A||B|/(|A|+|B|) times the distance of the means, not its square
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dendrogram:
    """All merges of a layer's experts, nearest first; the first E - r of them leave r clusters."""

    linkage: Linkage
    experts: int  # E
    rows: Array  # [E - fewest, 4], as in scipy: two clusters (E + s is the result of row s), their distance, the size
    mean_distance: float  # of two experts: the unit in which layers can be compared

    @property
    def fewest(self) -> int:
        """Clusters that are left after all merges: 1, or more where experts stay alone."""
        return self.experts - len(self.rows)


def dendrogram(distances: Array, linkage: Linkage, *, keep: Collection[int] = ()) -> Dendrogram:
    """The merges by distances [E, E]. Experts in `keep` merge with none.

    The distance of a new cluster to the others follows from those of its two parts (Lance and Williams 1967), so that
    O(E^3) comparisons in E vectorised steps do. Of equal distances the first in the order of (first member of A, first
    member of B) is taken. ConfigError for another linkage or a kept expert that there is not.
    """
    check_choice("linkage", linkage, Linkage)
    experts = len(distances)
    kept = kept_experts(keep, experts)
    between = np.array(distances, dtype=np.float64)  # clusters are at the row of their first member
    np.fill_diagonal(between, np.inf)
    between[kept] = between[:, kept] = np.inf
    sizes, names = np.ones(experts), np.arange(experts)
    rows = []
    for step in range(experts - len(kept) - 1):
        cost = _cost(linkage, between, sizes)
        a, b = divmod(int(cost.argmin()), experts)  # the first of equals; a < b, because the matrix is symmetric
        joined = _joined(linkage, between[a], between[b], between[a, b], sizes, sizes[a], sizes[b])
        joined[[a, b]] = np.inf
        rows.append((*sorted((names[a], names[b])), abs(cost[a, b]), sizes[a] + sizes[b]))
        between[a] = between[:, a] = joined
        between[b] = between[:, b] = np.inf
        sizes[a] += sizes[b]
        names[a] = experts + step
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    return Dendrogram(linkage=linkage, experts=experts, rows=table, mean_distance=mean_distance(distances))


def labels(dendrogram: Dendrogram, clusters: int) -> Labels:
    """The cluster of each expert, int64 [E], values 0..clusters-1 by first appearance; exactly `clusters` of them.

    The first E - clusters merges are replayed, so fewer clusters are always unions of more. ConfigError for a number
    that the layer cannot have.
    """
    check_clusters(clusters, dendrogram.experts, dendrogram.fewest)
    found = np.arange(dendrogram.experts)
    for step, row in enumerate(dendrogram.rows[: dendrogram.experts - clusters]):
        found[np.isin(found, row[:2])] = dendrogram.experts + step
    return by_first_appearance(found)


def centres(distances: Array, labels: Labels) -> Labels:
    """The expert nearest to the mean of each cluster, int64 [r]: the "dominant" one. Of equals the first.

    |v_j - mean|^2 is the mean over members i of d(i, j)^2, less a constant of the cluster, where distances are
    Euclidean; for others this is the member with the least squared distances to the rest.
    """
    found = []
    for cluster in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels == cluster)
        spread = np.square(distances[np.ix_(members, members)]).sum(0)
        found.append(members[spread.argmin()])
    return np.array(found, dtype=np.int64)


def check_clusters(clusters: int, experts: int, fewest: int = 1) -> None:
    """ConfigError unless a layer of `experts` experts can have that many clusters."""
    if not fewest <= clusters <= experts:
        alone = "" if fewest == 1 else f", {fewest - 1} or more of which stay alone"
        raise ConfigError(
            f"{clusters} clusters of a layer's {experts} experts{alone}: ask for a number from {fewest} to {experts}"
        )


def kept_experts(keep: Collection[int], experts: int) -> list[int]:
    """The experts that stay alone, in order. ConfigError for one that the layer does not have."""
    beyond = sorted(j for j in keep if not 0 <= j < experts)
    if beyond:
        raise ConfigError(f"expert {beyond[0]} cannot stay alone: name experts from 0 to {experts - 1}")
    return sorted(set(keep))


def by_first_appearance(names: Labels) -> Labels:
    """Names of clusters to 0, 1, ... in the order in which experts show them."""
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse].astype(np.int64)


def _cost(linkage: Linkage, between: Array, sizes: Array) -> Array:
    """[E, E]: the smallest entry merges next; infinite where there is no pair."""
    if linkage == "official_complete":
        return np.where(np.isinf(between), np.inf, -between)
    if linkage == "official_ward":
        return between * np.outer(sizes, sizes) / np.add.outer(sizes, sizes)
    return between


def _joined(linkage: Linkage, to_a: Array, to_b: Array, apart: float, n: Array, n_a: float, n_b: float) -> Array:
    """[E]: distances of clusters of sizes n to the union of a and b, which are `apart`."""
    if linkage == "single":
        return np.minimum(to_a, to_b)
    if linkage in ("complete", "official_complete"):
        return np.maximum(to_a, to_b)
    if linkage == "average":
        return (n_a * to_a + n_b * to_b) / (n_a + n_b)
    if linkage == "ward":
        square = ((n_a + n) * to_a**2 + (n_b + n) * to_b**2 - n * apart**2) / (n_a + n_b + n)
    else:  # of the means
        square = (n_a * to_a**2 + n_b * to_b**2) / (n_a + n_b) - n_a * n_b * (apart / (n_a + n_b)) ** 2
    return np.sqrt(np.maximum(square, 0))

"""Trees against scipy where no two distances are equal, and a loop over pairs of clusters where some are."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform

from launch.config import from_dict
from launch.errors import ConfigError
from llm.moe.clustering import Linkage, centres, dendrogram, labels

LINKAGES = ("single", "complete", "average", "ward")
OFFICIAL = ("official_complete", "official_ward")
EQUAL = np.ones((5, 5)) - np.eye(5)


def points(count, seed=0, width=3):
    return np.random.default_rng(seed).normal(size=(count, width))


def between(vectors):
    return squareform(pdist(vectors))


def replayed(rows, experts, clusters):
    """The partition after the first merges of scipy's rows, as a set of sets."""
    parts = {j: frozenset([j]) for j in range(experts)}
    for step, row in enumerate(rows[: experts - clusters]):
        parts[experts + step] = parts.pop(int(row[0])) | parts.pop(int(row[1]))
    return set(parts.values())


def partition(found):
    return {frozenset(np.flatnonzero(found == c).tolist()) for c in range(found.max() + 1)}


def slow_merges(distances, linkage, vectors=None):
    """Clusters that merge, by the definition of each linkage over all pairs of members: lists of (A, B), A first."""

    def distance(a, b):
        pairs = distances[np.ix_(a, b)]
        if linkage in ("single", "complete", "average"):
            return {"single": pairs.min, "complete": pairs.max, "average": pairs.mean}[linkage]()
        if linkage == "official_complete":
            return -pairs.max()
        apart = np.linalg.norm(vectors[a].mean(0) - vectors[b].mean(0))
        weight = len(a) * len(b) / (len(a) + len(b))
        return weight * apart if linkage == "official_ward" else np.sqrt(2 * weight) * apart

    clusters, merges = [[j] for j in range(len(distances))], []
    while len(clusters) > 1:
        a, b = min(combinations(clusters, 2), key=lambda pair: distance(*pair))  # the first of equals
        merges.append((sorted(a), sorted(b)))
        clusters = sorted([*(c for c in clusters if c not in (a, b)), a + b], key=min)
    return merges


def merges_of(tree):
    members = {j: [j] for j in range(tree.experts)}
    found = []
    for step, row in enumerate(tree.rows):
        a, b = sorted((members[int(row[0])], members[int(row[1])]))
        found.append((a, b))
        members[tree.experts + step] = sorted(a + b)
    return found


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("count", [2, 3, 5, 8, 13, 32, 64])
def test_the_tree_is_scipys_where_no_distances_are_equal(count, linkage):
    for seed in range(5):
        distances = between(points(count, seed))
        tree, expected = dendrogram(distances, linkage), hierarchy.linkage(squareform(distances), linkage)
        np.testing.assert_allclose(tree.rows[:, 2:], expected[:, 2:], rtol=1e-9)
        for clusters in range(1, count + 1):
            assert partition(labels(tree, clusters)) == replayed(expected, count, clusters)
    assert hierarchy.is_valid_linkage(tree.rows)


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_the_tree_is_that_of_the_definition(linkage):
    for seed in range(10):
        vectors = points(9, seed)
        assert merges_of(dendrogram(between(vectors), linkage)) == slow_merges(between(vectors), linkage, vectors)


@pytest.mark.parametrize("linkage", ["single", "complete", "official_complete"])
def test_of_equal_distances_the_pair_with_the_first_members_merges_first(linkage):
    """Distances of 1, 2 and 3 only: nearly every step is a tie, and minima and maxima keep them exact."""
    for seed in range(20):
        distances = np.random.default_rng(seed).integers(1, 4, size=(9, 9)).astype(float)
        distances = np.triu(distances, 1) + np.triu(distances, 1).T
        assert merges_of(dendrogram(distances, linkage)) == slow_merges(distances, linkage)


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_equal_distances_still_leave_as_many_clusters_as_were_asked_for(linkage):
    tree = dendrogram(EQUAL, linkage)
    for clusters in range(1, 6):
        assert labels(tree, clusters).max() + 1 == clusters
    assert labels(tree, 4).tolist() == [0, 0, 1, 2, 3]
    flat = hierarchy.fcluster(tree.rows, 4, "maxclust")
    assert linkage not in ("single", "complete", "average") or flat.max() == 1  # why scipy's cut is not used


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_copies_merge_first_at_height_0(linkage):
    vectors = points(4)[[0, 1, 0, 2, 3, 1]]
    tree = dendrogram(between(vectors), linkage)
    if linkage != "official_complete":  # which merges the farthest
        assert labels(tree, 4).tolist() == [0, 1, 0, 2, 3, 1]
        assert tree.rows[:2, 2].tolist() == [0, 0]
    assert np.isfinite(tree.rows).all()


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_fewer_clusters_are_unions_of_more_from_all_alone_to_one(linkage):
    tree = dendrogram(between(points(10)), linkage)
    assert labels(tree, 10).tolist() == list(range(10))
    assert labels(tree, 1).tolist() == [0] * 10
    for clusters in range(1, 10):
        fewer, more = partition(labels(tree, clusters)), partition(labels(tree, clusters + 1))
        assert all(any(small <= large for large in fewer) for small in more)


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_the_order_of_experts_permutes_the_clusters(linkage):
    vectors, order = points(8, seed=3), np.array([3, 0, 6, 2, 7, 5, 1, 4])
    before, after = dendrogram(between(vectors), linkage), dendrogram(between(vectors[order]), linkage)
    for clusters in range(1, 9):
        expected = labels(before, clusters)[order]
        assert partition(labels(after, clusters)) == partition(expected)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_clusters_are_numbered_by_the_first_expert_that_is_in_them(linkage):
    for clusters in range(1, 13):
        found = labels(dendrogram(between(points(12)), linkage), clusters)
        assert found.dtype == np.int64
        assert list(dict.fromkeys(found.tolist())) == list(range(clusters))


def test_complete_linkage_of_the_published_code_merges_the_farthest_experts():
    distances = between(np.array([[0.0], [1.0], [10.0]]))
    assert labels(dendrogram(distances, "complete"), 2).tolist() == [0, 0, 1]
    assert labels(dendrogram(distances, "official_complete"), 2).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("linkage", "count", "width", "agree"),
    [
        ("complete", 8, 3, 0),
        ("complete", 16, 3, 0),
        ("complete", 60, 32, 0),
        ("ward", 8, 3, 46),
        ("ward", 16, 3, 18),
        ("ward", 60, 32, 0),
    ],
)
def test_how_often_the_published_linkages_agree_with_the_textbook(linkage, count, width, agree):
    found = 0
    for seed in range(60):
        distances = between(points(count, seed, width))
        usual, published = (
            labels(dendrogram(distances, name), count // 2) for name in (linkage, f"official_{linkage}")
        )
        found += (usual == published).all()
    assert found == agree


@pytest.mark.parametrize("linkage", (*LINKAGES, *OFFICIAL))
def test_kept_experts_stay_alone_and_the_others_cluster_as_if_without_them(linkage):
    vectors = points(9, seed=4)
    tree, others = dendrogram(between(vectors), linkage, keep={1, 6}), [0, 2, 3, 4, 5, 7, 8]
    without = dendrogram(between(vectors[others]), linkage)
    assert tree.fewest == 3
    for clusters in range(3, 10):
        found = labels(tree, clusters)
        assert np.bincount(found)[found[[1, 6]]].tolist() == [1, 1]
        assert partition(labels(without, clusters - 2)) == {
            frozenset(others.index(j) for j in part) for part in partition(found) if not part & {1, 6}
        }


def test_all_experts_can_be_kept():
    tree = dendrogram(EQUAL, "average", keep=range(5))
    assert tree.fewest == 5 and labels(tree, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_single_expert_is_a_cluster():
    assert labels(dendrogram(np.zeros((1, 1)), "average"), 1).tolist() == [0]


def test_the_centre_is_the_member_nearest_to_the_mean():
    for seed in range(10):
        vectors = points(20, seed)
        found = labels(dendrogram(between(vectors), "average"), 4)
        expected = []
        for cluster in range(4):
            members = np.flatnonzero(found == cluster)
            expected.append(members[np.linalg.norm(vectors[members] - vectors[members].mean(0), axis=1).argmin()])
        # Two members are equally far from their mean but for rounding: the first is promised.
        pairs = {c: np.flatnonzero(found == c)[0] for c in range(4) if (found == c).sum() == 2}
        expected = [pairs.get(c, e) for c, e in enumerate(expected)]
        assert centres(between(vectors), found).tolist() == expected


def test_of_equally_central_experts_the_first_is_the_centre():
    assert centres(EQUAL, np.array([0, 1, 1, 0, 1])).tolist() == [0, 1]


def test_unknown_linkages_are_refused_with_the_nearest_one_named():
    @dataclass(frozen=True, kw_only=True)
    class Merge:
        linkage: Linkage = "average"  # of clusters

    with pytest.raises(ConfigError, match=r"linkage = 'hirarchical' is unknown; expected one of 'single'"):
        dendrogram(EQUAL, "hirarchical")
    with pytest.raises(ConfigError, match=r"did you mean 'average'"):
        dendrogram(EQUAL, "avrage")
    with pytest.raises(ConfigError, match=r"linkage = 'hirarchical'.*expected one of 'single'"):
        from_dict(Merge, {"linkage": "hirarchical"}, source="merge.yaml")


@pytest.mark.parametrize("clusters", [0, -1, 6])
def test_a_number_of_clusters_that_cannot_be_is_refused_with_the_limits(clusters):
    with pytest.raises(
        ConfigError, match=rf"^{clusters} clusters of a layer's 5 experts: ask for a number from 1 to 5"
    ):
        labels(dendrogram(EQUAL, "average"), clusters)


def test_fewer_clusters_than_kept_experts_allow_are_refused():
    with pytest.raises(ConfigError, match=r"2 clusters .* 2 or more of which stay alone: ask for a number from 3 to 5"):
        labels(dendrogram(EQUAL, "average", keep=[0, 3]), 2)
    with pytest.raises(ConfigError, match=r"expert 7 cannot stay alone: name experts from 0 to 4"):
        dendrogram(EQUAL, "average", keep=[7])

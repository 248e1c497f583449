"""K-means by distances alone, against Lloyd's algorithm on vectors."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist, squareform

from launch.errors import ConfigError
from launch.random import stream_key
from llm.moe.clustering import by_first_appearance
from llm.moe.k_means import _seeds, k_means

KEY = stream_key(0, "k-means")


def points(count, seed=0, width=3):
    return np.random.default_rng(seed).normal(size=(count, width))


def between(vectors):
    return squareform(pdist(vectors))


def lloyd(vectors, clusters, assignment):
    """On vectors, from the first ones; None once a cluster is empty."""
    means, last = vectors[:clusters], None
    for _ in range(100):
        distances = cdist(vectors, means)
        if assignment == "official":
            distances = (distances - distances.mean(0)) / distances.std(0, ddof=1)
        found = distances.argmin(1)
        if len(set(found)) < clusters:
            return None
        if last is not None and (found == last).all():
            break
        last, means = found, np.stack([vectors[found == c].mean(0) for c in range(clusters)])
    return by_first_appearance(found)


@pytest.mark.parametrize("assignment", ["nearest", "official"])
@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_distances_alone_give_the_clusters_of_lloyd_on_vectors(clusters, assignment):
    compared = 0
    for seed in range(20):
        vectors = points(24, seed)
        expected = lloyd(vectors, clusters, assignment)
        if expected is not None:
            found = k_means(between(vectors), clusters, key=KEY, seeding="first", assignment=assignment)
            assert found.tolist() == expected.tolist()
            compared += 1
    assert compared > 5


def test_the_published_assignment_is_not_that_to_the_nearest_centre():
    vectors = points(24)
    found = [k_means(between(vectors), 3, key=KEY, seeding="first", assignment=a) for a in ("nearest", "official")]
    assert found[0].tolist() != found[1].tolist()


def test_planted_groups_are_found_from_far_apart_seeds():
    group = np.array([0, 1, 2, 0, 1, 2, 2, 1, 0])
    vectors = 100 * np.eye(3)[group] + 1e-3 * points(9)
    for seed in range(20):  # groups are so far apart that k-means++ never starts twice in one
        assert k_means(between(vectors), 3, key=stream_key(seed, "k-means")).tolist() == group.tolist()


def test_seeds_follow_the_key_and_nothing_else():
    distances = between(points(30))
    again = [k_means(distances, 6, key=KEY).tolist() for _ in range(2)]
    assert again[0] == again[1]
    assert len({tuple(k_means(distances, 6, key=stream_key(s, "k-means"))) for s in range(10)}) > 1


def test_k_means_plus_plus_seeds_by_squared_distance():
    """Of -1, 0 and 2, seeded at 0 (a third of the keys), the next seed is 2 with probability 4/5."""
    squares = between(np.array([[-1.0], [0.0], [2.0]])) ** 2
    seeds = [_seeds(squares, 2, "k_means++", stream_key(s, "k-means")).tolist() for s in range(900)]
    after_0 = [s[1] for s in seeds if s[0] == 1]
    assert len(after_0) == pytest.approx(300, abs=50)
    assert after_0.count(2) / len(after_0) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("seeding", ["k_means++", "first"])
def test_copies_still_give_as_many_clusters_as_were_asked_for(seeding):
    for distances in (np.zeros((5, 5)), between(points(2)[[0, 0, 0, 0, 1]])):
        for clusters in range(1, 6):
            found = k_means(distances, clusters, key=KEY, seeding=seeding)
            assert list(dict.fromkeys(found.tolist())) == list(range(clusters))


def test_a_cluster_that_loses_its_members_takes_the_farthest_expert():
    vectors = np.array([[0.0], [0.0], [1.5], [-6.0], [7.0]])  # the copy of the first seed is left without members
    assert k_means(between(vectors), 2, key=KEY, seeding="first").tolist() == [0, 0, 0, 0, 1]


def test_kept_experts_stay_alone():
    vectors = points(12, seed=2)
    found = k_means(between(vectors), 5, key=KEY, keep=[0, 7])
    assert np.bincount(found)[found[[0, 7]]].tolist() == [1, 1] and found.max() == 4
    rest = np.setdiff1d(np.arange(12), [0, 7])
    alone = k_means(between(vectors[rest]), 3, key=KEY)
    assert by_first_appearance(found[rest]).tolist() == alone.tolist()
    assert k_means(between(vectors), 12, key=KEY, keep=range(12)).tolist() == list(range(12))


def test_errors_name_the_value_and_the_remedy():
    distances = between(points(5))
    with pytest.raises(ConfigError, match=r"6 clusters of a layer's 5 experts: ask for a number from 1 to 5"):
        k_means(distances, 6, key=KEY)
    with pytest.raises(ConfigError, match=r"1 clusters .*: ask for a number from 2 to 5"):
        k_means(distances, 1, key=KEY, keep=[3])
    with pytest.raises(ConfigError, match=r"seeding = 'kmeans\+\+' is unknown.*did you mean 'k_means\+\+'"):
        k_means(distances, 2, key=KEY, seeding="kmeans++")
    with pytest.raises(ConfigError, match=r"assignment = 'offical'.*did you mean 'official'"):
        k_means(distances, 2, key=KEY, assignment="offical")

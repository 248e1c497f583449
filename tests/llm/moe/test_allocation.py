"""Clusters per layer, against rankings and merges by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from launch.errors import ConfigError
from llm.moe.allocation import allocate, by_dendrogram, by_frequency, by_official_threshold
from llm.moe.clustering import dendrogram

LAYERS, EXPERTS = 4, 8


def shares(seed=0, layers=LAYERS, experts=EXPERTS):
    return np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), size=layers)


def trees(scales=(1.0, 1.0, 1.0, 1.0), keep=(), linkage="average"):
    draw = np.random.default_rng(0)
    return [
        dendrogram(scale * squareform(pdist(draw.normal(size=(EXPERTS, 3)))), linkage, keep=keep) for scale in scales
    ]


def slow_by_frequency(frequencies, clusters):
    """Rank all pairs, take each layer's minimum, then the best of what is left."""
    layers, experts = frequencies.shape
    ranked = sorted((-frequencies[layer, j], layer, j) for layer in range(layers) for j in range(experts))
    fewest = max(1, int(np.ceil(clusters / 4)))
    taken = [pair for layer in range(layers) for pair in [p for p in ranked if p[1] == layer][:fewest]]
    rest = [pair for pair in ranked if pair not in taken]
    taken += rest[: clusters * layers - len(taken)]
    return [sum(layer == l for _, l, _ in taken) for layer in range(layers)]


def test_uniform_gives_every_layer_the_same():
    assert allocate("uniform", 6, shares()) == [6] * LAYERS


@pytest.mark.parametrize("clusters", range(1, EXPERTS + 1))
def test_frequencies_share_out_exactly_what_a_ranking_by_hand_does(clusters):
    for seed in range(10):
        found = allocate("frequency", clusters, shares(seed))
        assert found == slow_by_frequency(shares(seed), clusters)
        assert sum(found) == clusters * LAYERS
        assert max(1, clusters / 4) <= min(found) and max(found) <= EXPERTS


def test_of_equal_frequencies_the_earlier_layer_is_served_first():
    equal = np.full((3, 4), 0.25)
    assert by_frequency(equal, 2) == slow_by_frequency(equal, 2) == [4, 1, 1]


def test_a_layer_that_one_expert_serves_gives_its_clusters_to_the_others():
    skewed = np.array([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    assert by_frequency(skewed, 2) == [1, 3]


def test_every_layer_keeps_a_quarter_of_the_average_whatever_its_frequencies():
    rare = np.full((3, 16), 0.01)
    rare[0, 0] = 0.85  # one expert serves the first layer
    rare[1:] = 1 / 16
    assert by_frequency(rare, 7) == slow_by_frequency(rare, 7) == [2, 16, 3]


@pytest.mark.parametrize("alone", [2, 4])
def test_every_layer_keeps_a_cluster_for_each_protected_expert_and_one_for_the_others(alone):
    skewed = np.array([[0.97, 0.01, 0.01, 0.01, 0, 0], [1 / 6] * 6])
    assert allocate("frequency", 5, skewed, alone=alone) == ([4, 6] if alone == 2 else [5, 5])
    with pytest.raises(ConfigError, match=rf"{alone} clusters of a layer's 6 .* from {alone + 1} to 6"):
        allocate("uniform", alone, skewed, alone=alone)


def test_the_published_threshold_keeps_one_expert_too_many_and_may_empty_a_layer():
    assert sum(by_official_threshold(shares(), 3)) == 3 * LAYERS + 1
    assert allocate("official_frequency", 1, np.array([[0.6, 0.4, 0.0], [0.34, 0.33, 0.33]])) == [2, 1]
    assert by_official_threshold(np.array([[1 / 3] * 3, [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]), 1) == [0, 2, 2]


@pytest.mark.parametrize("linkage", ["average", "single", "official_complete", "official_ward"])
def test_the_lowest_merge_of_all_layers_comes_next(linkage):
    found = trees(linkage=linkage)
    for clusters in range(1, EXPERTS + 1):
        merged = [0] * LAYERS
        for _ in range((EXPERTS - clusters) * LAYERS):
            heights = [
                tree.rows[done, 2] / tree.mean_distance if done < EXPERTS - 1 else np.inf
                for tree, done in zip(found, merged, strict=True)
            ]
            merged[int(np.argmin(heights))] += 1
        assert by_dendrogram(found, clusters) == [EXPERTS - m for m in merged]
        assert allocate("dendrogram", clusters, shares(), found) == by_dendrogram(found, clusters)


def test_the_scale_of_a_layer_does_not_matter():
    assert by_dendrogram(trees(), 4) == by_dendrogram(trees(scales=(1.0, 8.0, 64.0, 512.0)), 4)


def test_a_layer_of_copies_merges_before_all_others():
    equal = dendrogram(np.zeros((EXPERTS, EXPERTS)), "average")
    assert by_dendrogram([trees()[0], equal], 5) == [8, 2]


def test_layers_with_kept_experts_stop_merging_where_only_those_are_left():
    found = by_dendrogram([*trees(keep=range(6))[:2], *trees()[2:]], 4)
    assert sum(found) == 16 and found[:2] == [7, 7]


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ConfigError, match=r"9 clusters of a layer's 8 experts: ask for a number from 1 to 8"):
        allocate("frequency", 9, shares())
    with pytest.raises(ConfigError, match=r"0 clusters"):
        allocate("uniform", 0, shares())
    with pytest.raises(ConfigError, match=r"allocation = 'frequencies' is unknown.*did you mean 'frequency'"):
        allocate("frequencies", 2, shares())
    with pytest.raises(ConfigError, match=r"k-means grows none; cluster by a linkage"):
        allocate("dendrogram", 2, shares())
    with pytest.raises(ConfigError, match=r"leaves layer 0 .* 0 clusters, and it needs 1; use 'frequency'"):
        allocate("official_frequency", 1, np.array([[1 / 3] * 3, [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]))
    with pytest.raises(ConfigError, match=r"2 clusters per layer are 8 in 4 layers.*at least 16; ask for 4 or more"):
        by_dendrogram(trees(keep=[0, 1, 2]), 2)

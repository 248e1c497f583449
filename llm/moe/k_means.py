"""K-means of a layer's experts by their distances alone: what the published command lines of HC-SMoE run.

Lloyd's algorithm needs no vectors: the squared distance of expert j to the mean of a cluster C is the mean of d(i, j)^2
over i in C, less half the mean of d(i, k)^2 over i and k in C (the relational dual of k-means; Hathaway, Davenport and
Bezdek 1989). So every representation serves; for distances that are not Euclidean it is the same recipe without the
geometry.
"""

from collections.abc import Collection
from typing import Literal

import numpy as np
import torch

from launch.random import uniform
from llm.moe.choices import check_choice
from llm.moe.clustering import Labels, by_first_appearance, check_clusters, kept_experts
from llm.moe.representations import Array

ITERATIONS = 100

Seeding = Literal[
    "k_means++",  # Arthur and Vassilvitskii 2007
    "first",  # experts 0..r-1
]
Assignment = Literal[
    "nearest",
    "official",  # the published code's: each centre's distances are standardised over experts first
]


def k_means(
    distances: Array,
    clusters: int,
    *,
    key: int,
    seeding: Seeding = "k_means++",
    assignment: Assignment = "nearest",
    keep: Collection[int] = (),
) -> Labels:
    """The cluster of each expert, int64 [E], values 0..clusters-1 by first appearance; exactly `clusters` of them.

    It ends when no expert moves, or after 100 rounds. A cluster that loses all members takes the expert farthest from
    its centre. key: of `launch.random`. Experts in `keep` are clusters of their own. ConfigError for another seeding or
    assignment, and for a number that the layer cannot have.
    """
    check_choice("seeding", seeding, Seeding)
    check_choice("assignment", assignment, Assignment)
    experts = len(distances)
    kept = kept_experts(keep, experts)
    check_clusters(clusters, experts, len(kept) + (len(kept) < experts))
    free = np.setdiff1d(np.arange(experts), kept)
    found = np.arange(experts) + experts  # names beyond all clusters
    if len(free):
        squares = np.square(distances[np.ix_(free, free)])
        found[free] = _lloyd(squares, _seeds(squares, clusters - len(kept), seeding, key), assignment)
    return by_first_appearance(found)


def _seeds(squares: Array, clusters: int, seeding: Seeding, key: int) -> Labels:
    """Experts [r] that start as centres, none twice."""
    experts = len(squares)
    if seeding == "first":
        return np.arange(clusters)
    draws = uniform(key, torch.arange(clusters), 1, torch.float64)[:, 0].tolist()
    seeds = [int(draws[0] * experts)]
    for draw in draws[1:]:
        nearest = squares[:, seeds].min(1)
        if not nearest.any():  # all others are copies of a seed
            seeds.append(int(np.setdiff1d(np.arange(experts), seeds)[0]))
            continue
        cumulative = nearest.cumsum()
        seeds.append(int(np.searchsorted(cumulative, draw * cumulative[-1], side="right")))
    return np.array(seeds)


def _lloyd(squares: Array, seeds: Labels, assignment: Assignment) -> Labels:
    clusters = len(seeds)
    to_centres = squares[:, seeds]  # [E, r]
    labels = np.full(len(squares), -1)
    for _ in range(ITERATIONS):
        found = _assigned(to_centres, assignment)
        _fill_empty(found, to_centres, clusters)
        if (found == labels).all():
            break
        labels = found
        shares = np.eye(clusters)[labels] / np.bincount(labels, minlength=clusters)  # [E, r]
        means = squares @ shares
        to_centres = np.maximum(means - (shares * means).sum(0) / 2, 0)
    return labels


def _assigned(to_centres: Array, assignment: Assignment) -> Labels:
    if assignment == "nearest":
        return to_centres.argmin(1)
    distance = np.sqrt(to_centres)
    deviation = distance.std(0, ddof=1) if len(distance) > 1 else np.zeros(distance.shape[1])
    return ((distance - distance.mean(0)) / np.where(deviation > 0, deviation, 1)).argmin(1)


def _fill_empty(labels: Labels, to_centres: Array, clusters: int) -> None:
    """Gives every cluster without members the expert farthest from its centre, of a cluster that can spare one."""
    for empty in np.setdiff1d(np.arange(clusters), labels):
        own = to_centres[np.arange(len(labels)), labels]
        spare = np.bincount(labels, minlength=clusters)[labels] > 1
        labels[np.where(spare, own, -1).argmax()] = empty

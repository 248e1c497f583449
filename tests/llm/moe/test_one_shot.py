import itertools

import numpy as np
import pytest
import torch

from launch.errors import ConfigError
from llm.moe.one_shot import one_shot_labels


def similarity(**pairs):
    """Symmetric [6, 6] with 1 on the diagonal: similarity(e02=0.9) of experts 0 and 2; 0 for pairs not given."""
    found = np.eye(6)
    for pair, value in pairs.items():
        i, j = int(pair[1]), int(pair[2])
        found[i, j] = found[j, i] = value
    return found


def dominant(*experts, count=6):
    return torch.isin(torch.arange(count), torch.tensor(experts))


def test_each_expert_joins_the_dominant_one_most_like_it():
    # 0 and 5 are nearest of all, but neither dominates.
    alike = similarity(e05=0.99, e01=0.6, e04=0.5, e21=0.1, e24=0.2, e31=0.9, e34=0.8, e51=0.3, e54=0.4)
    assert one_shot_labels(alike, dominant(1, 4)).tolist() == [0, 0, 1, 0, 1, 1]


def test_of_equally_similar_dominant_experts_the_first_is_joined():
    assert one_shot_labels(np.ones((6, 6)), dominant(2, 3)).tolist() == [0, 0, 0, 1, 0, 0]


def test_an_over_full_group_expels_its_least_similar_member_to_the_next_best_group():
    alike = similarity(e01=0.9, e02=0.8, e03=0.7, e41=0.6, e51=0.5, e42=0.4, e52=0.3, e43=0.2, e53=0.1)
    # 0, 4 and 5 like 1 best. At most 2 in a group: 0 stays, 4 goes to 2, 5 is expelled from there too and goes to 3.
    assert one_shot_labels(alike, dominant(1, 2, 3)).tolist() == [0, 0, 1, 2, 0, 0]
    assert one_shot_labels(alike, dominant(1, 2, 3), group_limit=2).tolist() == [0, 0, 1, 2, 1, 2]
    assert one_shot_labels(alike, dominant(1, 2, 3), group_limit=3).tolist() == [0, 0, 1, 2, 0, 1]


def test_no_expert_and_group_prefer_each_other_to_what_they_have_and_order_does_not_matter():
    source = np.random.default_rng(3)
    for _ in range(20):
        half = source.random((9, 9))
        alike = (half + half.T) / 2
        leaders, limit = [1, 4, 7], 3
        found = one_shot_labels(alike, dominant(*leaders, count=9), group_limit=limit).tolist()
        assert sorted(found) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for expert, label in itertools.product(set(range(9)) - set(leaders), range(3)):
            prefers = alike[expert, leaders[label]] > alike[expert, leaders[found[expert]]]
            others = [e for e in range(9) if found[e] == label and e not in leaders]
            wanted = any(alike[expert, leaders[label]] > alike[e, leaders[label]] for e in others)
            assert not (prefers and wanted)
        order = source.permutation(9)
        moved = torch.from_numpy(np.isin(order, leaders))
        again = one_shot_labels(alike[np.ix_(order, order)], moved, group_limit=limit).tolist()
        same = [[a == b for b in found] for a in found]
        assert [[again[i] == again[j] for j in np.argsort(order)] for i in np.argsort(order)] == same


def test_all_experts_dominant_is_no_grouping_and_one_is_one_group():
    assert one_shot_labels(similarity(), dominant(*range(6)), group_limit=1).tolist() == list(range(6))
    assert one_shot_labels(similarity(), dominant(3)).tolist() == [0] * 6


def test_groups_that_cannot_hold_all_experts_are_refused():
    with pytest.raises(ConfigError, match=r"2 dominant experts with groups of at most 2 cannot hold 6 experts"):
        one_shot_labels(similarity(), dominant(0, 1), group_limit=2)
    with pytest.raises(ConfigError, match="0 dominant experts"):
        one_shot_labels(similarity(), dominant())

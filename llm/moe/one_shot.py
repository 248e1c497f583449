"""One-shot grouping, after M-SMoE (arXiv 2310.01334): some experts dominate, every other joins the one most like it.

It is what HC-SMoE is compared with under that name: dominant experts by frequency (`saliency.keep`, within layers or
across them), similarity of router logits (`representations.router_similarity`), merged by frequency.
"""

import numpy as np
import torch
from torch import Tensor

from launch.errors import ConfigError
from llm.moe.representations import Array


def one_shot_labels(similarity: Array, dominant: Tensor, *, group_limit: int | None = None) -> Tensor:
    """Labels int64 [E]: c for the c-th dominant expert and those that join it. similarity: [E, E]; dominant: bool [E].

    Of equally similar dominant experts the first is joined. A group of more than `group_limit` experts, its dominant
    one included, expels the least similar, which goes to its next best group, as in the published code (4 there).
    That is deferred acceptance (Gale and Shapley, 1962): where no two similarities are equal, the outcome does not
    depend on the order in which experts come. ConfigError if the groups cannot hold all experts.
    """
    num_experts = len(dominant)
    leaders = dominant.nonzero()[:, 0].tolist()
    if not leaders or (group_limit is not None and group_limit * len(leaders) < num_experts):
        raise ConfigError(
            f"{len(leaders)} dominant experts with groups of at most {group_limit} cannot hold {num_experts} experts; "
            "keep more experts or raise the limit"
        )
    labels = torch.full((num_experts,), -1)
    labels[dominant] = torch.arange(len(leaders))
    groups: list[list[int]] = [[] for _ in leaders]
    preferences = np.argsort(-similarity[:, leaders], axis=1, kind="stable").tolist()
    waiting = [expert for expert in reversed(range(num_experts)) if expert not in leaders]
    while waiting:
        expert = waiting.pop()
        label = preferences[expert].pop(0)
        groups[label].append(expert)
        if group_limit is not None and len(groups[label]) >= group_limit:
            least = min(groups[label], key=lambda member: (similarity[leaders[label], member], -member))
            groups[label].remove(least)
            waiting.append(least)
    for label, group in enumerate(groups):
        labels[group] = label
    return labels

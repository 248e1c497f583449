"""Classes of tokens that foretell one another: an order of the vocabulary for codes whose first digits say something.

With coarse-to-fine masks the first digits of all tokens are predicted from one another before any token is known, so a
code is good if the class of a token tells much about the class of the next one. Brown clustering asks for just that
(Brown et al. 1992, "Class-based n-gram models of natural language", section 3): of all classes of the wanted sizes,
those whose bigrams have the greatest mutual information, searched by exchanging tokens as long as it grows.
"""

import numpy as np

_SWEEPS = 20  # over the vocabulary; prose settles in about 10


def by_classes(counts: np.ndarray, *, base: int, granularity: int) -> np.ndarray:
    """int64 [V]: the tokens in the order of their codes, so that the token at place n has the base-b digits of n.

    counts: [V, V], how often token v stands right behind token u. Digits are chosen one by one, from the first to the
    last but one, each dividing the classes of the digits before it. The last digit orders the tokens of a class by
    frequency. Deterministic; memory and time grow with V**2, so this is for vocabularies of some thousand tokens.
    """
    size = len(counts)
    frequency = counts.sum(0) + counts.sum(1)
    order = np.argsort(-frequency, kind="stable")
    place = np.arange(size)
    for depth in range(1, granularity):
        classes = place // base ** (granularity - depth)  # [V], of each place
        labels = np.empty(size, dtype=np.int64)
        labels[order] = _dealt(place // base ** (granularity - depth + 1), classes)
        _exchange(counts, labels, np.argsort(-frequency, kind="stable"), base)
        order = np.lexsort((-frequency, labels))
    return order


def class_information(counts: np.ndarray, labels: np.ndarray) -> float:
    """Nats that the class of a token tells about the class of the next one. labels: int64 [V]."""
    table = _class_bigrams(counts, labels)
    return _information(table) / table.sum()


def _dealt(parents: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The classes of each parent dealt out in turns over its places, so that each class gets of every frequency."""
    dealt = np.empty_like(classes)
    for parent in np.unique(parents):
        own = classes[parents == parent]
        turn = np.arange(len(own)) - np.searchsorted(own, own)  # the how-manieth place of its class
        dealt[parents == parent] = own[np.argsort(turn, kind="stable")]
    return dealt


def _exchange(counts: np.ndarray, labels: np.ndarray, visits: np.ndarray, base: int) -> None:
    """Improve `labels` in place until no token gains by changing places with the rarest token of a sister class."""
    table = _class_bigrams(counts, labels)
    best = _information(table)
    for _ in range(_SWEEPS):
        before = best
        for token in visits.tolist():
            home = int(labels[token])
            sisters = np.arange(home // base * base, min(home // base * base + base, len(table)))
            away = table - _share(counts, labels, token)
            goal = int(sisters[np.argmax(_gains(away, *_neighbours(counts, labels, token), sisters))])
            if goal == home:
                continue
            other = int(visits[np.flatnonzero(labels[visits] == goal)[-1]])
            labels[token], labels[other] = goal, home
            trial = _exchanged(counts, labels, table, token, other)
            found = _information(trial)
            if found > best * (1 + 1e-12):
                table, best = trial, found
            else:
                labels[token], labels[other] = home, goal
        if best == before:
            return


def _class_bigrams(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [K, K]: how often a token of class d stands right behind one of class c."""
    member = np.eye(labels.max() + 1)[labels]
    return member.T @ counts @ member


def _neighbours(counts: np.ndarray, labels: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray, float]:
    """How often each class stands right behind and right before `token`, [K] each, and how often it does itself."""
    size, itself = labels.max() + 1, counts[token, token]
    behind = np.bincount(labels, counts[token], size)
    before = np.bincount(labels, counts[:, token], size)
    behind[labels[token]] -= itself
    before[labels[token]] -= itself
    return behind, before, itself


def _share(counts: np.ndarray, labels: np.ndarray, token: int) -> np.ndarray:
    """float64 [K, K]: what `token` contributes to the table of class bigrams."""
    behind, before, itself = _neighbours(counts, labels, token)
    share = np.zeros((len(behind), len(behind)))
    share[labels[token]] += behind
    share[:, labels[token]] += before
    share[labels[token], labels[token]] += itself
    return share


def _exchanged(counts: np.ndarray, labels: np.ndarray, table: np.ndarray, token: int, other: int) -> np.ndarray:
    """The table of class bigrams once `token` and `other`, whose labels are exchanged already, have changed places."""
    goal, home = labels[token], labels[other]
    after = table.copy()
    for label, member in ((goal, labels == goal), (home, labels == home)):
        after[label] = np.bincount(labels, counts[member].sum(0), len(table))
        after[:, label] = np.bincount(labels, counts[:, member].sum(1), len(table))
    return after


def _gains(
    away: np.ndarray, behind: np.ndarray, before: np.ndarray, itself: float, candidates: np.ndarray
) -> np.ndarray:
    """What the information grows by when a token outside the table `away` joins each candidate, but for a constant."""
    rows, columns = away[candidates], away[:, candidates].T
    diagonal = away[candidates, candidates]
    gain = (_x_log_x(rows + behind) - _x_log_x(rows) + _x_log_x(columns + before) - _x_log_x(columns)).sum(1)
    for extra in (behind[candidates], before[candidates]):  # the cell that both lines cross was counted twice
        gain -= _x_log_x(diagonal + extra) - _x_log_x(diagonal)
    gain += _x_log_x(diagonal + behind[candidates] + before[candidates] + itself) - _x_log_x(diagonal)
    # Whichever class it joins, the token's neighbours add to the margins of their own classes: those are in the lines.
    for line, own in ((rows.sum(1) + before[candidates], behind), (columns.sum(1) + behind[candidates], before)):
        gain -= _x_log_x(line + own.sum() + itself) - _x_log_x(line)
    return gain


def _information(table: np.ndarray) -> float:
    """Mutual information of the two sides of a table of counts, times its sum."""
    marginals = _x_log_x(table.sum(0)).sum() + _x_log_x(table.sum(1)).sum()
    return float(_x_log_x(table).sum() - marginals + _x_log_x(table.sum()))


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.maximum(x, 1e-300))

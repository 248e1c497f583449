"""How figures of a study look, and how many families share them out among panels."""

import math
from collections.abc import Collection, Sequence
from typing import Any

# Okabe and Ito's palette without yellow, which colour-blind readers can tell apart; markers tell more apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F3C8D")
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "unmask",  # otherwise identifiers in the file are random
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}
GREYS = ("black", "#888888", "#888888", "#888888")  # of what the others are measured against


def group(families: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, families) of the panels: those that share the word before their first _, at most as many as there are
    colours; families that share it with no other are together."""
    kinds: dict[str, list[str]] = {}
    for family in families:
        kinds.setdefault(family.partition("_")[0], []).append(family)
    found = [(f"variants of {kind}", members) for kind, members in kinds.items() if len(members) > 1]
    alone = [members[0] for members in kinds.values() if len(members) == 1]
    found += [("others" if found and len(alone) > 1 else "", alone)] if alone else []
    most = len(COLOURS)
    return [(title, members[i : i + most]) for title, members in found for i in range(0, len(members), most)]


def columns(count: int) -> int:
    return min(4 if count > 9 else 3, count)


def panels(plt: Any, count: int, *, own: Collection[int] = ()) -> tuple[Any, list[Any]]:
    """A figure and its axes, which share x and y; those numbered in `own` have a y of their own."""
    across = columns(count)
    rows = math.ceil(count / across)
    wide, high = (3.0, 2.5) if count > 4 else (4.2, 3.8)
    figure = plt.figure(figsize=(wide * across + 0.6, high * rows + 0.6), layout="constrained")
    axes: list[Any] = []
    for i in range(count):
        alike = next((axis for j, axis in enumerate(axes) if j not in own), None)
        first = axes[0] if axes else None
        axes.append(figure.add_subplot(rows, across, i + 1, sharex=first, sharey=None if i in own else alike))
    return figure, axes


def legend_below(axis: Any) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def budget_ticks(plt: Any, axis: Any, budgets: Sequence[float]) -> None:
    """At the budgets themselves, unless they are many."""
    known = sorted(set(budgets))
    if len(known) <= 8:
        axis.set_xticks(known, [f"{b:.2g}".replace("e+", "e") for b in known])
        axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.set_xlim(known[0] / 1.25, known[-1] * 1.25)


def size_ticks(plt: Any, axis: Any) -> None:
    """30k, 1M: numbers of parameters at 1 and 3 of each decade."""
    axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    axis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())


def plain_ticks(plt: Any, axis: Any) -> None:
    """Losses span less than a decade, where a logarithmic axis would show next to no number."""
    axis.set_major_locator(plt.matplotlib.ticker.MaxNLocator(7))
    axis.set_major_formatter(plt.matplotlib.ticker.ScalarFormatter())
    axis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())


def style_of(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "",
        "markersize": 5,
        "linewidth": 1.2,
    }

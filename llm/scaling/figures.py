"""Figures of a scaling study, as PNG and SVG. The same data give the same bytes."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.scaling.bootstrap import interval
from llm.scaling.laws import Law, gather
from llm.scaling.point import Result

# Okabe and Ito's palette without yellow, which colour-blind readers can tell apart; markers and dashes tell more apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "unmask",  # otherwise identifiers in the file are random
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}
NATS = "nats per token"


def draw(laws: Sequence[Law], results: Sequence[Result], folder: Path) -> list[Path]:
    """isoflop, frontier, size and bounds in `folder`; returns the PNG files. Several laws of a family: all are in
    isoflop, the first in frontier and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = list({law.family: law for law in reversed(laws)}.values())[::-1]
    paths = []
    with plt.rc_context(rc=STYLE):
        for name, figure in (
            ("isoflop", isoflop(plt, laws)),
            ("frontier", frontier(plt, first)),
            ("size", size(plt, first)),
            ("bounds", bounds(plt, results)),
        ):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            plt.close(figure)
            paths.append(folder / f"{name}.png")
    return paths


def isoflop(plt: Any, laws: Sequence[Law]) -> Any:
    """Loss against N, a panel for each family and bound: points with 2 s.e., parabolas, minima (open if not sound)."""
    figure, axes = _panels(plt, len(laws))
    colour = plt.get_cmap("viridis")
    budgets = sorted({float(b) for law in laws for b in law.budgets})
    shades = {b: colour(0.9 * i / max(1, len(budgets) - 1)) for i, b in enumerate(budgets)}
    for axis, law in zip(axes, laws, strict=True):
        points = law.points
        for budget in law.budgets:
            rows = points.budgets == budget
            axis.errorbar(
                points.parameters[rows],
                points.loss[rows],
                yerr=2 * points.standard_error[rows],
                color=shades[float(budget)],
                fmt="o",
                markersize=3.5,
                linewidth=1,
            )
        for parabola in law.isoflop.parabolas:
            sizes = points.parameters[points.budgets == parabola.budget]
            line = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 100)
            axis.plot(line, parabola(line), color=shades[parabola.budget], linewidth=1)
            if parabola.flaw is None:
                axis.plot(parabola.parameters, parabola.loss, "*", color=shades[parabola.budget], markersize=9)
        axis.set(xscale="log", title=f"{law.family}: {law.bound}", xlabel="non-embedding parameters N", ylabel=NATS)
        _size_ticks(plt, axis.xaxis)
    handles = [plt.Line2D([], [], marker="o", color=shades[b], label=f"{b:.2g} FLOPs") for b in budgets]
    handles.append(plt.Line2D([], [], marker="*", color="grey", linestyle="", markersize=9, label="minimum"))
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def frontier(plt: Any, laws: Sequence[Law]) -> Any:
    """The smallest loss at each budget by its parabola, a power law, and the bootstrap's 95 % band."""
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for index, law in enumerate(laws):
        style = _style(index)
        label = f"{law.family} ({law.bound})"
        minima = law.isoflop.sound
        if not minima:
            best = [law.points.loss[law.points.budgets == b].min() for b in law.budgets]
            axis.plot(law.budgets, best, **{**style, "linestyle": ""}, fillstyle="none", label=f"{label}, best point")
            continue
        axis.plot([p.budget for p in minima], [p.loss for p in minima], **{**style, "linestyle": ""}, label=label)
        if law.isoflop.loss:
            _line(axis, law, law.isoflop.loss, column=-2, style=style)
    axis.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel=f"smallest loss ({NATS})")
    _plain_ticks(plt, axis.yaxis)
    axis.legend()
    return figure


def size(plt: Any, laws: Sequence[Law]) -> Any:
    """The size at each parabola's minimum, a power law, and the bootstrap's 95 % band."""
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for index, law in enumerate(laws):
        minima, style = law.isoflop.sound, _style(index)
        if not minima:
            continue
        exponent = f", a = {law.isoflop.parameters.exponent:.2f}" if law.isoflop.parameters else ""
        label = f"{law.family}{exponent}"
        axis.plot([p.budget for p in minima], [p.parameters for p in minima], **{**style, "linestyle": ""}, label=label)
        if law.isoflop.parameters:
            _line(axis, law, law.isoflop.parameters, column=-6, style=style)
    axis.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel="compute-optimal parameters N")
    _size_ticks(plt, axis.yaxis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure


def bounds(plt: Any, results: Sequence[Result]) -> Any:
    """The lowest value of every valid bound at each budget, a panel a family; the joint loss in a panel of its own."""
    families = list(dict.fromkeys(result.point.family for result in results))
    names = list(dict.fromkeys(name for result in results for name in sorted(result.estimates)))
    several = [f for f in families if len({n for r in results if r.point.family == f for n in r.estimates}) > 1]
    joint = [f for f in families if any(r.joint for r in results if r.point.family == f)]
    figure, axes = _panels(plt, max(1, len(several) + bool(joint)))
    spent = np.array([result.point.budget for result in results])
    for axis, family in zip(axes, several, strict=False):
        for name in names:
            if any(name in r.estimates for r in results if r.point.family == family):
                points = gather(results, family, name)
                budgets = np.unique(points.budgets)
                best = [
                    int(np.flatnonzero(points.budgets == b)[points.loss[points.budgets == b].argmin()]) for b in budgets
                ]
                style = {**_style(names.index(name)), "markersize": 4}
                beside = budgets * 1.03 ** names.index(name)  # error bars of equal values stay visible
                axis.errorbar(beside, points.loss[best], yerr=2 * points.standard_error[best], label=name, **style)
        axis.set_xlim(spent.min() / 2, spent.max() * 2)
        axis.set(xscale="log", title=family, xlabel="training compute C (FLOPs)", ylabel=f"lowest value ({NATS})")
        axis.legend()
    if joint:
        axis = axes[len(several)]
        axis.set_facecolor("#f2f2f2")
        for index, family in enumerate(joint):
            lowest: dict[float, float] = {}
            for result in results:
                if result.point.family == family and result.joint:
                    budget = result.point.budget
                    lowest[budget] = min(lowest.get(budget, math.inf), result.joint.nats_per_token)
            axis.plot(*zip(*sorted(lowest.items()), strict=True), **_style(index), label=family)
        axis.set(
            xscale="log", title="loss_ce_joint: no likelihood, not comparable", xlabel="training compute C (FLOPs)"
        )
        axis.set_ylabel("loss_ce_joint (nats)")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right lower", title="loss_ce_joint")
    return figure


def _line(axis: Any, law: Law, curve: Callable[[float], float], *, column: int, style: dict[str, Any]) -> None:
    """A power law over the measured budgets, with its band; `column` is that of its coefficient in the replicates."""
    line = np.geomspace(law.budgets.min(), law.budgets.max(), 50)
    axis.plot(line, [curve(c) for c in line], color=style["color"], linestyle=style["linestyle"], linewidth=1)
    coefficients, exponents = law.replicates[:, column, None], law.replicates[:, column + 1, None]
    values = coefficients * line**exponents
    band = [interval(curve(c), values[:, i]) for i, c in enumerate(line)]
    axis.fill_between(
        line, [b.low for b in band], [b.high for b in band], color=style["color"], alpha=0.15, linewidth=0
    )


def _panels(plt: Any, count: int) -> tuple[Any, list[Any]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for axis in grid.flat[count:]:
        axis.set_visible(False)
    return figure, list(grid.flat[:count])


def _size_ticks(plt: Any, axis: Any) -> None:
    """30k, 1M: numbers of parameters at 1 and 3 of each decade."""
    axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    axis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())


def _plain_ticks(plt: Any, axis: Any) -> None:
    """Losses span less than a decade, where a logarithmic axis would show next to no number."""
    axis.set_major_locator(plt.matplotlib.ticker.MaxNLocator(7))
    axis.set_major_formatter(plt.matplotlib.ticker.ScalarFormatter())
    axis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],  # another marker when colours come round
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.2,
    }

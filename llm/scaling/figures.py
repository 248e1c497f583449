"""Figures of a scaling study, as PNG and SVG. The same data give the same bytes.

Axes of nats hold valid bounds alone; the joint loss has a grey panel that says what it is not. An open marker stands
for what may lie beyond the measured sizes, and is drawn at the nearest of them, so that no guess stretches an axis.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.scaling.bootstrap import interval
from llm.scaling.difference import Comparison
from llm.scaling.isoflop import Parabola
from llm.scaling.laws import Law, gather
from llm.scaling.panels import (
    COLOURS,
    GREYS,
    MARKERS,
    STYLE,
    budget_ticks,
    columns,
    group,
    legend_below,
    panels,
    plain_ticks,
    size_ticks,
    style_of,
)
from llm.scaling.point import Result

NATS = "nats per token"
COMPUTE = "training compute C (FLOPs)"


def draw(laws: Sequence[Law], results: Sequence[Result], compared: Comparison, folder: Path) -> list[Path]:
    """Every figure that the points allow, in `folder`; returns the PNG files. Several laws of a family: all are in
    isoflop, the first in frontier and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reference = compared.reference
    laws = sorted(laws, key=lambda law: _rank(law, reference))
    first = list({law.family: law for law in reversed(laws)}.values())[::-1]
    paths = []
    with plt.rc_context(rc=STYLE):
        for name, figure in (
            ("difference", difference(plt, compared)),
            ("frontier", frontier(plt, first, reference)),
            ("isoflop", isoflop(plt, laws)),
            ("size", size(plt, first, reference)),
            ("bounds", bounds(plt, results, [law.family for law in first])),
        ):
            if figure is None:
                continue
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            plt.close(figure)
            paths.append(folder / f"{name}.png")
    return paths


def difference(plt: Any, compared: Comparison) -> Any:
    """Best size to best size at equal compute, less the reference, with the noise within which it does not count.

    Left-to-right families, which are far away, are in the tables only. None if no other is left.
    """
    shown = [one for one in compared.best if one.bound != "nll_ar"]
    families = sorted({one.family for one in shown})
    if not families:
        return None
    groups = group(families)
    figure, axes = panels(plt, len(groups))
    for axis, (title, names) in zip(axes, groups, strict=True):
        for index, name in enumerate(names):
            mine = [one for one in shown if one.family == name]
            x = [one.budget * 1.025 ** (index - (len(names) - 1) / 2) for one in mine]
            style, noise = style_of(index), [compared.noise(one) for one in mine]
            axis.errorbar(x, [one.value for one in mine], yerr=noise, fmt="none", color=style["color"], linewidth=1)
            for place, one in zip(x, mine, strict=True):
                axis.plot(place, one.value, **{**style, "fillstyle": "none" if one.edge else "full"})
            axis.plot([], [], **style, label=f"{name} ({mine[0].bound})")
        axis.axhline(0, color="black", linewidth=1)
        axis.set(xscale="log", title=title, xlabel=COMPUTE)
        budget_ticks(plt, axis, [one.budget for one in shown])
        legend_below(axis)
    axes[0].set_ylabel(f"loss less {compared.reference}'s ({NATS})")
    figure.suptitle(
        f"below 0: better than {compared.reference}; bars: 2 s.e. + spread of seeds; open: best size at an end"
    )
    return figure


def frontier(plt: Any, laws: Sequence[Law], reference: str) -> Any:
    """The smallest loss at each budget by its parabola, a power law if there is one, and the bootstrap's 95 % band."""

    def draw_family(axis: Any, law: Law, style: dict[str, Any]) -> None:
        parabolas = {parabola.budget: parabola for parabola in law.isoflop.parabolas}
        for budget in map(float, law.budgets):
            parabola = parabolas.get(budget)
            if parabola is None or parabola.flaw == "not convex":
                lowest = law.points.loss[law.points.budgets == budget].min()
                axis.plot(budget, lowest, **{**style, "marker": "x"})
            else:
                value, fill = parabola.loss, "full"
                if parabola.flaw is not None:
                    value, fill = float(parabola(np.array([_nearest(law, parabola)]))[0]), "none"
                axis.plot(budget, value, **style, fillstyle=fill)
        if law.isoflop.loss:
            _line(axis, law, law.isoflop.loss, column=-2, style=style)

    figure, axes = _grouped(plt, laws, reference, draw_family, lambda law: f"{law.family} ({law.bound})")
    axes[0].set_ylabel(f"smallest loss ({NATS})")
    axes[0].set_yscale("log")
    plain_ticks(plt, axes[0].yaxis)
    figure.suptitle("filled: minimum of a parabola; open: at the nearest measured size; x: best point, no parabola")
    return figure


def size(plt: Any, laws: Sequence[Law], reference: str) -> Any:
    """The size at each parabola's minimum, a power law, and the bootstrap's 95 % band. None without a parabola."""
    known = [law for law in laws if any(parabola.flaw != "not convex" for parabola in law.isoflop.parabolas)]
    if not known:
        return None

    def draw_family(axis: Any, law: Law, style: dict[str, Any]) -> None:
        for parabola in law.isoflop.parabolas:
            if parabola.flaw is None:
                axis.plot(parabola.budget, parabola.parameters, **style)
            elif parabola.flaw == "extrapolated":
                axis.plot(parabola.budget, _nearest(law, parabola), **style, fillstyle="none")
        if law.isoflop.parameters:
            _line(axis, law, law.isoflop.parameters, column=-6, style=style)

    def label(law: Law) -> str:
        return f"{law.family}, exponent {law.isoflop.parameters.exponent:.2f}" if law.isoflop.parameters else law.family

    figure, axes = _grouped(plt, known, reference, draw_family, label)
    axes[0].set_ylabel("compute-optimal parameters N")
    axes[0].set_yscale("log")
    size_ticks(plt, axes[0].yaxis)
    figure.suptitle("open: the optimum lies beyond the measured sizes, drawn at the nearest")
    return figure


def isoflop(plt: Any, laws: Sequence[Law]) -> Any:
    """Loss against N, a panel for each family and bound: points with 2 s.e., parabolas, and their minima.

    Left-to-right models have an axis of nats of their own: on that of the others all curves would be flat.
    """
    apart = {i for i, law in enumerate(laws) if law.bound == "nll_ar"}
    figure, axes = panels(plt, len(laws), own=apart if len(apart) < len(laws) else ())
    colour = plt.get_cmap("viridis")
    budgets = sorted({float(b) for law in laws for b in law.budgets})
    shades = {b: colour(0.9 * i / max(1, len(budgets) - 1)) for i, b in enumerate(budgets)}
    for axis, law in zip(axes, laws, strict=True):
        points = law.points
        for budget in map(float, law.budgets):
            rows = points.budgets == budget
            error = 2 * points.standard_error[rows]
            style = {"color": shades[budget], "fmt": "o", "markersize": 3, "linewidth": 1}
            axis.errorbar(points.parameters[rows], points.loss[rows], yerr=error, **style)
        for parabola in law.isoflop.parabolas:
            sizes = points.parameters[points.budgets == parabola.budget]
            line = np.geomspace(sizes.min(), sizes.max(), 60)
            shade = shades[parabola.budget]
            axis.plot(line, parabola(line), color=shade, linewidth=1)
            if parabola.flaw is None:
                axis.plot(parabola.parameters, parabola.loss, "*", color=shade, markersize=9)
            elif parabola.flaw == "extrapolated":
                end = np.array([_nearest(law, parabola)])
                towards = "<" if parabola.parameters < end[0] else ">"
                axis.plot(end, parabola(end), towards, color=shade, markersize=9, fillstyle="none")
        axis.set(xscale="log", title=f"{law.family} ({law.bound})")
        size_ticks(plt, axis.xaxis)
    figure.supxlabel("non-embedding parameters N")
    figure.supylabel(f"{NATS} (2 s.e.)")
    handles = [plt.Line2D([], [], marker="o", color=shades[b], label=f"{b:.2g} FLOPs") for b in budgets]
    for marker, fill, text in (("*", "full", "minimum"), (">", "none", "minimum beyond: extrapolated")):
        handles.append(
            plt.Line2D([], [], marker=marker, color="grey", linestyle="", markersize=8, fillstyle=fill, label=text)
        )
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 2 * columns(len(laws))))
    return figure


def bounds(plt: Any, results: Sequence[Result], families: Sequence[str]) -> Any:
    """The lowest value of every valid bound at each budget, a panel a family that has several; the joint loss in a
    panel of its own, with an axis of its own. None if there is neither."""
    names = sorted({name for result in results for name in result.estimates})
    several = [f for f in families if len({n for r in results if r.point.family == f for n in r.estimates}) > 1]
    joint = [f for f in families if any(r.joint for r in results if r.point.family == f)]
    if not several and not joint:
        return None
    figure, axes = panels(plt, len(several) + bool(joint), own={len(several)} if joint else ())
    spent = sorted({result.point.budget for result in results})
    for axis, family in zip(axes, several, strict=False):
        for index, name in enumerate(names):
            if any(name in r.estimates for r in results if r.point.family == family):
                points = gather(results, family, name)
                budgets = np.unique(points.budgets)
                best = [
                    int(np.flatnonzero(points.budgets == b)[points.loss[points.budgets == b].argmin()]) for b in budgets
                ]
                style = {**style_of(index), "markersize": 4, "linestyle": "-"}
                beside = budgets * 1.03**index  # error bars of equal values stay visible
                axis.errorbar(beside, points.loss[best], yerr=2 * points.standard_error[best], **style)
        axis.set(xscale="log", title=family)
        budget_ticks(plt, axis, spent)
    if joint:
        axis = axes[-1]
        axis.set_facecolor("#f2f2f2")
        for index, family in enumerate(joint):
            lowest: dict[float, float] = {}
            for result in results:
                if result.point.family == family and result.joint:
                    budget = result.point.budget
                    lowest[budget] = min(lowest.get(budget, math.inf), result.joint.nats_per_token)
            marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
            style = {**style_of(index), "marker": marker, "markersize": 4, "linestyle": "-"}
            axis.plot(*zip(*sorted(lowest.items()), strict=True), **style, label=family)
        axis.set(xscale="log", title="loss_ce_joint: no likelihood, not comparable", ylabel="loss_ce_joint")
        budget_ticks(plt, axis, spent)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=6.5)
    figure.supxlabel(COMPUTE)
    figure.supylabel(f"lowest value ({NATS}, 2 s.e.)" if several else "")
    known = [
        i for i, name in enumerate(names) if any(name in r.estimates for r in results if r.point.family in several)
    ]
    handles = [plt.Line2D([], [], **{**style_of(i), "linestyle": "-"}, label=names[i]) for i in known]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _grouped(
    plt: Any,
    laws: Sequence[Law],
    reference: str,
    draw_family: Callable[[Any, Law, dict[str, Any]], None],
    label: Callable[[Law], str],
) -> tuple[Any, list[Any]]:
    """A panel for each group of families, and in every one, in black and grey, what they are measured against."""
    against = [law for law in laws if _rank(law, reference)[0] < 2]
    by_name = {law.family: law for law in laws}
    groups = group([law.family for law in laws if law not in against]) or [("", [])]
    figure, axes = panels(plt, len(groups))
    for axis, (title, names) in zip(axes, groups, strict=True):
        shown = [
            (law, style_of(0) | {"color": shade, "marker": "h"}) for law, shade in zip(against, GREYS, strict=False)
        ]
        shown += [(by_name[name], style_of(index)) for index, name in enumerate(names)]
        for law, style in shown:
            draw_family(axis, law, style)
            axis.plot([], [], **style, label=label(law))
        axis.set(xscale="log", title=title, xlabel=COMPUTE)
        budget_ticks(plt, axis, sorted({float(b) for law in laws for b in law.budgets}))
        legend_below(axis)
    return figure, axes


def _rank(law: Law, reference: str) -> tuple[int, str]:
    """The reference first, then left-to-right models, then the others by name."""
    return (0 if law.family == reference else 1 if law.bound == "nll_ar" else 2), law.family


def _nearest(law: Law, parabola: Parabola) -> float:
    """The measured size of a budget that is closest to the minimum of its parabola."""
    sizes = law.points.parameters[law.points.budgets == parabola.budget]
    return float(np.clip(parabola.parameters, sizes.min(), sizes.max()))


def _line(axis: Any, law: Law, curve: Callable[[float], float], *, column: int, style: dict[str, Any]) -> None:
    """A power law over the measured budgets, with its band; `column` is that of its coefficient in the replicates."""
    line = np.geomspace(law.budgets.min(), law.budgets.max(), 50)
    axis.plot(line, [curve(c) for c in line], color=style["color"], linewidth=1)
    coefficients, exponents = law.replicates[:, column, None], law.replicates[:, column + 1, None]
    values = coefficients * line**exponents
    band = [interval(curve(c), values[:, i]) for i, c in enumerate(line)]
    low, high = [b.low for b in band], [b.high for b in band]
    axis.fill_between(line, low, high, color=style["color"], alpha=0.12, linewidth=0)

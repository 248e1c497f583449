"""Tables of a study, as Markdown. Losses are nats per token of held-out text, under valid bounds alone."""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from llm.diffusion.likelihood import ValidName
from llm.scaling.bootstrap import Frontier, compute_ratio, frontier_ratio, interval
from llm.scaling.difference import Comparison, Difference, Verdict, best_cell, cells
from llm.scaling.isoflop import FEWEST
from llm.scaling.laws import CostRule, Law, lack
from llm.scaling.point import Result
from llm.scaling.surface import allocate

SIX_ND = CostRule(constant=6.0)
Frontiers = Mapping[tuple[str, str], Frontier]  # by family and bound: the sound surfaces


def difference_words(found: Comparison) -> str:
    """Which families are better or worse than the reference, and how sure that is."""
    if not found.best:
        return f"No family shares a budget and a seed with {found.reference} yet: there is nothing to compare."
    spread = found.spread()
    known = "unknown, as no two seeds meet" if spread is None else f"{spread:.4f}"
    borrowed = sorted({one.family for one in found.best if found.spread(one.family) is None})
    words = [
        f"Loss less that of {found.reference} ({found.bound}), nats per token: below 0 is better. Every family has its "
        "best valid bound. A difference counts if it is beyond its noise: twice its standard error, which combines "
        "those of the two evaluations, plus the spread over seeds: the standard deviation of the difference of one "
        f"size, pooled over the sizes of the family, or over all families ({known}) where it has no two seeds yet.",
        f"Best size to best size:\n\n{_verdicts(found, found.best)}",
    ]
    if found.sizes:
        words.append(f"Size by size:\n\n{_verdicts(found, found.sizes)}")
    seeds: dict[int, set[float]] = {}
    for one in found.best:
        seeds.setdefault(one.seeds, set()).add(one.budget)
    counts = [f"{count} at {', '.join(f'{b:.3g}' for b in sorted(at))} FLOPs" for count, at in sorted(seeds.items())]
    words.append(
        f"Seeds that both have: {'; '.join(counts)}."
        + (f" With a borrowed spread: {', '.join(borrowed)}." if borrowed and spread is not None else "")
        + (" Without a spread, what counts here may be an accident of one seed." if spread is None else "")
    )
    if found.unmatched:
        words.append(f"Not compared, for {found.reference} has no such budget or seed: {', '.join(found.unmatched)}.")
    return "\n\n".join(words)


def best_difference_table(found: Comparison) -> str:
    """A line for each budget and family, the lowest difference of a budget first."""
    rows = []
    for one in found.best:
        size = one.size if one.edge is None else f"{one.size} ({one.edge})"
        cells = [f"{one.budget:.3g}", one.family, one.bound, size, one.reference_size, _difference(one)]
        spread = "-" if one.spread is None else f"{one.spread:.4f}"
        rows.append([*cells, str(one.seeds), spread, found.verdict(one)])
    head = ["FLOPs", "family", "bound", "best size", f"size of {found.reference}", f"less {found.reference} (s.e.)"]
    return table([*head, "seeds", "spread of seeds", "verdict"], rows)


def size_difference_table(found: Comparison) -> str:
    """A line for each family and size, a column for each budget."""
    budgets = sorted({one.budget for one in found.sizes})
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for one in found.sizes:
        seeds = f"; {one.seeds} seeds, {one.spread:.4f}" if one.spread is not None else ""
        cell = f"{one.value:+.4f} ({one.standard_error:.4f}{seeds})"
        mark = MARKS[found.verdict(one)]
        lines.setdefault((one.family, one.bound, one.size), {})[one.budget] = f"{cell} {mark}".rstrip()
    rows = [[*key, *(cells.get(budget, "-") for budget in budgets)] for key, cells in sorted(lines.items())]
    return table(["family", "bound", "size", *(f"{budget:.3g} FLOPs" for budget in budgets)], rows)


MARKS: dict[Verdict, str] = {"better": "**better**", "worse": "worse", "within noise": ""}
LABELS: dict[Verdict, str] = {
    "better": "better, beyond noise",
    "worse": "worse, beyond noise",
    "within noise": "not told apart",
}


def laws_table(laws: Sequence[Law]) -> str:
    """Exponents with intervals; a dash where there are too few sound minima."""
    rows = []
    for law in laws:
        fit, found = law.isoflop, []
        for column, power in ((-5, fit.parameters), (-3, fit.tokens), (-1, fit.loss)):
            found.append(_range(power.exponent, law.replicates[:, column], "{:.3f}") if power else "-")
        rows.append([law.family, law.bound, str(len(law.points)), f"{len(fit.sound)} of {len(law.budgets)}", *found])
    head = ["family", "bound", "points", "sound minima", "N_opt exponent", "D_opt exponent", "L_min exponent"]
    missing = [law.family for law in laws if law.isoflop.loss is None]
    words = f"Fewer than {FEWEST} sound minima, so no law: {', '.join(missing)}." if missing else ""
    return f"{table(head, rows)}\n\n{words}".rstrip()


def minima_table(laws: Sequence[Law]) -> str:
    """N_opt, D_opt and L_min of each budget, or why there are none: what is extrapolated is a limit and no value."""
    rows = []
    for law in laws:
        parabolas = {parabola.budget: parabola for parabola in law.isoflop.parabolas}
        count = len(law.budgets)
        for i, budget in enumerate(map(float, law.budgets)):
            sizes = np.unique(law.points.parameters[law.points.budgets == budget])
            found, cells_of = parabolas.get(budget), ["-", "-", "-"]
            if found is None:
                remark = f"{len(sizes)} of {FEWEST} sizes, no curve"
            elif found.flaw is None:
                values = (found.parameters, found.tokens, found.loss)
                forms = ("{:.3g}", "{:.3g}", "{:.4f}")
                columns = (i, count + i, 2 * count + i)
                cells_of = [_range(v, law.replicates[:, c], f) for v, c, f in zip(values, columns, forms, strict=True)]
                remark = "measured"
            else:
                remark = found.flaw
                if found.flaw == "extrapolated":
                    cells_of[0] = f"< {sizes[0]:.3g}" if found.parameters < sizes[0] else f"> {sizes[-1]:.3g}"
            rows.append([law.family, law.bound, f"{budget:.3g}", str(len(sizes)), *cells_of, remark])
    return table(["family", "bound", "FLOPs", "sizes", "N_opt (95 %)", "D_opt (95 %)", "L_min (95 %)", "minimum"], rows)


def surface_table(laws: Sequence[Law], rule: str) -> str:
    """Parameters of the surfaces, the best allocation of the largest budget, and whether to believe it."""
    rows = []
    for law in laws:
        fit = law.surface
        if fit is None:
            rows.append([law.family, law.bound, *["-"] * 7, f"no surface: {lack(law.points)}"])
            continue
        best = allocate(fit, float(law.budgets.max()), cost_of(law, rule))
        values = [f"{fit.irreducible:.4g}", f"{fit.size_scale:.4g}", f"{fit.token_scale:.4g}"]
        values += [f"{fit.size_exponent:.4f}", f"{fit.token_exponent:.4f}"]
        values += [f"{best.parameters:.4g}{'' if law.is_measured(best.parameters) else ' extrapolated'}"]
        rows.append(
            [law.family, law.bound, *values, f"{best.tokens:.4g}", fit.flaw or f"{fit.reached} of {fit.starts}"]
        )
    head = ["family", "bound", "E", "A", "B", "a", "b", "N* at the largest budget", "D*", "starts that agree"]
    return table(head, rows)


def ratio_table(laws: Sequence[Law], frontiers: Frontiers, reference: str, draws: int, seed: int) -> str:
    """C_B / C_A at the loss of family A, the reference, at each of its budgets."""
    base = next((law for law in laws if law.family == reference), None)
    rows, missing = [], []
    for law in laws:
        if base is None or law.family == reference:
            continue
        surfaces = frontiers.get(base.key), frontiers.get(law.key)
        for budget in map(float, base.budgets):
            if surfaces[0] is not None and surfaces[1] is not None:
                found, by = frontier_ratio(surfaces[0], surfaces[1], budget), "surfaces"
            elif base.isoflop.loss and law.isoflop.loss:
                found = compute_ratio(base.points, law.points, budget, draws=draws, seed=seed)
                by = "power laws, no floor"
            else:
                missing.append(law.family)
                break
            value = _interval(found.ratio.estimate, found.ratio.low, found.ratio.high, "{:.3g}")
            remark = "extrapolated" if found.extrapolated else "measured"
            rows.append([law.family, law.bound, f"{budget:.3g}", f"{found.loss:.4f}", value, remark, by])
    words = []
    if base is None or missing:
        needs = f"sound surfaces or {FEWEST} sound minima of both families"
        words = [f"No ratio to {reference}, which needs {needs}: {', '.join(missing) or 'all'}."]
    if not rows:
        return words[0] if words else f"No family but {reference}: no ratio."
    head = ["family", "bound", f"FLOPs of {reference}", f"loss of {reference}", "times the FLOPs (95 %)", "the loss is"]
    return "\n\n".join([table([*head, "by"], rows), *words])


def prediction_table(laws: Sequence[Law], frontiers: Frontiers, flops: float, rule: str) -> str:
    """N*, D*, steps and loss at a budget: by the surface where it is sound, by the power laws otherwise."""
    rows = []
    for law in laws:
        fit, frontier = law.isoflop, frontiers.get(law.key)
        if frontier is not None:
            cost = cost_of(law, rule)
            best = [allocate(surface, flops, cost) for surface in (frontier.surface, *frontier.replicates)]
            every = np.array([[one.parameters, one.tokens, one.loss] for one in best])
            values, draws, source = every[0], every[1:], "surface"
        elif fit.parameters and fit.tokens and fit.loss:
            values = np.array([fit.parameters(flops), fit.tokens(flops), fit.loss(flops)])
            draws, source = law.replicates[:, -6::2] * flops ** law.replicates[:, -5::2], "power laws"
        else:
            rows.append([law.family, law.bound, *["-"] * 5, f"no law: {lack(law.points) or 'minima are not sound'}"])
            continue
        size, tokens, loss = (
            _range(values[i], draws[:, i], form) for i, form in enumerate(("{:.3g}", "{:.3g}", "{:.4f}"))
        )
        steps = f"{max(1, round(values[1] / law.tokens_per_step)):,}"
        rows.append([law.family, law.bound, size, tokens, steps, loss, source, _beyond(law, flops, values[0])])
    head = ["family", "bound", "N* (95 %)", "D* (95 %)", "steps", "loss (95 %)", "by", "extrapolation"]
    return table(head, rows)


def _beyond(law: Law, flops: float, parameters: float) -> str:
    """How far a budget and its best size lie outside what was measured, as factors."""
    words = []
    for value, known, what in ((flops, law.budgets, "budget"), (parameters, law.points.parameters, "size")):
        if value > known.max():
            words.append(f"{value / known.max():.3g} times the largest {what}")
        elif value < known.min():
            words.append(f"{value / known.min():.3g} times the smallest {what}")
    return "extrapolated: " + ", ".join(words) if words else "none"


def best_table(laws: Sequence[Law], results: Sequence[Result]) -> str:
    """The size of the lowest mean over seeds at each budget, its standard error, and the spread of its seeds."""
    rows = []
    for law in laws:
        found = cells(results, law.family, law.bound)
        factor = next(r.bytes_per_token for r in results if r.point.family == law.family) * math.log(2)
        for budget in map(float, law.budgets):
            size, seeds = best_cell(found, budget)
            losses = [one.nats_per_token for one in seeds.values()]
            error = float(np.mean([one.standard_error for one in seeds.values()]))  # all seeds read the same text
            mean, count = float(np.mean(losses)), len(losses)
            spread = f"{np.std(losses, ddof=1):.4f} ({count} seeds)" if count > 1 else "one seed"
            cell = f"{size} of {sum(at == budget for at, _ in found)}"
            rows.append(
                [
                    law.family,
                    law.bound,
                    f"{budget:.3g}",
                    cell,
                    f"{mean:.4f} ({error:.4f})",
                    spread,
                    f"{mean / factor:.4f}",
                ]
            )
    return table(["family", "bound", "FLOPs", "best size", "loss (s.e.)", "spread of seeds", "bits/byte"], rows)


def points_table(results: Sequence[Result]) -> str:
    """Every point with every valid estimate; the joint loss in a last column that says what it is not."""
    names = [name for name in get_args(ValidName) if any(name in r.estimates for r in results)]
    rows = []
    for r in sorted(results, key=lambda r: (r.point.family, r.point.budget, r.point.parameters, r.point.seed)):
        found = [r.estimates.get(name) for name in names] + [r.joint]
        cells = [f"{e.nats_per_token:.4f} ({e.standard_error:.4f})" if e else "-" for e in found]
        p = r.point
        rows.append([p.name, f"{p.parameters:,}", f"{p.tokens:,}", f"{p.flops:.4g}", f"{p.flops_6nd:.4g}", *cells])
    return table(["point", "N", "D", "FLOPs", "6ND", *names, "loss_ce_joint (no likelihood)"], rows)


def _verdicts(found: Comparison, differences: Sequence[Difference]) -> str:
    """A list: better, worse and within noise, with families and budgets."""
    lines = []
    for verdict, words in LABELS.items():
        at: dict[str, list[float]] = {}
        for one in differences:
            if found.verdict(one) == verdict:
                at.setdefault(one.family, []).append(one.budget)
        families = [f"{name} at {', '.join(_counted(budgets))}" for name, budgets in sorted(at.items())]
        lines.append(f"- {words}: {'; '.join(families) or 'none'}.")
    return "\n".join(lines)


def _counted(budgets: Sequence[float]) -> list[str]:
    """1e+12, or 1e+12 (3 sizes)."""
    counts = {budget: list(budgets).count(budget) for budget in sorted(budgets)}
    return [f"{b:.3g}" if count == 1 else f"{b:.3g} ({count} sizes)" for b, count in counts.items()]


def _difference(one: Difference) -> str:
    return f"{one.value:+.4f} ({one.standard_error:.4f})"


def cost_of(law: Law, rule: str) -> CostRule:
    return law.cost if rule == "ladder" else SIX_ND


def _range(estimate: float, replicates: np.ndarray, form: str) -> str:
    found = interval(estimate, replicates)
    return _interval(estimate, found.low, found.high, form)


def _interval(estimate: float, low: float, high: float, form: str) -> str:
    known = math.isfinite(low) and math.isfinite(high)
    return (
        f"{form.format(estimate)} [{form.format(low)}, {form.format(high)}]"
        if known
        else f"{form.format(estimate)} [?]"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])

"""`unmask scaling fit STUDY` and `unmask scaling report STUDY`: laws, tables and figures of a scaling study.

STUDY is a folder of `unmask scaling run`, or a file with one result a line, such as `report` writes beside its figures,
from which they can be made again without the runs. Whatever a study lacks is said, not guessed: a family of too few
points has points and no curve.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from launch import config as configs
from launch.errors import ConfigError, DataError
from llm.diffusion.likelihood import ValidName
from llm.scaling import figures
from llm.scaling.bootstrap import bootstrap, compute_ratio, fit_frontier, frontier_ratio, interval, surface_values
from llm.scaling.laws import CostRule, Law, choose, fit_law
from llm.scaling.point import Result, read_results, write_json
from llm.scaling.surface import Method, allocate

SIX_ND = CostRule(constant=6.0)
SURFACE_DRAWS = 60  # refits of a surface take a tenth of a second


def main_fit(argv: Sequence[str]) -> int:
    """Fit, print a table, write fit.json beside the results."""
    parser = _parser("fit", "Fit parabolas, power laws and loss surfaces under valid bounds.")
    options = parser.parse_args(argv)
    _check_bounds(options.bound)
    results = read(options.study)
    laws = fit_all(results, options.bound, options.method, options.draws, options.seed)
    folder = options.study if options.study.is_dir() else options.study.parent
    rule = options.flops_rule
    write_json(folder / "fit.json", {"method": options.method, "laws": [to_json(law, rule) for law in laws]})
    print(f"{laws_table(laws)}\n\n{surface_table(laws, rule)}\n\n{folder / 'fit.json'}")
    return 0


def main_report(argv: Sequence[str]) -> int:
    """report.md, figures and results.jsonl in --out."""
    parser = _parser("report", "Tables and figures of a study.")
    parser.add_argument("--predict", type=float, metavar="FLOPS", help="predict size, tokens and loss at this budget")
    parser.add_argument("--against", metavar="FAMILY", help="of compute ratios; default: the family of the lowest loss")
    parser.add_argument("--out", type=Path, help="folder; default: STUDY/report, or that of the results file")
    options = parser.parse_args(argv)
    _check_bounds(options.bound)
    results = read(options.study)
    laws = fit_all(results, options.bound, options.method, options.draws, options.seed)
    folder = options.out or (options.study / "report" if options.study.is_dir() else options.study.parent)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(configs.to_dict(result), allow_nan=False) for result in results]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    pictures = figures.draw(laws, results, folder)
    sections = [
        ("Laws of the parabolas' minima", laws_table(laws)),
        ("Surface L(N, D) = E + A/N^a + B/D^b", surface_table(laws, options.flops_rule)),
        ("Compute for equal loss", ratio_table(laws, options.against, options.draws, options.seed)),
    ]
    if options.predict:
        sections.append((f"Prediction at {options.predict:.4g} FLOPs", prediction_table(laws, options)))
    sections += [("Best of each budget", best_table(laws, results)), ("All points", points_table(results))]
    sections += [("Figures", "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures))]
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections)
    report = folder / "report.md"
    report.write_text(
        f"# Scaling study\n\n{len(results)} points. Losses are nats per token (standard error).\n\n{body}\n"
    )
    print(f"{sections[0][1]}\n\n{report}")
    return 0


def read(study: Path) -> list[Result]:
    """Results of a study's folder or of a file with one a line. DataError names the line that is none."""
    if study.is_dir():
        return read_results(study)
    if not study.is_file():
        raise DataError(f"{study} is neither a study's folder nor a file of results; run `unmask scaling run` first")
    results = []
    for number, line in enumerate(study.read_text().splitlines(), 1):
        source = f"{study}, line {number}"
        try:
            results.append(configs.from_dict(Result, json.loads(line), source=source))
        except (ValueError, AttributeError, TypeError, ConfigError) as error:
            raise DataError(f"{source} is not a result: {error}; write the file with `unmask scaling report`") from None
    if not results:
        raise DataError(f"{study} is empty; write it with `unmask scaling report STUDY`")
    return results


def fit_all(
    results: Sequence[Result], bounds: Sequence[str] | None, method: Method, draws: int, seed: int
) -> list[Law]:
    """The laws that `choose` asks for."""
    pairs = choose(results, bounds)
    return [fit_law(results, family, bound, method=method, draws=draws, seed=seed) for family, bound in pairs]


def laws_table(laws: Sequence[Law]) -> str:
    """Exponents with intervals, and what could not be fitted."""
    rows, remarks = [], []
    for law in laws:
        fit, cells = law.isoflop, []
        for column, power in ((-5, fit.parameters), (-3, fit.tokens), (-1, fit.loss)):
            cells.append(_range(power.exponent, law.replicates[:, column], "{:.3f}") if power else "-")
        rows.append([law.family, law.bound, str(len(law.points)), f"{len(fit.sound)} of {len(law.budgets)}", *cells])
        drawn = {p.budget for p in fit.parabolas}
        flaws = [f"{p.budget:.3g} FLOPs: {p.flaw}" for p in fit.parabolas if p.flaw]
        flaws += [f"{b:.3g} FLOPs: fewer than 3 sizes, no curve" for b in law.budgets if b not in drawn]
        remarks += [f"- {law.family}, {law.bound}: {'; '.join(flaws)}"] if flaws else []
    head = ["family", "bound", "points", "sound minima", "N_opt exponent", "D_opt exponent", "L_min exponent"]
    return "\n".join([_table(head, rows), "", *remarks]).rstrip()


def surface_table(laws: Sequence[Law], rule: str) -> str:
    """Parameters of the surfaces, the best allocation of the largest budget, and whether to believe it."""
    rows = []
    for law in laws:
        fit = law.surface
        if fit is None:
            rows.append([law.family, law.bound, *["-"] * 7, "too few points"])
            continue
        best = allocate(fit, float(law.budgets.max()), _cost(law, rule))
        values = [f"{fit.irreducible:.4g}", f"{fit.size_scale:.4g}", f"{fit.token_scale:.4g}"]
        values += [f"{fit.size_exponent:.4f}", f"{fit.token_exponent:.4f}", f"{best.parameters:.4g}"]
        rows.append(
            [law.family, law.bound, *values, f"{best.tokens:.4g}", fit.flaw or f"{fit.reached} of {fit.starts}"]
        )
    head = ["family", "bound", "E", "A", "B", "a", "b", "N* at the largest budget", "D*", "starts that agree"]
    return _table(head, rows)


def ratio_table(laws: Sequence[Law], against: str | None, draws: int, seed: int) -> str:
    """C_B / C_A at the loss of family A at each of its budgets."""
    fitted = [law for law in laws if law.isoflop.loss]
    if against is not None and against not in {law.family for law in fitted}:
        names = ", ".join(law.family for law in fitted) or "none"
        raise ConfigError(f"--against {against} has no frontier of two sound minima; families that have one: {names}")
    if len(fitted) < 2:
        return "Too few families with sound minima at two budgets: no ratio."
    lowest = min(fitted, key=lambda law: min(p.loss for p in law.isoflop.sound))
    base = next((law for law in fitted if law.family == against), lowest)
    frontiers = {
        law.family: fit_frontier(law.points, law.surface, law.cost, draws=min(draws, SURFACE_DRAWS), seed=seed + i)
        for i, law in enumerate(fitted)
        if law.surface is not None and law.surface.flaw is None
    }
    rows = []
    for law in fitted:
        if law is not base:
            by = "surfaces" if {law.family, base.family} <= frontiers.keys() else "power laws, no floor"
            for parabola in base.isoflop.sound:
                if by == "surfaces":
                    found = frontier_ratio(frontiers[base.family], frontiers[law.family], parabola.budget)
                else:
                    found = compute_ratio(base.points, law.points, parabola.budget, draws=draws, seed=seed)
                value = _interval(found.ratio.estimate, found.ratio.low, found.ratio.high, "{:.3g}")
                remark = "extrapolated" if found.extrapolated else "measured"
                rows.append([law.family, law.bound, f"{parabola.budget:.3g}", f"{found.loss:.4f}", value, remark, by])
    head = [
        "family",
        "bound",
        f"FLOPs of {base.family}",
        f"loss ({base.bound})",
        "times the FLOPs (95 %)",
        "the loss is",
        "by",
    ]
    return _table(head, rows)


def prediction_table(laws: Sequence[Law], options: argparse.Namespace) -> str:
    """N*, D*, loss at a budget: by the surface where it is sound, by the power laws otherwise."""
    flops, rows = options.predict, []
    for law in laws:
        fit, laws_of = law.surface, law.isoflop
        if fit is not None and fit.flaw is None:
            cost = _cost(law, options.flops_rule)
            best = allocate(fit, flops, cost)
            draws = bootstrap(
                law.points,
                lambda p, fit=fit, cost=cost: surface_values(p, fit, flops, cost),
                draws=min(options.draws, SURFACE_DRAWS),
                seed=options.seed,
                around=fit,
            )[:, 5:]
            values, source = (best.parameters, best.tokens, best.loss), "surface"
        elif laws_of.parameters and laws_of.tokens and laws_of.loss:
            values = (laws_of.parameters(flops), laws_of.tokens(flops), laws_of.loss(flops))
            draws = law.replicates[:, -6::2] * flops ** law.replicates[:, -5::2]
            source = "power laws"
        else:
            rows.append([law.family, law.bound, "-", "-", "-", "too few points"])
            continue
        outside = not law.budgets.min() <= flops <= law.budgets.max()
        cells = [_range(v, draws[:, i], "{:.4f}" if i == 2 else "{:.3g}") for i, v in enumerate(values)]
        rows.append([law.family, law.bound, *cells, source + (", extrapolated" if outside else "")])
    return _table(["family", "bound", "N* (95 %)", "D* (95 %)", "loss (95 %)", "by"], rows)


def best_table(laws: Sequence[Law], results: Sequence[Result]) -> str:
    """The size of the lowest mean over seeds at each budget, its standard error, and the spread of its seeds."""
    rows = []
    for law in laws:
        for budget in law.budgets:
            sizes: dict[str, list[Result]] = {}
            for r in results:
                if (r.point.family, r.point.budget) == (law.family, budget) and law.bound in r.estimates:
                    sizes.setdefault(r.point.size, []).append(r)
            losses = {s: [r.estimates[law.bound].nats_per_token for r in rs] for s, rs in sizes.items()}
            best = min(losses, key=lambda s: float(np.mean(losses[s])))
            errors = [r.estimates[law.bound].standard_error for r in sizes[best]]
            error = math.sqrt(sum(e * e for e in errors)) / len(errors)
            mean, count = float(np.mean(losses[best])), len(errors)
            spread = f"{np.std(losses[best], ddof=1):.4f} ({count} seeds)" if count > 1 else "one seed"
            bits = mean / math.log(2) / sizes[best][0].bytes_per_token
            cells = [best, f"{mean:.4f} ({error:.4f})", spread, f"{bits:.4f}"]
            rows.append([law.family, law.bound, f"{budget:.3g}", *cells])
    return _table(["family", "bound", "FLOPs", "best size", "loss (s.e.)", "spread of seeds", "bits/byte"], rows)


def points_table(results: Sequence[Result]) -> str:
    """Every point with every valid estimate; the joint loss in a last column that says what it is not."""
    names = [name for name in get_args(ValidName) if any(name in r.estimates for r in results)]
    rows = []
    for r in sorted(results, key=lambda r: (r.point.family, r.point.budget, r.point.parameters, r.point.seed)):
        found = [r.estimates.get(name) for name in names] + [r.joint]
        cells = [f"{e.nats_per_token:.4f} ({e.standard_error:.4f})" if e else "-" for e in found]
        p = r.point
        rows.append([p.name, f"{p.parameters:,}", f"{p.tokens:,}", f"{p.flops:.4g}", f"{p.flops_6nd:.4g}", *cells])
    return _table(["point", "N", "D", "FLOPs", "6ND", *names, "loss_ce_joint (no likelihood)"], rows)


def to_json(law: Law, rule: str) -> dict[str, Any]:
    """Plain data; what is not a finite number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    fit = law.isoflop
    powers = {}
    for name, column, power in (("N_opt", -6, fit.parameters), ("D_opt", -4, fit.tokens), ("L_min", -2, fit.loss)):
        if power:
            found = interval(power.exponent, law.replicates[:, column + 1])
            powers[name] = {**configs.to_dict(power), "exponent_95": [found.low, found.high]}
    surface = law.surface and {
        **configs.to_dict(law.surface),
        "flaw": law.surface.flaw,
        "optimum": [configs.to_dict(allocate(law.surface, float(b), _cost(law, rule))) for b in law.budgets],
    }
    parabolas = [configs.to_dict(parabola) for parabola in fit.parabolas]
    tree = {"family": law.family, "bound": law.bound, "points": len(law.points)}
    return plain({**tree, "flops_rule": rule, "parabolas": parabolas, "power_laws": powers, "surface": surface})


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"unmask scaling {verb}", description=description)
    parser.add_argument("study", type=Path, help="folder of `unmask scaling run`, or a file of results, one a line")
    parser.add_argument(
        "--bound", action="append", metavar="NAME", help="fit this bound, may be repeated; default: one each"
    )
    parser.add_argument(
        "--method", choices=get_args(Method), default="converged", help="official: the stuck published fit"
    )
    parser.add_argument(
        "--flops-rule", choices=("ladder", "six_nd"), default="ladder", help="by which optimal sizes spend a budget"
    )
    parser.add_argument("--draws", type=int, default=400, help="bootstrap replicates")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def _check_bounds(bounds: Sequence[str] | None) -> None:
    for name in bounds or ():
        if name not in get_args(ValidName):
            raise ConfigError(f"--bound {name} is not a likelihood; choose from {', '.join(get_args(ValidName))}")


def _cost(law: Law, rule: str) -> CostRule:
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])

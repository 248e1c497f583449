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

from launch import config as configs
from launch.errors import ConfigError, DataError
from llm.diffusion.likelihood import ValidName
from llm.scaling import figures
from llm.scaling.bootstrap import fit_frontier, interval
from llm.scaling.difference import compare
from llm.scaling.laws import Law, best_bound, choose, fit_law
from llm.scaling.point import Result, read_results, write_json
from llm.scaling.summary import (
    best_difference_table,
    best_table,
    cost_of,
    difference_words,
    laws_table,
    minima_table,
    points_table,
    prediction_table,
    ratio_table,
    size_difference_table,
    surface_table,
)
from llm.scaling.surface import Method, allocate

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
    print(f"{minima_table(laws)}\n\n{laws_table(laws)}\n\n{surface_table(laws, rule)}\n\n{folder / 'fit.json'}")
    return 0


def main_report(argv: Sequence[str]) -> int:
    """report.md, figures and results.jsonl in --out."""
    parser = _parser("report", "Tables and figures of a study.")
    parser.add_argument("--predict", type=float, metavar="FLOPS", help="predict size, tokens and loss at this budget")
    parser.add_argument(
        "--reference", metavar="FAMILY", help="what families are compared with; default: mdm, else the best family"
    )
    parser.add_argument("--out", type=Path, help="folder; default: STUDY/report, or that of the results file")
    options = parser.parse_args(argv)
    _check_bounds(options.bound)
    if options.predict is not None and options.predict <= 0:
        raise ConfigError(f"--predict {options.predict:g}; a budget is a number of FLOPs above 0")
    results = read(options.study)
    reference = _reference(results, options.reference)
    compared = compare(results, choose(results, options.bound), reference)
    laws = fit_all(results, options.bound, options.method, options.draws, options.seed)
    folder = options.out or (options.study / "report" if options.study.is_dir() else options.study.parent)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(configs.to_dict(result), allow_nan=False) for result in results]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    pictures = {path.stem: f"\n\n![{path.stem}]({path.name})" for path in figures.draw(laws, results, compared, folder)}
    frontiers = {
        law.key: fit_frontier(
            law.points, law.surface, law.cost, draws=min(options.draws, SURFACE_DRAWS), seed=options.seed + i
        )
        for i, law in enumerate(laws)
        if law.surface is not None and law.surface.flaw is None
    }
    sections = [
        (f"Against {reference}, at equal compute", difference_words(compared) + pictures.get("difference", "")),
        ("Best size to best size", best_difference_table(compared)),
        ("Size by size", size_difference_table(compared)),
        ("Best of each budget", best_table(laws, results) + pictures["frontier"]),
        ("Minima of the parabolas", minima_table(laws) + pictures["isoflop"]),
        ("Laws of the minima", laws_table(laws) + pictures.get("size", "")),
        ("Surface L(N, D) = E + A/N^a + B/D^b", surface_table(laws, options.flops_rule)),
        ("Compute for equal loss", ratio_table(laws, frontiers, reference, options.draws, options.seed)),
    ]
    if options.predict is not None:
        text = prediction_table(laws, frontiers, options.predict, options.flops_rule)
        sections.append((f"Prediction at {options.predict:.4g} FLOPs", text))
    sections.append(("All points", points_table(results) + pictures.get("bounds", "")))
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
        "optimum": [
            {**configs.to_dict(best), "extrapolated": not law.is_measured(best.parameters)}
            for best in (allocate(law.surface, float(b), cost_of(law, rule)) for b in law.budgets)
        ],
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


def _reference(results: Sequence[Result], named: str | None) -> str:
    families = list(dict.fromkeys(result.point.family for result in results if result.estimates))
    if named is not None and named not in families:
        raise ConfigError(f"--reference {named} has no result; families of the study: {', '.join(families)}")
    if named or "mdm" in families:
        return named or "mdm"
    lowest = {
        family: min(
            r.estimates[bound].nats_per_token for r in results if r.point.family == family and bound in r.estimates
        )
        for family in families
        for bound in [best_bound(results, family)]
    }
    return min(lowest, key=lambda family: lowest[family])


def _check_bounds(bounds: Sequence[str] | None) -> None:
    for name in bounds or ():
        if name not in get_args(ValidName):
            raise ConfigError(f"--bound {name} is not a likelihood; choose from {', '.join(get_args(ValidName))}")

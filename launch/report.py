"""RUN/report.md at the end of a run: curves, final values, checkpoints and environment.

Everything comes from files of the run folder (metrics.jsonl, run.json, env.json, checkpoints/), so that a report can be
made again, anywhere the folder is. What a room adds (samples, tables of its own) is kept in RUN/report/sections.json.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.config import flatten
from launch.errors import DataError
from launch.metrics import metrics_path, read_metrics, read_run_info

Section = tuple[str, str]  # title, markdown

# Bookkeeping: worth a row among the last values, not a curve.
_WITHOUT_CURVE = re.compile(r"tokens|skipped_steps|mfu|memory_gib|step_seconds.*|checkpoint/.*|seconds/.*|straggler/.*")
_FIRST_CURVES = ("loss", "loss_ce_joint", "nelbo_subtoken", "nelbo_token", "nll_chain")
_LAST_CURVES = ("lr", "grad_norm", "tokens_per_second")


@dataclass(frozen=True)
class Series:
    """One metric over the run. `errors` are its standard errors, where known, else None."""

    steps: list[int]
    values: list[float]
    errors: list[float] | None


def write_report(run_dir: Path, sections: Sequence[Section] | None = None) -> Path:
    """Write RUN/report.md and its pictures in RUN/report/, and return the former.

    `sections` come after the curves; None takes those of the last report. `DataError` if there is nothing to report.
    """
    path = metrics_path(run_dir)
    if not path.exists():
        raise DataError(f"{path} does not exist, so there is nothing to report; name a run folder that has trained")
    series = collect(read_metrics(path))
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    sections = _remember(folder / "sections.json", sections)
    parts = [f"# {run_dir.resolve().name}"]
    if series:
        parts += ["## Curves", *_curves(series, folder), "## Last values", _last_values(series)]
    for title, markdown in sections:
        parts += [f"## {title}", markdown.strip()]
    parts += ["## Checkpoints", _checkpoints(run_dir / "checkpoints"), "## Environment", _environment(run_dir)]
    report = run_dir / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def collect(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Series of every numeric metric; `X_se` becomes the errors of `X`. Of two rows for one step the later counts."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                values.setdefault(name, {})[row["step"]] = float(value)
    series = {}
    for name, by_step in values.items():
        if name.endswith("_se") and name.removesuffix("_se") in values:
            continue
        steps = sorted(by_step)
        errors = values.get(f"{name}_se")
        series[name] = Series(
            steps, [by_step[s] for s in steps], None if errors is None else [errors.get(s, math.nan) for s in steps]
        )
    return series


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(series: Mapping[str, Series], folder: Path) -> list[str]:
    """One picture for each metric, in which training and every evaluation of it meet; the markdown that shows it."""
    groups: dict[str, list[str]] = {}
    for name in series:
        if not _WITHOUT_CURVE.fullmatch(name):
            groups.setdefault(name.rpartition("/")[2], []).append(name)

    def position(metric: str) -> tuple[int, str]:
        if metric in _LAST_CURVES:
            return len(_FIRST_CURVES) + 1 + _LAST_CURVES.index(metric), metric
        return _FIRST_CURVES.index(metric) if metric in _FIRST_CURVES else len(_FIRST_CURVES), metric

    lines = []
    for metric in sorted(groups, key=position):
        picture = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', metric)}.png"
        _draw(metric, {name: series[name] for name in sorted(groups[metric])}, picture)
        lines.append(f"![{metric}]({folder.name}/{picture.name})")
    return lines


def _draw(title: str, curves: Mapping[str, Series], picture: Path) -> None:
    # The object interface of matplotlib: pyplot keeps every figure in a global list and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        values = [value if math.isfinite(value) else math.nan for value in curve.values]
        marker = "o" if len(values) < 50 else None
        (line,) = axes.plot(curve.steps, values, label=name, marker=marker, markersize=3, linewidth=1.2)
        if curve.errors is not None:
            low = [value - error for value, error in zip(values, curve.errors, strict=True)]
            high = [value + error for value, error in zip(values, curve.errors, strict=True)]
            axes.fill_between(curve.steps, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if list(curves) != [title]:
        axes.legend()
    figure.savefig(picture, dpi=120)


# --- tables ----------------------------------------------------------------------------------------------------------


def _last_values(series: Mapping[str, Series]) -> str:
    rows = []
    for name in sorted(series, key=lambda n: ("/" in n, n)):
        curve = series[name]
        error = "" if curve.errors is None or math.isnan(curve.errors[-1]) else f" ± {curve.errors[-1]:.2g}"
        rows.append((name, f"{_number(curve.values[-1])}{error}", str(curve.steps[-1])))
    return _table(("metric", "last value (± standard error)", "at step"), rows)


def _checkpoints(folder: Path) -> str:
    # Under its final name a checkpoint is committed; anything else is on its way in or out.
    found = sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    if not found:
        return "None."
    rows = []
    for path in found:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        rows.append((path.name, f"{size / 2**20:,.1f} MiB", written))
    return _table(("checkpoint", "size", "written"), rows)


def _environment(run_dir: Path) -> str:
    path = run_dir / "env.json"
    facts = flatten(json.loads(path.read_text()) if path.exists() else {}) | flatten(read_run_info(run_dir))
    return _table(("what", "value"), [(name, _text(value)) for name, value in facts.items()]) if facts else "Unknown."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())


def _remember(path: Path, sections: Sequence[Section] | None) -> list[Section]:
    if sections is None:
        return [(title, markdown) for title, markdown in json.loads(path.read_text())] if path.exists() else []
    path.write_text(json.dumps([list(section) for section in sections], indent=2))
    return list(sections)

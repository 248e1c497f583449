"""`unmask scaling plan`: what a ladder would train, before anything is trained."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.stop import EXIT_OK
from llm.scaling.config import Ladder, load_ladder
from llm.scaling.plan import PlannedPoint, plan_ladder

MANY_EPOCHS = 4.0  # about where repeated data stop being worth as much as new data (Muennighoff et al., 2305.16264)
FEW_STEPS = 100  # below, warmup and rounding to whole steps decide
CURVE = 3  # sizes that a parabola in log N needs


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask scaling plan",
        description="The points of a ladder: parameters, tokens, steps, FLOPs by every rule, epochs. Trains nothing.",
        epilog="example: unmask scaling plan configs/llm/scaling/study.yaml --measure",
    )
    parser.add_argument("ladder", type=Path, metavar="LADDER", help="YAML file of the ladder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the ladder, e.g. jobs=4")
    parser.add_argument(
        "--measure", action="store_true", help="train a few steps of the smallest and largest sizes, and tell the time"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_intermixed_args(argv)
    ladder = load_ladder(options.ladder, options.overrides)
    planned = plan_ladder(ladder)
    seconds = None
    if options.measure:
        from llm.scaling import speed  # the engine takes its time to import

        speeds = speed.measure(planned)
        seconds = [speed.seconds(one, speeds) for one in planned]
    print(as_json(ladder, planned, seconds) if options.json else as_text(ladder, planned, seconds))
    return EXIT_OK


def as_json(ladder: Ladder, planned: Sequence[PlannedPoint], seconds: Sequence[float] | None) -> str:
    points = [
        {
            **dataclasses.asdict(one.point),
            "steps": one.steps,
            "lr": one.experiment["schedule"]["lr"],
            "flops_by_rule": dataclasses.asdict(one.flops),
            "tokens_per_parameter": one.point.tokens / one.point.parameters,
            "epochs": one.epochs,
            "seconds": None if seconds is None else seconds[i],
        }
        for i, one in enumerate(planned)
    ]
    totals = {
        "points": len(planned),
        "flops": sum(one.point.flops for one in planned),
        "tokens": sum(one.point.tokens for one in planned),
        "wall_seconds": None if seconds is None else wall_seconds(seconds, ladder.jobs),
    }
    tree: dict[str, Any] = {"flops_rule": ladder.flops_rule, "points": points, "totals": totals}
    return json.dumps(tree | {"warnings": warnings(planned)}, indent=1)


def as_text(ladder: Ladder, planned: Sequence[PlannedPoint], seconds: Sequence[float] | None) -> str:
    """Markdown: one line for all seeds of a point, then totals and warnings."""
    head = ["point", "seeds", "N", "D", "D/N", "steps", "lr", "FLOPs full", "6ND", "6ND label", "epochs"]
    lines = [[*head, "time"] if seconds is not None else head]
    place = {one.point.name: i for i, one in enumerate(planned)}
    together = sorted(
        planned, key=lambda one: (one.point.family, one.point.budget, one.point.parameters, one.point.size)
    )
    for name, group in itertools.groupby(together, key=lambda one: one.point.name.rpartition("-s")[0]):
        seeds = list(group)
        one = seeds[0]
        line = [
            name,
            ",".join(str(other.point.seed) for other in seeds),
            f"{one.point.parameters:,}",
            f"{one.point.tokens:,}",
            f"{one.point.tokens / one.point.parameters:.1f}",
            f"{one.steps:,}",
            f"{one.experiment['schedule']['lr']:.3g}",
            *(f"{value:.3e}" for value in (one.flops.full, one.flops.six_nd, one.flops.six_nd_label)),
            "?" if one.epochs is None else f"{one.epochs:.2f}",
        ]
        lines.append([*line, duration(seconds[place[one.point.name]])] if seconds is not None else line)
    totals = (
        f"{len(planned)} points, {sum(one.point.flops for one in planned):.3e} FLOPs by the rule {ladder.flops_rule}, "
        f"{sum(one.point.tokens for one in planned):,} tokens"
    )
    if seconds is not None:
        totals += (
            f"; about {duration(wall_seconds(seconds, ladder.jobs))} with {ladder.jobs} points at a time at the speed "
            "that was measured now"
        )
    return "\n".join([_aligned(lines), "", totals, *(f"warning: {words}" for words in warnings(planned))])


def warnings(planned: Sequence[PlannedPoint]) -> list[str]:
    """What makes points worth less than they seem."""
    words = []
    if again := [one for one in planned if one.epochs is not None and one.epochs > MANY_EPOCHS]:
        most = max(again, key=lambda one: one.epochs or 0.0)
        words.append(
            f"{len(again)} points read the data more than {MANY_EPOCHS:g} times, {most.point.name} {most.epochs:.1f} "
            "times: repeated tokens count as new ones in a fit; use more data, smaller budgets or larger sizes"
        )
    if short := [one for one in planned if one.steps < FEW_STEPS]:
        least = min(short, key=lambda one: one.steps)
        words.append(
            f"{len(short)} points have fewer than {FEW_STEPS} steps, {least.point.name} {least.steps}: use a smaller "
            "global_batch, larger budgets or smaller sizes there"
        )
    curves: dict[tuple[str, float], set[str]] = {}
    for one in planned:
        curves.setdefault((one.point.family, one.point.budget), set()).add(one.point.size)
    if thin := [f"{family} at {budget:g}" for (family, budget), sizes in curves.items() if len(sizes) < CURVE]:
        words.append(f"fewer than {CURVE} sizes, so no IsoFLOP parabola: {', '.join(thin)}")
    return words


def wall_seconds(seconds: Sequence[float], jobs: int) -> float:
    """Of points that start in this order as workers become free."""
    free = [0.0] * jobs
    for one in seconds:
        free[free.index(min(free))] += one
    return max(free)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(
        [f"| {rows[0]} |", "|" + "|".join("-" * (w + 2) for w in widths) + "|", *(f"| {r} |" for r in rows[1:])]
    )

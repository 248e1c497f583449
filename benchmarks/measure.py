"""How the benchmarks measure: both sides in one run, by turns, compared turn by turn.

A shared machine is faster in one minute than in the next. Two sides that take turns see the same minutes, so the median
of the ratios of neighbouring turns is steady where the times themselves are not. CPU time (all threads of the side's
processes) is given beside wall time: it does not count what other programs did meanwhile.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from launch.local import rank_environment

torch.set_num_threads(1)  # in every process of every side: threads that wait for each other measure the other programs

_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds of all threads of all processes of a side


Turn = Callable[[], Cost]


def timed(function: Callable[[], Any]) -> Turn:
    """A turn that calls `function` once in this process."""

    def turn() -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)

    return turn


def alternate(sides: Mapping[str, Turn], turns: int, *, warmup: int = 1) -> dict[str, list[Cost]]:
    """`turns` costs of each side, taken in the order ABC, CBA, ABC... after `warmup` rounds that do not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for round_number in range(warmup + turns):
        for name in list(sides) if round_number % 2 == 0 else reversed(list(sides)):
            cost = sides[name]()
            if round_number >= warmup:
                costs[name].append(cost)
    return costs


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs))


def ratio(above: Sequence[Cost], below: Sequence[Cost]) -> Cost:
    """Medians of the ratios turn by turn."""
    pairs = list(zip(above, below, strict=True))
    return Cost(
        statistics.median(a.wall / b.wall for a, b in pairs),
        statistics.median(a.cpu / b.cpu for a, b in pairs),
    )


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A markdown table, flushed so that a benchmark of minutes shows what it has."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smallest sizes and few turns: does it run, not how fast")
    return made


# --- sides that own their loop ---------------------------------------------------------------------------------------

Loop = Callable[..., None]
"""loop(pause, *arguments): trains for ever, calling `pause()` before every step."""


@contextmanager
def loops(
    sides: Mapping[str, tuple[Loop, tuple[Any, ...]]], *, steps: int, ranks: int = 1
) -> Iterator[dict[str, Turn]]:
    """Each side's loop in `ranks` processes of its own, standing still except in its turns of `steps` steps.

    A loop is a module-level function with picklable arguments. Its output goes to a file, shown if the side dies.
    """
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as name, ExitStack() as stack:
        turns = {}
        for side, (loop, arguments) in sides.items():
            folder = Path(name) / side.replace(" ", "-")
            folder.mkdir()
            turns[side] = stack.enter_context(_processes(loop, arguments, folder, steps, ranks))
        yield turns


@contextmanager
def _processes(loop: Loop, arguments: tuple[Any, ...], folder: Path, steps: int, ranks: int) -> Iterator[Turn]:
    pipes, processes = [], []
    for rank in range(ranks):
        mine, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_rank, args=(theirs, loop, arguments, folder, rank, ranks, steps), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)

    def turn() -> Cost:
        try:
            for pipe in pipes:
                pipe.send("go")
            costs = [pipe.recv() for pipe in pipes]
        except (EOFError, OSError):
            logs = "\n".join(log.read_text(errors="replace")[-4000:] for log in sorted(folder.glob("rank-*.log")))
            raise SystemExit(f"{loop.__name__} ended by itself:\n{logs}") from None
        return Cost(max(c.wall for c in costs), sum(c.cpu for c in costs))

    try:
        yield turn
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    pipe: Connection, loop: Loop, arguments: tuple[Any, ...], folder: Path, rank: int, ranks: int, steps: int
) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if ranks > 1:
        os.environ.update(rank_environment(os.environ, rank, ranks, rendezvous_file=folder / "rendezvous"))
    begun: Cost | None = None
    done = 0

    def pause() -> None:
        nonlocal begun, done
        if begun is not None and done < steps:
            done += 1
            return
        if begun is not None:
            pipe.send(Cost(time.perf_counter() - begun.wall, time.process_time() - begun.cpu))
        pipe.recv()
        begun, done = Cost(time.perf_counter(), time.process_time()), 1

    loop(pause, *arguments)

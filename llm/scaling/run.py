"""`unmask scaling run`: the points of a ladder, several at a time, until all of them have a result.

Whatever is killed, the next call goes on: a point with a result is left alone, one with a checkpoint resumes from it.
Children die with this process, so that two calls never train the same point.
"""

import argparse
import fnmatch
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import config as configs
from launch import slurm
from launch.errors import ConfigError
from launch.local import die_with, exit_code
from launch.metrics import metrics_path, read_metrics
from launch.stop import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, MEANING, StopFlag
from llm.data.codes import read_code
from llm.scaling import cluster
from llm.scaling.config import load_ladder
from llm.scaling.plan import PlannedPoint, plan_ladder
from llm.scaling.point import RESULT, read_result
from llm.scaling.study import (
    FAILURE,
    is_finished,
    one_at_a_time,
    prepare,
    read_failure,
    refuse_or_restart_changed,
    to_do,
    write_failure,
)

_POLL_SECONDS = 0.1
_SAY_SECONDS = 60.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask scaling run",
        description=(
            "Train and judge the points of a ladder. The same command goes on after a kill, a crash or Ctrl-C; points "
            "that are done are left alone."
        ),
        epilog="example: unmask scaling run configs/llm/scaling/study.yaml --out runs/study --jobs 2 --only 'mdm/*'",
    )
    parser.add_argument("ladder", type=Path, metavar="LADDER", help="YAML file of the ladder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the ladder, e.g. evaluation.draws=4"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STUDY", help="folder of the study")
    parser.add_argument("--jobs", type=int, metavar="N", help="points at the same time, one thread each (the ladder's)")
    parser.add_argument("--only", metavar="PATTERN", help="points whose name fits, such as 'mdm/*-1e11-*'")
    parser.add_argument(
        "--restart-changed", action="store_true", help="delete and train again what a changed ladder makes differently"
    )
    parser.add_argument(
        "--cluster", type=Path, metavar="YAML", help="submit the points as a SLURM array: configs/cluster/*.yaml"
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="points of the array that may run at the same time")
    parser.add_argument("--dry-run", action="store_true", help="with --cluster: print the job script, submit nothing")
    options = parser.parse_intermixed_args(argv)
    if options.cluster is None and (options.at_once is not None or options.dry_run):
        raise ConfigError(
            "--at-once and --dry-run are about the job of --cluster; see `unmask scaling plan` without it"
        )
    changes = [] if options.jobs is None else [f"jobs={options.jobs}"]
    ladder = load_ladder(options.ladder, [*options.overrides, *changes])
    planned = select(plan_ladder(ladder), options.only)
    if options.cluster is not None and options.dry_run:
        print(cluster.script(planned, options.out, profile=options.cluster, at_once=options.at_once), end="")
        return EXIT_OK
    with one_at_a_time(options.out):
        if slurm.has_slurm():
            slurm.refuse_if_active(options.out)
        refuse_or_restart_changed(planned, options.out, restart=options.restart_changed)
        _need_codes(planned)
        for one in planned:
            prepare(one, options.out / one.point.name, keep_checkpoints=ladder.keep_checkpoints)
        if options.cluster is not None:
            return cluster.submit(planned, options.out, profile=options.cluster, at_once=options.at_once)
        return Study(options.out, planned, jobs=ladder.jobs).run()


def select(planned: Sequence[PlannedPoint], pattern: str | None) -> list[PlannedPoint]:
    """The points whose name fits; `ConfigError` if none does."""
    chosen = [p for p in planned if pattern is None or fnmatch.fnmatchcase(p.point.name, pattern)]
    if not chosen:
        raise ConfigError(
            f"--only {pattern!r} fits none of the {len(planned)} points, such as {planned[0].point.name}; quote the "
            "pattern: --only 'mdm/*'"
        )
    return chosen


def _need_codes(planned: Sequence[PlannedPoint]) -> None:
    """`DataError` if a table of codes is missing: hours may pass before the first point that reads it."""
    named = (one.experiment.get("diffusion", {}).get("code") for one in planned)
    for code in {name for name in named if name is not None}:
        read_code(Path(code))


@dataclass(kw_only=True)
class Job:
    one: PlannedPoint
    process: subprocess.Popen[bytes]


class Study:
    """One call of `unmask scaling run`. Make and run it on the main thread: children die with the thread."""

    def __init__(self, folder: Path, planned: Sequence[PlannedPoint], *, jobs: int) -> None:
        self._folder, self._planned, self._jobs = folder, planned, jobs
        self._running: list[Job] = []
        self._codes: list[int] = []  # of every point, in the end; of those that diverged earlier, too
        self._finished = {one.point.name for one in planned if is_finished(one, folder)}
        self._begin, self._said = time.monotonic(), time.monotonic()
        self._flops_at_begin = 0.0
        self._is_stopping = False

    def run(self) -> int:
        """Until every point has ended, or a signal asks to stop; the exit code that says most."""
        waiting = to_do(self._planned, self._folder)
        left = len(self._planned) - len(self._finished) - len(waiting)
        self._codes += [EXIT_DIVERGED] * left
        self._flops_at_begin = self._flops_done(waiting)
        diverged = f", {left} diverged earlier (remove a {FAILURE} to try its point again)" if left else ""
        print(f"{len(self._planned)} points, {len(self._finished)} done, {len(waiting)} to do{diverged}", flush=True)
        try:
            with StopFlag() as stop:
                while self._running or (waiting and stop.request is None):
                    while waiting and len(self._running) < self._jobs and stop.request is None:
                        self._start(waiting.pop(0))
                    if stop.request is not None:
                        self._ask_to_stop(stop.request.reason)
                    self._reap(waiting)
                    time.sleep(_POLL_SECONDS)
        finally:
            for job in self._running:
                job.process.kill()
                job.process.wait()
        self._codes += [EXIT_STOPPED] * len(waiting)
        return self._summary()

    def _start(self, one: PlannedPoint) -> None:
        folder = self._folder / one.point.name
        (folder / FAILURE).unlink(missing_ok=True)
        with (folder / "point.log").open("ab") as log:
            process = subprocess.Popen(
                command(folder),
                env=_environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this process, which passes it on once
                preexec_fn=die_with(os.getpid()),
            )
        self._running.append(Job(one=one, process=process))

    def _ask_to_stop(self, reason: str) -> None:
        """Once: every point in training saves a checkpoint and ends."""
        if self._is_stopping:
            return
        self._is_stopping = True
        print(f"{reason}: {len(self._running)} points save a checkpoint; the same command goes on", flush=True)
        for job in self._running:
            job.process.terminate()

    def _reap(self, waiting: Sequence[PlannedPoint]) -> None:
        """Take note of the points that have ended, and say where the study stands."""
        ended = [job for job in self._running if job.process.poll() is not None]
        self._running = [job for job in self._running if job not in ended]
        words = [self._note(job) for job in ended]
        if words or time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            for line in words or [f"training {', '.join(job.one.point.name for job in self._running)}"]:
                print(f"{self._progress(waiting)} | {line}", flush=True)

    def _note(self, job: Job) -> str:
        """Record how a point has ended; a line about it."""
        point, folder = job.one.point, self._folder / job.one.point.name
        code = exit_code([job.process.returncode])
        if code == EXIT_OK and is_finished(job.one, self._folder):
            self._finished.add(point.name)
            self._codes.append(EXIT_OK)
            name, found = next(iter(read_result(folder / RESULT).estimates.items()))
            return f"{point.name}: {name} {found.nats_per_token:.4f} ({found.standard_error:.4f}) nats/token"
        if code == EXIT_STOPPED or (self._is_stopping and job.process.returncode == -signal.SIGTERM):
            self._codes.append(EXIT_STOPPED)
            return f"{point.name}: stopped"
        if code == EXIT_OK:
            code, reason = 1, f"trained, but its {RESULT} is gone; remove the folder to train it again"
        else:
            reason = _last_words(folder / "point.log", job.process.returncode)
        self._codes.append(code)
        write_failure(folder, config_hash=job.one.config_hash, code=code, reason=reason)
        return f"{point.name}: FAILED, {reason}"

    def _progress(self, waiting: Sequence[PlannedPoint]) -> str:
        total = sum(one.point.flops for one in self._planned)
        done = self._flops_done([*waiting, *(job.one for job in self._running)])
        left = sum(one.point.flops for one in waiting) + sum(
            one.point.flops * (1 - _share_trained(one, self._folder)) for one in (job.one for job in self._running)
        )
        speed = (done - self._flops_at_begin) / (time.monotonic() - self._begin)
        eta = _clock(left / speed) if speed > 0 else "unknown"
        return f"{len(self._finished)}/{len(self._planned)} points, {done / total:.1%} of the FLOPs, ETA {eta}"

    def _flops_done(self, begun: Sequence[PlannedPoint]) -> float:
        """Of all finished points, and of the trained part of those in `begun`."""
        finished = sum(one.point.flops for one in self._planned if one.point.name in self._finished)
        return finished + sum(one.point.flops * _share_trained(one, self._folder) for one in begun)

    def _summary(self) -> int:
        failures = [(p.point.name, f) for p in self._planned if (f := read_failure(p, self._folder / p.point.name))]
        for name, failure in failures:
            print(f"failed: {name}: {failure['reason']} (see {self._folder / name / 'point.log'})", flush=True)
        done = f"{len(self._finished)} of {len(self._planned)} points in {self._folder} have a {RESULT}"
        print(f"{done}, {len(failures)} failed", flush=True)
        return exit_code(self._codes)


def command(folder: Path) -> list[str]:
    """What trains the point in `folder`, or goes on with it."""
    target = configs.override("run.dir", str(folder))
    return [sys.executable, "-m", "llm.scaling.train", str(folder / "experiment.yaml"), target]


def _share_trained(one: PlannedPoint, study: Path) -> float:
    """Of a point's steps, by the last row of its metrics."""
    path = metrics_path(study / one.point.name)
    rows = read_metrics(path) if path.exists() else []
    return min(1.0, rows[-1]["step"] / one.steps) if rows else 0.0


def _last_words(log: Path, returncode: int) -> str:
    """Why a point failed, from the end of its log."""
    if returncode < 0:
        return f"ended by {signal.Signals(-returncode).name}"
    lines = log.read_text(errors="replace").splitlines()[-200:]
    words = [line for line in lines if line.lower().startswith("error")] or [line for line in lines if line.strip()]
    return words[-1] if words else MEANING.get(returncode, f"exit code {returncode}")


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """One thread a point; and what a launcher around us says of its own processes is wrong for them."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {k: v for k, v in environ.items() if k not in launcher}
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

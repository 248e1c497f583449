"""`unmask status` and `unmask logs`: where a run stands, by the files in its folder and, if there is SLURM, its queue.

    runs/prime
      job         17 RUNNING on node[1-2] for 12:31 of 4:00:00
      step        1,240 of 10,000, loss 3.21, 51.2k tok/s, ETA 01:12:20
      checkpoint  step 1,200, 1 min old
      attempts    3, requeued 2 times: warned, crashed
      last error  attempt 2: rank-1.log: RuntimeError: ...
      lagging     rank 5 (node2, pid 4711): step 1240 of 1240, phase train, no progress for 95 s, ...

Nothing here asks a running process anything, so it works from a login node, and for a run that is long dead.
"""

import argparse
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from launch.errors import ClusterError, ConfigError
from launch.metrics import metrics_path, read_metrics
from launch.slurm import (
    Attempt,
    JobRecord,
    QueuedJob,
    final_state,
    has_slurm,
    job_of,
    points_of,
    queued,
    read_attempts,
    read_record,
)
from launch.stop import EXIT_OK
from launch.watch import file_clock, health_dir, lagging, read_health

_SILENT_SECONDS = 60.0  # without progress or a sign of life, after which a rank of a running job is named
_TAIL_BYTES = 256 * 1024  # of a log, in which the telling line is looked for

# What tells most about a failure, the best first: our one sentence, the end of a traceback, SLURM's obituary.
_TELLING = (
    re.compile(r"^error: .+"),
    re.compile(r"^(?:\[?rank\d+\]?:? ?)?(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Timeout|Failure)\b.*"),
    re.compile(r"^rank \d+ on \S+: (?:no progress|lost another rank) .+|.+ have not agreed to stop.*"),
    re.compile(r".*CANCELLED AT .+ DUE TO .+|.*oom.?kill.*", re.IGNORECASE),
    re.compile(r"^srun: error: .+"),
)
# The peers of a rank that died raise errors too; they are the echo, not the cause.
_ECHO = re.compile(r"ChildFailedError|SignalException|[Cc]onnection (?:closed|reset|refused)|Broken pipe|gloo|NCCL")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask status",
        description="Where a run stands: queue, step, time to go, checkpoint, attempts, last error. Without RUN: all "
        "runs in runs/, a line each.",
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder, or that of a sweep")
    run = parser.parse_args(argv).run
    now = time.time()
    if run is not None and not run.is_dir():
        raise ConfigError(f"there is no run folder {run}; `unmask status` lists those in runs/")
    record = None if run is None else read_record(run)
    if run is not None and not (record and (record.points or record.runs)):
        print(run)
        for title, text in describe(run, states([run]).get(run), now=now):
            print(f"  {title:<10}  {text}")
        return EXIT_OK
    if run is None:
        folders = [path for path in sorted(Path("runs").glob("*")) if path.is_dir()]
        points = [path for folder in folders for path in points_of(folder)]
        runs = [path for path in sorted([*folders, *points]) if _is_run(path)]
    else:
        runs = points_of(run)
    if not runs:
        print("no runs here" if run is None else f"{run}: no points")
    found = states(runs)
    overrides = {} if record is None else dict(zip(runs, record.points, strict=False))
    for path in runs:
        print(one_line(path, found.get(path), now=now) + (f"  {overrides[path]}" if path in overrides else ""))
    return EXIT_OK


def logs(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="unmask logs", description="What the job of a run has printed.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on printing as it grows; Ctrl-C ends")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="another rank than the first")
    options = parser.parse_args(argv)
    path = log_of(options.run, read_record(options.run), options.rank)
    if not path.exists():
        there = ", ".join(sorted(p.name for p in (*options.run.glob("job.log"), *options.run.glob("logs/*.log"))))
        raise ConfigError(f"there is no {path} (yet); logs of {options.run}: {there or 'none'}")
    path = path.resolve()  # no option, whatever its name
    if options.follow:
        try:
            return subprocess.run(["tail", "-n", "200", "-F", str(path)], check=False).returncode
        except KeyboardInterrupt:
            return EXIT_OK
    print(path.read_text(errors="replace"), end="")
    return EXIT_OK


def log_of(run: Path, record: JobRecord | None, rank: int) -> Path:
    """Where a rank's output went. An agent (torchrun, accelerate) and its ranks share the log of their node."""
    if record is None or record.launcher == "srun":
        return run / "job.log" if rank == 0 else run / "logs" / f"rank-{rank}.log"
    node = rank // record.processes_per_node
    return run / "job.log" if node == 0 else run / "logs" / f"node-{node}.log"


# --- one run ---------------------------------------------------------------------------------------------------------


def states(runs: Sequence[Path]) -> dict[Path, QueuedJob | str]:
    """For each submitted run its line of the queue, or in words what became of its job."""
    ids = {run: job_id for run in runs if (job_id := job_of(run)) is not None}
    if not has_slurm():
        return {run: "unknown: no squeue here" for run in ids}
    try:
        jobs = {job.job_id: job for job in queued(list(ids.values()))}
        return {run: jobs.get(id_) or final_state(id_) or "left the queue" for run, id_ in ids.items()}
    except ClusterError as error:  # the files tell the rest
        return {run: f"unknown: {error}" for run in ids}


def describe(run: Path, state: QueuedJob | str | None, *, now: float) -> list[tuple[str, str]]:
    """Titles and texts of what is known of a run."""
    job_id, attempts = job_of(run), read_attempts(run)
    rows = []
    if job_id is not None:
        rows.append(("job", f"{job_id} {_state_text(state)}"))
    rows.append(("step", _progress(run)))
    rows.append(("checkpoint", _checkpoint(run, now)))
    if attempts:
        rows.append(("attempts", _history(attempts, runs=isinstance(state, QueuedJob) and bool(state.nodes))))
    if (error := last_error(run, attempts)) is not None:
        rows.append(("last error", error))
    if isinstance(state, QueuedJob) and state.state == "RUNNING":
        rows += [("lagging", line) for line in _lagging(run)]
        rows += [("slow", health.straggler) for health in read_health(run) if health.straggler]
    return rows


def one_line(run: Path, state: QueuedJob | str | None, *, now: float) -> str:
    job_id, attempts = job_of(run), read_attempts(run)
    word = state.state if isinstance(state, QueuedJob) else state
    last = attempts[-1].outcome if attempts else None
    parts = [f"{run!s:<32}", f"{job_id} {word}" if job_id else "no job", _progress(run)]
    parts += [f"checkpoint {_checkpoint(run, now)}"] if last != "finished" else []
    runs = isinstance(state, QueuedJob) and bool(state.nodes)
    parts += [_history(attempts, runs=runs)] if len(attempts) > 1 or last not in (None, "finished") else []
    return " | ".join(parts)


def last_error(run: Path, attempts: Sequence[Attempt]) -> str | None:
    """Why the last attempt that did not end well did not, and the line of its logs that says most."""
    well = (None, "finished", "warned", "preempted", "requeued", "stopped", "terminated")
    bad = [attempt for attempt in attempts if attempt.outcome not in well]
    if not bad or attempts[-1].outcome == "finished":
        return None
    line = telling_line(
        {path.name: part_of(_tail(path), bad[-1].number) for path in (run / "job.log", *sorted(run.glob("logs/*.log")))}
    )
    return f"attempt {bad[-1].number}: {bad[-1].reason}" + (f"; {line}" if line else "")


def telling_line(logs: Mapping[str, str]) -> str | None:
    """Of several logs (name -> text) the line that explains most; the peers of a dead rank only echo its death."""
    candidates = []
    for order, (name, text) in enumerate(logs.items()):
        for number, line in enumerate(text.splitlines()):
            for rank, pattern in enumerate(_TELLING):
                if pattern.match(line.strip()):
                    candidates.append((bool(_ECHO.search(line)), rank, order, -number, f"{name}: {line.strip()}"))
                    break
    return min(candidates)[-1][:500] if candidates else None


def part_of(log: str, attempt: int) -> str:
    """What one attempt has written to a log that all attempts append to."""
    begins = list(re.finditer(r"^.*\battempt (\d+) \(restart \d+\) on .*$", log, re.MULTILINE))
    for mark, following in zip(begins, [*begins[1:], None], strict=True):
        if int(mark[1]) == attempt:
            return log[mark.end() : following.start() if following else len(log)]
    return ""


def _history(attempts: Sequence[Attempt], *, runs: bool) -> str:
    again = len(attempts) - len({attempt.job for attempt in attempts})
    again += attempts[-1].action == "requeue"  # and has not started yet
    ends = [attempt.outcome or ("running" if runs and attempt is attempts[-1] else "lost") for attempt in attempts]
    shown = ", ".join([*(["..."] if len(ends) > 5 else []), *ends[-5:]])
    return f"{len(attempts)}, requeued {again} time{'s' * (again != 1)}: {shown}"


def _state_text(state: QueuedJob | str | None) -> str:
    if not isinstance(state, QueuedJob):
        return str(state)
    if state.nodes:
        return f"{state.state} on {state.nodes} for {state.elapsed} of {state.limit}"
    return f"{state.state}" + (f" ({state.reason})" if state.reason else "")


def _progress(run: Path) -> str:
    total = _total_steps(run)
    of = f" of {total:,}" if total else ""
    rows = read_metrics(metrics_path(run)) if metrics_path(run).exists() else []
    rows = [row for row in rows if "grad_norm" in row]
    if not rows:
        return f"0{of}: no step recorded yet"
    row = rows[-1]
    parts = [f"{row['step']:,}{of}"]
    parts += [f"loss {row['loss']:.4f}"] if isinstance(row.get("loss"), float) else []
    parts += [f"{row['tokens_per_second']:,.0f} tok/s"] if "tokens_per_second" in row else []
    if total and row["step"] < total and "step_seconds" in row:
        parts.append(f"ETA {_duration((total - row['step']) * row['step_seconds'])} of training")
    return ", ".join(parts)


def _checkpoint(run: Path, now: float) -> str:
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not found:
        return "none yet"
    newest = max(found, key=lambda path: int(path.name.removeprefix("step_")))
    return f"step {int(newest.name.removeprefix('step_')):,}, {_duration(now - newest.stat().st_mtime)} old"


def _lagging(run: Path) -> list[str]:
    healths, now = read_health(run), file_clock(health_dir(run))
    if all(now - h.progress_time < _SILENT_SECONDS and now - h.written_time < _SILENT_SECONDS for h in healths):
        return []
    return lagging(healths, world_size=healths[0].world_size, now=now, silent_seconds=_SILENT_SECONDS)


def _total_steps(run: Path) -> int | None:
    """train.steps of the configuration that runs, or that waits."""
    for path in (run / "config.yaml", run / "job.yaml"):
        if path.exists():
            steps = ((yaml.safe_load(path.read_text()) or {}).get("train") or {}).get("steps")
            return steps if isinstance(steps, int) else None
    return None


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", "job.yaml", "metrics.jsonl"))


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


def _duration(seconds: float) -> str:
    days, rest = divmod(round(max(0.0, seconds)), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock

"""`unmask scaling run --cluster`: the points that are to do as one array of SLURM jobs, requeued one by one.

A point gets the nodes and processes of the profile, so a ladder of small models wants a profile of one process. Its
job is that of `unmask submit` (slurm/train.sbatch), which resumes it; the study's folder is that of a sweep.
"""

import copy
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import config as configs
from launch.cluster import load_cluster
from launch.errors import ConfigError
from launch.slurm import Sweep, check_configurations
from launch.stop import EXIT_OK
from llm.scaling.plan import PlannedPoint
from llm.scaling.study import to_do

MODULE = "llm.scaling.train"
LOGS = "jobs"  # below the study: an array has one pattern for the logs of all its tasks


def submit(planned: Sequence[PlannedPoint], study: Path, *, profile: Path, at_once: int | None) -> int:
    """Submit what is to do; each point's folder remembers its task of the array and links its log."""
    waiting = to_do(planned, study)
    print(f"{len(planned)} points, {len(planned) - len(waiting)} done or diverged, {len(waiting)} to do")
    if not waiting:
        return EXIT_OK
    settings = load_cluster(profile)
    sweep = _sweep(waiting, study, at_once)
    # All of them have been planned already; the cheapest and the largest show whether they fit what the profile gives.
    ends = {0, max(range(len(waiting)), key=lambda i: waiting[i].point.parameters)}
    arguments = [[str(sweep.runs[i] / "experiment.yaml"), _target(sweep.runs[i])] for i in sorted(ends)]
    print(check_configurations(MODULE, arguments, settings.nodes * settings.processes_per_node), file=sys.stderr)
    (study / LOGS).mkdir(exist_ok=True)
    job_id = sweep.submit(settings, profile=profile)
    for i, run in enumerate(sweep.runs):
        log = run / "job.log"
        log.unlink(missing_ok=True)
        log.symlink_to(os.path.relpath(sweep.folder / LOGS / f"{job_id}_{i}.log", run))
    print(f"job {job_id}: {len(waiting)} points in {study}; see: unmask status {shlex.quote(str(study))}")
    return EXIT_OK


def script(planned: Sequence[PlannedPoint], study: Path, *, profile: Path, at_once: int | None) -> str:
    """The job script that `submit` would hand to SLURM."""
    return _sweep(to_do(planned, study) or planned, study, at_once).script(load_cluster(profile))


def _sweep(waiting: Sequence[PlannedPoint], study: Path, at_once: int | None) -> Sweep:
    if at_once is not None and at_once < 1:
        raise ConfigError(f"--at-once {at_once}; the smallest is 1")
    folder = Path(os.path.abspath(study))
    runs = [folder / one.point.name for one in waiting]
    return Sweep(
        folder=folder,
        runs=runs,
        configurations=[
            configs.merge(copy.deepcopy(one.experiment), {"run": {"dir": str(run)}})
            for one, run in zip(waiting, runs, strict=True)
        ],
        name=folder.name,
        module=MODULE,
        log=f"{LOGS}/%A_%a.log",
        array=f"0-{len(runs) - 1}" + (f"%{at_once}" if at_once else ""),
        below=tuple(one.point.name for one in waiting),
    )


def _target(run: Path) -> str:
    return configs.override("run.dir", str(run))

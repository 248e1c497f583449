"""Submit a run as a SLURM job, ask SLURM about it, cancel it. What the job then does is told in slurm/train.sbatch.

    unmask submit CONFIG key=value ... --cluster configs/cluster/X.yaml --nodes 2

The run folder gets `job.yaml`, the configuration as of now (so that an edit in the hours of waiting changes nothing),
`job.sbatch`, the template with its settings filled in, and `job.json`, which remembers the job's id. A sweep is an
array: one folder `point-N` for each of its points.

Whatever comes from a user (names, paths, values) is quoted for the shell by shlex, and for the rest SLURM's own rules
count: a job name is reduced to harmless characters, and a path that an `#SBATCH` line cannot hold is refused.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch import config as configs
from launch.cluster import Cluster, load_cluster
from launch.errors import ClusterError, ConfigError
from launch.stop import EXIT_OK, EXIT_USER_ERROR

TEMPLATE = Path(__file__).parents[1] / "slurm" / "train.sbatch"
_SETTINGS = re.compile(r"(?<=\n)# --- settings .*?\n(?=# --- end of settings)", re.DOTALL)
_TIMEOUT_SECONDS = 120.0
_QUESTION_SECONDS = 20.0  # for commands that only ask; without a slurm.conf they would retry for a minute
_PARALLEL_CHECKS = 4  # each imports torch


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """What RUN/job.json remembers of the last submission. `job_id` is "17", or "17_2" for a point of an array."""

    job_id: str
    submitted: float  # seconds since the epoch
    cluster: str  # path of the profile
    nodes: int
    launcher: str
    processes_per_node: int
    points: tuple[str, ...] = ()  # overrides of each point, in a sweep's own folder
    runs: tuple[str, ...] = ()  # its points, below that folder; empty for point-0, point-1...


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job, of RUN/attempts.jsonl. Without an `outcome` it runs, or was lost (its node died, say)."""

    number: int
    job: str
    started: float  # seconds since the epoch
    outcome: str | None = (
        None  # finished, warned, preempted, requeued, timeout, terminated, stopped, crashed, refused, ...
    )
    action: str | None = None  # requeue or end
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A line of squeue."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETING, ...
    elapsed: str  # of this attempt, [days-]hours:minutes:seconds
    limit: str
    nodes: str  # a list such as node[1-2]; empty while it waits
    reason: str  # why it waits


# --- the job script --------------------------------------------------------------------------------------------------


def render(
    template: str,
    cluster: Cluster,
    *,
    name: str,
    module: str,
    runs: Sequence[Path],
    log: Path,
    array: str | None = None,
) -> str:
    """The template with its settings filled in. `runs` are absolute; `log` may hold %a, and its %% is one %.

    `ConfigError` for a run folder whose path an #SBATCH line cannot hold.
    """
    if not _SETTINGS.search(template):
        raise ConfigError(f"{TEMPLATE} has no settings between its marks; restore it from the repository")
    lines = [
        "# --- settings (from the cluster profile) " + "-" * 79,
        *_directives(cluster, name=name, log=log, array=array),
        "",
        f"module={shlex.quote(module)}",
        f"launcher={cluster.launcher}",
        f"processes={cluster.processes_per_node}",
        f"cores={cluster.cores_per_process}",
        f"interface={shlex.quote(cluster.interface or '')}",
        f"python={shlex.quote(_python(cluster))}",
        f"max_requeues={cluster.max_requeues}",
        f"crash_limit={cluster.crash_limit}",
        _array("runs", [str(run) for run in runs]),
        _array("container", _before_python(cluster, runs)),
        _array("step_options", _step_options(cluster, runs)),
        "set_up() {",
        "  :",
        *(f"  export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()),
        *_module_lines(cluster),
        *(f"  {line}" for line in cluster.setup),
        "}",
    ]
    return _SETTINGS.sub(lambda _: "\n".join(lines) + "\n", template)


def _directives(cluster: Cluster, *, name: str, log: Path, array: str | None) -> list[str]:
    tasks = cluster.processes_per_node if cluster.launcher == "srun" else 1
    cores = cluster.cores_per_process * cluster.processes_per_node // tasks
    options = {
        "job-name": job_name(name),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": time_limit(cluster.time),
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(cores),
        "gres": cluster.gres,
        "mem": cluster.memory,
        "constraint": cluster.constraint,
        "array": array,
        "output": _for_sbatch(log),
        "open-mode": "append",
        "signal": f"USR1@{round(cluster.signal_lead)}",
    }
    lines = [f"#SBATCH --{option}={shlex.quote(value)}" for option, value in options.items() if value is not None]
    flags = ["--requeue", *(["--exclusive"] if cluster.exclusive else [])]
    return lines + [f"#SBATCH {flag}" for flag in flags] + [f"#SBATCH {shlex.quote(d)}" for d in cluster.directives]


def job_name(name: str) -> str:
    """A name that means nothing to a shell, to squeue's formats or to file name patterns."""
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "_", name).lstrip("-.")[:64] or "unmask"


def time_limit(seconds: float) -> str:
    """D-HH:MM:SS, which leaves no doubt about its unit."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:{rest:02d}"


def _for_sbatch(path: Path) -> str:
    # sbatch reads quotes as a shell does, but a backslash switches its patterns off and is itself dropped.
    if bad := re.search(r"[\x00-\x1f\x7f\\]", str(path)):
        raise ConfigError(
            f"the run folder {str(path.parent)!r} holds the character {bad[0]!r}, which an #SBATCH line cannot; choose "
            "another with run.dir=FOLDER"
        )
    return str(path)


def _python(cluster: Cluster) -> str:
    return cluster.python or (sys.executable if cluster.container.kind == "none" else "python3")


def _before_python(cluster: Cluster, runs: Sequence[Path]) -> list[str]:
    container = cluster.container
    if container.kind != "apptainer":
        return []
    flags = ["--nv"] if container.nvidia else []
    mounts = [word for mount in _mounts(cluster, runs) for word in ("--bind", mount)]
    return ["apptainer", "exec", *flags, "--pwd", os.getcwd(), *mounts, str(container.image)]


def _step_options(cluster: Cluster, runs: Sequence[Path]) -> list[str]:
    container = cluster.container
    if container.kind != "pyxis":
        return []
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in _mounts(cluster, runs)]
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={os.getcwd()}",
    ]


def _mounts(cluster: Cluster, runs: Sequence[Path]) -> list[str]:
    own = [os.getcwd(), *dict.fromkeys(str(run.parent if len(runs) > 1 else run) for run in runs)]
    for folder in own:
        if re.search(r"[,:]", folder):
            raise ConfigError(
                f"{folder!r} holds a comma or a colon, so no container can mount it; choose another folder"
            )
    return [*own, *cluster.container.mounts]


def _module_lines(cluster: Cluster) -> list[str]:
    if not cluster.modules:
        return []
    return [
        "  # Where the login shell that brings `module` has not come along:",
        '  type module >/dev/null 2>&1 || . "${MODULESHOME:?there is no module command here}/init/bash"',
        f"  module load {shlex.join(cluster.modules)} || end 1 crashed 'module load failed'",
    ]


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({shlex.join(words)})"


# --- submit ----------------------------------------------------------------------------------------------------------


def submit(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask submit",
        description="Submit an experiment, or the rest of a run, to SLURM. Checks configuration and data first.",
        epilog=(
            "example: unmask submit configs/llm/tiny/primev2.yaml --cluster configs/cluster/cpu.yaml --nodes 2 "
            "--array schedule.lr=1e-3,2e-3 --array run.seed=0,1 --at-once 2"
        ),
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides")
    parser.add_argument("--cluster", type=Path, required=True, metavar="YAML", help="profile: configs/cluster/*.yaml")
    parser.add_argument("--nodes", type=int, metavar="N", help="number of nodes, in place of the profile's")
    parser.add_argument(
        "--time", metavar="T", help="limit of one attempt, such as 4h or 4:00:00, in place of the profile's"
    )
    parser.add_argument(
        "--array",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a sweep over these values, one task of an array each; several --array make a grid",
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="tasks of the array that may run at the same time")
    parser.add_argument("--dry-run", action="store_true", help="print the job script, write and submit nothing")
    parser.add_argument(
        "--check", action="store_true", help="ask SLURM whether and when it could start; submit nothing"
    )
    options = parser.parse_intermixed_args(argv)
    settings = [f"nodes={options.nodes}"] if options.nodes is not None else []
    settings += [f"time={options.time}"] if options.time is not None else []
    cluster = load_cluster(options.cluster, settings)
    if options.at_once is not None and (options.at_once < 1 or not options.array):
        raise ConfigError(f"--at-once {options.at_once} needs a number of at least 1, and --array")

    module = configs.entry_module(options.config)
    points = grid(options.array)
    folder = Path(os.path.abspath(configs.run_folder(options.config, options.overrides)))
    runs = [folder / f"point-{i}" for i in range(len(points))] if options.array else [folder]
    overrides = [[*options.overrides, *point] for point in points]
    if options.array:
        overrides = [[*o, configs.override("run.dir", str(run))] for o, run in zip(overrides, runs, strict=True)]
    trees = [configs.read_tree(options.config, o) for o in overrides]
    array = None
    if options.array:
        array = f"0-{len(runs) - 1}" + (f"%{options.at_once}" if options.at_once else "")
    sweep = Sweep(
        folder=folder,
        runs=runs,
        configurations=trees,
        name=str((trees[0].get("run") or {}).get("name") or folder.name),
        module=module,
        log="point-%a/job.log" if options.array else "job.log",
        array=array,
        points=tuple(" ".join(point) for point in points),
    )
    script = sweep.script(cluster)
    if not (options.dry_run or options.check):
        refuse_if_active(folder)  # before the check, which takes seconds; and again below, when nobody else submits
    world = cluster.nodes * cluster.processes_per_node
    print(check_configurations(module, [[str(options.config), *o] for o in overrides], world), file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return EXIT_OK
    if options.check:
        print(call(["sbatch", "--test-only"], script=script).strip())
        return EXIT_OK
    job_id = sweep.submit(cluster, profile=options.cluster)
    shown = os.path.relpath(folder)
    shown = str(folder) if shown.startswith("..") else shown
    print(f"job {job_id}: {len(runs)} run{'s' * (len(runs) > 1)} in {shown}; see: unmask status {shlex.quote(shown)}")
    return EXIT_OK


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One job and its runs: a single one, or one for each task of an array."""

    folder: Path  # absolute; of the only run, or the folder that the runs of an array share
    runs: Sequence[Path]  # absolute
    configurations: Sequence[dict[str, Any]]  # of each run, to become its job.yaml
    name: str
    module: str  # what the ranks run, for example llm.train
    log: str  # below `folder`; %a is the number of a task, %A the id of the array
    array: str | None = None  # as sbatch writes it, for example 0-3%2; None for a single run
    points: tuple[str, ...] = ()  # what distinguishes the runs of an array, in words
    below: tuple[str, ...] = ()  # the runs below `folder`, where they are not point-0, point-1...

    def script(self, cluster: Cluster) -> str:
        log = Path(str(self.folder).replace("%", "%%"), self.log)
        return render(
            TEMPLATE.read_text(),
            cluster,
            name=self.name,
            module=self.module,
            runs=self.runs,
            log=log,
            array=self.array,
        )

    def submit(self, cluster: Cluster, *, profile: Path) -> str:
        """Write what the job reads, hand it to SLURM, and remember its id in every folder; returns that."""
        script = self.script(cluster)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.folder):
            refuse_if_active(self.folder)
            for run, tree in zip(self.runs, self.configurations, strict=True):
                run.mkdir(parents=True, exist_ok=True)
                _replace(run / "job.yaml", yaml.safe_dump(tree, sort_keys=False, width=120))
            _replace(self.folder / "job.sbatch", script)
            job_id = call(["sbatch", "--parsable", str(self.folder / "job.sbatch")]).strip().partition(";")[0]
            record = JobRecord(
                job_id=job_id,
                submitted=time.time(),
                cluster=str(profile),
                nodes=cluster.nodes,
                launcher=cluster.launcher,
                processes_per_node=cluster.processes_per_node,
            )
            if self.array:
                for i, run in enumerate(self.runs):
                    _write_record(run, replace(record, job_id=f"{job_id}_{i}"))
                record = replace(record, points=self.points, runs=self.below)
            _write_record(self.folder, record)
        return job_id


def grid(arrays: Sequence[str]) -> list[tuple[str, ...]]:
    """The points of a sweep as overrides: every combination of the values, `["a=1,2"]` -> `[("a=1",), ("a=2",)]`."""
    axes = []
    for text in arrays:
        key, equals, values = text.partition("=")
        try:
            listed = yaml.safe_load(f"[{values}]") if equals else []
        except yaml.YAMLError:
            listed = []
        if not listed:
            raise ConfigError(
                f"--array {text!r} is not of the form section.key=value,value, such as schedule.lr=1e-3,2e-3"
            )
        axes.append([configs.override(key, value) for value in listed])
    return list(itertools.product(*axes))


def refuse_if_active(folder: Path) -> None:
    """`ClusterError` with the job's id if this run, or a point of this sweep, is in the queue."""
    ids = [job_of(run) for run in (folder, *points_of(folder))]
    for job in queued([job_id for job_id in ids if job_id is not None])[:1]:
        raise ClusterError(
            f"{folder} is job {job.job_id} already ({job.state}); wait for it, or end it: unmask cancel "
            f"{shlex.quote(str(folder))}"
        )


def check_configurations(module: str, arguments: Sequence[Sequence[str]], world: int) -> str:
    """Plan every run as its ranks would, but here: a wrong key must not wait a day in the queue.

    `arguments`: of each run's module, the configuration first. The plan of the first run is returned.
    """

    def plan(one: Sequence[str]) -> str:
        command = [sys.executable, "-m", module, *one, "--dry-run", "--gpus", str(world)]
        done = subprocess.run(command, text=True, capture_output=True, env=_outside_of_jobs(os.environ), check=False)
        if done.returncode == EXIT_USER_ERROR:
            raise ConfigError(done.stderr.strip().rpartition("error: ")[2])
        if done.returncode != EXIT_OK:
            raise ClusterError(f"the check of the configuration failed: {done.stderr.strip()[-1000:]}")
        return done.stdout.rstrip()

    with concurrent.futures.ThreadPoolExecutor(_PARALLEL_CHECKS) as pool:
        return [*pool.map(plan, arguments)][0]  # noqa: RUF015 (all of them must be heard)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "job.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError(f"another `unmask submit` of {folder} is at work; look at it: unmask status") from None
        yield


# --- what the run folder and SLURM know ------------------------------------------------------------------------------


def read_record(run: Path) -> JobRecord | None:
    path = run / "job.json"
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    return JobRecord(**{**fields, "points": tuple(fields["points"]), "runs": tuple(fields.get("runs", ()))})


def points_of(folder: Path) -> list[Path]:
    """The runs of the sweep in `folder`; none if it is no sweep."""
    if (record := read_record(folder)) is not None and record.runs:
        return [folder / run for run in record.runs]
    return sorted(folder.glob("point-*"), key=lambda path: (len(path.name), path.name))


def read_attempts(run: Path) -> list[Attempt]:
    """Oldest first. A line that the death of a node has torn is left out."""
    path = run / "attempts.jsonl"
    attempts: dict[int, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["event"] == "start":
            attempts[row["attempt"]] = {"number": row["attempt"], "job": row["job"], "started": row["time"]}
        elif row["attempt"] in attempts:
            attempts[row["attempt"]] |= {key: row[key] for key in ("outcome", "action", "reason")}
    return [Attempt(**fields) for fields in attempts.values()]


def job_of(run: Path) -> str | None:
    """The last job of a run, whoever has submitted it; None if it never met SLURM."""
    record, attempts = read_record(run), read_attempts(run)
    if attempts and (record is None or attempts[-1].started > record.submitted):
        return attempts[-1].job
    return None if record is None else record.job_id


def has_slurm() -> bool:
    return shutil.which("squeue") is not None


def queued(job_ids: Sequence[str]) -> list[QueuedJob]:
    """Those of these jobs (all tasks of an array's id) that wait or run."""
    if not job_ids:
        return []
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(job_ids)}", "--format=%i|%T|%M|%l|%N|%r"]
    try:
        return parse_squeue(call(command, timeout=_QUESTION_SECONDS))
    except ClusterError as error:
        if "Invalid job id" in str(error):  # so long ago that SLURM has forgotten it
            return []
        raise


def parse_squeue(output: str) -> list[QueuedJob]:
    """The output of squeue in our format; job names and other free text are not in it."""
    jobs = []
    for line in output.splitlines():
        job_id, state, elapsed, limit, nodes, reason = line.strip().split("|")
        reason = "" if reason == "None" else reason
        jobs.append(QueuedJob(job_id=job_id, state=state, elapsed=elapsed, limit=limit, nodes=nodes, reason=reason))
    return jobs


def final_state(job_id: str) -> str | None:
    """COMPLETED, CANCELLED, TIMEOUT, ... of a job that has left the queue; None if SLURM has forgotten it.

    From scontrol, which knows it for some minutes (MinJobAge): accounting (sacct) is not switched on everywhere.
    """
    try:
        return parse_scontrol(call(["scontrol", "show", "job", job_id], timeout=_QUESTION_SECONDS)).get("JobState")
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def parse_scontrol(output: str) -> dict[str, str]:
    """Key -> value of the first record that `scontrol show` prints. A value ends at a space, so free text is cut."""
    first = output.strip().split("\n\n")[0]
    fields: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", first):
        fields.setdefault(key, value)
    return fields


def cancel(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask cancel",
        description="End the job of a run, or all jobs of a sweep. The ranks save a checkpoint and the job does not "
        "come back; `unmask submit` with the same arguments goes on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    run = parser.parse_args(argv).run
    job_id = job_of(run)
    if job_id is None:
        raise ConfigError(f"{run} was not submitted to SLURM: it has neither job.json nor attempts.jsonl")
    active = queued([job_id])
    if not active:
        state = final_state(job_id) or "forgotten"
        print(f"job {job_id} of {run} is not in the queue ({state}): nothing to do")
        return EXIT_OK
    call(["scancel", job_id])
    for job in active:
        running = (
            "its ranks have KillWait seconds to save a checkpoint" if job.state == "RUNNING" else "it had not started"
        )
        print(f"cancelled job {job.job_id} ({job.state}): {running}")
    return EXIT_OK


def call(command: Sequence[str], *, script: str | None = None, timeout: float = _TIMEOUT_SECONDS) -> str:
    """Output of one of SLURM's commands; `ClusterError` with its words if it fails."""
    try:
        done = subprocess.run(
            command,
            input=script,
            text=True,
            capture_output=True,
            timeout=timeout,
            env=_outside_of_jobs(os.environ),
            check=False,
        )
    except FileNotFoundError:
        raise ClusterError(f"there is no {command[0]} here; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} has not answered for {timeout:g} s; try again later") from None
    if done.returncode != 0:
        raise ClusterError(f"{command[0]} says: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout if command[-1] != "--test-only" else done.stderr  # sbatch --test-only answers there


def _outside_of_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a job or a launcher around us says of itself: the new job would take it for its own."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in environ.items()
        if name not in launcher and (not name.startswith(("SLURM_", "SLURMD_")) or name == "SLURM_CONF")
    }


def _write_record(run: Path, record: JobRecord) -> None:
    _replace(run / "job.json", json.dumps(asdict(record), indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)

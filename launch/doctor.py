"""`unmask doctor`: what this machine has, what is missing, and what to do about it.

Every check is a function that returns findings; a FAIL among them is the exit code 1.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from launch.errors import ClusterError
from launch.local import RENDEZVOUS_FILE, run_local, usable_cores
from launch.metrics import read_metrics
from launch.slurm import call

_ROOT = Path(__file__).resolve().parents[1]
_OUR_NAMES = ("launch", "llm", "vision", "rl")
_MESSAGE_MIB = 64
_REPEATS = 5
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Finding:
    level: Literal["OK", "WARN", "FAIL"]
    what: str
    text: str
    remedy: str = ""  # of a WARN or FAIL

    def __str__(self) -> str:
        return f"{self.level:<5}{self.what:<12} {self.text}" + (f"\n{'':<18}-> {self.remedy}" if self.remedy else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Print all findings; 1 if something needed fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="unmask doctor",
        description="Look at this machine: versions, import names, devices, two processes that talk, disk, data.",
        epilog="exit code 1 if a line says FAIL. example: unmask doctor",
    )
    parser.parse_args(argv)
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        check_packages,
        check_import_names,
        check_devices,
        check_cores,
        check_communication,
        lambda: check_disk(Path.cwd()),
        check_limits,
        lambda: check_cache(os.environ),
        lambda: check_slurm(Path("runs")),
    ]
    failed = False
    for check in checks:
        for finding in check():
            print(finding, flush=True)
            failed |= finding.level == "FAIL"
    return int(failed)


# --- software --------------------------------------------------------------------------------------------------------


def check_python() -> list[Finding]:
    text = f"{platform.python_version()} on {platform.platform()}"
    if sys.platform != "linux":
        remedy = "start several processes with --launcher torchrun; the local launcher needs Linux"
        return [Finding(level="WARN", what="python", text=text, remedy=remedy)]
    return [Finding(level="OK", what="python", text=text)]


def check_packages(pyproject: Path = _ROOT / "pyproject.toml") -> list[Finding]:
    """Versions against the requirements of the project; missing extras are no fault."""
    if not pyproject.exists():
        remedy = "run from a checkout (git clone, pip install -e .)"
        return [Finding(level="WARN", what="packages", text=f"{pyproject} is missing: not checked", remedy=remedy)]
    project = tomllib.loads(pyproject.read_text())["project"]
    if importlib.util.find_spec("packaging") is None:
        return [Finding(level="FAIL", what="packages", text="packaging is missing", remedy="pip install -e .")]
    needed, wrong, found = project["dependencies"], [], []
    for requirement in needed:
        name, version, fits = _installed(requirement)
        found += [f"{name} {version}"] if version else []
        if not fits:
            wrong.append(f"{requirement} (found {version or 'none'})")
    findings = [Finding(level="OK", what="packages", text=", ".join(found))]
    if wrong:
        findings.append(Finding(level="FAIL", what="packages", text="; ".join(wrong), remedy="pip install -e ."))
    for extra, requirements in project.get("optional-dependencies", {}).items():
        for name, version, fits in map(_installed, requirements):
            if version and not fits:
                remedy = f"pip install -e '.[{extra}]'"
                text = f"{name} {version} is not the version that was tested"
                findings.append(Finding(level="WARN", what="packages", text=text, remedy=remedy))
    return findings


def check_import_names(root: Path = _ROOT) -> list[Finding]:
    """Our import names are plain words, so another distribution may own one of them and win."""
    owners = metadata.packages_distributions()
    findings = []
    for name in _OUR_NAMES:
        others = sorted(set(owners.get(name, [])) - {"unmask"})
        spec = importlib.machinery.PathFinder.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        elsewhere = [place for place in places if not Path(place).resolve().is_relative_to(root)]
        if others or elsewhere:
            text = f"`import {name}` " + (f"belongs to {', '.join(others)} too" if others else f"finds {elsewhere[0]}")
            remedy = f"pip uninstall {' '.join(others)}" if others else f"remove it from PYTHONPATH, or run in {root}"
            findings.append(
                Finding(level="WARN", what="names", text=text, remedy=f"{remedy}; or use an environment of its own")
            )
    return findings or [Finding(level="OK", what="names", text=f"{', '.join(_OUR_NAMES)} are ours")]


def _installed(requirement: str) -> tuple[str, str | None, bool]:
    """(name, version or None, whether it fits) of a requirement such as "numpy>=2.0"."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    try:
        version = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        return parsed.name, None, False
    return parsed.name, version, parsed.specifier.contains(version, prereleases=True)


# --- hardware --------------------------------------------------------------------------------------------------------


def check_devices() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding(level="FAIL", what="devices", text="torch is missing", remedy="pip install -e .")]
    import torch

    if torch.cuda.is_available():
        findings = []
        for index in range(torch.cuda.device_count()):
            gib = torch.cuda.get_device_properties(index).total_memory / 2**30
            text = f"cuda:{index} {torch.cuda.get_device_name(index)}, {gib:.0f} GiB, CUDA {torch.version.cuda}"
            findings.append(Finding(level="OK", what="devices", text=text))
        return findings
    if Path("/proc/driver/nvidia/version").exists():
        text = f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
        remedy = "install the CUDA build of torch (https://pytorch.org), and look at CUDA_VISIBLE_DEVICES"
        return [Finding(level="WARN", what="devices", text=text, remedy=remedy)]
    return [Finding(level="OK", what="devices", text="no GPU; training runs on the CPU")]


def check_cores() -> list[Finding]:
    usable, all_cores = usable_cores(), os.cpu_count() or 0
    text = f"{usable} of {all_cores} usable, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    return [Finding(level="OK", what="cores", text=text)]


def check_communication() -> list[Finding]:
    """All-reduce between two processes: gloo always, NCCL if there are two GPUs."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    backends = ["gloo", *(["nccl"] if torch.cuda.is_available() and torch.cuda.device_count() > 1 else [])]
    return [_measure_all_reduce(backend) for backend in backends]


def _measure_all_reduce(backend: str) -> Finding:
    with tempfile.TemporaryDirectory(prefix="unmask-doctor-") as name:
        result = Path(name) / "result.json"
        program = "import sys; from launch.doctor import all_reduce_probe; all_reduce_probe(*sys.argv[1:])"
        code = run_local([sys.executable, "-c", program, backend, str(result)], 2, log_dir=Path(name))
        if code != 0 or not result.exists():
            return Finding(
                level="FAIL",
                what=backend,
                text=f"two processes of this machine could not add numbers (exit code {code}, see above)",
                remedy="check that the loopback interface is up and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME name one",
            )
        seconds = json.loads(result.read_text())["seconds"]
    speed = _MESSAGE_MIB / 1024 / seconds
    return Finding(
        level="OK", what=backend, text=f"all-reduce of {_MESSAGE_MIB} MiB between 2 processes: {speed:.2f} GiB/s"
    )


def all_reduce_probe(backend: str, result: str) -> None:
    """What each of the two processes runs; rank 0 writes the seconds of one all-reduce to `result`."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    store = dist.FileStore(os.environ[RENDEZVOUS_FILE], world_size)  # pyright: ignore[reportPrivateImportUsage]
    timeout = timedelta(seconds=_TIMEOUT_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    message = torch.ones(_MESSAGE_MIB * 2**18, device=device)  # float32
    dist.all_reduce(message)  # connections are made here
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(message)
    total = message[-1].item()  # waits for the device
    seconds = (time.perf_counter() - begin) / _REPEATS
    expected = float(world_size ** (_REPEATS + 1))
    if total != expected:
        raise RuntimeError(f"the sum of {_REPEATS + 1} all-reduces is {total}, not {expected}")
    if rank == 0:
        Path(result).write_text(json.dumps({"seconds": seconds}))
    dist.destroy_process_group()


# --- the rest --------------------------------------------------------------------------------------------------------


def check_disk(folder: Path) -> list[Finding]:
    gib = shutil.disk_usage(folder).free / 2**30
    text = f"{gib:.1f} GiB free in {folder}"
    remedy = "free some, or set run.dir to a larger disk: a checkpoint takes 12 bytes a parameter (16 with an average)"
    level = "FAIL" if gib < 1 else "WARN" if gib < 10 else "OK"
    return [Finding(level=level, what="disk", text=text, remedy="" if level == "OK" else remedy)]


def check_limits() -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"open files {_limit(files)}, locked memory {_limit(locked)} bytes"
    if files != resource.RLIM_INFINITY and files < 1024:
        return [Finding(level="WARN", what="limits", text=text, remedy="ulimit -n 65536")]
    infiniband = Path("/sys/class/infiniband")
    if locked != resource.RLIM_INFINITY and infiniband.is_dir() and any(infiniband.iterdir()):
        remedy = "NCCL over InfiniBand needs `ulimit -l unlimited` (memlock in limits.conf; LimitMEMLOCK of slurmd)"
        return [Finding(level="WARN", what="limits", text=text, remedy=remedy)]
    return [Finding(level="OK", what="limits", text=text)]


def check_cache(environ: Mapping[str, str]) -> list[Finding]:
    """What `unmask data fetch` has brought: folders of $UNMASK_CACHE, $XDG_CACHE_HOME/unmask or ~/.cache/unmask."""
    override = environ.get("UNMASK_CACHE")
    base = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "~")).expanduser() / ".cache") / "unmask"
    cache = Path(override).expanduser() if override else base
    fetched = [
        f"{kind}/{path.name}"
        for kind in ("corpora", "tokenizers", "folders")
        for path in sorted((cache / kind).glob("*"))
        if path.is_dir() and not path.name.startswith(".")
    ]
    if not fetched:
        remedy = "unmask data fetch --help lists what there is; own text needs none of it"
        return [Finding(level="WARN", what="data", text=f"nothing fetched in {cache}", remedy=remedy)]
    return [Finding(level="OK", what="data", text=f"{', '.join(fetched)} in {cache}")]


def check_slurm(runs: Path) -> list[Finding]:
    """Does SLURM answer, and does it leave a cancelled job the time of a checkpoint? Nothing where there is none."""
    missing = [name for name in ("sbatch", "squeue", "scontrol", "scancel", "srun") if shutil.which(name) is None]
    if len(missing) == 5:
        return []
    if missing:
        remedy = "install the client commands of your cluster's SLURM, or work on its login node"
        return [Finding(level="WARN", what="slurm", text=f"{', '.join(missing)} missing", remedy=remedy)]
    try:
        settings = call(["scontrol", "show", "config"], timeout=10)
    except ClusterError as error:
        remedy = "work on a login node, or set SLURM_CONF"
        return [Finding(level="WARN", what="slurm", text=str(error), remedy=remedy)]
    version = re.search(r"^SLURM_VERSION\s*= (\S+)", settings, re.MULTILINE)
    wait = re.search(r"^KillWait\s*= (\d+)", settings, re.MULTILINE)
    text = f"{version[1] if version else 'unknown version'}, KillWait {wait[1] if wait else '?'} s"
    saved = _last_save(runs)
    if wait is None or saved is None:
        return [Finding(level="OK", what="slurm", text=text)]
    run, seconds = saved
    text += f", the last checkpoint of {run} took {seconds:.1f} s"
    if seconds < int(wait[1]):
        return [Finding(level="OK", what="slurm", text=text)]
    remedy = (
        "scancel, and preemption without a grace time, kill before a checkpoint is done: rely on checkpoint.every, and "
        "keep signal_lead of the cluster profile well above that time"
    )
    return [Finding(level="WARN", what="slurm", text=text, remedy=remedy)]


def _last_save(runs: Path) -> tuple[Path, float] | None:
    """The run that was written to last, of those that have saved, and how long its last checkpoint took in all."""
    for path in sorted(runs.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        rows = [row for row in read_metrics(path) if "checkpoint/write_seconds" in row]
        if rows:
            return path.parent, rows[-1]["checkpoint/stage_seconds"] + rows[-1]["checkpoint/write_seconds"]
    return None


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)

"""What a SLURM cluster wants to be told: one YAML file a cluster, in configs/cluster/.

    partition: gpu
    gres: gpu:8
    processes_per_node: 8

Everything in it is written into the job as text that no shell evaluates, but `setup`: those are shell lines of the
user's own.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch import config as configs
from launch.config import Seconds
from launch.errors import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[\w.,:;+*/@=&|!()\[\]-]+")  # of options such as a partition list or a constraint


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    kind: Literal["none", "apptainer", "pyxis"] = "none"  # apptainer wraps Python; pyxis (enroot) wraps the whole task
    image: str | None = None  # apptainer: a .sif file or docker://...; pyxis: a .sqsh file or an image of a registry
    mounts: tuple[
        str, ...
    ] = ()  # HOST or HOST:CONTAINER[:ro]; the working folder and the run folder come by themselves
    nvidia: bool = True  # apptainer: bring the NVIDIA driver in (--nv)

    def check(self, path: str) -> None:
        if (self.kind == "none") != (self.image is None):
            raise ConfigError(f"{path}.kind = {self.kind} with image = {self.image!r}; set both, or neither")
        for i, mount in enumerate(self.mounts):
            if re.search(r"[,\n]", mount):
                raise ConfigError(
                    f"{path}.mounts[{i}] = {mount!r} holds a comma or a line end, which no runtime can mount"
                )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    partition: str | None = None  # null: the default one
    account: str | None = None  # what the job is charged to
    qos: str | None = None  # quality of service
    time: Seconds  # limit of one attempt, such as 4h; a run longer than that requeues itself
    nodes: int = 1  # unless --nodes says otherwise
    gres: str | None = None  # of each node, such as gpu:8 or gpu:h100:8
    processes_per_node: int = 1  # ranks on each node: one a GPU, as a rule
    cores_per_process: int = 1  # cores of each rank, and its OMP_NUM_THREADS
    memory: str | None = None  # of each node, such as 500G; 0 for all of it; null: the partition's default
    exclusive: bool = False  # share the nodes with no other job
    constraint: str | None = None  # features that the nodes must have
    directives: tuple[str, ...] = ()  # further options of sbatch, such as --reservation=course
    modules: tuple[str, ...] = ()  # loaded at the start of each attempt: module load A B
    setup: tuple[str, ...] = ()  # shell lines run after that, on the first node; what they export reaches all ranks
    environment: dict[str, str] = field(default_factory=dict)  # variables of the ranks
    interface: str | None = None  # network interface of gloo and NCCL, such as ib0; lo if all nodes are one machine
    container: ContainerConfig = field(default_factory=ContainerConfig)
    python: str | None = None  # null: the one that runs `unmask submit`, or python3 of the container
    launcher: Literal["srun", "torchrun", "accelerate"] = "srun"  # srun: no agent between SLURM and the ranks
    signal_lead: Seconds = 300.0  # warning before the time limit; must cover one step, one checkpoint, and a minute
    max_requeues: int = 100  # of one job, whatever their cause
    crash_limit: int = 3  # failures in a row without a new checkpoint, after which the job ends

    def check(self, path: str) -> None:
        del path  # this is the root
        for name in ("nodes", "processes_per_node", "cores_per_process", "crash_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; the smallest is 1")
        if self.max_requeues < 0:
            raise ConfigError(f"max_requeues = {self.max_requeues}; the smallest is 0 (never)")
        for name in ("time", "signal_lead"):
            if not 60 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name):g} s; SLURM counts in minutes, so the least is 60 s")
        if self.signal_lead >= self.time:
            raise ConfigError(
                f"signal_lead = {self.signal_lead:g} s is no less than time = {self.time:g} s: the warning would come "
                "at the start; raise time or lower signal_lead"
            )
        for name in ("partition", "account", "qos", "gres", "memory", "constraint", "interface"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise ConfigError(f"{name} = {value!r} holds characters that an #SBATCH line cannot, such as spaces")
        for i, directive in enumerate(self.directives):
            if not re.fullmatch(r"--[a-z][^\n\r]*", directive):
                raise ConfigError(
                    f"directives[{i}] = {directive!r}; expected an option of sbatch, such as --mail-type=END"
                )
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"environment: {name!r} is no name of a variable")


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> Cluster:
    """The profile in `path`, with overrides such as "nodes=4" or "time=12h"."""
    return configs.load(Cluster, path, overrides)[0]

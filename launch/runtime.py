"""The processes of a run: who they are, which device each has, and how they agree.

The process group comes from whatever launcher started us: `unmask train` (a file store, no listener), torchrun,
`accelerate launch` (both set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), srun (a task is a rank), or
nothing (one process). A half-set environment is an error, never a fall-back to one process.

Two groups exist from the start: the training group (NCCL on CUDA, else gloo), and a gloo control group over CPU tensors
for decisions, so that an agreement never waits for, nor interleaves with, a collective of the training stream.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch.errors import ClusterError, UserError
from launch.local import RENDEZVOUS_FILE

T = TypeVar("T")

# gloo and the file store have no error type of their own. The last is what a connection says that timed out before.
_LOST_PEER = re.compile(r"gloo/transport|^Wait timeout|Application timeout caused pair closure")

_AGENT = "TORCHELASTIC_RUN_ID"  # of torchrun and accelerate, whose agent holds the store
_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands, as its launcher said."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def place_from_environment(environ: Mapping[str, str]) -> Place:
    """Read the launcher's variables; `ClusterError` if only some are set or they contradict each other."""
    present = [name for name in _REQUIRED if name in environ]
    if not present:
        return Place()
    missing = [name for name in _REQUIRED if name not in environ]
    if RENDEZVOUS_FILE not in environ:
        missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise ClusterError(
            f"the launcher set {', '.join(present)} but not {', '.join(missing)}; start with `unmask train`, torchrun "
            f"or `accelerate launch`, or unset {', '.join(present)} for a single process"
        )
    rank, world_size, local_rank = (int(environ[name]) for name in _REQUIRED)
    local_world_size = int(environ.get("LOCAL_WORLD_SIZE", world_size))
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size):
        raise ClusterError(
            f"RANK={rank} of WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world_size}: "
            "a rank must be smaller than its size; check the launcher's --node_rank and --nproc_per_node"
        )
    return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


def ranks_of_srun(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a launcher, translated from what srun says of this task; empty if srun started no ranks.

    A step of one task is a single process: `unmask train` in an interactive shell of a job is what it is elsewhere. A
    step of several tasks needs MASTER_ADDR and MASTER_PORT, as slurm/train.sbatch sets them; without, each task would
    train alone, and that is a `ClusterError`.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or any(name in environ for name in _REQUIRED):
        return {}
    needed = (
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_TASKS_PER_NODE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    if missing := [name for name in needed if name not in environ]:
        raise ClusterError(
            f"srun started {tasks} tasks, but {', '.join(missing)} is not set; use slurm/train.sbatch, or export "
            "MASTER_ADDR (a name of the first node) and MASTER_PORT (free there) before srun"
        )
    per_node: list[int] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):  # such as 4(x2),3
        count, _, times = part.partition("(x")
        per_node += [int(count)] * int(times.rstrip(")") or 1)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environ["SLURM_NODEID"])]),
    }


class Runtime:
    """This process among its peers. Make it with `start`, end it with `close`."""

    def __init__(self, place: Place, device: torch.device, control_group: dist.ProcessGroup, timeout: timedelta):
        self.rank, self.world_size = place.rank, place.world_size
        self.local_rank, self.local_world_size = place.local_rank, place.local_world_size
        self.device = device
        self.control_group = control_group
        self._timeout = timeout

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def new_control_group(self) -> dist.ProcessGroup:
        """Collective. Another gloo group, for a thread that must not interleave with the control group."""
        return _gloo_group(self._timeout)

    def barrier(self) -> None:
        """Collective. Wait for all ranks, on the control group."""
        if self.world_size > 1:
            dist.barrier(group=self.control_group)

    def sum_and_max(self, summed: list[float], maximised: list[int]) -> tuple[list[float], list[int]]:
        """Collective. Sums and maxima over ranks in ONE exchange; the per-step agreement of the trainer."""
        if self.world_size == 1:
            return summed, maximised
        mine = torch.tensor([*summed, *maximised], dtype=torch.float64)
        everyone = torch.empty(self.world_size, mine.numel(), dtype=torch.float64)
        dist.all_gather_single(everyone.view(-1), mine, group=self.control_group)
        sums, maxima = everyone[:, : len(summed)].sum(0), everyone[:, len(summed) :].amax(0)
        return sums.tolist(), [int(v) for v in maxima.tolist()] if maximised else []

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Collective. Sum of a small tensor over all ranks in float64 (so that the order of ranks does not show)."""
        total = values.detach().to("cpu", torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control_group)
        return total

    def decide(self, function: Callable[[], T]) -> T:
        """Collective. Rank 0 runs `function`; every rank gets its value, or raises its error."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:  # re-raised below on every rank, so nobody waits for a rank that has left
                failure = error
                outcome[1] = (type(error).__name__, str(error), isinstance(error, UserError))
        dist.broadcast_object_list(outcome, src=0, group=self.control_group)
        if outcome[1] is None:
            return outcome[0]
        if failure is not None:
            raise failure
        name, text, is_user_error = outcome[1]
        raise _error_like(name, text) if is_user_error else RuntimeError(f"rank 0 failed with {name}: {text}")

    def together(self, function: Callable[[], T]) -> T:
        """Collective. Every rank runs `function`; if it fails on any, it fails on all (first failing rank's words)."""
        value, problem, failure = None, None, None
        try:
            value = function()
        except Exception as error:  # re-raised below, after the other ranks have heard of it
            failure, problem = error, (type(error).__name__, str(error), isinstance(error, UserError))
        problems = self.gather(problem)
        if failure is not None:
            raise failure
        for rank, other in enumerate(problems):
            if other is not None:
                name, text, is_user_error = other
                raise _error_like(name, text) if is_user_error else RuntimeError(f"rank {rank}: {name}: {text}")
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Collective. The value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(*, device: str = "auto", timeout_seconds: float = 600.0) -> Runtime:
    """Join the process group and pick the device. `device` is "auto" (CUDA if there is one), "cpu" or "cuda"."""
    place = place_from_environment(os.environ)
    timeout = timedelta(seconds=timeout_seconds)
    chosen = _pick_device(device, place)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    elif RENDEZVOUS_FILE in os.environ:
        store = FileStore(os.environ[RENDEZVOUS_FILE], place.world_size)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    elif os.environ["MASTER_ADDR"].startswith("127.") and _AGENT not in os.environ:  # srun on a cluster of one machine
        store = _loopback_store(place, timeout)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=timeout)
    runtime = Runtime(place, chosen, _gloo_group(timeout), timeout)
    _prove_world(runtime)
    return runtime


def lost_peer(error: BaseException | None) -> str | None:
    """What the process group said, in one line, if `error` comes of a rank that is gone, silent or cut off."""
    while error is not None:
        is_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
        if is_store or (isinstance(error, RuntimeError) and _LOST_PEER.search(str(error))):
            return re.sub(r"^\[\S+gloo/\S+\] ", "", str(error).splitlines()[0])
        error = error.__cause__
    return None


def _loopback_store(place: Place, timeout: timedelta) -> TCPStore:
    """Rank 0 listens on loopback alone, where torch by itself would listen on every interface.

    Not so for a name: its own host may resolve it to loopback (127.0.1.1), where no other node would find it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if place.rank != 0:
        return TCPStore(host, port, place.world_size, False, timeout)
    listener = socket.create_server((host, port)).detach()
    return TCPStore(host, port, place.world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener)


def _error_like(name: str, text: str) -> UserError:
    """The user error called `name`, as another rank raised it."""
    return {c.__name__: c for c in UserError.__subclasses__()}.get(name, UserError)(text)


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _pick_device(name: str, place: Place) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "engine.device = cuda but torch sees no CUDA device; use engine.device=cpu, or see `unmask doctor`"
        )
    if place.local_rank >= torch.cuda.device_count():
        raise ClusterError(
            f"LOCAL_RANK={place.local_rank} but this machine shows {torch.cuda.device_count()} CUDA devices; "
            "start at most one process a device (--nproc), or use engine.device=cpu"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _prove_world(runtime: Runtime) -> None:
    """Two ranks on one GPU or two torch versions in one run cost days; one exchange at the start shows them."""
    mine = (socket.gethostname(), runtime.device.type, str(runtime.local_rank), str(torch.__version__))
    everyone = runtime.gather(mine)
    for what, index in (("device types", 1), ("torch versions", 3)):
        values = sorted({entry[index] for entry in everyone})
        if len(values) > 1:
            raise ClusterError(f"the ranks have different {what}: {', '.join(values)}; make them equal")
    if runtime.device.type == "cuda" and len({entry[:3] for entry in everyone}) < len(everyone):
        raise ClusterError("two ranks of one machine share a CUDA device; start one process a device")

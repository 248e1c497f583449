"""Whether a folder will take checkpoints, found out in the first minute instead of at the first save hours later."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch.distributed as dist

from launch.checkpoint import layout
from launch.checkpoint.commit import remedy, size, sweep
from launch.errors import CheckpointError, ClusterError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """What this package needs of launch.runtime.Runtime."""

    rank: int
    world_size: int

    def decide(self, function: Callable[[], T]) -> T: ...
    def together(self, function: Callable[[], T]) -> T: ...
    def gather(self, value: T) -> list[T]: ...
    def new_control_group(self) -> dist.ProcessGroup: ...


def preflight(folder: Path, runtime: Runtime, *, needed_bytes: int, keep_last: int) -> None:
    """Collective. Write, rename and read back on every rank; compare the free space with the size of one checkpoint.

    `ClusterError` if the ranks do not see the same folder, `CheckpointError` if it cannot be written or is full.
    """
    probe = folder / f"{layout.TRASH}probe"  # of the kind that is swept away, should this process die here
    token = runtime.decide(lambda: _open_probe(folder, probe))
    try:
        runtime.together(lambda: _try_probe(folder, probe, token, runtime.rank))
    finally:
        runtime.decide(lambda: shutil.rmtree(probe, ignore_errors=True))
    runtime.decide(lambda: _check_space(folder, needed_bytes, keep_last))


def _open_probe(folder: Path, probe: Path) -> str:
    token = f"{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        probe.mkdir()
        layout.write_synced(probe / "token.new", token)
        (probe / "token.new").rename(probe / "token")
        layout.sync(probe)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error}; {remedy(str(error), folder)}") from error
    return token


def _try_probe(folder: Path, probe: Path, token: str, rank: int) -> None:
    if not (probe / "token").exists() or (probe / "token").read_text() != token:
        raise ClusterError(
            f"rank {rank} on {os.uname().nodename} does not see what rank 0 wrote to {folder}; the run folder must lie "
            "on a file system that all nodes share"
        )
    mine = probe / f"rank-{rank}"
    try:
        layout.write_synced(mine, token)
        back = mine.read_text()
    except OSError as error:
        raise CheckpointError(f"rank {rank} cannot write to {folder}: {error}; {remedy(str(error), folder)}") from error
    if back != token:
        raise CheckpointError(f"rank {rank} read {back!r} from {mine} after writing {token!r}; use another file system")


def _check_space(folder: Path, needed: int, keep_last: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"a checkpoint takes {size(needed)}, but {size(free)} are free at {folder}; free {size(needed - free)} "
            "there, or choose a run folder on another disk"
        )
    held = sum(file.stat().st_size for file in folder.glob(f"step_*/{layout.STATE}/*"))  # retention will free these
    if free + held < (keep_last + 1) * needed:
        logger.warning(
            "%s has room for %s, but %d checkpoints and one being written take %s; lower checkpoint.keep_last, or free "
            "space before that many are there",
            folder, size(free + held), keep_last, size((keep_last + 1) * needed),
        )  # fmt: skip

"""A verb on several ranks: those that a launcher has started, or as many as --nproc asks for on this machine."""

import os
import sys
from collections.abc import Callable, Sequence

from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.local import run_local
from launch.runtime import Runtime

_PATIENCE_S = 24 * 3600.0  # ranks meet after hours of work of different lengths


def check_processes(count: int) -> None:
    if count < 1:
        raise ConfigError(f"--nproc {count}; the smallest is 1")


def on_ranks(
    verb: str, argv: Sequence[str], *, processes: int, device: str, work: Callable[[Runtime], None], done: str
) -> int:
    """Run `work` on every rank, and say `done` on the first; the exit code."""
    check_processes(processes)
    if processes > 1 and "RANK" not in os.environ:
        return run_local([sys.executable, "-m", "launch", "moe", verb, *argv], processes)
    runtime = runtimes.start(device=device, timeout_seconds=_PATIENCE_S)
    try:
        work(runtime)
        runtime.barrier()
        if runtime.is_main:
            print(done)
    finally:
        runtime.close()
    return 0

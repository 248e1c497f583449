"""Run one function on several real processes that form a gloo group, and learn what each of them returned.

    def total(rank: int) -> int: ...                    # a module-level function; every rank gets the same arguments
    assert spawn(total, 4, 10) == [10, 10, 10, 10]

The group meets through a file store, so no test needs a free port. The first rank that raises, dies or hangs ends the
whole group: the caller gets `RankFailed` with the traceback (or the stacks) of that rank, and no process stays behind.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# A fork server imports torch once and forks every rank from a process without threads: ranks start in milliseconds,
# which plain spawn (seconds of imports a rank) and plain fork (a child inherits locked mutexes) do not give together.
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the fork server starts: DeepSpeed reads it at its import
_CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = (  # what the first optimizer, DTensor or FSDP module of a rank imports: 1.3 CPU-seconds
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.profiler"),
    *("safetensors.torch", "deepspeed"),
)
_CONTEXT.set_forkserver_preload(list(PRELOADED))
_SETTLE_S = 0.3  # after the first failure, so that the cause is found among the ranks that merely lost their peer
_STACKS_S = 5.0  # a rank that hangs writes its own stacks at `timeout`; the parent waits this much longer for them

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the fork server starts: OpenMP reads it once, at its load
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def spawn(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, group: bool = True) -> list[Any]:
    """`fn(*args)` on `world_size` processes; the results in the order of the ranks.

    `fn` must be importable (module level), arguments and results picklable. Every rank sees RANK, LOCAL_RANK,
    WORLD_SIZE and LOCAL_WORLD_SIZE in its environment, and finds the default process group ready unless `group` is
    False. `timeout` in seconds bounds the whole call and every collective.
    """
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="unmask-spawn-") as name:
        folder = Path(name)
        processes = [
            _CONTEXT.Process(
                target=_rank_main,
                args=(payload, rank, world_size, folder, timeout, group, dict(os.environ), os.getcwd()),
                daemon=False,
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            hung = _wait_for_all_or_first_failure(processes, deadline=time.monotonic() + timeout + _STACKS_S)
            failure = _first_failure(processes, folder, hung, timeout)
        finally:
            for process in processes:
                _end(process)
        if failure is not None:
            raise failure
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


class RankFailed(RuntimeError):
    """One rank raised, died or hung. `rank` is the one that did so first."""

    def __init__(self, rank: int, world_size: int, what: str, detail: str) -> None:
        super().__init__(f"rank {rank} of {world_size} {what}\n{detail}".rstrip())
        self.rank = rank


def _rank_main(
    payload: bytes,
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    group: bool,
    environment: dict[str, str],
    working_folder: str,
) -> None:
    os.setsid()  # one process group a rank, so that whatever it starts itself ends with it
    os.environ.clear()  # the fork server keeps the environment of its own start
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ["UNMASK_RENDEZVOUS_FILE"] = str(folder / "rendezvous")  # for launch.runtime.start, with group=False
    os.chdir(working_folder)
    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if group:
            limit = timedelta(seconds=timeout)
            store = f"file://{folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
        fn, args = pickle.loads(payload)
        result = fn(*args)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        # The monotonic clock is common to all processes: the earliest failure is the cause, the others its echoes.
        (folder / f"error-{rank}").write_text(f"{time.monotonic()}\n{traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)  # threads and groups of a failed rank must not keep it alive
    sys.stdout.flush()


def _wait_for_all_or_first_failure(processes: Sequence[BaseProcess], deadline: float) -> bool:
    """True if the deadline came first."""
    while running := [process for process in processes if process.exitcode is None]:
        if not wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic())):
            return True
        if any(process.exitcode for process in processes):
            settled = time.monotonic() + _SETTLE_S
            while time.monotonic() < settled and any(process.exitcode is None for process in processes):
                time.sleep(0.02)
            return False
    return False


def _first_failure(processes: Sequence[BaseProcess], folder: Path, hung: bool, timeout: float) -> RankFailed | None:
    world_size = len(processes)
    died, raised, stuck = [], [], []
    for rank, process in enumerate(processes):
        error, stacks = folder / f"error-{rank}", folder / f"stacks-{rank}"
        if error.exists():
            moment, text = error.read_text().split("\n", 1)
            raised.append((float(moment), RankFailed(rank, world_size, "raised", text)))
        elif stacks.exists() and (text := stacks.read_text()):
            stuck.append(RankFailed(rank, world_size, f"hung: not finished after {timeout:g} s. Its stacks:", text))
        elif process.exitcode is None and hung:
            stuck.append(RankFailed(rank, world_size, f"hung: not finished after {timeout:g} s and did not answer", ""))
        elif process.exitcode:
            died.append(RankFailed(rank, world_size, f"died {_cause_of_death(process.exitcode)}", ""))
    if died:  # without a word: whoever raised has only lost this peer
        return died[0]
    if raised:
        return min(raised, key=lambda item: item[0])[1]
    return stuck[0] if stuck else None


def _cause_of_death(exitcode: int) -> str:
    return f"by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"with exit code {exitcode}"


def _end(process: BaseProcess) -> None:
    if process.pid is None:  # never started
        return
    # Also after an orderly end: the group may hold what the rank started. ESRCH says that nothing is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    process.close()

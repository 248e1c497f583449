"""Start the processes of a run on this machine, and write the command lines of torchrun and `accelerate launch`.

    code = run_local([sys.executable, "-m", "llm.train", "config.yaml"], 4, log_dir=Path("RUN/logs"))

Linux only: that no process outlives its launcher, even one that is SIGKILLed, rests on PR_SET_PDEATHSIG.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launch.errors import ClusterError
from launch.stop import EXIT_DIVERGED, EXIT_HUNG, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, STOP_SIGNALS

RENDEZVOUS_FILE = "UNMASK_RENDEZVOUS_FILE"  # the processes of one machine meet in this file: no port to find or guard

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_LAST_LINES = 20

# Ends that all ranks have agreed on. Rank 0 may still be writing its report when the others have left.
_ORDERLY = (EXIT_OK, EXIT_STOPPED, EXIT_DIVERGED)


# --- processes on this machine ---------------------------------------------------------------------------------------


def run_local(
    command: Sequence[str],
    num_processes: int,
    *,
    log_dir: Path | None = None,
    grace_seconds: float = 10.0,
    as_ranks: bool = True,
) -> int:
    """Run `command` as ranks 0..num_processes-1 and return the exit code that says most (`exit_code`).

    Rank 0 writes to the console, the others to `log_dir`/rank-N.log (without `log_dir`, all to the console). SIGTERM,
    SIGINT, SIGUSR1 and SIGUSR2 are passed on, and the ranks decide. If a rank fails, the others get `grace_seconds`
    to notice and are then killed: a process group with a hole cannot save a checkpoint. Call it on the main thread.

    Without `as_ranks` the command is a launcher itself, which sets the variables of its ranks.
    """
    if num_processes < 1:
        raise ClusterError(f"{num_processes} processes were asked for; at least 1 is needed")
    if sys.platform != "linux":
        raise ClusterError(f"the local launcher needs Linux, this is {sys.platform}; use --launcher torchrun")
    with tempfile.TemporaryDirectory(prefix="unmask-") as folder, _Children(as_ranks) as children:
        for rank in range(num_processes):
            variables = dict(os.environ)
            if as_ranks:
                file = Path(folder) / "rendezvous"
                variables = rank_environment(os.environ, rank, num_processes, rendezvous_file=file)
            log = None if log_dir is None or rank == 0 else log_dir / f"rank-{rank}.log"
            children.start(command, variables, log)
        return children.wait(grace_seconds)


def rank_environment(
    environ: Mapping[str, str], rank: int, num_processes: int, *, rendezvous_file: Path
) -> dict[str, str]:
    """The environment of one rank. Thread counts and network interfaces that the user has set stay."""
    # What another launcher said about its own processes is wrong for ours.
    variables = {k: v for k, v in environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    variables.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_processes)))
    variables.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: a host name that does not resolve must not matter
    variables.setdefault("PYTHONFAULTHANDLER", "1")
    variables.setdefault("PYTHONUNBUFFERED", "1")  # so that the log of a killed rank ends where the rank did
    variables |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        RENDEZVOUS_FILE: str(rendezvous_file),
    }
    return variables


def exit_code(returncodes: Sequence[int], first_failed: int | None = None) -> int:
    """One exit code for many ranks. `returncodes` as subprocess gives them: negative for a signal.

    0 if all are 0; 75 (stopped, resumable) only if nobody failed; 77 or 2 if a rank ended with it; else the code of the
    rank that failed first, 128 + signal if a signal killed it: one that then loses it as a peer ends with 76.
    """
    codes = [code if code >= 0 else 128 - code for code in returncodes]
    if set(codes) <= {EXIT_OK, EXIT_STOPPED}:
        return max(codes, default=EXIT_OK)
    for code in (EXIT_DIVERGED, EXIT_USER_ERROR):
        if code in codes:
            return code
    if first_failed is not None:
        return codes[first_failed]
    return next(code for code in codes if code not in (EXIT_OK, EXIT_STOPPED))


def usable_cores() -> int:
    """Cores that this process may run on, which on a shared node are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


class _Children:
    """From `start` to the end of the context, with the stop signals passed on to them."""

    def __init__(self, are_ranks: bool) -> None:
        self._are_ranks = are_ranks
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path | None] = []
        self._received: list[int] = []
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Children":
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()  # nothing to do after an orderly end
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], environ: Mapping[str, str], log: Path | None) -> None:
        with contextlib.ExitStack() as stack:
            output = None
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))  # a resumed run adds to the log
            child = subprocess.Popen(
                list(command),
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C reaches the launcher alone, which passes it on once; and a rank can be killed with its helpers.
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
        self._children.append(child)
        self._logs.append(log)
        for number in self._received:  # came while the ranks were being started
            child.send_signal(number)

    def wait(self, grace_seconds: float) -> int:
        """Until all have ended; their common exit code."""
        first_failed, deadline = None, None
        killed: set[int] = set()
        while running := [rank for rank, child in enumerate(self._children) if child.poll() is None]:
            if first_failed is None and (first_failed := self._first_failed()) is not None:
                deadline = time.monotonic() + grace_seconds
                self._say(f"{self._obituary(first_failed)}; the others end within {grace_seconds:g} s", first_failed)
            if deadline is not None and time.monotonic() > deadline and not killed:
                killed = set(running)
                self._say(f"killed, because they did not end: ranks {', '.join(map(str, running))}")
                self._kill()
            time.sleep(_POLL_SECONDS)
        if first_failed is None and (first_failed := self._first_failed()) is not None:
            self._say(self._obituary(first_failed), first_failed)
        # A rank that we killed says nothing about the run.
        indices = [rank for rank in range(len(self._children)) if rank not in killed]
        codes = [self._children[rank].returncode for rank in indices]
        return exit_code(codes, None if first_failed is None else indices.index(first_failed))

    def _first_failed(self) -> int | None:
        codes = {rank: child.returncode for rank, child in enumerate(self._children) if child.returncode is not None}
        failed = [rank for rank, code in codes.items() if code not in _ORDERLY]
        # Of several at once, one that a signal ended is the cause: the others had time to raise an error. And one that
        # only lost its peers is none.
        return min(failed, key=lambda rank: (codes[rank] >= 0, codes[rank] == EXIT_HUNG, rank), default=None)

    def _obituary(self, rank: int) -> str:
        code = self._children[rank].returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} of {len(self._children)} {how}" if self._are_ranks else f"the launcher {how}"

    def _say(self, text: str, rank: int | None = None) -> None:
        print(f"unmask: {text}", file=sys.stderr, flush=True)
        log = None if rank is None else self._logs[rank]
        if log is not None:
            lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            print(
                "\n".join([f"  last lines of {log}:", *(f"  | {line}" for line in lines)]), file=sys.stderr, flush=True
            )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._are_ranks and number in (signal.SIGUSR1, signal.SIGUSR2):
            number = signal.SIGTERM  # a torchrun agent dies of the others and leaves its workers behind
        self._received.append(number)
        for child in self._children:
            child.send_signal(number)  # does nothing for a child that has been waited for

    def _kill(self) -> None:
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def die_with(launcher: int) -> Callable[[], None]:
    """For `preexec_fn`: the kernel kills the child when its launcher dies, of whatever cause."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork, where no lock may be waited for

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the line above
            os._exit(128 + signal.SIGKILL)

    return arrange


# --- command lines of other launchers --------------------------------------------------------------------------------


def torchrun_command(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    num_nodes: int = 1,
    endpoint: str | None = None,
    run_id: str = "unmask",
    shutdown_seconds: int = 300,
) -> list[str]:
    """`torchrun ... -m module arguments`; with several nodes the same line runs on each of them.

    `processes` are those of one node; `endpoint` is host:port of one of them, by a name that resolves there. torchrun
    kills its workers `shutdown_seconds` after it was asked to stop (30 by default): time for the step in flight and one
    checkpoint.
    """
    rendezvous = ["--standalone"]
    if num_nodes > 1:
        host, port = _split_endpoint(endpoint, num_nodes)
        rendezvous = [
            f"--nnodes={num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host}:{port}",
            f"--rdzv-id={run_id}",
        ]
    return [
        "torchrun",
        *rendezvous,
        f"--nproc-per-node={processes}",
        f"--shutdown-timeout={shutdown_seconds}",
        "-m",
        module,
        *arguments,
    ]


def accelerate_command(
    module: str,
    arguments: Sequence[str],
    *,
    processes: int,
    num_nodes: int = 1,
    node_rank: int = 0,
    endpoint: str | None = None,
    cpu: bool = False,
) -> list[str]:
    """`accelerate launch ... -m module arguments`; with several nodes, each has its own `node_rank`.

    accelerate only starts the processes: precision and sharding are said in the run's configuration. Without
    `--multi_gpu` it starts one process whatever `--num_processes` says, on CPU too, and `--cpu` would choose that
    path; hence the variable ACCELERATE_USE_CPU instead. `processes` are those of one node, `--num_processes` of all.
    """
    total = processes * num_nodes
    place = ["--main_process_port=0"]  # any free one; the default, 29500, is taken by a second run
    if num_nodes > 1:
        host, port = _split_endpoint(endpoint, num_nodes)
        place = [f"--machine_rank={node_rank}", f"--main_process_ip={host}", f"--main_process_port={port}"]
    return [
        *(["env", "ACCELERATE_USE_CPU=true"] if cpu else []),
        "accelerate",
        "launch",
        *(["--multi_gpu"] if total > 1 else []),
        f"--num_processes={total}",
        f"--num_machines={num_nodes}",
        *place,
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "-m",
        module,
        *arguments,
    ]


def check_accelerate_environment(strategy: str, precision: str, environ: Mapping[str, str]) -> None:
    """`ClusterError` if `accelerate launch` was told a sharding or precision other than the run's configuration.

    We read only ranks from accelerate. A plug-in that it announces in the environment and that we do not apply would be
    a training run of another kind than the one its user believes in. `strategy` is ddp, fsdp2, zero1...; `precision` is
    fp32 or bf16.
    """
    if _is_true(environ.get("ACCELERATE_USE_FSDP")):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2" or not strategy.startswith("fsdp2"):
            raise _disagreement(f"ACCELERATE_USE_FSDP=true, FSDP_VERSION={version}", f"engine strategy {strategy}")
    if _is_true(environ.get("ACCELERATE_USE_DEEPSPEED")):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if not strategy.startswith("zero") or (strategy[4:].isdigit() and stage not in ("", strategy[4:])):
            said = "ACCELERATE_USE_DEEPSPEED=true" + (f", ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}" if stage else "")
            raise _disagreement(said, f"engine strategy {strategy}")
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("", "no", precision):
        raise _disagreement(f"ACCELERATE_MIXED_PRECISION={mixed}", f"precision {precision}")


def _disagreement(environment: str, configured: str) -> ClusterError:
    return ClusterError(
        f"`accelerate launch` says {environment} but the run's configuration says {configured}; only the configuration "
        "counts: start with `accelerate launch --multi_gpu --mixed_precision no` and without its FSDP or DeepSpeed "
        "options, or change the configuration to what accelerate says"
    )


def _is_true(text: str | None) -> bool:
    return text is not None and text.lower() in ("1", "true", "yes", "on", "y", "t")


def _split_endpoint(endpoint: str | None, num_nodes: int) -> tuple[str, int]:
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"{num_nodes} nodes need an endpoint host:port that all of them reach, such as node001:29500; "
            f"got {endpoint!r}"
        )
    return host, int(port)

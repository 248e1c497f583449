"""How a run ends: the exit codes, and signals that ask for a stop instead of enforcing one.

| code | name          | meaning                                                                                    |
|------|---------------|--------------------------------------------------------------------------------------------|
| 0    | EXIT_OK       | the run is finished                                                                        |
| 2    | EXIT_USER_ERROR | a configuration, data set, checkpoint or cluster cannot be used; the message says why    |
| 75   | EXIT_STOPPED  | a signal asked to stop, a checkpoint is committed, `unmask resume RUN` goes on             |
| 76   | EXIT_HUNG     | no progress for too long, or another rank is lost; the stacks are in RUN/health            |
| 77   | EXIT_DIVERGED | the loss stayed non-finite or kept spiking, and the rollbacks are used up                  |
| 130  | EXIT_NOW      | a second Ctrl-C: nothing was saved                                                         |

Other codes are those of Python (1: our own mistake, with a traceback) and of the system (128 + signal). 75 is the
EX_TEMPFAIL of sysexits.h: try again later. torchrun turns every code but 0 into 1.

A handler only sets a flag. Which step is the last one is agreed by all ranks: the trainer puts `StopFlag.code()` into
its one exchange per step and stops when the maximum is not `GO_ON`.

A batch system warns before it takes the nodes away (USR1, USR2): the run wants to go on, elsewhere or later. Whoever
sends SIGTERM or SIGINT wants it to end. Both stop alike; after a warning rank 0 leaves RUN/REQUEUE for the job script.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
EXIT_HUNG = 76
EXIT_DIVERGED = 77
EXIT_NOW = 130

# What a rank proposes, and by their maximum all ranks do. A wish to end is stronger than a warning.
GO_ON, WARNED, TOLD_TO_END = 0, 1, 2

_WARNINGS = (signal.SIGUSR1.name, signal.SIGUSR2.name)
MEANING = {
    EXIT_USER_ERROR: "the message above says what to mend",
    EXIT_HUNG: "a rank hung or was lost",
    EXIT_DIVERGED: "the loss diverged",
    EXIT_NOW: "stopped at once, without a checkpoint",
}

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# A terminal and a launcher may both deliver one Ctrl-C; a person does not press twice within this time.
_SAME_KEYSTROKE_SECONDS = 0.5


def tell_launcher(words: str) -> None:
    """Leave the last words of this process where torchrun looks for them: its own summary comes after ours."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # a full disk; the words are in the log, too
            message = {"message": words, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))


@dataclass(frozen=True, kw_only=True)
class StopRequest:
    """The first signal that asked for a stop."""

    reason: str  # name of the signal, for example "SIGTERM"
    time: float  # seconds since the epoch


def record_exit(run_dir: Path, rank: int, code: int) -> None:
    """Leave this rank's exit code in RUN/health, if that is there: torchrun turns every code but 0 into 1."""
    folder = run_dir / "health"
    if folder.is_dir():
        with contextlib.suppress(OSError):  # a full disk may be the very reason of this end
            (folder / f"rank-{rank:05d}.exit").write_text(f"{code}\n")


def ask_for_requeue(run_dir: Path, *, reason: str, step: int) -> None:
    """For the job script (slurm/train.sbatch): RUN/REQUEUE says that this run has stopped in order to go on."""
    marker = {"reason": reason, "step": step, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    partial = run_dir / "REQUEUE.tmp"
    partial.write_text(json.dumps(marker) + "\n")
    partial.replace(run_dir / "REQUEUE")


def ignore_stop_signals(worker_id: int = 0) -> None:
    """Make a helper process deaf to the stop signals; usable as `worker_init_fn` of a DataLoader.

    SLURM signals every process of a step. A data worker that dies of USR1 takes its rank with it, and one that was
    forked would report the signal to its parent's listener.
    """
    del worker_id
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopFlag:
    """Turns SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 into a flag, between `install` and `close` (or as a context).

    Make it on the main thread. A second SIGINT ends the process at once with `EXIT_NOW`.

    Python runs a handler only when the main thread returns to the interpreter, which a rank inside a collective whose
    peer is gone never does. With `grace_seconds`, a listener thread that hears of signals through
    `signal.set_wakeup_fd` writes all stacks to stderr (and `stacks_path`) and exits with `EXIT_HUNG` unless
    `acknowledge` or `close` was called within that time after the first signal. The grace must cover one step, not the
    checkpoint: call `acknowledge` as soon as all ranks have agreed to stop.
    """

    def __init__(self, *, grace_seconds: float | None = None, stacks_path: Path | None = None) -> None:
        self.request: StopRequest | None = None
        self._grace_seconds = grace_seconds
        self._stacks_path = stacks_path
        self._interrupted_at: float | None = None  # monotonic time of the first SIGINT
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._listener: threading.Thread | None = None
        self._settled = threading.Event()
        self._pipe = (-1, -1)
        self._previous_wakeup_fd = -1

    def install(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._handle)
        if self._grace_seconds is not None:
            self._pipe = os.pipe()
            for descriptor in self._pipe:
                os.set_blocking(descriptor, False)  # a full pipe must not block a signal handler
            self._previous_wakeup_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._listener = threading.Thread(
                target=self._listen, args=(self._grace_seconds,), name="stop-listener", daemon=True
            )
            self._listener.start()
        return self

    def code(self) -> int:
        """What this rank proposes: GO_ON, or to save and stop. The maximum over ranks decides."""
        if self.request is None:
            return GO_ON
        return WARNED if self.request.reason in _WARNINGS else TOLD_TO_END

    def acknowledge(self) -> None:
        """All ranks have agreed to stop: nobody is stuck, and the checkpoint may take its time."""
        self._settled.set()
        self._wake_listener()

    def close(self) -> None:
        """Give the signals back to whoever handled them before. May be called twice.

        After a request, all but SIGINT are ignored instead: SLURM repeats itself, and a process that has saved and is
        about to end with `EXIT_STOPPED` must not die of the signal. A person who repeats Ctrl-C means it.
        """
        self._settled.set()
        if self._listener is not None:
            signal.set_wakeup_fd(self._previous_wakeup_fd)
            self._wake_listener()
            self._listener.join()
            self._listener = None
            for descriptor in self._pipe:
                os.close(descriptor)
        for number, handler in self._previous_handlers.items():
            is_leaving = self.request is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_leaving else handler)
        self._previous_handlers.clear()

    def __enter__(self) -> "StopFlag":
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > _SAME_KEYSTROKE_SECONDS:
                os._exit(EXIT_NOW)
        if self.request is None:  # SLURM may send a signal twice, and SIGCONT with it
            self.request = StopRequest(reason=signal.Signals(number).name, time=time.time())

    def _wake_listener(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(BlockingIOError):  # full: the listener is awake anyway
                os.write(self._pipe[1], b"\0")

    def _listen(self, grace_seconds: float) -> None:
        """Wait for a stop signal, then for `acknowledge` or the end of the grace; also for a second SIGINT."""
        first, interrupted, deadline = None, None, None
        while not self._settled.is_set():
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._pipe[0]], [], [], remaining)
            if self._settled.is_set():
                return
            if not readable:
                self._give_up(signal.Signals(first).name if first else "a signal", grace_seconds)
            for number in os.read(self._pipe[0], 4096):
                if number not in STOP_SIGNALS:
                    continue
                now = time.monotonic()
                first = first or number
                deadline = deadline or now + grace_seconds
                if number == signal.SIGINT:
                    interrupted = interrupted or now
                    if now - interrupted > _SAME_KEYSTROKE_SECONDS:
                        os._exit(EXIT_NOW)

    def _give_up(self, reason: str, grace_seconds: float) -> None:
        print(
            f"{reason} came {grace_seconds:g} s ago and the ranks have not agreed to stop; all stacks follow, "
            f"exit code {EXIT_HUNG}. `unmask resume` goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        if self._stacks_path is not None:
            with contextlib.suppress(OSError), self._stacks_path.open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        os._exit(EXIT_HUNG)

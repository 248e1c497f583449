"""Is the run alive, and is it sane: a heartbeat and watchdog per rank, and the policy for broken or spiking losses.

Every rank writes RUN/health/rank-00000.json every few seconds, so that `unmask status` and the other ranks can say who
lags by reading files alone. A rank that makes no progress for too long, or whose peers do not answer, writes its Python
stacks to rank-00000.stacks.txt beside it, leaves word in hung-ATTEMPT.txt, and ends with `EXIT_HUNG`; the others find
that word within one interval and do the same. A hung job costs as much as a working one.

Ages are differences of file times, which one clock stamps (that of the file system); clocks of hosts may differ.

`LossGuard` is a pure function of the global numbers it has been shown: every rank that shows it the same numbers comes
to the same verdict, before and after a restart.
"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

from launch.config import Seconds
from launch.errors import ConfigError
from launch.stop import EXIT_HUNG, record_exit, tell_launcher

_MISSED_WRITES = 6  # writes of its health file that a rank may miss (slow file system) before it counts as silent
_BACKSTOP_SECONDS = 2.0  # beyond limit and interval; less than the ten seconds that a launcher gives the other ranks

Verdict = Literal["ok", "skip", "rollback", "give_up"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    timeout: Seconds | None = 600.0  # no progress for this long is a hang: stacks, exit code 76; null: never
    first_step_timeout: Seconds = (
        1800.0  # the same limit for each part of the start and for the first step (compilation)
    )
    phase_timeout: Seconds | None = 7200.0  # the same limit for an evaluation, sampling or checkpoint; null: none
    interval: Seconds = 5.0  # time between two writes of RUN/health/rank-N.json
    stop_grace: Seconds | None = None  # ranks that cannot agree to stop this long after a signal end; null: they wait
    straggler_factor: float | None = (
        1.5  # name a rank that reads or computes this many times slower; null: measure no one
    )

    def check(self, path: str) -> None:
        if self.straggler_factor is not None and not 1 < self.straggler_factor < math.inf:
            raise ConfigError(f"{path}.straggler_factor = {self.straggler_factor}; need more than 1, or null for off")
        for name in ("timeout", "first_step_timeout", "phase_timeout", "interval", "stop_grace"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{path}.{name} = {value}; need a positive time such as 10min")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    spike_sigma: float | None = (
        None  # skip a step whose loss or gradient norm exceeds mean + this many sigma; null: off
    )
    window: int = 128  # accepted steps over which that mean and sigma are taken; the rule sleeps until half are there
    max_consecutive_skips: int = (
        10  # bad steps in a row that are skipped; the next one rolls back to the last checkpoint
    )
    max_rollbacks: int = 2  # rollbacks in the whole run; the next one ends it with exit code 77

    def check(self, path: str) -> None:
        if self.spike_sigma is not None and not self.spike_sigma > 0:
            raise ConfigError(f"{path}.spike_sigma = {self.spike_sigma} must be positive (6 is usual), or null for off")
        for name, least in (("window", 2), ("max_consecutive_skips", 0), ("max_rollbacks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{path}.{name} = {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class RankHealth:
    """What one rank last wrote about itself.

    Times are seconds since the epoch: in the file by the clock of that rank's host, from `read_health` by that of the
    file system. Compare them with `file_clock`, not with this host's clock.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    phase: str
    progress_time: float  # of the last beat
    written_time: float  # of the file
    straggler: str = ""  # rank 0: who held the others up when the last line of metrics was logged


def read_health(run_dir: Path) -> list[RankHealth]:
    """The health of every rank that has written one, by rank. Files of an earlier, larger run are left out."""
    found = []
    for path in sorted(health_dir(run_dir).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being replaced, or written by another version
            written = path.stat().st_mtime
            health = RankHealth(**json.loads(path.read_text()))
            silent = health.written_time - health.progress_time
            found.append(replace(health, progress_time=written - silent, written_time=written))
    newest = max(found, key=lambda health: health.written_time, default=None)
    return [health for health in found if newest is not None and health.rank < newest.world_size]


def file_clock(folder: Path) -> float:
    """Now, by the clock that stamps files in `folder`; by this host's where nothing can be written."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def lagging(healths: Sequence[RankHealth], *, world_size: int, now: float, silent_seconds: float) -> list[str]:
    """One line for each rank that is behind the furthest one or silent for longer; for all ranks if none is."""
    heard = [health for health in healths if now - health.written_time <= silent_seconds]
    furthest = max((health.step for health in heard), default=0)
    behind = [h for h in healths if h not in heard or h.step < furthest] or list(healths)
    missing = sorted(set(range(world_size)) - {health.rank for health in healths})
    lines = [f"rank {rank} has written nothing: it never started" for rank in missing]
    for health in sorted(behind, key=lambda h: (h.step, h.progress_time)):
        lines.append(
            f"rank {health.rank} ({health.host}, pid {health.pid}): step {health.step} of {furthest}, "
            f"phase {health.phase}, no progress for {now - health.progress_time:.0f} s, "
            f"last heard of {now - health.written_time:.0f} s ago" + ("" if health in heard else ": SILENT")
        )
    return lines


def health_dir(run_dir: Path) -> Path:
    return run_dir / "health"


class Watchdog:
    """Heartbeat of this rank, between `start` and `close` (or as a context).

    It watches from before the rendezvous to the very end. Its files appear with the first `starting` or `beat`, so
    that a start which is refused leaves nothing behind. The trainer calls `beat(step, phase)` as it goes. Until a beat
    names a later step than the first one did, the limit is `first_step_timeout`; after that `timeout`. What has another
    rhythm (evaluation, checkpoint) runs inside `phase`.

    The watchdog is a Python thread: SIGSTOP silences it, and so does C code that hangs while it holds the interpreter
    lock. Then the health file grows old, which the other ranks report. Against the latter there is a second timer, in
    C, which writes the stacks to stderr and ends the process with code 1.
    """

    def __init__(self, run_dir: Path, config: WatchConfig, *, rank: int, world_size: int) -> None:
        folder = health_dir(run_dir)
        self._run_dir = run_dir
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._path = folder / f"rank-{rank:05d}.json"
        self._stacks_path = folder / f"rank-{rank:05d}.stacks.txt"
        self._stacks_path.unlink(missing_ok=True)  # those of an earlier start would mislead
        self._word_path: Path | None = None  # until the ranks have met, they cannot hear of each other
        self._lock = threading.Lock()
        self._step, self._phase, self._straggler = 0, "start", ""
        self._first_step: int | None = None
        self._limit = None if config.timeout is None else config.first_step_timeout
        self._aside = False  # inside `phase`
        self._beat_at, self._beat_time = time.monotonic(), time.time()
        self._has_files = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._write_failed = False

    def start(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def meet(self, attempt: str) -> None:
        """All ranks of this start call it `attempt`; only they may end each other, not those an earlier one left."""
        self._word_path = health_dir(self._run_dir) / f"hung-{attempt}.txt"
        if self._rank == 0:
            for old in health_dir(self._run_dir).glob("hung-*.txt"):
                old.unlink(missing_ok=True)

    def starting(self, phase: str) -> None:
        """This rank goes on with its start and is now in `phase` of it."""
        with self._lock:
            self._phase = phase
            self._beat_at, self._beat_time = time.monotonic(), time.time()
            self._has_files = True
        self._write()

    def beat(self, step: int, phase: str) -> None:
        """This rank goes on: it is now in `phase` of `step`. Costs microseconds; the file is written by the thread."""
        with self._lock:
            if self._first_step is None:
                self._first_step = step
            if step > self._first_step and not self._aside:
                self._limit = self._config.timeout
            self._step, self._phase = step, phase
            self._beat_at, self._beat_time = time.monotonic(), time.time()
            self._has_files = True

    def report_straggler(self, words: str) -> None:
        """What the health file says of the slowest rank; empty for nobody."""
        self._straggler = words

    @contextlib.contextmanager
    def phase(self, step: int, phase: str) -> Iterator[None]:
        """Within this block the limit from beat to beat is `phase_timeout`; afterwards what it was before."""
        with self._lock:
            before = self._limit, self._phase, self._aside
            self._limit, self._aside = self._config.phase_timeout, True
        self.beat(step, phase)
        try:
            yield
        finally:
            with self._lock:
                self._limit, before_phase, self._aside = before
            self.beat(step, before_phase)

    def close(self, phase: str = "end") -> None:
        """End the thread and write the file a last time. May be called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()
            self._phase = phase
            self._write()

    def __enter__(self) -> "Watchdog":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("end" if error is None else "failed")

    def _watch(self) -> None:
        next_write = time.monotonic() + self._config.interval
        while True:
            with self._lock:
                deadline = math.inf if self._limit is None else self._beat_at + self._limit
            now = time.monotonic()
            if now >= deadline:
                silent = now - self._beat_at
                self._end(f"no progress for {silent:.0f} s (limit {self._limit:g} s) at {self._where()}")
            if now >= next_write:
                self._write()
                next_write = now + self._config.interval
                if self._word_path is not None and self._word_path.exists():
                    self._end(f"at {self._where()} when another rank gave up", leads=False)
            self._arm_backstop(deadline - now)
            # `phase` may bring the deadline forward, so never sleep past the interval
            if self._closed.wait(max(0.0, min(deadline, next_write) - now)):
                return

    def _arm_backstop(self, remaining: float) -> None:
        if math.isinf(remaining):
            faulthandler.cancel_dump_traceback_later()
        else:  # the next beat may come just after this call and is seen an interval later
            limit = remaining + self._config.interval + _BACKSTOP_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=2)

    def _where(self) -> str:
        return f"step {self._step}, phase {self._phase}"

    def _write(self) -> None:
        if not self._has_files:
            return
        with self._lock:
            health = RankHealth(
                rank=self._rank,
                world_size=self._world_size,
                host=socket.gethostname(),
                pid=os.getpid(),
                step=self._step,
                phase=self._phase,
                progress_time=self._beat_time,
                written_time=self._beat_time + time.monotonic() - self._beat_at,  # a clock that is set does not show
                straggler=self._straggler,
            )
        partial = self._path.with_suffix(".json.tmp")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(health)) + "\n")
            partial.replace(self._path)
        except OSError as error:  # a full disk must not blind the watchdog; say so once
            if not self._write_failed:
                print(f"rank {self._rank}: cannot write {self._path}: {error}", file=sys.stderr, flush=True)
            self._write_failed = True

    # --- the end: nothing below may wait for another rank or for the main thread ---

    def _end(self, why: str, *, leads: bool = True) -> NoReturn:
        """Say what hangs, where, and leave. With `leads`, the other ranks shall follow."""
        with contextlib.suppress(OSError):
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks_path.open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        self._leave(why, leads=leads)

    def lose_peer(self, error: BaseException, words: str) -> NoReturn:
        """Leave like a rank that hangs, because of `error`: another rank is gone or silent, as `words` say."""
        with contextlib.suppress(OSError):
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks_path.write_text("".join(traceback.format_exception(error)))
        why = "its process ended, and its own log says why; or its host did"
        if "imed out" in words or "timeout" in words:
            why = "engine.timeout has passed: a rank hangs or is gone, or the network between hosts is down"
        self._leave(f"lost another rank at {self._where()} ({words}): {why}", leads=True)

    def _leave(self, why: str, *, leads: bool) -> NoReturn:
        faulthandler.cancel_dump_traceback_later()
        self._has_files = True
        self._write()
        lines = [f"rank {self._rank} on {socket.gethostname()}: {why}"]
        folder = health_dir(self._run_dir)
        if leads and self._is_first():
            healths, now = read_health(self._run_dir), file_clock(folder)
            silent_seconds = _MISSED_WRITES * self._config.interval
            report = lagging(healths, world_size=self._world_size, now=now, silent_seconds=silent_seconds)
            lines += [f"  {line}" for line in report]
        lines.append(
            f"  stacks in {self._stacks_path}, exit code {EXIT_HUNG}; what is saved is intact: "
            f"`unmask resume {self._run_dir}` goes on from the last checkpoint"
        )
        text = "\n".join(lines) + "\n"
        tell_launcher(text)
        record_exit(self._run_dir, self._rank, EXIT_HUNG)
        os.write(2, text.encode())  # sys.stderr may be locked by the thread that hangs
        os._exit(EXIT_HUNG)

    def _is_first(self) -> bool:
        """Leave word for the others, unless one of them was faster: one report is enough."""
        if self._word_path is None:
            return True
        try:
            self._word_path.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk: rather twice than never
            return True
        return True


class LossGuard:
    """Verdict on each step from its GLOBAL gradient norm (and loss), so that all ranks come to the same.

    A step is bad if a number is not finite or, with `spike_sigma`, lies above mean + k sigma of the accepted ones. A
    loss that is not finite shows in the gradient norm, so a loop that would have to wait for its loss may leave it out.
    Bad steps are skipped (the update is not applied) until `max_consecutive_skips` in a row; the next one rolls back
    to the last checkpoint, at most `max_rollbacks` times in the run; then the guard gives up.

        if not guard.accepts(grad_norm):
            match guard.verdict(): ...  # "skip", "rollback" (then call `rolled_back`) or "give_up"
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._grad_norms: deque[float] = deque(maxlen=config.window)
        self._losses: deque[float] = deque(maxlen=config.window)
        self.consecutive_skips = 0
        self.total_skips = 0
        self.rollbacks = 0
        self.reason = ""  # why the last step was bad; empty after a good one

    def accepts(self, grad_norm: float, loss: float | None = None) -> bool:
        """Whether the update of this step may be applied; to be asked once a step."""
        self.reason = self._why_bad("gradient norm", grad_norm, self._grad_norms)
        if loss is not None and not self.reason:
            self.reason = self._why_bad("loss", loss, self._losses)
        if self.reason:
            self.consecutive_skips += 1
            self.total_skips += 1
            return False
        self._grad_norms.append(grad_norm)
        if loss is not None:
            self._losses.append(loss)
        self.consecutive_skips = 0
        return True

    def verdict(self) -> Verdict:
        """What to do after the step that `accepts` was last asked about."""
        if self.consecutive_skips == 0:
            return "ok"
        if self.consecutive_skips <= self._config.max_consecutive_skips:
            return "skip"
        return "rollback" if self.rollbacks < self._config.max_rollbacks else "give_up"

    def rolled_back(self) -> None:
        """The last checkpoint is loaded, and this guard has kept (or got back) its state of before."""
        self.rollbacks += 1
        self.consecutive_skips = 0

    def state(self) -> dict[str, Any]:
        """JSON-able; belongs into the checkpoint."""
        return {
            "grad_norms": list(self._grad_norms),
            "losses": list(self._losses),
            "consecutive_skips": self.consecutive_skips,
            "total_skips": self.total_skips,
            "rollbacks": self.rollbacks,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._grad_norms = deque(state["grad_norms"], maxlen=self._config.window)
        self._losses = deque(state["losses"], maxlen=self._config.window)
        self.consecutive_skips = state["consecutive_skips"]
        self.total_skips = state["total_skips"]
        self.rollbacks = state["rollbacks"]

    def _why_bad(self, name: str, value: float, accepted: deque[float]) -> str:
        if not math.isfinite(value):
            return f"{name} is {value}"
        sigmas = self._config.spike_sigma
        # As many values as half the window: sigma of a handful says nothing.
        if sigmas is None or len(accepted) < max(2, self._config.window // 2):
            return ""
        mean, sigma = statistics.fmean(accepted), statistics.pstdev(accepted)
        if value <= mean + sigmas * sigma:
            return ""
        return f"{name} {value:.4g} exceeds mean {mean:.4g} + {sigmas:g} x sigma {sigma:.3g} of {len(accepted)} steps"

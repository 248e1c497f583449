"""Who holds the others up: each rank's own time, compared at the lines of metrics.

In a synchronous step every rank takes as long as the slowest, so the time of a step names nobody. What is measured here
has no waiting for others in it:

    read      seconds a step in `task.batch`
    compute   seconds a step in the forward, on a CPU under a strategy whose forward does not communicate; elsewhere the
              seconds of a product of matrices that is the same on every rank, once a line of metrics

The figures of a rank ride along in the all-reduce of the line: two numbers a rank. Beside that it costs two looks at
the clock a micro-batch and, where there is one, the product.
"""

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.runtime import Runtime

logger = logging.getLogger(__name__)

KINDS = ("read", "compute")
_LOCAL_FORWARD = ("ddp", "zero1", "zero2")  # strategies whose forward talks to nobody
_WINDOW_SECONDS = 1.0  # lines of metrics are put together until they cover as much: less is noise
_WINDOWS = 3  # in a row, in which the same rank must be slow, before it is named
_REPEAT_SECONDS = 600.0  # before it is named again
_FLOOR_SECONDS = 0.02  # beyond the others, a step or a product: less is not worth a word
_FLOOR_SECONDS_CUDA = 0.0005
_LOOK_AT = {
    "read": "its disk or its way to the file system, its page cache and its load",
    "compute": "its clock rates, its temperature and what else runs there",
}


@dataclass(frozen=True, kw_only=True)
class Straggler:
    rank: int
    kind: str  # one of KINDS
    seconds: float  # its own
    others: float  # median of the others
    factor: float


def slowest(seconds: Sequence[float], kind: str) -> Straggler:
    """The slowest of at least two ranks beside the median of the others."""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median([*seconds[:rank], *seconds[rank + 1 :]])
    return Straggler(
        rank=rank, kind=kind, seconds=seconds[rank], others=others, factor=seconds[rank] / max(others, 1e-9)
    )


class Stragglers:
    """`factor`: of `watch.straggler_factor`; None, or a single rank, measures nothing."""

    def __init__(self, factor: float | None, runtime: Runtime, *, strategy: str, hosts: Sequence[str]) -> None:
        self._factor, self._runtime, self._hosts = factor, runtime, hosts
        self._is_on = factor is not None and runtime.world_size > 1
        self._probes = runtime.device.type != "cpu" or strategy not in _LOCAL_FORWARD
        self._own = torch.zeros(len(KINDS), dtype=torch.float64)  # seconds since the last line
        self._steps = 0  # since the last line
        self._window: list[Tensor] = []  # [R, 2] a line
        self._window_begin = time.monotonic()
        self._in_a_row: dict[str, tuple[int, int]] = {}  # kind -> (rank, windows)
        self._named_at: dict[tuple[int, str], float] = {}
        self.words = ""  # who is slow now; empty for nobody

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads the batches of one step."""
        begin = time.perf_counter()
        yield
        self._own[0] += time.perf_counter() - begin
        self._steps += 1

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around the forward of one micro-batch."""
        begin = time.perf_counter()
        yield
        if not self._probes:
            self._own[1] += time.perf_counter() - begin

    def own(self) -> Tensor:
        """float64 [R * 2]: seconds since the last line in this rank's place; a sum over ranks gathers them."""
        everyone = torch.zeros(self._runtime.world_size if self._is_on else 0, len(KINDS), dtype=torch.float64)
        if self._is_on and self._steps:
            mine = self._own / self._steps
            if self._probes:
                mine[1] = _product_seconds(self._runtime.device)
            everyone[self._runtime.rank] = mine
        self._own.zero_()
        self._steps = 0
        return everyone.flatten()

    def judge(self, gathered: Tensor) -> dict[str, float | str]:
        """What to log of `gathered`, the sum of `own` over ranks. Names a rank that is slow for windows in a row."""
        now = time.monotonic()
        if not self._is_on:
            return {}
        self._window.append(gathered.view(-1, len(KINDS)))
        if now - self._window_begin < _WINDOW_SECONDS:
            return {}
        seconds = torch.stack(self._window).mean(0)  # [R, 2]
        self._window, self._window_begin = [], now
        found = [slowest(seconds[:, i].tolist(), kind) for i, kind in enumerate(KINDS)]
        row: dict[str, float | str] = {f"straggler/{one.kind}_factor": one.factor for one in found}
        named = [one for one in found if self._is_slow_for_long(one)]
        self.words = "; ".join(self._words(one) for one in named)
        for one in named:
            row |= {f"straggler/{one.kind}_rank": one.rank, f"straggler/{one.kind}_host": self._hosts[one.rank]}
            if now - self._named_at.get((one.rank, one.kind), -_REPEAT_SECONDS) >= _REPEAT_SECONDS:
                self._named_at[one.rank, one.kind] = now
                if self._runtime.is_main:
                    logger.warning("%s; look at %s", self._words(one), _LOOK_AT[one.kind])
        return row

    def _is_slow_for_long(self, one: Straggler) -> bool:
        floor = _FLOOR_SECONDS_CUDA if one.kind == "compute" and self._runtime.device.type == "cuda" else _FLOOR_SECONDS
        assert self._factor is not None
        if one.factor < self._factor or one.seconds - one.others < floor:
            self._in_a_row.pop(one.kind, None)
            return False
        rank, windows = self._in_a_row.get(one.kind, (one.rank, 0))
        windows = windows + 1 if rank == one.rank else 1
        self._in_a_row[one.kind] = (one.rank, windows)
        return windows >= _WINDOWS

    def _words(self, one: Straggler) -> str:
        what = {"read": "reading its batches", "compute": "a product of matrices" if self._probes else "its forward"}
        return (
            f"rank {one.rank} on {self._hosts[one.rank]} holds the others up: {what[one.kind]} takes it "
            f"{one.seconds:.3g} s, {one.factor:.1f} times the {one.others:.3g} s of the others"
        )


def _product_seconds(device: torch.device) -> float:
    """Seconds of a fixed amount of arithmetic on this rank's device: 17 GFLOP on CUDA in bf16, 0.5 on a CPU."""
    size, dtype = (2048, torch.bfloat16) if device.type == "cuda" else (640, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    _wait(device)
    begin = time.perf_counter()
    torch.mm(a, a, out=out)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

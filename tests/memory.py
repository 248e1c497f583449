"""The peak of what training really allocates, to hold the plan against.

On CPU every allocation of torch passes the profiler, C++ temporaries of autograd included, so the peak is exact and
does not depend on the machine. The run is that of `launch.entry.run`: engine, trainer, real data.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from launch import entry
from llm.config import LanguageConfig
from llm.task import LanguageTask
from tests.processes import spawn

_COLLECTIVES = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
_COLLECTIVES += ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")
_HANDOVER_S = 0.005  # more than a worker thread of gloo needs to let go of a finished collective


class Enough(Exception):
    """Ends a run that has made its steps."""


def measured_peak(config: LanguageConfig, world_size: int, steps: int = 3) -> int:
    """Bytes at the peak of the rank that needs most, from the start of a run to the end of `steps` steps."""
    return max(spawn(_train, world_size, config, steps, group=False, timeout=240))


def _train(config: LanguageConfig, steps: int) -> int:
    step_begins = []

    class Stopping(LanguageTask):
        def batch(self, positions: np.ndarray, step: int) -> Any:
            if step == len(step_begins):
                step_begins.append(time.time_ns())
            if step == steps:
                raise Enough
            return super().batch(positions, step)

    with _nothing_freed_by_other_threads():
        moments, live = allocations_of(lambda: entry.run(config, Stopping))
    # Between steps nothing may grow, or a free was missed and the peak means nothing.
    at_rest = [int(live[np.searchsorted(moments, begin) - 1]) for begin in step_begins[1:]]
    assert max(at_rest) - min(at_rest) < 1e-3 * max(at_rest) + 4096, f"bytes at the ends of steps: {at_rest}"
    return int(live.max())


def allocations_of(run: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
    """Moments (ns), and bytes alive after each of them, of every allocation and every free while `run` runs.

    Without what gloo's collectives allocate for themselves: NCCL has nothing like it, and gloo frees it in threads that
    the profiler does not watch.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, contextlib.suppress(Enough):
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    moments, changes = [], []
    foreign: set[int] = set()  # addresses
    for moment, address, size, in_collective in sorted(
        event for root in profiler.profiler.kineto_results.experimental_event_tree() for event in _memory(root, False)
    ):
        if size > 0 and in_collective:
            foreign.add(address)
        elif size < 0 and address in foreign:
            foreign.discard(address)
        else:
            foreign.discard(address)
            moments.append(moment)
            changes.append(size)
    return np.array(moments), np.cumsum(changes)


def _memory(event: Any, in_collective: bool) -> Iterator[tuple[int, int, int, bool]]:
    """(moment, address, bytes, whether a collective did it) of the memory events at and below `event`."""
    if event.name == "[memory]":
        yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, in_collective
    in_collective = in_collective or event.name.startswith("c10d::")
    for child in event.children:
        yield from _memory(child, in_collective)


@contextlib.contextmanager
def _nothing_freed_by_other_threads() -> Iterator[None]:
    """The profiler does not see what gloo's worker threads free: let them let go before the caller does."""
    real = {name: getattr(dist, name) for name in _COLLECTIVES}

    def patient(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if work is not None:
                work.wait()
            time.sleep(_HANDOVER_S)
            return work

        return call

    try:
        for name, collective in real.items():
            setattr(dist, name, patient(collective))
        yield
    finally:
        for name, collective in real.items():
            setattr(dist, name, collective)

"""The peak of what training really allocates, to hold the plan against.

On CPU every allocation of torch passes the profiler, C++ temporaries of autograd included, so the peak is exact and
does not depend on the machine. The run is that of `launch.entry.run`: engine, trainer, real data.
"""

import argparse
import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch.profiler import ProfilerActivity, profile

from launch import config as configs
from launch import entry
from launch.plan import Estimate, Planner, add_options, options_from
from llm.config import LanguageConfig
from llm.task import LanguageTask
from tests.processes import spawn
from tests.runs import VOCAB_SIZE, Tiny

_COLLECTIVES = {
    dist: (
        *("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"),
        *("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter"),
    ),
    functional_collectives: ("wait_tensor",),
}
_HANDOVER_S = (0.005, 0.02, 0.08)  # what a worker thread of gloo needs to let go of a collective; tried in turn


# Experiments that differ in family, width, depth, activation checkpointing, types, accumulation and average: a wide
# vocabulary is left to the head's own benchmark. reduce_bucket_size: DeepSpeed's default alone has 2 GB.
_WIDE = "model={kind: llama, layers: 3, heads: 4, width: 192, ffn: 512, qk_norm: true}"
_DEEP = "model={kind: llama, layers: 6, heads: 4, width: 96, ffn: 256, qk_norm: true}"
_DIT = "model={kind: dit, layers: 3, heads: 4, width: 128, cond_dim: 32, init: mdlm}"
_BUCKET = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 200000}}"
_SMALL_GATHERS = (
    "engine.deepspeed={zero_optimization: {reduce_bucket_size: 200000, stage3_param_persistence_threshold: 1000, "
    "stage3_prefetch_bucket_size: 100000}}"
)
CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {  # name -> family, ranks, overrides
    "ddp": ("prime", 1, ("engine.strategy=ddp", _WIDE)),
    "ddp, accumulated": ("ar", 2, ("engine.strategy=ddp", _DEEP, "train.micro_batch=4")),
    "ddp, bf16, average": ("mdm", 2, ("engine.strategy=ddp", "engine.precision=bf16", "engine.ema_decay=0.9", _WIDE)),
    "ddp, selective": ("prime", 1, ("engine.strategy=ddp", "engine.activation_checkpointing=selective", _DIT)),
    "fsdp2": ("prime", 2, ("engine.strategy=fsdp2", _WIDE)),
    "fsdp2, full, average": (
        "ar",
        2,
        ("engine.strategy=fsdp2", "engine.activation_checkpointing=full", "engine.ema_decay=0.9", _DEEP),
    ),
    "fsdp2, one rank": ("mdm", 1, ("engine.strategy=fsdp2", _DIT)),
    "fsdp2, bf16, accumulated": (
        "prime",
        2,
        ("engine.strategy=fsdp2", "engine.precision=bf16", "train.micro_batch=4", _DEEP),
    ),
    "fsdp2, no reshard": ("ar", 2, ("engine.strategy=fsdp2", "engine.reshard_after_forward=false", _WIDE)),
    "fsdp2, hybrid": ("prime", 4, ("engine.strategy=fsdp2", "engine.replicas=2", "train.micro_batch=4", _WIDE)),
    "fsdp2, tensor parallel": ("prime", 2, ("engine.strategy=fsdp2", "engine.tensor_parallel=2", _WIDE)),
    "fsdp2, offload": ("prime", 2, ("engine.strategy=fsdp2", "engine.cpu_offload=true", _DEEP)),
    "zero1": ("prime", 2, ("engine.strategy=zero1", _BUCKET, _WIDE)),
    "zero2": ("ar", 2, ("engine.strategy=zero2", _BUCKET, _DEEP)),
    "zero2, bf16, selective": (
        "prime",
        2,
        ("engine.strategy=zero2", "engine.precision=bf16", "engine.activation_checkpointing=selective", _BUCKET, _WIDE),
    ),
    "zero2, offload": ("prime", 2, ("engine.strategy=zero2", "engine.cpu_offload=true", _BUCKET, _WIDE)),
    "zero3": ("prime", 2, ("engine.strategy=zero3", _BUCKET, _WIDE)),
    "zero3, bf16, small gathers": ("ar", 2, ("engine.strategy=zero3", "engine.precision=bf16", _SMALL_GATHERS, _WIDE)),
    "zero3, full": ("prime", 2, ("engine.strategy=zero3", "engine.activation_checkpointing=full", _BUCKET, _DEEP)),
}


def configured(name: str, tiny: Tiny, folder: Path) -> tuple[LanguageConfig, int]:
    """The configuration of a case, and its number of ranks."""
    family, world_size, overrides = CASES[name]
    common = ("data.block_length=64", "train.micro_batch=8", "train.global_batch=16", "train.steps=1000")
    overrides = (*common, f"data.vocab_size={VOCAB_SIZE}", f"run.dir={folder / 'run'}", "engine.device=cpu", *overrides)
    return configs.load(LanguageConfig, getattr(tiny, family), overrides)[0], world_size


def planner(config: LanguageConfig, *options: str) -> Planner:
    arguments = argparse.ArgumentParser()
    add_options(arguments)
    task = LanguageTask(config, torch.device("cpu"), open_data=False)
    return Planner(config, task, options_from(arguments.parse_args(options)))


def predicted(config: LanguageConfig, world_size: int) -> Estimate:
    """What the plan says of the peak of training; where host and device are the same memory, they are added up."""
    estimate = planner(config, "--gpus", str(world_size)).estimate(config.engine)
    return dataclasses.replace(estimate, peak=sum(estimate.parts.values()) + estimate.host)


class Enough(Exception):
    """Ends a run that has made its steps."""


def measured_peak(config: LanguageConfig, world_size: int, steps: int = 3) -> int:
    """Bytes at the peak of the rank that needs most, from the start of a run to the end of `steps` steps."""
    for handover in _HANDOVER_S:
        peaks = spawn(_train, world_size, config, steps, handover, group=False, timeout=240)
        if None not in peaks:
            return max(peaks)
    raise AssertionError(f"bytes grew from step to step, although collectives were given {_HANDOVER_S[-1]} s")


def _train(config: LanguageConfig, steps: int, handover: float) -> int | None:
    """None if a free was missed: memory at rest grew from step to step, and the peak means nothing."""
    step_begins = []

    class Stopping(LanguageTask):
        def batch(self, positions: np.ndarray, step: int) -> Any:
            if step == len(step_begins):
                step_begins.append(time.time_ns())
            if step == steps:
                raise Enough
            return super().batch(positions, step)

    with _nothing_freed_by_other_threads(handover), contextlib.redirect_stdout(io.StringIO()):
        moments, live = allocations_of(lambda: entry.run(config, Stopping))
    at_rest = [int(live[np.searchsorted(moments, begin) - 1]) for begin in step_begins[1:]]
    return int(live.max()) if max(at_rest) - min(at_rest) < 1e-3 * max(at_rest) + 4096 else None


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
def _nothing_freed_by_other_threads(seconds: float) -> Iterator[None]:
    """The profiler does not see what gloo's worker threads free: let them let go before the caller does."""
    real = {(module, name): getattr(module, name) for module, names in _COLLECTIVES.items() for name in names}

    def patient(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made = collective(*args, **kwargs)
            if isinstance(made, dist.Work):
                made.wait()
            time.sleep(seconds)
            return made

        return call

    try:
        for (module, name), collective in real.items():
            setattr(module, name, patient(collective))
        yield
    finally:
        for (module, name), collective in real.items():
            setattr(module, name, collective)

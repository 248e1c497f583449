"""What each strategy holds, in the order in which it takes and gives back: accounts that replay a recording.

An account is the bookkeeping twin of an engine. It hears of every block that begins or ends its forward or backward,
and of every finished gradient, and books what the engine allocates at that moment. The ledger knows the peak and what
it is made of. All sizes are bytes unless they are called elements.

What the accounts say was read off the code of torch 2.13 and DeepSpeed 0.19.8 and is held against measured peaks in
tests/llm/test_plan_memory.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from launch.engine.base import EngineConfig, data_world_size
from launch.recording import OUTSIDE, Boundary, Gradient, Held, Recording

Part = Literal["parameters", "gradients", "optimizer", "activations", "head", "buffers"]
PARTS: tuple[Part, ...] = ("parameters", "gradients", "optimizer", "activations", "head", "buffers")
_REGIONS: dict[str, Part] = {"blocks": "activations", "head": "head", "casts": "parameters"}

FP32 = 4  # bytes of master weights, of gradients while they are reduced, of moments and of the average
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default reduce_bucket_size

Units = Sequence[Sequence[torch.Size]]  # shapes of the parameters of each block; those of everything else last


def units_of(model: Any, tensor_parallel: int = 1) -> Units:
    """The shapes that one rank of a tensor group holds."""
    plan = model.tensor_parallel_plan() if tensor_parallel > 1 else {}

    def part(module_name: str, parameter: nn.Parameter) -> torch.Size:
        how = plan.get(module_name)
        dim = {"column": 0, "row": 1}.get(str(how))
        sizes = list(parameter.shape)
        if dim is not None and dim < len(sizes):
            sizes[dim] //= tensor_parallel
        return torch.Size(sizes)

    shapes = {id(p): part(name.rpartition(".")[0], p) for name, p in model.named_parameters()}
    blocks = [[shapes.pop(id(p)) for p in block.parameters()] for block in model.blocks]
    return [*blocks, list(shapes.values())]


class Ledger:
    """Bytes by part, now and at the moment when their sum was largest."""

    def __init__(self) -> None:
        self.now: Counter[Part] = Counter()
        self.total = self.peak = 0
        self.phase = self.peak_phase = "start"
        self.at_peak: dict[Part, int] = {}
        self.host: Counter[Part] = Counter()  # what is offloaded to host memory

    def hold(self, part: Part, size: int) -> None:
        self.now[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.total, self.phase, dict(self.now)

    def hold_on_host(self, part: Part, size: int) -> None:
        self.host[part] += size

    def drop(self, part: Part, size: int) -> None:
        self.now[part] -= size
        self.total -= size


class Account(Protocol):
    def begin(self, *, first: bool, last: bool) -> None:
        """A micro-step begins; the `first` of its step finds no gradients, the `last` reduces them."""
        ...

    def boundary(self, boundary: Boundary) -> None: ...

    def gradient(self, gradient: Gradient) -> None: ...

    def update(self) -> None:
        """The optimizer steps."""
        ...

    def beside_training(self) -> int:
        """Bytes that an evaluation or a checkpoint needs beside the state at rest; activations not counted."""
        ...


def replay(recording: Recording, account: Account, ledger: Ledger, micro_steps: int) -> None:
    """A step of training: all its micro-batches are made, then each runs forward and backward, then the update."""
    ledger.hold("activations", (micro_steps - 1) * recording.batch_bytes)
    alike = min(micro_steps, 3)  # the first and the last micro-step are special, those between them equal
    for number in range(alike):
        account.begin(first=number == 0, last=number == alike - 1)
        left: Counter[Part] = Counter()
        for event in recording.events:
            if isinstance(event, Held):
                part = _REGIONS[event.region]
                left[part] += event.size
                ledger.hold(part, event.size)
            elif isinstance(event, Gradient):
                part = _REGIONS[event.region]
                left[part] -= event.size
                ledger.drop(part, event.size)
                account.gradient(event)
            else:
                ledger.phase = event.phase
                account.boundary(event)
        for part, size in left.items():
            ledger.drop(part, size)
    ledger.phase = "update"
    account.update()


class DDPAccount:
    """Everything whole on every rank."""

    def __init__(self, config: EngineConfig, units: Units, ledger: Ledger, world_size: int):
        self._ledger, self._averages = ledger, config.ema_decay is not None
        self._whole = FP32 * _elements(units)
        ledger.hold("parameters", self._whole)
        ledger.hold("optimizer", (2 + self._averages) * self._whole)  # moments and average
        self._has_buckets = world_size > 1
        if self._has_buckets:
            ledger.hold("gradients", self._whole)  # DDP's buckets live for ever; the gradients of a step are views

    def begin(self, *, first: bool, last: bool) -> None:
        self._first = first

    def boundary(self, boundary: Boundary) -> None: ...

    def gradient(self, gradient: Gradient) -> None:
        if not self._has_buckets and self._first:  # later ones are added to it in place
            self._ledger.hold("gradients", gradient.size)

    def update(self) -> None:
        if not self._has_buckets:
            self._ledger.drop("gradients", self._whole)

    def beside_training(self) -> int:
        return self._whole if self._averages else 0  # the trained weights, while the average takes their place


class FSDP2Account:
    """Shards of everything; whole weights and gradients of few blocks at a time."""

    def __init__(self, config: EngineConfig, units: Units, ledger: Ledger, world_size: int):
        self._ledger, self._config = ledger, config
        self._shards = data_world_size(config, world_size) // config.replicas
        self._compute = 2 if config.precision == "bf16" else FP32
        self._rows = [sum(_rows(shape, self._shards) for shape in unit) for unit in units]  # N of a rank, padded
        self._whole = [sum(shape.numel() for shape in unit) for unit in units]
        held = sum(self._rows)
        hold = ledger.hold_on_host if config.cpu_offload else ledger.hold
        hold("parameters", FP32 * held)
        hold("optimizer", _states(config) * held)
        if config.cpu_offload:
            ledger.hold_on_host("gradients", FP32 * held)
        self._gathered: set[int] = set()
        self._in_flight: dict[int, int] = {}  # unit -> bytes of its all-gather's output, until it is copied out
        self._last_gather = 0  # the forward keeps one output longer, so that its copy may overlap the next gather
        self._reducing = 0  # input of the last reduce-scatter, kept until the next
        self._fresh: Counter[int] = Counter()  # unit -> gradients of this backward
        self._accumulated: Counter[int] = Counter()  # unit -> whole gradients of earlier micro-steps, in fp32
        self._sharded_gradients = 0

    def begin(self, *, first: bool, last: bool) -> None:
        self._first, self._last = first, last

    def boundary(self, boundary: Boundary) -> None:
        unit = boundary.unit
        match boundary.phase, boundary.begins:
            case "forward", True:
                self._gather(unit)
                self._copy_out(unit, forward=True)
            case "forward", False if unit == OUTSIDE:
                self._ledger.drop("buffers", self._last_gather)
                self._last_gather = 0
            case "forward", False if self._config.reshard_after_forward:
                self._reshard(unit)
            case "backward", True:
                self._gather(unit)
                self._copy_out(unit, forward=False)
                before = len(self._rows) - 2 if unit == OUTSIDE else unit - 1
                if before >= 0:
                    self._gather(before)  # prefetch
            case "backward", False:
                self._finish(unit)

    def gradient(self, gradient: Gradient) -> None:
        if self._accumulated[gradient.unit] and self._compute == FP32:  # added in place
            return
        self._fresh[gradient.unit] += gradient.size
        self._ledger.hold("gradients", gradient.size)

    def update(self) -> None:
        self._ledger.drop("gradients", self._sharded_gradients)
        self._sharded_gradients = 0

    def beside_training(self) -> int:
        gathered = self._compute * self._shards * sum(self._rows)
        trained = FP32 * sum(self._rows) if self._config.ema_decay is not None and not self._config.cpu_offload else 0
        split = self._config.tensor_parallel  # its layers communicate, so an evaluation has a whole copy
        return gathered + trained + (gathered * split if split > 1 else 0)

    def _gather(self, unit: int) -> None:
        if unit in self._gathered or unit in self._in_flight:
            return
        mine = self._compute * self._rows[unit]
        self._in_flight[unit] = mine * self._shards if self._shards > 1 else 0
        self._ledger.hold("buffers", self._in_flight[unit])
        if self._compute != FP32:  # the shard in the type of computation
            self._ledger.hold("buffers", mine)
            self._ledger.drop("buffers", mine)

    def _copy_out(self, unit: int, *, forward: bool) -> None:
        if unit not in self._in_flight:
            return
        output = self._in_flight.pop(unit)
        if forward:
            self._ledger.drop("buffers", self._last_gather)
        self._ledger.hold("parameters", self._compute * self._rows[unit] * self._shards)
        self._gathered.add(unit)
        if forward:
            self._last_gather = output
        else:
            self._ledger.drop("buffers", output)

    def _reshard(self, unit: int) -> None:
        self._gathered.discard(unit)
        self._ledger.drop("parameters", self._compute * self._rows[unit] * self._shards)

    def _finish(self, unit: int) -> None:
        fresh, self._fresh[unit] = self._fresh[unit], 0
        ledger, whole = self._ledger, FP32 * self._whole[unit]
        if self._accumulated[unit] and fresh:  # bf16 gradients are added to the fp32 sum
            ledger.drop("gradients", fresh)
            fresh = 0
        self._reshard(unit)
        if not self._last:
            if fresh and self._compute != FP32:
                ledger.hold("gradients", whole)
                ledger.drop("gradients", fresh)
            self._accumulated[unit] = whole
            return
        ledger.drop("buffers", self._reducing)
        reduced = FP32 * self._rows[unit]
        self._reducing = reduced * self._shards
        ledger.hold("buffers", self._reducing)
        ledger.drop("gradients", fresh or self._accumulated[unit])
        self._accumulated[unit] = 0
        ledger.hold("gradients", reduced)
        if self._config.cpu_offload:
            ledger.drop("gradients", reduced)
        else:
            self._sharded_gradients += reduced
        if self._shards == 1:  # torch divides by 1 into a temporary
            ledger.hold("buffers", self._reducing)
            ledger.drop("buffers", self._reducing)
        if unit == OUTSIDE:
            ledger.drop("buffers", self._reducing)
            self._reducing = 0


class ZeROAccount:
    """DeepSpeed's stages 1 and 2: whole weights; masters, moments and (stage 2) gradients in flat partitions.

    The bucket through which gradients pass is allocated whole in every backward, whatever the size of the model.
    """

    def __init__(self, config: EngineConfig, units: Units, ledger: Ledger, world_size: int):
        self._ledger = ledger
        self._partitions_gradients = config.strategy == "zero2"
        self._compute = 2 if config.precision == "bf16" else FP32
        total = _elements(units)
        self._whole, self._mine = total, math.ceil(total / world_size)
        self._is_split = world_size > 1
        raw = config.deepspeed.get("zero_optimization", {})
        self._bucket = int(raw.get("reduce_bucket_size", BUCKET_ELEMENTS))  # elements
        self._buffers = self._compute * self._bucket * (2 if raw.get("overlap_comm") else 1)
        self._offloads = config.cpu_offload
        hold = ledger.hold_on_host if config.cpu_offload else ledger.hold
        ledger.hold("parameters", self._compute * total)
        hold("optimizer", (FP32 + _states(config)) * self._mine)  # masters too
        if config.cpu_offload:
            ledger.hold_on_host("gradients", FP32 * self._mine)
            ledger.hold_on_host("buffers", self._compute * self._mine)  # updated weights on their way to the device
            largest = max(shape.numel() for unit in units for shape in unit)
            ledger.hold_on_host("buffers", self._compute * largest)
            ledger.hold("buffers", self._compute * largest)
        self._filled = 0  # elements in the bucket
        self._waiting = 0  # bytes of a gradient too large for the bucket
        self._has_bucket = False
        self._saved = (FP32 + _states(config)) * self._mine
        self._partition = 0  # bytes of this backward's part of the gradients
        self._accumulated = 0  # bytes of gradients of earlier micro-steps

    def begin(self, *, first: bool, last: bool) -> None:
        self._first, self._last = first, last

    def boundary(self, boundary: Boundary) -> None:
        if boundary.phase == "backward" and boundary.unit == OUTSIDE and not boundary.begins:
            self._end_backward()

    def gradient(self, gradient: Gradient) -> None:
        if not self._has_bucket:
            self._ledger.hold("buffers", self._buffers)
            self._has_bucket = True
        if self._partitions_gradients:
            self._pass_through_bucket(gradient.size // self._compute)
        elif self._first:  # stage 1 reduces nothing before the last micro-step is over
            self._ledger.hold("gradients", gradient.size)
            self._accumulated += gradient.size

    def update(self) -> None:
        self._ledger.hold("gradients", FP32 * self._mine)  # flattened for AdamW
        self._ledger.drop("gradients", FP32 * self._mine + self._accumulated)
        self._accumulated = 0

    def beside_training(self) -> int:
        return max(self._compute * self._whole, self._saved)  # a whole copy of the model; what goes into a checkpoint

    def _pass_through_bucket(self, elements: int) -> None:
        if self._filled + elements > self._bucket:
            self._reduce()
        if elements > self._bucket:
            self._waiting = self._compute * elements
            self._ledger.hold("gradients", self._waiting)
        self._filled += elements

    def _reduce(self) -> None:
        if not self._filled:
            return
        flat = self._compute * self._filled if self._is_split else 0
        exact = FP32 * self._filled if self._compute != FP32 else 0
        self._ledger.hold("buffers", flat + exact)
        if not self._partition and self._partitions_gradients and not self._offloads:
            needed = FP32 * self._mine
            if self._compute == FP32 or not self._accumulated:
                self._partition = needed
                self._ledger.hold("gradients", needed)
        self._ledger.drop("buffers", flat + exact)
        self._ledger.drop("gradients", self._waiting)
        self._filled = self._waiting = 0

    def _end_backward(self) -> None:
        if not self._partitions_gradients and self._last:
            # Copied through the bucket, then the part of this rank into a buffer of its own.
            self._filled = min(self._bucket, self._whole)
            self._reduce()
            if not self._offloads:
                self._ledger.hold("gradients", FP32 * self._mine)
            self._ledger.drop("gradients", self._accumulated)
            self._accumulated = 0 if self._offloads else FP32 * self._mine
        elif self._partitions_gradients:
            self._reduce()
            if self._accumulated:  # added to what earlier micro-steps left
                self._ledger.drop("gradients", self._partition)
            else:
                self._accumulated = self._partition
            self._partition = 0
        self._ledger.drop("buffers", self._buffers)
        self._has_bucket = False


class ZeRO3Account:
    """DeepSpeed's stage 3: everything in partitions.

    Every module that is entered asks for the next prefetch bucket, and a weight that will be used again is not given
    back: forward and backward run with as many gathered weights as `stage3_max_live_parameters` allows, not with those
    of a block.
    """

    def __init__(self, config: EngineConfig, units: Units, ledger: Ledger, world_size: int):
        self._ledger = ledger
        self._compute = 2 if config.precision == "bf16" else FP32
        raw = config.deepspeed.get("zero_optimization", {})
        self._bucket = int(raw.get("reduce_bucket_size", BUCKET_ELEMENTS))
        self._prefetch = int(raw.get("stage3_prefetch_bucket_size", 5e7))  # elements
        self._most_live = int(raw.get("stage3_max_live_parameters", 1e9))  # elements
        threshold = int(raw.get("stage3_param_persistence_threshold", 1e5))
        sizes = [[shape.numel() for shape in unit] for unit in units]
        self._mine = sum(math.ceil(size / world_size) for unit in sizes for size in unit)
        self._is_split = world_size > 1
        self._gathers = [sum(size for size in unit if size > threshold) for unit in sizes]  # elements, by unit
        self._offloads = config.cpu_offload
        hold = ledger.hold_on_host if config.cpu_offload else ledger.hold
        hold("parameters", self._compute * self._mine)
        hold("optimizer", (FP32 + _states(config)) * self._mine)  # masters too
        hold("gradients", FP32 * self._mine * (2 if config.cpu_offload else 1))
        ledger.hold("buffers", FP32 * self._bucket)
        if self._is_split:  # small weights stay gathered
            ledger.hold("parameters", self._compute * sum(s for unit in sizes for s in unit if s <= threshold))
        self._whole, self._saved = _elements(units), (FP32 + _states(config)) * self._mine
        self._live = self._in_flight = 0  # bytes
        self._filled = self._waiting = 0

    def begin(self, *, first: bool, last: bool) -> None: ...

    def boundary(self, boundary: Boundary) -> None:
        match boundary.phase, boundary.begins, boundary.unit:
            case "forward", True, unit if unit == OUTSIDE and self._is_split:
                self._in_flight = self._compute * min(self._prefetch, self._most_live, sum(self._gathers))
                self._ledger.hold("buffers", self._in_flight)
                self._keep(sum(self._gathers))
            case "forward", False, unit if unit == OUTSIDE:
                self._ledger.drop("buffers", self._in_flight)
                self._in_flight = 0
            case "backward", False, unit:
                if unit == OUTSIDE:
                    self._reduce()
                if self._is_split:
                    self._keep(0 if unit == OUTSIDE else sum(self._gathers[:unit]) + self._gathers[OUTSIDE])

    def gradient(self, gradient: Gradient) -> None:
        elements = gradient.size // self._compute
        if self._filled and self._filled + elements > self._bucket:
            self._reduce()
        if self._filled + elements > self._bucket:
            self._waiting += gradient.size
            self._ledger.hold("gradients", gradient.size)
        self._filled += elements

    def update(self) -> None:
        if not self._offloads:
            self._ledger.hold("gradients", FP32 * self._mine)  # flattened for AdamW
            self._ledger.drop("gradients", FP32 * self._mine)

    def beside_training(self) -> int:
        return max(self._compute * self._whole, self._saved)  # a whole copy of the model; what goes into a checkpoint

    def _keep(self, needed: int) -> None:
        """Have gathered what is `needed` (elements) until the end of the backward, as far as may live."""
        live = self._compute * min(needed, self._most_live)
        self._ledger.hold("parameters", live - self._live)
        self._live = live

    def _reduce(self) -> None:
        self._ledger.hold("buffers", FP32 * self._filled)  # the ranks' parts one behind the other
        self._ledger.drop("buffers", FP32 * self._filled)
        self._ledger.drop("gradients", self._waiting)
        self._filled = self._waiting = 0


ACCOUNTS: dict[str, Callable[[EngineConfig, Units, Ledger, int], Account]] = {
    "ddp": DDPAccount,
    "fsdp2": FSDP2Account,
    "zero1": ZeROAccount,
    "zero2": ZeROAccount,
    "zero3": ZeRO3Account,
}


def _states(config: EngineConfig) -> int:
    """Bytes of both moments, and of the average if one is kept, for each element."""
    return 2 * FP32 + FP32 * (config.ema_decay is not None)


def _elements(units: Units) -> int:
    return sum(shape.numel() for unit in units for shape in unit)


def _rows(shape: torch.Size, shards: int) -> int:
    """Elements of one rank's part of a parameter that is split by rows, padding included."""
    return math.ceil(shape[0] / shards) * shape[1:].numel()

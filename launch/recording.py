"""What a training step holds in memory while it runs, followed on tensors without data.

One micro-batch of the task's own forward and backward runs on fake tensors (shapes, types and storages, no values), so
that a model of any size is followed in seconds on any machine. The recording is a list of events; the accounts of
launch/engine/memory.py replay it beside what each strategy holds. Nothing is guessed about layers: activation
checkpointing, types and the head are those of the code that trains.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Region = Literal["blocks", "head", "casts"]  # casts: copies of weights in the type of computation
Phase = Literal["forward", "backward"]

OUTSIDE = -1  # the unit of what belongs to no block: input layer, last norm, head


@dataclass(frozen=True)
class Held:
    """A storage came to life; gone, if `size` is negative."""

    size: int  # bytes
    region: Region


@dataclass(frozen=True)
class Gradient:
    """The gradient of a parameter of `unit` is complete: its storage is the engine's business from here on."""

    unit: int
    size: int  # bytes
    region: Region  # where its storage was counted so far


@dataclass(frozen=True)
class Boundary:
    """A block, or (`OUTSIDE`) the whole model, begins or ends its forward or backward."""

    phase: Phase
    unit: int
    begins: bool


Event = Held | Gradient | Boundary


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One micro-batch of one rank, from its first operation to the end of its backward."""

    events: Sequence[Event]
    batch_bytes: int  # of the micro-batch itself
    flops: int  # of matrix products and attention, those that activation checkpointing repeats included
    all_reduced: int  # bytes that tensor parallelism adds up over its group


def record(
    build_model: Callable[[], Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    make_batch: Callable[[], Any],
    *,
    prepare: Callable[[Any], None],
    fake: FakeTensorMode,
    cuda: bool,
) -> Recording:
    """Follow `loss_of(model, batch)` and its backward.

    prepare: what the engine does to the model (types, tensor parallelism, activation checkpointing). cuda: let the code
    believe that its tensors live on a GPU; the operations are those of the CPU, whose fused attention keeps the same
    tensors. What depends on values is taken at its largest: every flag is set.
    """
    with fake:
        model = build_model()
        prepare(model)
        recorder = _Recorder(model)
        with _as_on_cuda() if cuda else contextlib.nullcontext(), recorder:
            batch = make_batch()
            batch_bytes = recorder.live
            recorder.events.append(Boundary("forward", OUTSIDE, True))
            loss = loss_of(model, batch)
            recorder.events.append(Boundary("forward", OUTSIDE, False))
            recorder.region = "head"
            recorder.events.append(Boundary("backward", OUTSIDE, True))
            loss.backward()
            recorder.events.append(Boundary("backward", OUTSIDE, False))
            del loss
    return Recording(
        events=tuple(recorder.events),
        batch_bytes=batch_bytes,
        flops=recorder.flops,
        all_reduced=recorder.all_reduced,
    )


class _ClaimsCuda(TorchFunctionMode):
    """Answers `tensor.is_cuda` with yes: code that sizes its pieces by the device plans for the GPU it will have."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """No fused attention of the CPU has dropout, those of CUDA do: without it the CPU takes the fused one too."""
    attention = nn.functional.scaled_dot_product_attention

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **(kwargs | {"dropout_p": 0.0}))

    # Not in the mode above, which torch suspends while a backward runs a checkpointed forward again.
    nn.functional.scaled_dot_product_attention = fused
    try:
        with _ClaimsCuda():
            yield
    finally:
        nn.functional.scaled_dot_product_attention = attention


class _Recorder(TorchDispatchMode):
    """Watches storages come and go, and hangs markers on the blocks of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.live = self.flops = self.all_reduced = 0
        self.region: Region = "blocks"
        self._known: dict[int, tuple[weakref.ref[Any], int, Region]] = {}  # storage -> itself, size, region
        self._blocks = list(model.blocks)
        self._weights = {_local(p).untyped_storage()._cdata for p in model.parameters()}
        owner = {id(p): i for i, block in enumerate(self._blocks) for p in block.parameters()}
        for parameter in model.parameters():
            unit = owner.get(id(parameter), OUTSIDE)
            parameter.register_post_accumulate_grad_hook(lambda p, unit=unit: self._complete(p, unit))
        for unit, block in enumerate(self._blocks):
            block.register_forward_pre_hook(lambda _, inputs, unit=unit: self._begin(unit, inputs))
            block.register_forward_hook(lambda _, __, output, unit=unit: self._end(unit, output))

    # --- markers -----------------------------------------------------------------------------------------------------

    def _begin(self, unit: int, inputs: tuple[Any, ...]) -> None:
        self.events.append(Boundary("forward", unit, True))
        first = next(x for x in inputs if isinstance(x, Tensor) and x.requires_grad)
        first.register_hook(lambda _: self.events.append(Boundary("backward", unit, False)))

    def _end(self, unit: int, output: Tensor) -> None:
        self.events.append(Boundary("forward", unit, False))
        if unit == len(self._blocks) - 1:
            self.region = "head"
        output.register_hook(lambda _: self._begin_backward(unit))

    def _begin_backward(self, unit: int) -> None:
        self.region = "blocks"
        self.events.append(Boundary("backward", unit, True))

    def _complete(self, parameter: Tensor, unit: int) -> None:
        assert parameter.grad is not None
        _, size, region = self._known.pop(_local(parameter.grad).untyped_storage()._cdata)
        self.live -= size
        self.events.append(Gradient(unit, size, region))

    # --- storages ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it takes itself apart, and comes back with the tensors of this rank
        kwargs = kwargs or {}
        called, args = as_many_as_there_can_be(func, args)
        outputs = called(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs, out_val=outputs)
        if packet is torch.ops._c10d_functional.all_reduce:
            self.all_reduced += args[0].numel() * args[0].element_size()
        region = self.region
        if func is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            region = "casts"
        for tensor in tree_leaves((args, kwargs, outputs)):  # arguments too: tables that the task made before
            if isinstance(tensor, Tensor):
                self._see(tensor, region)
        return outputs

    def _see(self, tensor: Tensor, region: Region) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._weights or ((known := self._known.get(key)) is not None and known[0]() is not None):
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._gone(key)), size, region)
        self.live += size
        self.events.append(Held(size, region))

    def _gone(self, key: int) -> None:
        if (known := self._known.pop(key, None)) is not None:
            self.live -= known[1]
            self.events.append(Held(-known[1], known[2]))


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def as_many_as_there_can_be(func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Operations whose result depends on values, made as large as they can be."""
    if func is aten.nonzero.default:
        flags = args[0]
        return (lambda: flags.new_empty((flags.numel(), flags.dim()), dtype=torch.int64)), ()
    if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
        places: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype == torch.bool:
                places += [index.new_empty(index.numel(), dtype=torch.int64)] * index.dim()
            else:
                places.append(index)
        return func, (args[0], places)
    return func, args


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """Two products [L, E] x [E, L]; a causal kernel skips half of them."""
    batch, heads, length, size = q.shape
    return 4 * batch * heads * length * k.shape[2] * size // (2 if causal else 1)


def _attention_backward_flops(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
    """The forward's two products again and their four derivatives, less the one that is recomputed in place."""
    return 5 * _attention_flops(q, k, v, causal=bool(rest[3])) // 2


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

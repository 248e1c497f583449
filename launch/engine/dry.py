"""A training step on its real mesh without its devices: a rank of a fake process group, on tensors without values.

Model, engine, optimizer and every collective are those of a run; only nothing is stored and nothing is sent. What a
preset gets wrong (a shape that does not divide, a layer that a plan forgets, an operation that a mesh does not know)
fails here, in seconds and on any machine.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from launch.checkpoint.shards import local_tensor
from launch.engine import fsdp2
from launch.engine.base import EngineConfig, OptimizerConfig
from launch.engine.build import build_engine
from launch.errors import ConfigError
from launch.recording import as_many_as_there_can_be
from launch.runtime import Place, Runtime

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What the first rank would hold."""

    engine: str  # what was really wrapped, in which types
    shapes: dict[str, tuple[torch.Size, torch.Size]]  # of each tensor of the state, whole and on this rank

    @property
    def state_elements(self) -> int:
        """Of weights, moments and average on this rank."""
        return sum(local.numel() for _, local in self.shapes.values())


def dry_run(
    build_model: Callable[[], Any],
    loss_of: Callable[[nn.Module], Tensor],
    config: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    world_size: int,
) -> DryRun:
    """Build the engine as rank 0 of `world_size`, run `loss_of` (one micro-batch), its backward, and a step.

    `ConfigError` where a run would raise it, and for DeepSpeed, which cannot do without values. Rank 0 holds the
    largest shards. Blocks are not compiled. No process group may exist yet.
    """
    if config.strategy not in ("ddp", "fsdp2"):
        raise ConfigError(
            f"engine.strategy = {config.strategy} has no dry run, because DeepSpeed reads values while it sets itself "
            "up; use ddp or fsdp2, or start it with train.steps=1"
        )
    config = dataclasses.replace(config, compile=False)
    with _fake_group(world_size) as runtime, _real_meshes(), FakeTensorMode(allow_non_fake_inputs=True), _Any():
        engine = build_engine(build_model, config, optimizer, runtime, seed=0)
        if isinstance(engine.module, DistributedDataParallel):
            engine.module.register_comm_hook(None, _as_if_reduced)
        engine.backward(loss_of(engine.module), last=True)
        if not engine.step(1e-3, lambda norm: True).applied:
            raise AssertionError("the step was not applied")
        shapes = {name: (tensor.shape, local_tensor(tensor).shape) for name, tensor in engine.state().items()}
        return DryRun(engine=engine.describe(), shapes=shapes)


@contextmanager
def _fake_group(world_size: int) -> Iterator[Runtime]:
    """A process group in which every collective is over at once and has moved nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        place = Place(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size)
        yield Runtime(place, torch.device("cpu"), group, timedelta(minutes=1))
    finally:
        dist.destroy_process_group()


def _as_if_reduced(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
    """DDP wants the reduced bucket back, and a fake collective returns nothing."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Meshes work out ranks and groups with small tensors, whose values they need."""

    def real(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return call

    with (
        patch.object(DeviceMesh, "__init__", real(DeviceMesh.__init__)),
        patch.object(fsdp2, "init_device_mesh", real(fsdp2.init_device_mesh)),
    ):
        yield


class _Any(TorchDispatchMode):
    """Answers what depends on values: every flag is set, every number that the host asks for is one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else 1
            func, args = as_many_as_there_can_be(func, args)
        return func(*args, **(kwargs or {}))

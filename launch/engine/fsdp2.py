"""Weights, gradients and optimizer states sharded over ranks (PyTorch `fully_shard`; ZeRO stage 3, or hybrid).

Order for each block: activation checkpointing, compilation, `fully_shard`. The optimizer is built last, because
`fully_shard` replaces the parameters. The head belongs to the root unit, which stays gathered through the backward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launch.engine.base import EngineConfig, OptimizerConfig, StepInfo, Updates, initialise, prepare_blocks
from launch.errors import ConfigError
from launch.runtime import Runtime


class FSDP2:
    def __init__(
        self,
        build_model: Callable[[], Any],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        seed: int,
    ):
        self._mesh = _mesh(config, runtime)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
        with torch.device("meta"):
            model = build_model()
        prepare_blocks(model, config)
        for unit in (*model.blocks, model):
            fully_shard(
                unit,
                mesh=self._mesh,
                mp_policy=precision,
                offload_policy=offload,
                reshard_after_forward=config.reshard_after_forward if unit is not model else False,
            )
        model.to_empty(device="cpu" if config.cpu_offload else runtime.device)
        initialise(model, model, seed)
        self.module: nn.Module = model
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            # Sums, not averages: the loss carries the global count already. Without the second line PyTorch would
            # express "divide by 1" as a pre-multiplied sum, which gloo does not have.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self._updates = Updates(model, model.no_decay, optimizer, config.ema_decay)
        self._config, self._runtime = config, runtime

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        loss.backward()

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        return self._updates.step(lr, accept)

    def state(self) -> dict[str, Tensor]:
        return self._updates.state()

    def scalars(self) -> dict[str, Any]:
        return self._updates.scalars()

    def adopt(self, state: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None) -> None:
        del state  # live
        for unit in self._units:
            unit.reshard()  # weights gathered before the load would outlive it
        self._updates.adopt(scalars)

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Collective. Gathers all weights once; inside, ranks may call forward as often as each of them likes."""
        for unit in self._units:
            unit.reshard()
        self.module.eval()
        try:
            with self._updates.averaged(), torch.no_grad():
                for unit in self._units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
                yield self.module
                for unit in self._units:
                    unit.reshard()
        finally:
            for unit in self._units:
                keep = unit is self.module or not self._config.reshard_after_forward
                unit.set_reshard_after_forward(not keep, recurse=False)
            self.module.train()

    def describe(self) -> str:
        sharded = [isinstance(p, DTensor) for p in self.module.parameters()]
        if not isinstance(self.module, FSDPModule) or not all(sharded):
            raise AssertionError(
                f"asked for fsdp2, but {sharded.count(False)} of {len(sharded)} parameters are not sharded"
            )
        shape = " x ".join(
            f"{name} {size}" for name, size in zip(self._mesh.mesh_dim_names or (), self._mesh.shape, strict=True)
        )
        offload = ", offloaded to host" if self._config.cpu_offload else ""
        return f"fully_shard over {shape} on {self._runtime.device.type}, compute {self._config.precision}{offload}"


def _mesh(config: EngineConfig, runtime: Runtime) -> DeviceMesh:
    world, replicas = runtime.world_size, config.replicas
    if replicas < 1 or world % replicas:
        divisors = [r for r in range(1, world + 1) if world % r == 0]
        raise ConfigError(f"engine.replicas = {replicas} does not divide the world size {world}; use one of {divisors}")
    if replicas == 1:
        return init_device_mesh(runtime.device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(runtime.device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))

"""Weights, gradients and optimizer states sharded over ranks (PyTorch `fully_shard`; ZeRO stage 3, or hybrid).

The ranks form a mesh (replicate, shard, tensor); a dimension that the configuration does not ask for has size 1 or is
left out. Order for each block: split over the tensor group, activation checkpointing, compilation, `fully_shard` over
the other two. The optimizer is built last, because `fully_shard` replaces the parameters. The head belongs to the root
unit, which stays gathered through the backward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from launch.engine.base import (
    EngineConfig,
    OptimizerConfig,
    StepInfo,
    Updates,
    data_world_size,
    initialise,
    prepare_blocks,
    whole_copy,
)
from launch.engine.tensor_parallel import add_up, split
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
        self._build_model = build_model
        self.data_rank = runtime.rank // config.tensor_parallel  # a tensor group is made of neighbours
        self.data_world_size = data_world_size(config, runtime.world_size)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if config.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
        with torch.device("meta"):
            model = build_model()
        seen_in_part = (
            split(model, self._mesh["tensor"], own_draws=not config.compile) if config.tensor_parallel > 1 else []
        )
        prepare_blocks(model, config)
        data_mesh = self._mesh[tuple(name for name in self._mesh.mesh_dim_names or () if name != "tensor")]
        for unit in (*model.blocks, model):
            fully_shard(
                unit,
                mesh=data_mesh,
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
        self._seen_in_part = [self._updates.parameters[name] for name in seen_in_part]
        self._config, self._runtime = config, runtime

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        loss.backward()

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        if self._seen_in_part:
            add_up([p.grad for p in self._seen_in_part], self._mesh["tensor"])
        return self._updates.step(lr, accept)

    def state(self) -> dict[str, Tensor]:
        """All on the whole mesh: a parameter that is not split is replicated over the tensor group."""
        return {name: self._on_whole_mesh(tensor) for name, tensor in self._updates.state().items()}

    def _on_whole_mesh(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        missing = self._mesh.ndim - tensor.device_mesh.ndim
        if not missing:
            return tensor
        return DTensor.from_local(
            tensor.to_local(),
            self._mesh,
            [*tensor.placements, *[Replicate()] * missing],
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

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
                if self._config.tensor_parallel > 1:  # its layers communicate in every forward
                    yield self._whole_copy()
                else:
                    yield self.module
                for unit in self._units:
                    unit.reshard()
        finally:
            for unit in self._units:
                keep = unit is self.module or not self._config.reshard_after_forward
                unit.set_reshard_after_forward(not keep, recurse=False)
            self.module.train()

    def _whole_copy(self) -> nn.Module:
        """Collective. From weights that are gathered over the data ranks; frees these."""
        gathered = dict(self.module.named_parameters())

        def weights(name: str) -> Tensor:
            p = gathered[name]
            return p.full_tensor() if isinstance(p, DTensor) else p

        model = whole_copy(self._build_model, self._config, self._runtime.device, weights)
        for unit in self._units:
            unit.reshard()
        return model

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
    """The ranks as (replicate, shard, tensor), without the first or the last where its size is 1."""
    shards = data_world_size(config, runtime.world_size) // config.replicas
    sizes = {"replicate": config.replicas, "shard": shards, "tensor": config.tensor_parallel}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

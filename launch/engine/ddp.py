"""Every rank holds the whole model; gradients are summed over ranks (PyTorch DistributedDataParallel)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.engine.base import EngineConfig, OptimizerConfig, StepInfo, Updates, initialise, prepare_blocks
from launch.runtime import Runtime


class DDP:
    def __init__(
        self,
        build_model: Callable[[], Any],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        seed: int,
    ):
        with torch.device(runtime.device):
            model = build_model()
        initialise(model, model, seed)
        prepare_blocks(model, config)
        self._runtime, self._precision = runtime, config.precision
        self.data_rank, self.data_world_size = runtime.rank, runtime.world_size
        self._model = model
        self._updates = Updates(model, model.no_decay, optimizer, config.ema_decay)
        if config.precision == "bf16":
            model.forward = torch.autocast(runtime.device.type, torch.bfloat16)(model.forward)
        self.module: nn.Module = model
        if runtime.world_size > 1:
            devices = [runtime.device.index] if runtime.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, init_sync=False
            )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        silent = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if silent else nullcontext():  # type: ignore[operator]
            (loss * self._runtime.world_size).backward()  # DDP divides by the world size; gradients here are sums

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        return self._updates.step(lr, accept)

    def state(self) -> dict[str, Tensor]:
        return self._updates.state()

    def scalars(self) -> dict[str, Any]:
        return self._updates.scalars()

    def adopt(self, state: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None) -> None:
        del state  # live
        self._updates.adopt(scalars)

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        self._model.eval()
        try:
            with self._updates.averaged(), torch.no_grad():
                yield self._model  # not the wrapper: ranks may call forward a different number of times
        finally:
            self._model.train()

    def describe(self) -> str:
        wrapped = isinstance(self.module, DistributedDataParallel)
        if wrapped != (self._runtime.world_size > 1):
            raise AssertionError(
                f"world size {self._runtime.world_size} but the module is {type(self.module).__name__}"
            )
        where = f"{self._runtime.world_size} x {self._runtime.device.type}"
        return f"{type(self.module).__name__} on {where}, compute {self._precision}"

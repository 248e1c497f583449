"""The layers of each block split over a tensor group (Megatron-LM, arXiv 1909.08053), by torch's `parallelize_module`.

Between regions (see `SplittableModel`) every rank of the group holds the same residual stream; a region costs one
all-reduce of it in the forward and one in the backward. Everything outside regions is computed by all ranks alike, so
its gradients are equal without being exchanged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from launch.engine.base import SplittableModel
from launch.errors import ConfigError
from launch.random import stream_key


def split(model: Any, mesh: DeviceMesh, *, own_draws: bool) -> list[str]:
    """Split the layers of `model` over `mesh` in place, as its plan says.

    Without `own_draws`, random regions draw alike on every rank of a group, as torch.compile needs it: it cannot trace
    a change of the generator, and would leave a checkpointed block as it is. Returns the names of the parameters whose
    gradients `add_up` must complete: whole ones, inside of regions.
    """
    if not isinstance(model, SplittableModel):
        raise ConfigError(
            f"engine.tensor_parallel = {mesh.size()}, but {type(model).__name__} has no plan for splitting its layers; "
            "use engine.tensor_parallel=1"
        )
    assert isinstance(model, nn.Module)
    plan = model.tensor_parallel_plan()
    for name, how in plan.items():
        module = model.get_submodule(name)
        if how == "column" or how == "row":
            style = ColwiseParallel() if how == "column" else RowwiseParallel()
            parallelize_module(module, mesh, style, src_data_rank=None)
            continue
        # One conversion at the entrance, and not one at each layer inside: their gradients are then added up before
        # they are exchanged.
        module.register_forward_pre_hook(partial(_enter, mesh))
        if how == "random-region" and own_draws:
            module.forward = partial(_with_own_draws, module.forward, name, mesh)
    return [
        f"{name}.{inner}"
        for name, how in plan.items()
        if how.endswith("region")
        for inner, p in model.get_submodule(name).named_parameters()
        if not isinstance(p, DTensor)
    ]


def add_up(gradients: list[Tensor | None], mesh: DeviceMesh) -> None:
    """Collective. Replace gradients, each that of a rank's part of the heads, by their sum over the tensor group."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
    flat = torch.cat([g.flatten() for g in local]).to(mesh.device_type)  # offloaded gradients are on the host
    dist.all_reduce(flat, group=mesh.get_group())
    for gradient, total in zip(local, flat.split([g.numel() for g in local]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _enter(mesh: DeviceMesh, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]


@torch.compiler.disable(recursive=False)
def _with_own_draws(forward: Callable[..., Tensor], name: str, mesh: DeviceMesh, *inputs: Any) -> Tensor:
    """Call `forward` with random numbers that differ between the ranks of a tensor group.

    They are a function of the seed that the client last gave torch (for a micro-batch, say), the module's name and the
    rank. The group's common stream is left as it was, so the dropout of the residual stream stays the same everywhere.
    """
    devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else []
    key = stream_key(torch.initial_seed(), name, mesh.get_local_rank())
    with torch.random.fork_rng(devices):
        torch.manual_seed(key)
        return forward(*inputs)

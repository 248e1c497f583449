"""What an engine is, and the parts that every engine of ours is put together from.

The contract that makes results independent of the world size: a client's loss is a local SUM divided by the GLOBAL
count, and the engine adds gradients over ranks without averaging. Initial weights are drawn for each parameter from a
stream keyed by its name, so they do not depend on how, or whether, the model is sharded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_lerp_, _foreach_mul_, _foreach_norm, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launch.checkpoint.layout import Box
from launch.checkpoint.shards import local_box, local_tensor
from launch.config import Seconds
from launch.engine.deepspeed_keys import check_deepspeed_keys
from launch.errors import CheckpointError, ConfigError
from launch.random import generator, stream_key


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = (
        "ddp"  # ddp: every rank holds all; fsdp2, zero3: weights, gradients, states sharded; zero1, zero2: part of them
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if torch sees one
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: compute in bf16; master weights, reductions, states stay fp32
    replicas: int = 1  # fsdp2: hybrid sharding, this many replicas of the model, each sharded over world/replicas ranks
    tensor_parallel: int = 1  # fsdp2: split each layer over groups of this many neighbouring ranks, which share batches
    reshard_after_forward: bool = True  # fsdp2: free a block's gathered weights between its forward and its backward
    cpu_offload: bool = False  # fsdp2, zero: keep what is sharded in host memory (zero1, zero2: but the weights)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # zero: raw keys of DeepSpeed's own configuration
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # selective keeps matmuls and attention
    compile: bool = False  # torch.compile each block
    ema_decay: float | None = None  # keep an exponential average of the weights; evaluation, sampling, export use it
    timeout: Seconds = 600.0  # of every collective: a dead link is an error after this long

    def check(self, path: str) -> None:
        zeros = ("zero1", "zero2", "zero3")
        for name, default, strategies in (
            ("replicas", 1, ("fsdp2",)),
            ("tensor_parallel", 1, ("fsdp2",)),
            ("cpu_offload", False, ("fsdp2", *zeros)),
            ("deepspeed", {}, zeros),
        ):
            if getattr(self, name) != default and self.strategy not in strategies:
                raise ConfigError(
                    f"{path}.{name} = {getattr(self, name)} works with strategy {', '.join(strategies)}, not "
                    f"{self.strategy}; set {path}.strategy={strategies[0]} or {path}.{name}={str(default).lower()}"
                )
        if self.tensor_parallel < 1:
            raise ConfigError(
                f"{path}.tensor_parallel = {self.tensor_parallel}; the smallest is 1, which splits nothing"
            )
        if self.strategy == "zero1" and self.precision == "bf16":
            raise ConfigError(
                f"{path}.strategy = zero1 with {path}.precision = bf16: DeepSpeed would accumulate gradients in bf16 "
                f"there; use {path}.strategy=zero2, which gives the same steps from less memory, with fp32 gradients"
            )
        check_deepspeed_keys(self.deepspeed, f"{path}.deepspeed")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"{path}.ema_decay = {self.ema_decay}; need 0 < ema_decay < 1, or null for no average")
        if self.timeout <= 0:
            raise ConfigError(f"{path}.timeout = {self.timeout}; need a positive time such as 10min")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, ICLR 2019)."""

    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; on matrices only (the model says which parameters are exempt)
    clip: float | None = 1.0  # largest norm of the global gradient; null for no clipping

    def check(self, path: str) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{path}.betas = {list(self.betas)}; both must lie in [0, 1)")
        if self.eps <= 0 or self.weight_decay < 0 or (self.clip is not None and self.clip <= 0):
            raise ConfigError(
                f"{path}: eps = {self.eps}, weight_decay = {self.weight_decay}, clip = {self.clip}; "
                "need eps > 0, weight_decay >= 0, clip > 0 or null"
            )


def data_world_size(config: EngineConfig, world_size: int) -> int:
    """How many different parts a global batch is dealt into: the ranks of a tensor group read the same one.

    `ConfigError` if the ranks cannot be grouped as `config` says.
    """
    if world_size % config.tensor_parallel:
        raise _does_not_divide("tensor_parallel", config.tensor_parallel, world_size, f"the world size {world_size}")
    groups = world_size // config.tensor_parallel
    if config.replicas < 1 or groups % config.replicas:
        of = f" / engine.tensor_parallel {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
        raise _does_not_divide("replicas", config.replicas, groups, f"the world size {world_size}{of}")
    return groups


def _does_not_divide(name: str, value: int, number: int, what: str) -> ConfigError:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return ConfigError(f"engine.{name} = {value} does not divide {what}; use one of {divisors}")


class TrainableModel(Protocol):
    """What an engine asks of a model, besides being an `nn.Module` that can be built on the meta device."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The units of activation checkpointing, compilation and sharding."""
        ...

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full tensor of the parameter called `name` in place."""
        ...

    def no_decay(self, name: str) -> bool:
        """Whether weight decay leaves this parameter alone."""
        ...


Split = Literal["column", "row", "region", "random-region"]


@runtime_checkable
class SplittableModel(TrainableModel, Protocol):
    """A model whose layers can be split over a tensor group."""

    def tensor_parallel_plan(self) -> Mapping[str, Split]:
        """How each module, by name, is split (Megatron-LM, arXiv 1909.08053).

        "column" and "row" are linear layers split by outputs and by inputs; what one hands to the other is a part of
        the features or heads. A "region" is a module that takes the whole residual stream, works on its part with such
        layers, and gives the whole stream back: parameters in it that are not split see one part only, so their
        gradients are added up. In a "random-region" each rank draws random numbers of its own (attention dropout).
        """
        ...


@dataclass(frozen=True)
class StepInfo:
    grad_norm: float  # of the global gradient before clipping; the same on every rank
    applied: bool  # False if the step was refused


class Engine(Protocol):
    module: nn.Module  # what clients call
    data_rank: int  # which part of the global batch this rank reads, of
    data_world_size: int  # parts; ranks that read the same part compute the same loss

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate d(loss). `loss` is a local sum over the global count; only `last` communicates. Collective."""
        ...

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        """Clip, then update if `accept(global gradient norm)`; clear the gradients. Collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors by canonical name (`model.*`, `optim.exp_avg.*`, `optim.exp_avg_sq.*`, `ema.*`). Collective.

        fp32, live or copies: what is written into them counts once `adopt` has been called.
        """
        ...

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, as JSON."""
        ...

    def adopt(self, state: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None) -> None:
        """Collective. Go on from `state()`, its tensors filled in place, and from `scalars()` (None: as if new)."""
        ...

    def evaluation(self) -> AbstractContextManager[nn.Module]:
        """The module with averaged weights (if any), gathered on every rank so that forwards need no communication."""
        ...

    def describe(self) -> str:
        """One line: what was really wrapped, in which types. Raises if it is not what was asked for."""
        ...


# --- parts -----------------------------------------------------------------------------------------------------------


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], no_decay: Callable[[str], bool], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: parameters that decay, and those that are exempt; without empty ones.

    Tensor parallelism leaves parameters on two meshes, and one fused update cannot span both.
    """
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        groups.setdefault((no_decay(name), mesh), []).append(p)
    return [
        {"params": params, "weight_decay": 0.0 if exempt else weight_decay}
        for (exempt, _), params in sorted(groups.items(), key=lambda item: item[0][0])
    ]


class Updates:
    """AdamW, gradient clipping and the weight average of one model, on whatever shards this rank holds."""

    def __init__(
        self, model: nn.Module, no_decay: Callable[[str], bool], config: OptimizerConfig, ema_decay: float | None
    ):
        self.parameters = dict(model.named_parameters())  # ties appear once, under their first name
        self._clip, self._ema_decay = config.clip, ema_decay
        groups = parameter_groups(self.parameters, no_decay, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        # AdamW makes its states at the first step; made here they count from the start and can be loaded into.
        for p in self.parameters.values():
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=_local(p).device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if ema_decay is not None else {}

    @torch.no_grad()
    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(global_norm(gradients))  # the one host synchronisation of a step
        applied = accept(norm)
        if applied:
            if self._clip is not None and norm > self._clip:
                _foreach_mul_([_local(g) for g in gradients], self._clip / (norm + 1e-6))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self._ema_decay is not None:
                shadows = [_local(shadow) for shadow in self.average.values()]
                _foreach_lerp_(shadows, [_local(p) for p in self.parameters.values()], 1 - self._ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(norm, applied)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            moments = self.optimizer.state[p]
            state[f"model.{name}"] = p.detach()
            state[f"optim.exp_avg.{name}"] = moments["exp_avg"]
            state[f"optim.exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return state | {f"ema.{name}": shadow for name, shadow in self.average.items()}

    def scalars(self) -> dict[str, Any]:
        """The number of applied updates, which AdamW's bias correction needs."""
        return {"updates": int(next(iter(self.optimizer.state.values()))["step"].item())}

    def adopt(self, scalars: Mapping[str, Any] | None) -> None:
        """The tensors of `state` are live; only the count has to be told."""
        for moments in self.optimizer.state.values():
            moments["step"].fill_(scalars["updates"] if scalars is not None else 0)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, if an average is kept."""
        trained = {n: _local(self.parameters[n]).detach().clone() for n in self.average}
        with torch.no_grad():
            for name, shadow in self.average.items():
                _local(self.parameters[name]).copy_(_local(shadow))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in trained.items():
                    _local(self.parameters[name]).copy_(weights)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """float64 []: the 2-norm of the whole gradient, bit for bit the same on every rank.

    Plain tensors are whole on every rank. Of DTensors, on one mesh or several, each element lies on as many ranks as
    the world has replicas of its shard, and one exchange adds up all of them.
    """
    norms = torch.stack(_foreach_norm([_local(g) for g in gradients])).double()
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    if not sharded:
        return norms.square().sum().sqrt()
    world = dist.get_world_size()
    copies = torch.tensor([world // _shards(g) for g in sharded], dtype=torch.float64, device=norms.device)
    total = (norms.square() / copies).sum()
    total = total.to(sharded[0].device_mesh.device_type)  # offloaded gradients are on the host
    dist.all_reduce(total)
    return total.sqrt()


def _shards(tensor: DTensor) -> int:
    mesh = tensor.device_mesh
    return prod(mesh.size(dim) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())


@torch.no_grad()
def initialise(model: nn.Module, rules: TrainableModel, seed: int) -> None:
    """Fill every parameter (or this rank's shard of it) from the stream of its name.

    The full tensor of one parameter at a time exists in host memory, so that the draw is the same on every device.
    """
    for name, p in model.named_parameters():
        full = torch.empty(p.shape, dtype=torch.float32)
        rules.init_parameter(name, full, generator(stream_key(seed, "init", name)))
        _fill(p, full)


@torch.no_grad()
def load_weights(state: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy full tensors, by parameter name and equal on every rank, into an engine's live weights and their average.

    `CheckpointError` unless names and shapes match one to one.
    """
    missing = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    for name, full in weights:
        mine = state.get(f"model.{name}")
        if mine is None or mine.shape != full.shape:
            has = f"{name} of shape {tuple(mine.shape)}" if mine is not None else f"no {name}"
            raise CheckpointError(
                f"the initial weights hold {name} of shape {tuple(full.shape)}, the model has {has}; use the model and "
                "diffusion sections of the run that made them"
            )
        for tensor in (mine, state.get(f"ema.{name}")):
            if tensor is not None:
                _fill(tensor, full)
        missing.discard(name)
    if missing:
        raise CheckpointError(
            f"the initial weights lack {', '.join(sorted(missing)[:3])} ({len(missing)} tensors in all); export them "
            "again"
        )


def _fill(tensor: Tensor, full: Tensor) -> None:
    """Copy `full`, equal on every rank, or this rank's part of it, into `tensor`."""
    box = local_box("to fill", tensor)
    whole = Box(offsets=(0,) * full.dim(), sizes=tuple(full.shape))
    local_tensor(tensor).copy_(full[box.slices_within(whole)])


@torch.no_grad()
def whole_copy(
    build_model: Callable[[], Any], config: EngineConfig, device: torch.device, weights: Callable[[str], Tensor]
) -> nn.Module:
    """A copy of the model for evaluation, apart from the engine and its hooks: forwards need no communication.

    In the type of training, filled with the full tensors that `weights` gives for each parameter's name. Collective if
    `weights` is, which is called in the same order on every rank.
    """
    with torch.device(device):
        model = build_model()
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights(name))
    return model.eval()


def prepare_blocks(model: TrainableModel, config: EngineConfig) -> None:
    """Activation checkpointing, then compilation, of each block in place: parameter names stay canonical."""
    for block in model.blocks:
        if config.activation_checkpointing != "none":
            options = (
                {"context_fn": _keep_expensive_operations} if config.activation_checkpointing == "selective" else {}
            )
            block.forward = _checkpointed(block.forward, options)
        if config.compile:
            block.compile(dynamic=False)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A function and not a `partial`, in front of which torch.compile gives up without a word (torch 2.13)."""

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return checkpointed


def _keep_expensive_operations() -> tuple[Any, Any]:
    attention = (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    )
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, *attention)

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Optimizer states (stage 1), gradients (2) and weights (3) sharded over ranks by DeepSpeed ZeRO (arXiv 1910.02054).

DeepSpeed is asked for sharding alone: AdamW is torch's, the learning rate is set before every step, checkpoints are
ours. Its weights and states live in flat fp32 partitions whose borders ignore tensors. `_Fragment` is where a
parameter lies in the partition of this rank; from it everything else follows: initial weights, the average, the
canonical state that any strategy at any world size can take up, and the copy of the model that evaluations use.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from launch.engine.base import EngineConfig, OptimizerConfig, StepInfo, parameter_groups, prepare_blocks, whole_copy
from launch.errors import ConfigError
from launch.random import generator, stream_key
from launch.runtime import Runtime

_STATES = {"optim.exp_avg": "exp_avg", "optim.exp_avg_sq": "exp_avg_sq"}  # canonical prefix -> key in AdamW's state


def import_deepspeed(device_type: str) -> Any:
    """The module, prepared so that nothing is compiled at start; `ConfigError` if it is not installed."""
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at the import
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            "engine.strategy = zero1, zero2 or zero3 needs DeepSpeed; install it with `pip install -c constraints.txt "
            "-e '.[deepspeed]'`, or use engine.strategy=fsdp2, which shards alike"
        ) from error
    if device_type == "cpu":
        # The shared-memory collectives of the CPU backend would be compiled now, for minutes, and a process killed
        # meanwhile leaves a lock that hangs every later start (seen with 0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; its users can do nothing about that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def deepspeed_settings(config: EngineConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    stage = int(config.strategy.removeprefix("zero"))
    raw = dict(config.deepspeed)
    zero = {**raw.pop("zero_optimization", {}), "stage": stage}
    if config.cpu_offload:
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = host
        if stage == 3:
            zero["offload_param"] = host
    return {
        **raw,
        "train_micro_batch_size_per_gpu": 1,  # in its own books only: the trainer counts
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip or 0.0,
        "bf16": {"enabled": config.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class ZeRO:
    def __init__(
        self,
        build_model: Callable[[], Any],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        seed: int,
    ):
        self._deepspeed = import_deepspeed(runtime.device.type)
        settings = deepspeed_settings(config, optimizer)
        self._stage = int(settings["zero_optimization"]["stage"])
        self._config, self._runtime, self._build_model = config, runtime, build_model
        self.data_rank, self.data_world_size = runtime.rank, runtime.world_size
        self._deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))  # read in every step, launcher or not
        if self._stage == 3:
            with self._deepspeed.zero.Init(config_dict_or_path=settings):  # shards each parameter as it is made
                model = build_model()
        else:
            with torch.device(runtime.device):
                model = build_model()
        prepare_blocks(model, config)
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        groups = parameter_groups(self._parameters, model.no_decay, optimizer.weight_decay)
        adam = torch.optim.AdamW(groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        engine, *_ = self._deepspeed.initialize(model=model, optimizer=adam, config=settings)
        self.module: nn.Module = engine
        self._optimizer: Any = engine.optimizer
        self._make_states()
        self._initialise(model, seed)
        self._norm, self._accept = math.nan, lambda norm: math.isfinite(norm)
        self._ask_before_updates()
        self._mesh = init_device_mesh(runtime.device.type, (runtime.world_size,), mesh_dim_names=("shard",))

    # --- training ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        engine: Any = self.module
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss * self._runtime.world_size)  # DeepSpeed averages over ranks; gradients here are sums

    def step(self, lr: float, accept: Callable[[float], bool]) -> StepInfo:
        engine: Any = self.module
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._accept = accept
        engine.step()
        applied = not self._optimizer.overflow
        if applied and self._config.ema_decay is not None:
            with torch.no_grad():
                for partition in self._partitions:
                    self._states[partition]["ema"].lerp_(partition, 1 - self._config.ema_decay)
        return StepInfo(self._norm, applied)

    def _ask_before_updates(self) -> None:
        """Let `accept` refuse an update: DeepSpeed knows one kind of refusal, a gradient that overflowed.

        Every stage computes the norm, then calls `_update_scale(overflow)`, then leaves the step if `overflow` is set.
        """
        optimizer = self._optimizer
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        measure, update_scale = getattr(optimizer, name), optimizer._update_scale

        def measured(*arguments: Any, **options: Any) -> Any:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            found = measure(*arguments, **options)
            self._norm = float(combine_grad_norm_groups(found) if self._stage == 3 else found)
            return found

        def decided(overflow: bool) -> None:
            if overflow or self._norm < 0:
                self._norm = math.inf
            if not self._accept(self._norm):
                optimizer.overflow = True
            update_scale(optimizer.overflow)

        setattr(optimizer, name, measured)
        optimizer._update_scale = decided

    # --- where things are --------------------------------------------------------------------------------------------

    @property
    def _partitions(self) -> list[Tensor]:
        """The flat fp32 weights of this rank."""
        optimizer = self._optimizer
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    @property
    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's state of each partition; the average of the weights is kept beside the moments."""
        return self._optimizer.optimizer.state

    def _make_states(self) -> None:
        """AdamW makes its states at the first step; made here they count from the start and can be loaded into."""
        for partition in self._partitions:
            self._states[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
            if self._config.ema_decay is not None:
                self._states[partition]["ema"] = partition.detach().clone()
        if self._stage < 3:  # stage 3 looks states up by name; the others keep views, made for the first group alone
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _fragment(self, parameter: Any, key: str | None) -> tuple[int, Tensor]:
        """(first element, live flat view) of this rank's part of a weight (None) or of one of its states."""
        if self._stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return 0, torch.empty(0)
            return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)
        flat, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
        return start, flat[: max(0, parameter.ds_numel - start)]  # the last parts are padded

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.ds_shape if self._stage == 3 else parameter.shape

    def _gather(self, parameter: Any, key: str | None) -> Tensor:
        """Collective. The full fp32 tensor, on the device of training."""
        shape = self._shape(parameter)
        full = torch.zeros(shape, dtype=torch.float32, device=self._runtime.device)
        start, fragment = self._fragment(parameter, key)
        full.view(-1)[start : start + len(fragment)] = fragment.to(full.device)
        if self._runtime.world_size > 1:
            dist.all_reduce(full)
        return full

    @torch.no_grad()
    def _write(self, parameter: Any, key: str | None, full: Tensor) -> None:
        """Collective. The inverse of `_gather`; a weight is also written where forward and backward read it."""
        start, fragment = self._fragment(parameter, key)
        fragment.copy_(full.reshape(-1)[start : start + len(fragment)])
        if key is not None:
            return
        if self._stage < 3:
            parameter.data.copy_(full)
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(full)

    def _initialise(self, rules: Any, seed: int) -> None:
        """As `base.initialise`, after DeepSpeed: it would round fp32 masters to the type of the weights."""
        for name, parameter in self._parameters.items():
            full = torch.empty(self._shape(parameter), dtype=torch.float32)
            rules.init_parameter(name, full, generator(stream_key(seed, "init", name)))
            full = full.to(self._runtime.device)
            self._write(parameter, None, full)
            if self._config.ema_decay is not None:
                self._write(parameter, "ema", full)

    # --- state -------------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[str, Any, str | None]]:
        """(canonical name, parameter, key of its state) of every tensor, in the same order on each rank."""
        states = _STATES | ({"ema": "ema"} if self._config.ema_decay is not None else {})
        for name, parameter in self._parameters.items():
            yield f"model.{name}", parameter, None
            for prefix, key in states.items():
                yield f"{prefix}.{name}", parameter, key

    def state(self) -> dict[str, Tensor]:
        """Collective. Copies, sharded by rows as FSDP2 shards them; one full tensor at a time is in memory."""
        return {name: self._rows(self._gather(parameter, key)) for name, parameter, key in self._places()}

    def _rows(self, full: Tensor) -> DTensor:
        chunks = full.chunk(self._runtime.world_size)
        rank = self._runtime.rank
        mine = chunks[rank].clone() if rank < len(chunks) else full.new_empty((0, *full.shape[1:]))
        return DTensor.from_local(mine, self._mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())

    def adopt(self, state: Mapping[str, Tensor], scalars: Mapping[str, Any] | None = None) -> None:
        for name, parameter, key in self._places():
            found = state[name]
            self._write(parameter, key, found.full_tensor() if isinstance(found, DTensor) else found)
        if scalars is not None:
            for moments in self._states.values():
                moments["step"].fill_(scalars["updates"])

    def scalars(self) -> dict[str, Any]:
        return {"updates": int(next(iter(self._states.values()))["step"].item())}

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Collective. A whole copy of the model, apart from DeepSpeed and its hooks."""
        key = "ema" if self._config.ema_decay is not None else None
        with torch.no_grad():
            yield whole_copy(
                self._build_model,
                self._config,
                self._runtime.device,
                lambda name: self._gather(self._parameters[name], key),
            )

    def describe(self) -> str:
        engine: Any = self.module
        found = engine.zero_optimization_stage()
        sharded = all(hasattr(p, "ds_id") for p in self._parameters.values())
        if found != self._stage or sharded != (self._stage == 3):
            raise AssertionError(f"asked for {self._config.strategy}, but DeepSpeed runs stage {found}")
        offload = ", offloaded to host" if self._config.cpu_offload else ""
        where = f"{self._runtime.world_size} x {self._runtime.device.type}"
        return f"DeepSpeed ZeRO stage {found} on {where}, compute {self._config.precision}{offload}"

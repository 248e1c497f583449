"""What a run would need, under every strategy, before anything is started: `unmask plan CONFIG --gpus 16`.

Memory is the peak of a replayed recording of the task's own forward and backward (launch/recording.py) beside what each
strategy holds (launch/engine/memory.py). Time is a stated rule over stated rates: what `PlanOptions` says.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from launch import config as configs
from launch.data import accumulation_steps
from launch.engine.base import EngineConfig, SplittableModel, data_world_size, prepare_blocks
from launch.engine.memory import ACCOUNTS, PARTS, Ledger, Part, replay, units_of
from launch.engine.tensor_parallel import split
from launch.engine.traffic import Transfer, transfers
from launch.errors import ConfigError
from launch.experiment import Experiment, Task
from launch.metrics import peak_flops_of
from launch.recording import Recording, record

# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The machine that is planned for. Rates are those of one GPU."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float  # bytes
    head_room: float  # share of the memory left free: CUDA's context, NCCL's buffers, fragmentation
    flops: float  # FLOP/s of dense products in the type of training
    mfu: float  # share of `flops` that training reaches while nothing else holds it up
    within: float  # bytes/s to the other GPUs of its machine
    between: float  # bytes/s to other machines
    host: float  # bytes/s to and from host memory, AdamW in host memory included

    @property
    def usable(self) -> float:
        return self.gpu_memory * (1 - self.head_room)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to plan for")
    group.add_argument("--gpus", metavar="N", help="number of GPUs (1)")
    group.add_argument("--gpus-per-node", default="8", metavar="N", help="GPUs of a machine (8)")
    group.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="memory of a GPU: 80GB, 40GiB (80GB)")
    group.add_argument("--head-room", default="0.1", metavar="SHARE", help="share of the memory to leave free (0.1)")
    group.add_argument("--gpu", default="H100", metavar="NAME", help="sets --flops: H100, A100, L40S, ... (H100)")
    group.add_argument(
        "--flops", metavar="RATE", help="FLOP/s of a GPU, dense, in the type of training, such as 989e12"
    )
    group.add_argument("--mfu", default="0.4", metavar="SHARE", help="share of --flops that training reaches (0.4)")
    group.add_argument(
        "--bandwidth", default="450GB", metavar="SIZE", help="bytes/s from a GPU to others of its machine (450GB)"
    )
    group.add_argument(
        "--node-bandwidth", default="50GB", metavar="SIZE", help="bytes/s from a GPU to other machines (50GB)"
    )
    group.add_argument(
        "--host-bandwidth", default="25GB", metavar="SIZE", help="bytes/s between a GPU and host memory (25GB)"
    )
    group.add_argument("--json", action="store_true", help="print the plan as JSON")


def options_from(arguments: argparse.Namespace, *, gpus: str = "1") -> PlanOptions:
    """`gpus` counts if the command line does not say. `ConfigError` names the option whose value cannot be."""
    if arguments.flops is not None:
        flops = _number("--flops", arguments.flops, least=1.0)
    else:
        known = peak_flops_of(arguments.gpu)
        if known is None:
            raise ConfigError(f"--gpu {arguments.gpu} is not in the table of known GPUs; say --flops, such as 312e12")
        flops = known
    return PlanOptions(
        gpus=_count("--gpus", arguments.gpus or gpus),
        gpus_per_node=_count("--gpus-per-node", arguments.gpus_per_node),
        gpu_memory=size_in_bytes("--gpu-memory", arguments.gpu_memory),
        head_room=_number("--head-room", arguments.head_room, least=0.0, below=1.0),
        flops=flops,
        mfu=_number("--mfu", arguments.mfu, least=1e-3, below=1.0 + 1e-9),
        within=size_in_bytes("--bandwidth", arguments.bandwidth),
        between=size_in_bytes("--node-bandwidth", arguments.node_bandwidth),
        host=size_in_bytes("--host-bandwidth", arguments.host_bandwidth),
    )


def size_in_bytes(option: str, text: str) -> float:
    """80GB is 80e9 bytes, 80GiB is 80 * 2**30."""
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([kMGT]i?|)B?(?:/s)?\s*", text)
    if match is None or match[2].replace("k", "K") not in {u.replace("k", "K") for u in units} or not float(match[1]):
        raise ConfigError(f"{option} {text!r} is not a size above 0; write it like 80GB or 80GiB")
    return float(match[1]) * units[match[2].replace("ki", "Ki")]


def _count(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} {text!r} is not a whole number of 1 or more")
    return int(text)


def _number(option: str, text: str, *, least: float, below: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < below:
        limit = f"of {least:g} or more" if below == math.inf else f"from {least:g} to {below:.3g}"
        raise ConfigError(f"{option} {text!r} is not a number {limit}")
    return value


# --- one strategy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One strategy on one GPU of the plan. Bytes and seconds."""

    engine: EngineConfig
    micro_batch: int
    micro_steps: int
    peak: int
    phase: str  # in which the peak comes
    parts: Mapping[Part, int]  # at the peak of training
    host: int  # in host memory, for each GPU
    transfers: Sequence[Transfer]
    compute_seconds: float
    step_seconds: float
    tokens_per_second: float  # of all GPUs

    @property
    def overrides(self) -> dict[str, Any]:
        """The keys of `engine` that make it this strategy."""
        defaults, chosen = EngineConfig(), {"strategy": self.engine.strategy}
        for name in ("replicas", "tensor_parallel", "reshard_after_forward", "cpu_offload"):
            if getattr(self.engine, name) != getattr(defaults, name):
                chosen[name] = getattr(self.engine, name)
        return chosen

    @property
    def label(self) -> str:
        words = {"reshard_after_forward": "no reshard", "cpu_offload": "offload"}
        return " ".join(
            str(value) if key == "strategy" else words.get(key, f"{key}={value}")
            for key, value in self.overrides.items()
        )

    def sent(self, link: str) -> float:
        return sum(getattr(transfer, link) for transfer in self.transfers)


class Planner:
    """Estimates for one experiment; each recording it needs is made once."""

    def __init__(self, config: Experiment, task: Task, options: PlanOptions):
        self.config, self.task, self.options = config, task, options
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._recordings: dict[Any, Recording] = {}
        with torch.device("meta"):
            self.model = task.build_model()

    def estimate(self, engine: EngineConfig, *, micro_batch: int | None = None, gpus: int | None = None) -> Estimate:
        """`ConfigError` if the strategy does not go with the experiment or the number of GPUs."""
        config, options = self.config, self.options
        gpus, micro_batch = gpus or options.gpus, micro_batch or config.train.micro_batch
        configs.check(dataclasses.replace(config, engine=engine))
        micro_steps = micro_steps_of(config, gpus, engine=engine, micro_batch=micro_batch)
        recording = self._recording(engine, micro_batch)
        units = units_of(self.model, engine.tensor_parallel)
        ledger = Ledger()
        account = ACCOUNTS[engine.strategy](engine, units, ledger, gpus)
        at_rest = ledger.total
        replay(recording, account, ledger, micro_steps)
        aside = at_rest + account.beside_training()
        sent = transfers(
            engine,
            units,
            world_size=gpus,
            per_node=options.gpus_per_node,
            micro_steps=micro_steps,
            all_reduced=recording.all_reduced,
        )
        compute = micro_steps * recording.flops / (options.flops * options.mfu)
        seconds = step_seconds(compute, sent, options)
        return Estimate(
            engine=engine,
            micro_batch=micro_batch,
            micro_steps=micro_steps,
            peak=max(ledger.peak, aside),
            phase=ledger.peak_phase if ledger.peak >= aside else "evaluation",
            parts={part: ledger.at_peak.get(part, 0) for part in PARTS},
            host=sum(ledger.host.values()),
            transfers=sent,
            compute_seconds=compute,
            step_seconds=seconds,
            tokens_per_second=config.train.global_batch * self.task.tokens_per_sample / seconds,
        )

    def _recording(self, engine: EngineConfig, micro_batch: int) -> Recording:
        is_bf16, ranks = engine.precision == "bf16", engine.tensor_parallel
        casts_as_it_goes = is_bf16 and engine.strategy == "ddp"
        key = (casts_as_it_goes, ranks, engine.activation_checkpointing, micro_batch)
        if key not in self._recordings:
            with pretended_group(ranks) if ranks > 1 else contextlib.nullcontext() as mesh:

                def prepare(model: Any) -> None:
                    if is_bf16 and not casts_as_it_goes:  # the engine hands out weights in bf16
                        for parameter in model.parameters():
                            parameter.data = parameter.data.to(torch.bfloat16)
                    if mesh is not None:
                        split(model, mesh, own_draws=not engine.compile)
                    prepare_blocks(model, dataclasses.replace(engine, compile=False))
                    if casts_as_it_goes:
                        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)

                self._recordings[key] = record(
                    self.task.build_model,
                    lambda model, batch: self.task.loss(model, batch)[0],
                    lambda: self.task.example_batch(micro_batch),
                    prepare=prepare,
                    fake=self._fake,
                    cuda=self.config.engine.device != "cpu",
                )
        return self._recordings[key]


@contextlib.contextmanager
def pretended_group(size: int) -> Iterator[DeviceMesh]:
    """A mesh of `size` ranks of which this process is the first and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
    finally:
        dist.destroy_process_group()


def step_seconds(compute: float, sent: Sequence[Transfer], options: PlanOptions) -> float:
    """What can overlap runs beside the computation, the longer of the two counts; the rest comes on top."""
    hidden = exposed = 0.0
    for transfer in sent:
        seconds = max(
            transfer.within / options.within, transfer.between / options.between, transfer.host / options.host
        )
        if transfer.overlaps:
            hidden += seconds
        else:
            exposed += seconds
    return max(compute, hidden) + exposed


# --- all of them -----------------------------------------------------------------------------------------------------


def strategies(engine: EngineConfig, options: PlanOptions, *, splits: bool) -> list[EngineConfig]:
    """Every strategy worth a row, the simplest first; that of the configuration is among them."""
    raw = engine.deepspeed if engine.strategy.startswith("zero") else {}
    plain = dataclasses.replace(
        engine,
        strategy="ddp",
        replicas=1,
        tensor_parallel=1,
        reshard_after_forward=True,
        cpu_offload=False,
        deepspeed={},
    )
    fsdp2 = dataclasses.replace(plain, strategy="fsdp2")
    rows = [plain, fsdp2, dataclasses.replace(fsdp2, reshard_after_forward=False)]
    nodes = options.gpus // options.gpus_per_node
    if nodes > 1 and options.gpus % options.gpus_per_node == 0:
        rows.append(dataclasses.replace(fsdp2, replicas=nodes))
    if splits:
        rows += [dataclasses.replace(fsdp2, tensor_parallel=n) for n in (2, 4, 8) if n <= options.gpus_per_node]
    zeros = [dataclasses.replace(plain, strategy=f"zero{stage}", deepspeed=raw) for stage in (1, 2, 3)]
    rows += zeros
    rows += [dataclasses.replace(row, cpu_offload=True) for row in (fsdp2, *zeros)]
    if engine not in rows:
        rows.append(engine)
    return rows


def estimates(planner: Planner) -> list[Estimate]:
    """A row for each strategy that goes with the experiment; `ConfigError` if that of the configuration does not."""
    chosen = planner.config.engine
    rows = []
    for engine in strategies(chosen, planner.options, splits=isinstance(planner.model, SplittableModel)):
        try:
            rows.append(planner.estimate(engine))
        except ConfigError:
            if engine == chosen:
                raise
    return rows


def recommended(rows: Sequence[Estimate], options: PlanOptions) -> Estimate | None:
    """The fastest that fits; of those within 2 % of it the simplest, which comes first."""
    fitting = [row for row in rows if row.peak <= options.usable]
    if not fitting:
        return None
    fastest = min(row.step_seconds for row in fitting)
    return next(row for row in fitting if row.step_seconds <= 1.02 * fastest)


def remedies(planner: Planner, rows: Sequence[Estimate]) -> list[tuple[str, Estimate]]:
    """What would make the two least hungry strategies fit, each by the first of these steps that is enough."""
    usable, found = planner.options.usable, []
    frugal = sorted((row for row in rows if not row.engine.cpu_offload), key=lambda row: row.peak)[:2]
    for row in frugal:
        checkpointed = dataclasses.replace(row.engine, activation_checkpointing="full")
        for words, engine, micro_batch in (
            ("engine.activation_checkpointing=full", checkpointed, None),
            ("train.micro_batch=1", row.engine, 1),
            ("engine.activation_checkpointing=full train.micro_batch=1", checkpointed, 1),
        ):
            changed = _estimate_or_none(planner, engine, micro_batch=micro_batch)
            if changed is not None and changed.peak <= usable:
                found.append((words, changed))
                break
        for factor in (2, 4, 8, 16):
            gpus = planner.options.gpus * factor
            changed = _estimate_or_none(planner, row.engine, gpus=gpus)
            if changed is not None and changed.peak <= usable:
                found.append((f"--gpus {gpus}", changed))
                break
    return found


def _estimate_or_none(planner: Planner, engine: EngineConfig, **changes: int | None) -> Estimate | None:
    try:
        return planner.estimate(engine, **changes)
    except ConfigError:
        return None


# --- what is printed -------------------------------------------------------------------------------------------------


def facts(config: Experiment, task: Task, world_size: int) -> dict[str, Any]:
    """The table at the start of a run; `ConfigError` unless ranks and batch divide as the configuration says."""
    with torch.device("meta"):
        model = task.build_model()
    assert isinstance(model, torch.nn.Module)
    parameters = sum(p.numel() for p in model.parameters())
    saved = 12 + 4 * (config.engine.ema_decay is not None)  # bytes of a parameter: weight, two moments, average
    train, engine = config.train, config.engine
    readers = data_world_size(engine, world_size)
    kind = "ranks" if engine.tensor_parallel == 1 else f"groups of {engine.tensor_parallel} ranks"
    tokens_per_step = train.global_batch * task.tokens_per_sample
    at_rest = Ledger()
    ACCOUNTS[engine.strategy](engine, units_of(model, engine.tensor_parallel), at_rest, world_size)
    return {
        "run": f"{config.run.name} in {config.run.folder}",
        **task.facts(),
        "batch": (
            f"{train.global_batch} sequences = {readers} {kind} x {train.micro_batch} x "
            f"{micro_steps_of(config, world_size)} micro-steps"
        ),
        "budget": f"{train.steps:,} steps x {tokens_per_step:,} tokens = {train.steps * tokens_per_step:,} tokens",
        "compute": f"{task.flops_per_token() * train.steps * tokens_per_step:.3g} FLOPs (full rule)",
        "memory": (
            f"{(at_rest.total + sum(at_rest.host.values())) / 2**20:,.1f} MiB a rank between steps "
            f"({engine.strategy} on {world_size}); gradients and activations come on top: unmask plan"
        ),
        "checkpoint": f"{saved * parameters / 2**20:,.1f} MiB each",
    }


def micro_steps_of(
    config: Experiment, world_size: int, *, engine: EngineConfig | None = None, micro_batch: int | None = None
) -> int:
    """Of each rank in a step; `ConfigError` unless ranks and batch can be divided as the configuration says."""
    engine = engine or config.engine
    data_world_size(engine, world_size)
    return accumulation_steps(
        global_batch=config.train.global_batch,
        micro_batch=micro_batch or config.train.micro_batch,
        world_size=world_size,
        group=engine.tensor_parallel,
    )


def table(rows: Mapping[str, Any]) -> str:
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items())


def plan(config: Experiment, task: Task, options: PlanOptions) -> str:
    """The facts of a run, a row for each strategy, and which one to take."""
    head = table(facts(config, task, options.gpus))
    planner = Planner(config, task, options)
    rows = estimates(planner)
    return "\n".join([head, "", render(rows, options, config.engine), "", advice(planner, rows)])


def plan_as_json(config: Experiment, task: Task, options: PlanOptions) -> str:
    planner = Planner(config, task, options)
    rows = estimates(planner)
    best = recommended(rows, options)
    described = [
        {
            "engine": row.overrides,
            "peak_bytes": row.peak,
            "phase": row.phase,
            "fits": row.peak <= options.usable,
            "parts_bytes": dict(row.parts),
            "host_bytes": row.host,
            "sent_bytes": {transfer.what: dataclasses.asdict(transfer) for transfer in row.transfers},
            "micro_steps": row.micro_steps,
            "compute_seconds": row.compute_seconds,
            "step_seconds": row.step_seconds,
            "tokens_per_second": row.tokens_per_second,
        }
        for row in rows
    ]
    made = {
        "options": dataclasses.asdict(options),
        "strategies": described,
        "recommended": best.overrides if best else None,
    }
    return json.dumps(made, indent=2)


def render(rows: Sequence[Estimate], options: PlanOptions, chosen: EngineConfig) -> str:
    """A line for each strategy, and what its columns rest on."""
    scale, unit = (1e6, "MB") if max(row.peak for row in rows) < 10e9 else (1e9, "GB")

    def size(value: float) -> str:
        return "-" if not value else f"{value / scale:,.2f}" if value < 10 * scale else f"{value / scale:,.1f}"

    header = [unit, "weights", "grads", "optim", "activ", "head", "buffers", "PEAK", "fits", "in node", "between"]
    header += ["on host", "step s", "tokens/s"]
    body = [
        [
            f"{'*' if row.engine == chosen else ' '} {row.label}",
            *(size(row.parts[part]) for part in PARTS),
            size(row.peak) + ("e" if row.phase == "evaluation" else ""),
            "yes" if row.peak <= options.usable else "NO",
            size(row.sent("within")),
            size(row.sent("between")),
            size(row.host),
            f"{row.step_seconds:.3g}",
            f"{row.tokens_per_second:,.0f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *body]
    ]
    rates = f"{options.flops / 1e12:,.0f} TFLOP/s at {options.mfu:.0%}; {options.within / 1e9:,.0f} GB/s in a node of "
    rates += (
        f"{options.gpus_per_node}, {options.between / 1e9:,.0f} between nodes, {options.host / 1e9:,.0f} to the host"
    )
    notes = [
        f"{unit} of one of {options.gpus} GPUs. weights to buffers: at the peak of a step. in node, between (nodes):",
        "sent in a step. *: as configured. e: the copy of an evaluation or checkpoint is the peak, not training.",
        f"assumed: {rates}. Longest batches, every",
        "position charged. step: the longer of computation (recomputation included) and the traffic that can",
        "overlap it, and on top the traffic that cannot.",
    ]
    if chosen.compile:
        notes.append("engine.compile is not followed: compiled blocks usually need less than this.")
    return "\n".join([*lines, *notes])


def advice(planner: Planner, rows: Sequence[Estimate]) -> str:
    options = planner.options
    limit = f"{_gb(options.usable)} ({_gb(options.gpu_memory)} less {options.head_room:.0%})"
    best = recommended(rows, options)
    if best is not None:
        keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in best.overrides.items())
        return (
            f"recommended: {best.label}, the fastest (or within 2 % of it) that fits in {limit}: {_gb(best.peak)}\n"
            f"  engine: {{{keys}}}"
        )
    least = min(rows, key=lambda row: row.peak)
    lines = [f"nothing fits in {limit}; {least.label} needs least, {_gb(least.peak)}"]
    lines += [f"  would fit: {row.label} with {words}, {_gb(row.peak)}" for words, row in remedies(planner, rows)]
    if len(lines) == 1:
        lines.append(
            "  nor would activation checkpointing, train.micro_batch=1 or 16 times the GPUs; take a smaller model"
        )
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"

"""What the strategies agree on, as two tables: loss curves, and checkpoints taken up by one another.

    python -m tests.distributed.matrix              # both, as docs/strategies.md shows them; minutes

The curves are those of configs/llm/tiny/primev2.yaml on real prose (`unmask data fetch prose-21`), in float32. The
tests beside this file hold the same numbers to their limits.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.checkpoint import CheckpointStore
from launch.data import micro_batches
from launch.engine import build_engine
from launch.errors import DataError
from launch.schedule import learning_rate
from llm.config import LanguageConfig
from llm.data.prepare import prepare
from llm.task import LanguageTask
from tests.processes import spawn
from tests.runs import ROOT, curve, train, write_tiny

FSDP2 = "engine.strategy=fsdp2"
STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("engine.strategy=ddp",),
    "fsdp2": (FSDP2,),
    "hybrid": (FSDP2, "engine.replicas=2"),
    "zero1": ("engine.strategy=zero1",),
    "zero2": ("engine.strategy=zero2",),
    "zero3": ("engine.strategy=zero3",),
    "tp2": (FSDP2, "engine.tensor_parallel=2"),
    "tp2-hybrid": (FSDP2, "engine.tensor_parallel=2", "engine.replicas=2"),
}
SMALLEST = {"hybrid": 2, "tp2": 2, "tp2-hybrid": 4}  # world sizes at which a strategy is what its name says
PLACES = [(strategy, world) for strategy in STRATEGIES for world in (1, 2, 4) if world >= SMALLEST.get(strategy, 1)]

Curve = dict[int, float]


def place_name(strategy: str, world: int) -> str:
    return f"{strategy}-{world}"


def largest_difference(found: Curve, expected: Curve) -> float:
    """Relative, over steps that must be the same."""
    assert found.keys() == expected.keys()
    return max(abs(found[step] - value) / abs(value) for step, value in expected.items())


# --- loss curves -----------------------------------------------------------------------------------------------------

CURVE_STEPS = 20
TINY_PRESET = ROOT / "configs/llm/tiny/primev2.yaml"


def prepare_prose(folder: Path) -> Path:
    """The first documents of prose-21 in the vocabulary of the tiny experiments; DataError if it is not fetched."""
    prepare(["prose-21"], folder, tokenizer="bpe:288", limit_documents=1000)
    return folder


def train_preset(data: Path, strategy: str, world: int, run: Path) -> tuple[Curve, Curve]:
    """Loss and gradient norm of the first steps of the tiny Prime-v2 experiment."""
    train(
        TINY_PRESET,
        world,
        run,
        f"data.sources=[{{path: {data}}}]",
        *(f"train.steps={CURVE_STEPS}", "train.micro_batch=8", "train.log_every=1", "schedule.warmup_steps=5"),
        *("evaluation.sequences=4", "sampling.count=1", "sampling.sampler.steps=2", "metrics.tensorboard=false"),
        "engine.timeout=120",
        *STRATEGIES[strategy],
    )
    return curve(run), curve(run, "grad_norm")


# --- checkpoints -----------------------------------------------------------------------------------------------------

SAVED, STEPS = 3, 5
OPTIONS = ("engine.ema_decay=0.9", f"train.steps={STEPS}", "schedule.lr=1.0e-3", "sampling.count=1")


def train_and_save(config: Path, strategy: str, world: int, run: Path) -> Path:
    """A run with a checkpoint of step 3 among others."""
    return train(config, world, run, *OPTIONS, f"checkpoint.every_steps={SAVED}", *STRATEGIES[strategy])


def go_on(config: Path, strategy: str, world: int, folders: Sequence[Path]) -> list[Curve]:
    """For each folder the losses of the steps after its checkpoint of step 3, on the last rank."""
    options = (*OPTIONS, *STRATEGIES[strategy])
    return spawn(_go_on_from_each, world, config, options, list(folders), group=False, timeout=240)[-1]


def _go_on_from_each(config_path: Path, options: tuple[str, ...], folders: list[Path]) -> list[Curve]:
    """One engine takes them up in turn."""
    config, _ = configs.load(LanguageConfig, config_path, options)
    here = runtimes.start(device="cpu", timeout_seconds=60)
    task = LanguageTask(config, here.device)
    engine = build_engine(task.build_model, config.engine, config.optimizer, here, seed=99)
    found = []
    for folder in folders:
        store = CheckpointStore(folder / "checkpoints", here, asynchronous=False)
        tensors = engine.state()
        engine.adopt(tensors, store.load(SAVED, tensors)["engine"])
        losses = {}
        for step in range(SAVED, STEPS):
            positions = micro_batches(
                step,
                global_batch=config.train.global_batch,
                micro_batch=config.train.micro_batch,
                rank=engine.data_rank,
                world_size=engine.data_world_size,
            )
            total = torch.zeros(())
            for i, part in enumerate(positions):
                loss_sum, _ = task.loss(engine.module, task.batch(part, step))
                loss = loss_sum / (config.train.global_batch * task.tokens_per_sample)
                engine.backward(loss, last=i == len(positions) - 1)
                total += loss.detach()
            engine.step(learning_rate(config.schedule, step, config.train.steps), lambda norm: True)
            losses[step + 1] = float(here.all_reduce_sum(total)) * engine.data_world_size / here.world_size
        found.append(losses)
    here.close()
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(corner: str, columns: Sequence[str], rows: Mapping[str, Iterable[float | None]]) -> str:
    lines = [f"| {' | '.join((corner, *columns))} |", f"|{'---|' * (1 + len(columns))}"]
    for name, values in rows.items():
        lines.append(f"| {' | '.join((name, *('-' if v is None else f'{v:.0e}' for v in values)))} |")
    return "\n".join(lines)


def curve_table(folder: Path) -> str:
    """A row a strategy; for each world size the largest relative difference of loss and gradient norm."""
    data = prepare_prose(folder / "prose")
    found = {place: train_preset(data, *place, folder / place_name(*place)) for place in PLACES}
    expected = found["ddp", 1]
    rows = {
        strategy: [
            largest_difference(found[strategy, world][figure], expected[figure]) if (strategy, world) in found else None
            for figure in (0, 1)
            for world in (1, 2, 4)
        ]
        for strategy in STRATEGIES
    }
    columns = [f"{figure}, {world}" for figure in ("loss", "grad_norm") for world in (1, 2, 4)]
    return markdown("strategy", columns, rows)


def checkpoint_table(folder: Path) -> str:
    """A row for each saver; for each strategy that took it up the largest difference over world sizes."""
    tiny = write_tiny(folder / "tiny")
    unbroken = curve(train_and_save(tiny.prime, "ddp", 1, folder / "unbroken"))
    expected = {step: loss for step, loss in unbroken.items() if step > SAVED}
    runs = {place: train_and_save(tiny.prime, *place, folder / f"any-{place_name(*place)}") for place in PLACES}
    taken_up = {place: go_on(tiny.prime, *place, list(runs.values())) for place in PLACES}
    rows = {
        place_name(*saver): [
            max(largest_difference(taken_up[place][number], expected) for place in PLACES if place[0] == strategy)
            for strategy in STRATEGIES
        ]
        for number, saver in enumerate(runs)
    }
    return markdown("saved by", list(STRATEGIES), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.matrix", description=__doc__.split("\n")[0])
    parser.add_argument("table", nargs="*", choices=["curves", "checkpoints"], help="which (default: both)")
    wanted = parser.parse_args().table or ["curves", "checkpoints"]
    tables = {"curves": curve_table, "checkpoints": checkpoint_table}
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="unmask-matrix-") as folder:
            print(f"{tables[name](Path(folder))}\n", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        sys.exit(f"error: {error}")

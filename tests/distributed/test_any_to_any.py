"""A checkpoint of any strategy at any world size is taken up by any other, exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.checkpoint import CheckpointStore
from launch.data import micro_batches
from launch.engine import build_engine
from launch.schedule import learning_rate
from llm.config import LanguageConfig
from llm.task import LanguageTask
from tests.processes import spawn
from tests.runs import Tiny, curve, state, train

pytestmark = pytest.mark.slow  # 17 runs, and 289 checkpoints taken up

SAVED, STEPS = 3, 5
OPTIONS = ("engine.ema_decay=0.9", f"train.steps={STEPS}", "schedule.lr=1.0e-3", "sampling.count=1")
PLACES = [
    *((strategy, world) for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for world in (1, 2, 4)),
    *(("hybrid", world) for world in (2, 4)),
]
NAMES = [f"{strategy}-{world}" for strategy, world in PLACES]


def strategy_options(strategy: str) -> tuple[str, ...]:
    return ("engine.strategy=fsdp2", "engine.replicas=2") if strategy == "hybrid" else (f"engine.strategy={strategy}",)


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, shared: Path) -> Path:
    return train(tiny.prime, 1, shared / "any-unbroken", *OPTIONS, f"checkpoint.every_steps={SAVED}")


@pytest.fixture(scope="module")
def runs(tiny: Tiny, shared: Path) -> dict[str, Path]:
    """By name of strategy and world size, a run with a checkpoint of step 3 among others."""
    saving = (*OPTIONS, f"checkpoint.every_steps={SAVED}")
    return {
        name: train(tiny.prime, world, shared / f"any-{name}", *saving, *strategy_options(strategy))
        for name, (strategy, world) in zip(NAMES, PLACES, strict=True)
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_and_world_size_trains_the_same_model(unbroken: Path, runs: dict[str, Path], name: str) -> None:
    for figure in ("loss", "grad_norm", "nelbo_subtoken", "nelbo_token"):
        assert curve(runs[name], figure) == pytest.approx(curve(unbroken, figure), rel=1e-5)
    found, expected = state(runs[name], STEPS), state(unbroken, STEPS)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def go_on_from_each(config_path: Path, options: tuple[str, ...], folders: list[Path]) -> list[list[float]]:
    """For each folder the losses of the steps after its checkpoint of step 3; one engine loads them in turn."""
    config, _ = configs.load(LanguageConfig, config_path, options)
    here = runtimes.start(device="cpu", timeout_seconds=60)
    task = LanguageTask(config, here.device)
    engine = build_engine(task.build_model, config.engine, config.optimizer, here, seed=99)
    found = []
    for folder in folders:
        store = CheckpointStore(folder / "checkpoints", here, asynchronous=False)
        tensors = engine.state()
        engine.adopt(tensors, store.load(SAVED, tensors)["engine"])
        losses = []
        for step in range(SAVED, STEPS):
            positions = micro_batches(
                step,
                global_batch=config.train.global_batch,
                micro_batch=config.train.micro_batch,
                rank=here.rank,
                world_size=here.world_size,
            )
            total = torch.zeros(())
            for i, part in enumerate(positions):
                loss_sum, _ = task.loss(engine.module, task.batch(np.asarray(part), step))
                loss = loss_sum / (config.train.global_batch * task.tokens_per_sample)
                engine.backward(loss, last=i == len(positions) - 1)
                total += loss.detach()
            engine.step(learning_rate(config.schedule, step, config.train.steps), lambda norm: True)
            losses.append(float(here.all_reduce_sum(total)))
        found.append(losses)
    here.close()
    return found


@pytest.mark.parametrize(("strategy", "world"), PLACES, ids=NAMES)
def test_a_checkpoint_of_every_strategy_and_world_size_is_taken_up(
    tiny: Tiny, unbroken: Path, runs: dict[str, Path], strategy: str, world: int
) -> None:
    expected = [curve(unbroken)[step + 1] for step in range(SAVED, STEPS)]
    options = (*OPTIONS, *strategy_options(strategy))
    for of_rank in spawn(go_on_from_each, world, tiny.prime, options, list(runs.values()), group=False, timeout=240):
        for name, losses in zip(runs, of_rank, strict=True):
            assert losses == pytest.approx(expected, rel=1e-6), f"saved by {name}"

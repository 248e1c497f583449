"""How long a study will take on this machine, from a few training steps of each family's smallest and largest size.

Small models spend most of their time outside the matrix products that FLOPs count, so the speed of a size in between is
interpolated between the two, in the logarithms of FLOPs a token and FLOP/s.
"""

import copy
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launch import config as configs
from launch import runtime as runtimes
from launch.data import micro_batches
from launch.engine import build_engine
from launch.runtime import Runtime
from llm.config import LanguageConfig
from llm.scaling.plan import PlannedPoint
from llm.scaling.train import COSTLY
from llm.task import LanguageTask

START_SECONDS = 4.0  # of a point's own process on a CPU, before and after training: imports, data, checkpoint
_WARM_UP, _MEASURED = 2, 9  # steps; the median of the latter counts

Speeds = dict[str, tuple[np.ndarray, np.ndarray]]
"""Family -> log of FLOPs a token, ascending, and log of FLOP/s there; by the full rule."""


def measure(planned: Sequence[PlannedPoint]) -> Speeds:
    """Train a few steps of two sizes of each family, in one thread, without leaving anything behind."""
    torch.set_num_threads(1)
    runtime = runtimes.start(device="auto")
    speeds: Speeds = {}
    for family in dict.fromkeys(one.point.family for one in planned):
        mine = sorted((one for one in planned if one.point.family == family), key=_flops_per_token)
        ends = [mine[0]] if _flops_per_token(mine[0]) == _flops_per_token(mine[-1]) else [mine[0], mine[-1]]
        found = [_flops_per_token(one) * _tokens_per_second(one, runtime) for one in ends]
        speeds[family] = np.log([_flops_per_token(one) for one in ends]), np.log(found)
    runtime.close()
    return speeds


def seconds(one: PlannedPoint, speeds: Speeds) -> float:
    """Of training and judging a point, start included."""
    sizes, rates = speeds[one.point.family]
    flops_per_second = math.exp(float(np.interp(math.log(_flops_per_token(one)), sizes, rates)))
    return START_SECONDS + (one.flops.full + evaluation_flops(one)) / flops_per_second


def evaluation_flops(one: PlannedPoint) -> float:
    """Of the forwards behind a point's estimates; a forward is a third of a training step."""
    config = configs.from_dict(LanguageConfig, one.experiment, source=one.point.name)
    evaluation, length = config.evaluation, config.data.block_length
    draws = evaluation.draws
    forwards = {"nll_chain": length, "nelbo_steps": draws * evaluation.steps}
    cheap = sum(name not in COSTLY for name in evaluation.bounds) + (1 if one.judged["joint"] else 0)
    costly = sum(forwards[name] for name in evaluation.bounds if name in COSTLY)
    families = {"ar": (1, 0), "mdm": (draws, costly), "prime": (draws * cheap, costly)}
    per_block, per_costly_block = families[config.diffusion.family]
    blocks = evaluation.sequences or 0
    return _flops_per_token(one) / 3 * length * (blocks * per_block + one.judged["costly_sequences"] * per_costly_block)


def _flops_per_token(one: PlannedPoint) -> float:
    return one.flops.full / one.point.tokens


def _tokens_per_second(one: PlannedPoint, runtime: Runtime) -> float:
    """On real batches if the data are here: how many digits are hidden decides how much there is to compute."""
    tree: dict[str, Any] = copy.deepcopy(one.experiment)
    configs.merge(tree, {"data": {"vocab_size": one.vocab_size}, "engine": {"strategy": "ddp", "compile": False}})
    config = configs.from_dict(LanguageConfig, tree, source=one.point.name)
    task = LanguageTask(config, runtime.device, open_data=one.epochs is not None)
    engine = build_engine(task.build_model, config.engine, config.optimizer, runtime, seed=0)
    train = config.train
    marks = []
    for step in range(_WARM_UP + _MEASURED):
        positions = micro_batches(
            step, global_batch=train.global_batch, micro_batch=train.micro_batch, rank=0, world_size=1
        )
        for i, rows in enumerate(positions):
            batch = task.batch(rows, step) if task.stream else task.example_batch(len(rows))
            loss_sum, _ = task.loss(engine.module, batch)
            engine.backward(loss_sum / task.count(batch), last=i == len(positions) - 1)
        engine.step(1e-4, lambda norm: True)  # waits for the device
        marks.append(time.perf_counter())
    return train.global_batch * config.data.block_length / float(np.median(np.diff(marks)[-_MEASURED:]))

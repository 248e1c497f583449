"""Train and judge one point of a study: `python -m llm.scaling.train POINT/experiment.yaml run.dir=POINT`.

An ordinary run in every respect, so that kill, resume and clusters are the trainer's business. It differs in its one
evaluation at the end, which becomes POINT/result.json, and in that it writes no samples. POINT/point.json, written by
`unmask scaling run`, says which point this is.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch import config as configs
from launch import entry
from launch.checkpoint import layout
from launch.runtime import Runtime
from launch.stop import EXIT_DIVERGED, MEANING
from llm.config import LanguageConfig
from llm.diffusion.likelihood import JointLoss
from llm.heldout import Result as Heldout
from llm.heldout import evaluate_bounds, heldout_blocks
from llm.scaling.point import COSTLY, FACTS, RESULT, Estimated, Point, Result, read_facts, write_result
from llm.scaling.study import write_failure
from llm.task import LanguageTask


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    tasks: list[PointTask] = []

    def make_task(config: LanguageConfig, device: torch.device, open_data: bool) -> PointTask:
        tasks.append(PointTask(config, device, open_data))
        return tasks[0]

    code = entry.main(LanguageConfig, make_task, arguments)
    if tasks and os.environ.get("RANK", "0") == "0":
        folder = tasks[0].config.run.folder
        if code == EXIT_DIVERGED:
            hash_ = read_facts(folder)["config_hash"]
            write_failure(folder, config_hash=hash_, code=code, reason=MEANING[code])
        elif (folder / RESULT).exists() and read_facts(folder)["keep_checkpoints"] == "none":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


class PointTask(LanguageTask):
    """A language model that is judged once, by every bound that the ladder asks for."""

    def evaluate(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Collective. On held-out blocks of the first data source; rank 0 writes POINT/result.json.

        The trainer calls it once, behind the last checkpoint.
        """
        evaluation, facts = self.config.evaluation, read_facts(self.config.run.folder)
        wanted = self.language.bounds(evaluation.bounds)
        joint = ["loss_ce_joint"] if facts["judged"]["joint"] and self.language.family == "prime" else []
        dataset = self._validation[0]
        found: list[Heldout] = []
        for names, sequences in (
            ([*(name for name in wanted if name not in COSTLY), *joint], evaluation.sequences),
            ([name for name in wanted if name in COSTLY], facts["judged"]["costly_sequences"]),
        ):
            if names:
                blocks = heldout_blocks(dataset, sequences)
                found += evaluate_bounds(model, self.language, dataset, blocks, names, evaluation, runtime)
        if runtime.is_main:
            self._write(found, facts, dataset.bytes_per_token)
        return {key: value for one in found for key, value in one.figures(dataset.bytes_per_token).items()}

    def sample(self, model: nn.Module, runtime: Runtime, step: int, folder: Path) -> None:
        """None: a study has hundreds of points, and `unmask sample POINT` works while the checkpoint is there."""

    def _write(self, found: Sequence[Heldout], facts: dict[str, Any], bytes_per_token: float) -> None:
        folder = self.config.run.folder
        estimates: dict[str, Estimated] = {}
        joint = None
        for one in (result.estimate for result in found):
            figures = {"standard_error": one.standard_error / one.num_tokens, "estimator": one.estimator}
            if isinstance(one, JointLoss):
                joint = Estimated(nats_per_token=one.loss_per_token, draws=one.draws, **figures)
            else:
                estimates[one.name] = Estimated(nats_per_token=one.nats_per_token, draws=one.draws, **figures)
        result = Result(
            point=configs.from_dict(Point, facts["point"], source=str(folder / FACTS)),
            estimates=estimates,
            joint=joint,
            bytes_per_token=bytes_per_token,
            seconds=_seconds(folder),
            steps=self.config.train.steps,
        )
        write_result(folder, result, config_hash=facts["config_hash"])


def _seconds(folder: Path) -> float:
    """Time spent in training, over all restarts, as the last checkpoint has it."""
    checkpoints = folder / "checkpoints"
    last = checkpoints / layout.step_name(layout.committed_steps(checkpoints)[-1])
    return layout.read_scalars(last)["progress"]["seconds"]


if __name__ == "__main__":
    sys.exit(main())

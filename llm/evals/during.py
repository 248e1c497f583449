"""Zero-shot tasks while a model trains: `evaluation.tasks`, sharded over ranks, with the weights of the moment.

The figures are those that `unmask eval RUN --tasks` gives for the same settings. Nothing of the training is touched:
random states stay, the model is the whole copy that evaluations get, and documents are read before the first step, so
that a misspelt task ends the run before it begins.
"""

from pathlib import Path
from typing import Any

from torch import nn

from launch.runtime import Runtime
from llm.config import LanguageConfig
from llm.data.tokenizers import TextTokenizer
from llm.evals.models import Scorable
from llm.evals.run import harness_model, run_tasks, untouched_random_states
from llm.evals.scoring import ScoringConfig
from llm.evals.tasks import select
from llm.generate import Language


class TrainingTasks:
    """The tasks of a run. ConfigError or DataError, at once, for those that cannot be scored."""

    def __init__(self, config: LanguageConfig) -> None:
        self._config = config
        with untouched_random_states():
            self._selection = select(config.evaluation.tasks, heldout=Path(config.data.sources[0].path))

    def are_due(self, step: int) -> bool:
        """Whether the evaluation after `step` steps has them; the last always has."""
        every = self._config.evaluation.tasks_every
        return every is None or step % every == 0 or step >= self._config.train.steps

    def figures(
        self, model: nn.Module, language: Language, tokenizer: TextTokenizer, runtime: Runtime
    ) -> dict[str, float]:
        """Collective. "task/NAME/METRIC" and its standard error "task/NAME/METRIC_se", of tasks and groups."""
        evaluation = self._config.evaluation
        scorable = Scorable(
            family=language.family,
            model=model,
            language=language,
            tokenizer=tokenizer,
            max_length=self._config.data.block_length,
            fingerprint="in training",  # nothing is cached
        )
        scoring = ScoringConfig(draws=evaluation.task_draws, seed=evaluation.seed)
        results = run_tasks(
            harness_model(scorable, scoring, runtime), self._selection, runtime, limit=evaluation.task_limit
        )
        return figures_of(results["results"])


def figures_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of the harness's results by the names of metrics."""
    figures = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, int | float):
                name = metric.replace("_stderr", "_se") + ("" if filter_name == "none" else f"_{filter_name}")
                figures[f"task/{task}/{name}"] = float(value)
    return figures

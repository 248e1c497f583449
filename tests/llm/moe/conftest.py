from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm.moe.config import MoeExperiment
from llm.moe.task import MoeTask
from tests.runs import Tiny, train

_BASE = """
entry: llm.moe.train
model: {{kind: {kind}, layers: 2, width: 16, heads: 2, kv_heads: 1, experts: 4, top_k: 2, expert_width: 8{more}}}
data: {{sources: [{{path: {data}}}], block_length: 16}}
train: {{steps: 6, global_batch: 8, micro_batch: 2, log_every: 1}}
schedule: {{kind: constant, lr: 1.0e-2, warmup_steps: 0}}
evaluation: {{sequences: 7, batch: 2}}
metrics: {{tensorboard: false}}
engine: {{timeout: 60}}
"""


@dataclass(frozen=True)
class TinyMixtures:
    """A configuration of each architecture that trains in milliseconds a step, and a dense layer where one can be."""

    mixtral: Path
    qwen2_moe: Path
    qwen3_moe: Path

    def train(self, kind: str, world: int, run: Path, *overrides: str, **options: Any) -> Path:
        return train(getattr(self, kind), world, run, *overrides, schema=MoeExperiment, task=MoeTask, **options)


@pytest.fixture(scope="session")
def tiny_mixtures(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> TinyMixtures:
    folder = tmp_path_factory.mktemp("tiny-mixtures")
    more = {"mixtral": "", "qwen2_moe": ", dense_layers: [0], shared_width: 12", "qwen3_moe": ", dense_layers: [0]"}
    for kind, settings in more.items():
        (folder / f"{kind}.yaml").write_text(_BASE.format(kind=kind, more=settings, data=tiny.data))
    return TinyMixtures(**{kind: folder / f"{kind}.yaml" for kind in more})

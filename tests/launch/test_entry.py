"""What a run folder may be resumed with."""

import dataclasses

import pytest

from launch import config as configs
from launch.engine import EngineConfig
from launch.entry import _check_same_experiment
from launch.errors import ConfigError
from launch.experiment import Experiment, RunConfig, TrainConfig


def experiment(**changes):
    base = Experiment(entry="room.train", train=TrainConfig(steps=10, global_batch=8, micro_batch=4))
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(configs.dump(experiment()))
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": EngineConfig(strategy="fsdp2", precision="bf16")},
        {"train": TrainConfig(steps=20, global_batch=8, micro_batch=1, log_every=1)},
        {"run": RunConfig(dir="elsewhere")},
    ],
)
def test_how_a_run_runs_may_change(folder, changes):
    _check_same_experiment(experiment(**changes), folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": TrainConfig(steps=10, global_batch=16, micro_batch=4)}, r"train\.global_batch = 8.*16"),
        ({"run": RunConfig(seed=1)}, r"run\.seed = 0.*1"),
        ({"engine": EngineConfig(ema_decay=0.9)}, r"engine\.ema_decay = None.*0\.9"),
    ],
)
def test_what_a_run_computes_may_not_change(folder, changes, words):
    with pytest.raises(ConfigError, match=words):
        _check_same_experiment(experiment(**changes), folder)


def test_a_folder_without_checkpoints_may_hold_anything(folder):
    (folder / "checkpoints" / "step_00000005").rmdir()
    _check_same_experiment(experiment(run=RunConfig(seed=1)), folder)

"""Every preset of the papers makes a step on its real mesh of eight, without a GPU and without its memory."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import config as configs
from launch import entry
from launch.engine import EngineConfig, OptimizerConfig
from launch.engine.dry import DryRun, dry_run
from launch.errors import ConfigError
from llm.config import LanguageConfig
from llm.task import LanguageTask
from tests.runs import Tiny

PAPER = Path(__file__).parents[2] / "configs" / "llm" / "paper"
PRESETS = sorted(path for path in PAPER.glob("*/*.yaml") if not path.stem.startswith("recipe"))
QUICK = {"scale_14M_mdm", "scale_771M_primev2", "slim_6M_primev2", "prime_l4_owt", "mdlm_tiny_owt", "arm_small_owt"}
SPLIT = tuple(f"{name}.weight" for name in ("q", "k", "v", "out", "gate", "up", "down"))


def run_dry(path: Path, *overrides: str) -> tuple[LanguageConfig, DryRun]:
    config, _ = configs.load(LanguageConfig, path, overrides)
    task = LanguageTask(config, torch.device("cpu"), False)
    found = dry_run(
        task.build_model,
        lambda model: task.loss(model, task.example_batch(config.train.micro_batch))[0],
        config.engine,
        config.optimizer,
        world_size=8,
    )
    return config, found


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.slow]) for p in PRESETS],
)
def test_a_paper_preset_makes_a_step_on_its_mesh_of_eight(path: Path) -> None:
    config, found = run_dry(path)
    engine = config.engine
    assert not dist.is_initialized()
    if engine.strategy == "ddp":
        assert found.engine.startswith("DistributedDataParallel on 8 x")
        assert all(whole == local for whole, local in found.shapes.values())
        return
    group = engine.tensor_parallel
    mesh = f"shard {8 // group}" + (f" x tensor {group}" if group > 1 else "")
    assert found.engine.startswith(f"fully_shard over {mesh} on")
    for name, (whole, local) in found.shapes.items():
        if name.endswith(SPLIT):
            assert local.numel() * 8 == whole.numel(), name
        else:
            assert local == (math.ceil(whole[0] * group / 8), *whole[1:]), name


def test_the_published_layout_of_771m_and_more_is_two_ranks_for_each_layer() -> None:
    for path in PAPER.glob("scale/scale_*.yaml"):
        config, _ = configs.load(LanguageConfig, path)
        large = int(path.stem.split("_")[1].removesuffix("M")) >= 771
        assert config.engine.tensor_parallel == (2 if large else 1), path.stem


def test_a_hybrid_of_tensor_groups_shards_over_what_is_left_of_the_mesh() -> None:
    _, found = run_dry(PAPER / "scale/scale_771M_arm.yaml", "engine.replicas=2", "model.layers=1")
    assert found.engine.startswith("fully_shard over replicate 2 x shard 2 x tensor 2")
    assert found.shapes["model.input.weight"] == ((50257, 1792), (25129, 1792))
    assert found.shapes["model.blocks.0.mlp.up.weight"] == ((7168, 1792), (1792, 1792))
    assert found.shapes["model.blocks.0.mlp.down.weight"] == ((1792, 7168), (896, 3584))


def test_what_a_mesh_cannot_do_fails_in_a_dry_run() -> None:
    with pytest.raises(ConfigError, match="does not divide the world size 8"):
        run_dry(PAPER / "scale/scale_771M_arm.yaml", "engine.tensor_parallel=7", "model.layers=1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("engine.strategy=fsdp2", "engine.tensor_parallel=2"),
            "one step of fully_shard over shard 2 x tensor 2 on cpu",
        ),
        (("engine.strategy=ddp",), "one step of DistributedDataParallel on 4 x cpu"),
        (("engine.strategy=zero2",), "checks only: DeepSpeed"),
    ],
)
def test_the_dry_run_of_a_command_makes_a_step_at_the_world_size_it_is_asked_for(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert entry.main(LanguageConfig, LanguageTask, [str(tiny.prime), *options, "--dry-run", "--gpus", "4"]) == 0
    assert words in capsys.readouterr().out


def test_deepspeed_has_no_dry_run() -> None:
    with pytest.raises(ConfigError, match="zero3 has no dry run"):
        dry_run(lambda: None, lambda _: torch.ones(()), EngineConfig(strategy="zero3"), OptimizerConfig(), world_size=8)

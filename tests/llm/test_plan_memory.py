"""Predicted peaks are those that training has, under every strategy: real engine, real trainer, real data."""

import dataclasses
import json

import pytest

from launch import config as configs
from launch.plan import remedies
from llm.config import LanguageConfig
from llm.train import main
from tests.memory import CASES, configured, measured_peak, planner, predicted
from tests.runs import ROOT, VOCAB_SIZE

QUICK = ("ddp", "ddp, accumulated", "fsdp2", "fsdp2, full, average", "fsdp2, tensor parallel", "zero2", "zero3")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_predicted_peak_is_within_ten_percent_of_the_measured_one(name, tiny, tmp_path):
    config, world_size = configured(name, tiny, tmp_path)
    measured = measured_peak(config, world_size)
    assert predicted(config, world_size).peak == pytest.approx(measured, rel=0.1)


def estimate(tiny, tmp_path, *overrides, gpus=2):
    config, _ = configured("fsdp2", tiny, tmp_path)
    config = configs.load(LanguageConfig, write(config, tmp_path), overrides)[0]
    return predicted(config, gpus).peak


def write(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(configs.dump(config))
    return path


def test_more_ranks_smaller_batches_and_checkpointing_need_less_and_an_average_more(tiny, tmp_path):
    plain = estimate(tiny, tmp_path)
    assert estimate(tiny, tmp_path, gpus=1) > plain
    assert estimate(tiny, tmp_path, "train.micro_batch=16", gpus=1) > estimate(tiny, tmp_path, gpus=1)
    selective = estimate(tiny, tmp_path, "engine.activation_checkpointing=selective")
    assert plain > selective > estimate(tiny, tmp_path, "engine.activation_checkpointing=full")
    assert estimate(tiny, tmp_path, "engine.ema_decay=0.9") > plain
    assert estimate(tiny, tmp_path, "engine.reshard_after_forward=false") > plain


def test_a_plan_that_fits_recommends_and_one_that_does_not_says_what_would(tiny, capsys):
    command = [str(tiny.prime), f"data.vocab_size={VOCAB_SIZE}", "engine.device=cpu", "--plan", "--gpus", "2"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "* ddp" in text and "zero3 offload" in text and "recommended: ddp" in text
    assert main([*command, "--json", "--gpu-memory", "0.3MB"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recommended"] is None and len(made["strategies"]) > 8
    assert main([*command[:-1], "3"]) == 2
    assert "3" in capsys.readouterr().err


def test_remedies_fit_where_no_strategy_did(tiny):
    config, _ = configs.load(LanguageConfig, tiny.prime, [f"data.vocab_size={VOCAB_SIZE}", "engine.device=cpu"])
    made = planner(config, "--gpus", "1", "--head-room", "0")
    row = made.estimate(dataclasses.replace(config.engine, strategy="fsdp2"))
    small = planner(config, "--gpus", "1", "--head-room", "0", "--gpu-memory", str(row.peak - 1))
    found = remedies(small, [row])
    assert found and all(changed.peak < row.peak for _, changed in found)


# The largest of each published table and family; `unmask plan` takes any of the others. Each is about 15 s of CPU.
PRESETS = ("scale/scale_3426M_arm", "scale/scale_3426M_primev2", "slim/slim_2121M_primev2", "owt/opt_arm_owt")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_paper_preset_is_planned_on_sixteen_gpus(name):
    config, _ = configs.load(LanguageConfig, ROOT / "configs/llm/paper" / f"{name}.yaml")
    assert predicted(config, 16).peak > 0

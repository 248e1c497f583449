"""Every shipped experiment loads under the full schema, and the keys of diffusion mean what they say."""

import itertools
from pathlib import Path

import pytest
import torch

from launch import config as configs
from launch.errors import ConfigError
from launch.plan import facts
from llm.config import DiffusionConfig, LanguageConfig
from llm.diffusion.codec import build_codec
from llm.diffusion.sampler import SamplerConfig
from llm.generate import Language
from llm.task import LanguageTask

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PRESETS = sorted(p for p in (ROOT / "configs/llm/paper").rglob("*.yaml") if not p.name.startswith("recipe"))
TINY = sorted(p for p in (ROOT / "configs/llm/tiny").glob("*.yaml") if p.name != "base.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_the_facts_of_a_paper_preset_need_no_data(path):
    config, _ = configs.load(LanguageConfig, path)
    rows = facts(config, LanguageTask(config, CPU, open_data=False), 8)
    assert config.run.name == path.stem and "FLOPs" in rows["compute"]
    assert rows["budget"].startswith(f"{config.train.steps:,} steps")


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_the_tiny_experiments_differ_in_model_input_and_objective_only(path):
    config, _ = configs.load(LanguageConfig, path)
    reference, _ = configs.load(LanguageConfig, TINY[0])
    changed = configs.difference(configs.to_dict(reference), configs.to_dict(config))
    assert all(key.startswith(("diffusion.", "run.", "engine.")) for key in changed)


def test_every_key_that_a_user_can_set_is_explained():
    config, sources = configs.load(LanguageConfig, TINY[0])
    lines = configs.explain(config, sources).splitlines()
    keys = [line for line in lines if not line.startswith("    ")]
    bare = [a for a, b in itertools.pairwise([*lines, ""]) if a in keys and not b.startswith("    ")]
    assert bare == []


def test_an_objective_is_a_sum_of_factors_and_terms():
    config = DiffusionConfig(granularity=2, objective="0.25*ce_joint + nelbo_token+2*ce_joint", p_group=0.5)
    assert config.terms == {"ce_joint": 2.25, "nelbo_token": 1.0}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"granularity": 4, "objective": "nelbo"}, "nelbo_token"),
        ({"granularity": 4, "objective": "x*ce_joint"}, "not a number"),
        ({"family": "ar", "objective": "ce_joint"}, "does not train"),
        ({"family": "prime", "granularity": 1}, "granularity"),
        ({"family": "mdm", "granularity": 4}, "granularity"),
        ({"family": "prime", "granularity": 4, "p_group": 1.5}, "p_group"),
        ({"family": "prime", "granularity": 4, "t_min": 0.0}, "t_min"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        DiffusionConfig(**values).check("diffusion")


@pytest.mark.parametrize("objective", ["nelbo_subtoken", "ce_joint", "ce_joint+nelbo_layered"])
def test_layers_are_trained_by_their_own_bound_alone(objective):
    config = DiffusionConfig(granularity=2, order="layers", objective=objective)
    with pytest.raises(ConfigError, match=r"order = layers is trained by nelbo_layered"):
        config.objective_for(config.codec(9))


def test_the_layered_bound_does_not_train_on_digits_in_any_order():
    config = DiffusionConfig(granularity=2, objective="nelbo_layered")
    with pytest.raises(ConfigError, match="order = layers"):
        config.objective_for(config.codec(9))


def test_an_objective_whose_masks_are_never_drawn_is_refused():
    config = DiffusionConfig(granularity=4, objective="nelbo_token")
    with pytest.raises(ConfigError, match="p_group"):
        config.objective_for(config.codec(256))


def test_a_granularity_that_the_vocabulary_cannot_fill_is_refused_with_the_largest_that_fits():
    with pytest.raises(ConfigError, match=r"granularity = 12 .*at most 10"):
        DiffusionConfig(granularity=12).codec(1000)


def test_a_plan_without_data_needs_the_vocabulary_size():
    config, _ = configs.load(LanguageConfig, TINY[0])
    with pytest.raises(ConfigError, match=r"data\.vocab_size"):
        LanguageTask(config, torch.device("cpu"), open_data=False)


def test_the_share_of_whole_tokens_moves_evenly_to_its_last_value():
    rising = DiffusionConfig(granularity=2, objective="ce_joint", p_group=0.0, p_group_final=1.0)
    assert [rising.group_share(t) for t in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert [DiffusionConfig(granularity=2, p_group=0.3).group_share(t) for t in (0.0, 1.0)] == [0.3, 0.3]
    with pytest.raises(ConfigError, match=r"p_group_final = 1\.5; a probability"):
        DiffusionConfig(granularity=2, p_group_final=1.5).check("diffusion")
    falling = DiffusionConfig(granularity=2, objective="nelbo_subtoken", p_group=0.5, p_group_final=0.0)
    with pytest.raises(ConfigError, match="leaves part of the batch without a loss"):
        falling.objective_for(falling.codec(9))


def test_a_model_trained_in_layers_draws_so_unless_another_order_is_named():
    def language(order):
        return Language(family="prime", codec=build_codec(9, 2), first_token=0, order=order)

    assert language("layers").sampler(SamplerConfig()).order == "layers"
    assert language("uniform").sampler(SamplerConfig()).order == "ancestral"
    assert language("layers").sampler(SamplerConfig(order="confidence")).order == "confidence"
    tree = {
        **configs.to_dict(configs.load(LanguageConfig, TINY[0])[0]),
        "diffusion": {"granularity": 2, "order": "layers", "objective": "nelbo_layered"},
    }
    assert configs.from_dict(LanguageConfig, tree, source="here").sampling.sampler.order is None
    tree["sampling"] = {"sampler": {"group": "token"}}
    with pytest.raises(ConfigError, match=r"sampling\.sampler\.group = token reveals no digits"):
        configs.from_dict(LanguageConfig, tree, source="here")
    tree["sampling"]["sampler"]["order"] = "confidence"
    configs.from_dict(LanguageConfig, tree, source="here")

"""A batch and its loss are functions of (seed, step, place in the global batch) and of nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import config as configs
from launch.errors import ConfigError
from llm.config import LanguageConfig
from llm.task import Batch, LanguageTask
from tests.runs import VOCAB_SIZE, Tiny

CPU = torch.device("cpu")


def task(path: Path, *overrides: str) -> LanguageTask:
    return LanguageTask(configs.load(LanguageConfig, path, overrides)[0], CPU)


def masks(batch: Batch) -> torch.Tensor:
    assert batch.masked is not None
    return batch.masked.mask


@pytest.mark.parametrize("family", ["ar", "mdm", "prime"])
def test_a_part_of_a_global_batch_is_that_part_of_the_whole(tiny: Tiny, family: str) -> None:
    made = task(getattr(tiny, family))
    whole, part = made.batch(np.arange(8, 16), 1), made.batch(np.array([13, 10]), 1)
    assert torch.equal(part.tokens, whole.tokens[[5, 2]])
    if family != "ar":
        assert torch.equal(masks(part), masks(whole)[[5, 2]])
        assert part.masked and whole.masked and torch.equal(part.masked.times, whole.masked.times[[5, 2]])


def test_the_masks_of_two_steps_and_of_two_seeds_differ(tiny: Tiny) -> None:
    made, other = task(tiny.prime), task(tiny.prime, "run.seed=1")
    first = masks(made.batch(np.arange(8), 0))
    assert not torch.equal(first, masks(made.batch(np.arange(8), 1)))
    assert not torch.equal(first, masks(other.batch(np.arange(8), 0)))


def test_the_times_of_a_global_batch_lie_in_one_stratum_each(tiny: Tiny) -> None:
    made = task(tiny.prime).batch(np.arange(8), 0).masked
    assert made is not None
    assert sorted(int(8 * time) for time in made.times.tolist()) == list(range(8))


def test_layers_share_a_global_batch_evenly_and_hide_what_lies_behind_them(tiny: Tiny) -> None:
    layers = ("order=layers", "objective=nelbo_layered", "p_group=0", "shuffle=false", "granularity=2")
    made = task(tiny.prime, *(f"diffusion.{setting}" for setting in layers))
    whole, part = made.batch(np.arange(8), 0).masked, made.batch(np.array([6, 3]), 0).masked
    assert whole is not None and whole.layer is not None and part is not None
    assert abs(int((whole.layer == 0).sum()) - 4) <= 1  # stratified times, from a random start
    assert whole.mask[whole.layer == 0][..., 1].all() and not whole.mask[whole.layer == 1][..., 0].any()
    assert torch.equal(part.mask, whole.mask[[6, 3]])


def test_a_random_length_is_that_of_the_step_on_every_rank(tiny: Tiny) -> None:
    made = task(tiny.prime, "diffusion.random_length_probability=1.0")
    lengths = {
        step: {made.batch(np.array([8 * step + row]), step).tokens.shape[1] for row in range(8)} for step in range(6)
    }
    assert all(len(found) == 1 for found in lengths.values())
    assert len(set.union(*lengths.values())) > 1


def test_in_layers_no_digit_is_visible_behind_the_layer_and_none_hidden_before_it(tiny: Tiny) -> None:
    settings = ("diffusion.order=layers", "diffusion.objective=nelbo_layered", "diffusion.p_group=0")
    made, seen = task(tiny.prime, *settings), set()
    for step in range(6):
        masked = made.batch(np.arange(8), step).masked
        assert masked is not None and masked.layer is not None
        for layer, mask in zip(masked.layer.tolist(), masked.mask, strict=True):
            assert not mask[:, :layer].any() and mask[:, layer + 1 :].all()
            seen.add(layer)
    assert seen == {0, 1, 2}


def test_a_rising_share_of_whole_tokens_begins_with_digits_and_ends_with_tokens(tiny: Tiny) -> None:
    made = task(tiny.prime, "diffusion.p_group=0", "diffusion.p_group_final=1", "diffusion.objective=ce_joint")
    shares = []
    for step in range(6):
        masked = made.batch(np.arange(8), step).masked
        assert masked is not None and masked.grouped is not None
        shares.append(float(masked.grouped.float().mean()))
    assert shares[0] == 0.0 and shares[-1] == 1.0 and 0.0 < shares[2] < 1.0


def test_the_loss_is_a_sum_and_its_figures_are_those_of_the_parts_added_up(tiny: Tiny) -> None:
    made = task(tiny.prime)
    model = made.build_model()
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(0))
    whole, whole_figures = made.loss(model, made.batch(np.arange(8), 0))
    parts = [made.loss(model, made.batch(np.arange(i, i + 2), 0)) for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    assert {"nelbo_subtoken", "nelbo_token", "loss_positions"} <= whole_figures.keys()
    for name, figure in whole_figures.items():
        torch.testing.assert_close(sum(figures[name] for _, figures in parts), figure)


def test_a_vocabulary_that_is_not_that_of_the_data_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=f"data.vocab_size = 299, but .* {VOCAB_SIZE} tokens; set it to {VOCAB_SIZE}"):
        task(tiny.prime, "data.vocab_size=299")


def test_without_data_the_vocabulary_must_be_named(tiny: Tiny) -> None:
    config = configs.load(LanguageConfig, tiny.prime)[0]
    with pytest.raises(ConfigError, match=r"data\.vocab_size is not set"):
        LanguageTask(config, CPU, open_data=False)
    planned = LanguageTask(replace(config, data=replace(config.data, vocab_size=VOCAB_SIZE)), CPU, open_data=False)
    assert planned.facts() == task(tiny.prime).facts()


def test_its_identity_tells_codec_and_data_apart(tiny: Tiny) -> None:
    same = task(tiny.prime).identity()
    assert task(tiny.prime).identity() == same
    for other in ("diffusion.shuffle_seed=1", "diffusion.granularity=4", "data.block_length=8"):
        assert task(tiny.prime, other).identity() != same

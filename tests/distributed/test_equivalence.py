"""The number of processes, the strategy and the micro-batch decide how a run is computed, never what."""

from pathlib import Path

import pytest

from tests.distributed.matrix import STRATEGIES
from tests.runs import Tiny, curve, scalars, train

CASES = [  # (strategy, processes, micro-batch of the 8 sequences of a step)
    ("ddp", 1, 8),
    ("ddp", 2, 4),
    ("ddp", 2, 1),
    ("ddp", 4, 2),
    ("ddp", 4, 1),
    ("fsdp2", 1, 4),
    ("fsdp2", 2, 4),
    ("fsdp2", 2, 2),
    ("fsdp2", 4, 2),
    ("fsdp2", 4, 1),
    ("tp2", 2, 4),
    ("tp2", 4, 2),
    ("tp2-hybrid", 4, 4),
]


@pytest.fixture(scope="module")
def reference(tiny: Tiny, shared: Path) -> dict[str, Path]:
    """One process, two sequences at a time."""
    return {family: train(getattr(tiny, family), 1, shared / f"one-{family}") for family in ("prime", "ar")}


@pytest.mark.parametrize("family", ["prime", "ar"])
@pytest.mark.parametrize(("strategy", "world", "micro_batch"), CASES)
def test_every_strategy_world_size_and_micro_batch_gives_the_same_curve(
    tiny: Tiny,
    reference: dict[str, Path],
    tmp_path: Path,
    family: str,
    strategy: str,
    world: int,
    micro_batch: int,
) -> None:
    run = train(getattr(tiny, family), world, tmp_path, *STRATEGIES[strategy], f"train.micro_batch={micro_batch}")
    names = ("loss", "grad_norm", *(("nelbo_subtoken", "nelbo_token") if family == "prime" else ("nll_ar",)))
    for name in names:
        assert curve(run, name) == pytest.approx(curve(reference[family], name), rel=1e-5)
    assert len(curve(run)) == 6
    assert scalars(run, 6)["progress"]["tokens"] == 6 * 8 * 16


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 4), ("fsdp2", 2)])
def test_dropout_is_drawn_for_a_micro_batch_whoever_computes_it(
    tiny: Tiny, reference: dict[str, Path], tmp_path: Path, strategy: str, world: int
) -> None:
    options = ("model.dropout=0.2", "train.micro_batch=2", "train.steps=3")
    one = train(tiny.prime, 1, tmp_path / "one", *options)
    many = train(tiny.prime, world, tmp_path / "many", *options, f"engine.strategy={strategy}")
    assert curve(many) == pytest.approx(curve(one), rel=1e-5)
    assert curve(one)[1] != pytest.approx(curve(reference["prime"])[1], rel=1e-5)


def test_dropout_of_attention_is_drawn_by_the_ranks_of_a_tensor_group_whoever_computes_the_samples(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The number of data ranks changes nothing, the size of a tensor group does."""
    options = ("model.dropout=0.2", "train.micro_batch=2", "train.steps=3")
    two = train(tiny.prime, 2, tmp_path / "two", *options, *STRATEGIES["tp2"])
    four = train(tiny.prime, 4, tmp_path / "four", *options, *STRATEGIES["tp2"], "engine.activation_checkpointing=full")
    one = train(tiny.prime, 1, tmp_path / "one", *options)
    assert curve(four) == pytest.approx(curve(two), rel=1e-5)
    assert curve(two)[1] != pytest.approx(curve(one)[1], rel=1e-5)


def test_the_mixture_masks_whole_tokens_in_some_sequences_and_single_digits_in_others(
    reference: dict[str, Path],
) -> None:
    """Both kinds are counted, so the curves above compare both."""
    for name in ("nelbo_subtoken", "nelbo_token"):
        assert all(value > 0 for value in curve(reference["prime"], name).values())

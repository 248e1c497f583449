"""A checkpoint of any strategy at any world size is taken up by any other, exactly."""

from pathlib import Path

import pytest
import torch

from tests.distributed.matrix import PLACES, SAVED, STEPS, go_on, place_name, train_and_save
from tests.runs import Tiny, curve, state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # 20 runs in a fixture, and 400 checkpoints taken up

NAMES = [place_name(*place) for place in PLACES]


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, shared: Path) -> Path:
    return train_and_save(tiny.prime, "ddp", 1, shared / "any-unbroken")


@pytest.fixture(scope="module")
def runs(tiny: Tiny, shared: Path) -> dict[str, Path]:
    """By name of strategy and world size, a run with a checkpoint of step 3 among others."""
    return {place_name(*place): train_and_save(tiny.prime, *place, shared / place_name(*place)) for place in PLACES}


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_and_world_size_trains_the_same_model(unbroken: Path, runs: dict[str, Path], name: str) -> None:
    for figure in ("loss", "grad_norm", "nelbo_subtoken", "nelbo_token"):
        assert curve(runs[name], figure) == pytest.approx(curve(unbroken, figure), rel=1e-5)
    found, expected = state(runs[name], STEPS), state(unbroken, STEPS)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("strategy", "world"), PLACES, ids=NAMES)
def test_a_checkpoint_of_every_strategy_and_world_size_is_taken_up(
    tiny: Tiny, unbroken: Path, runs: dict[str, Path], strategy: str, world: int
) -> None:
    expected = {step: loss for step, loss in curve(unbroken).items() if step > SAVED}
    for name, losses in zip(runs, go_on(tiny.prime, strategy, world, list(runs.values())), strict=True):
        assert losses == pytest.approx(expected, rel=1e-6), f"saved by {name}"

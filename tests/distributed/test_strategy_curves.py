"""Every strategy at every world size follows the loss curve of one process, on a shipped experiment and real text."""

from pathlib import Path

import pytest

from tests.distributed.matrix import CURVE_STEPS, PLACES, Curve, place_name, prepare_prose, train_preset

pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(600)]  # 20 runs


@pytest.fixture(scope="module")
def prose(fetched, shared: Path) -> Path:
    return fetched(prepare_prose, shared / "prose")


@pytest.fixture(scope="module")
def one_process(prose: Path, shared: Path) -> tuple[Curve, Curve]:
    return train_preset(prose, "ddp", 1, shared / "preset-one")


@pytest.mark.parametrize(("strategy", "world"), PLACES, ids=[place_name(*place) for place in PLACES])
def test_the_tiny_prime_v2_experiment_has_one_loss_curve(
    prose: Path, one_process: tuple[Curve, Curve], tmp_path: Path, strategy: str, world: int
) -> None:
    loss, norm = train_preset(prose, strategy, world, tmp_path)
    assert list(loss) == list(range(1, CURVE_STEPS + 1))
    assert loss == pytest.approx(one_process[0], rel=1e-5)
    assert norm == pytest.approx(one_process[1], rel=1e-4)

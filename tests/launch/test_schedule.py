import pytest

from launch.errors import ConfigError
from launch.schedule import ScheduleConfig, learning_rate


def test_warmup_reaches_the_peak_at_its_last_step():
    config = ScheduleConfig(kind="constant", lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_ends_at_the_final_rate_and_passes_the_middle_halfway():
    config = ScheduleConfig(kind="cosine", lr=1.0, final_lr=0.1)
    assert learning_rate(config, 0, 101) == 1.0
    assert learning_rate(config, 50, 101) == pytest.approx(0.55)
    assert learning_rate(config, 100, 101) == pytest.approx(0.1)
    assert learning_rate(config, 500, 101) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_linear():
    config = ScheduleConfig(kind="wsd", lr=1.0, final_lr=0.0, decay_fraction=0.5)
    assert [learning_rate(config, step, 8) for step in range(8)] == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    "values", [{"lr": 0.0}, {"lr": 1e-3, "final_lr": 1.0}, {"warmup_steps": -1}, {"decay_fraction": 0.0}]
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**values).check("schedule")

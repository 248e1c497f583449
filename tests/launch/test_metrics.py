import errno
import io
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.errors import ConfigError, DataError
from launch.metrics import (
    MetricsConfig,
    MetricsWriter,
    Progress,
    Throughput,
    check_name,
    memory_gib,
    metrics_path,
    peak_flops_of,
    read_metrics,
    read_run_info,
    rewind,
    update_run_info,
)

PLAIN = MetricsConfig(tensorboard=False, console=0.0)


def write_steps(run_dir: Path, *steps: int) -> None:
    with MetricsWriter(run_dir, PLAIN, total_steps=100, console=io.StringIO()) as writer:
        for step in steps:
            writer.log(step, {"loss": float(step)})


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_one_line_of_json_and_is_there_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN, total_steps=10, console=io.StringIO()) as writer:
        writer.log(3, {"loss_ce_joint": 2.5, "skipped": 1, "flop_rule": "full"})
        (line,) = metrics_path(tmp_path).read_text().splitlines()
    row = json.loads(line)
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "loss_ce_joint": 2.5, "skipped": 1, "flop_rule": "full"}


def test_numbers_that_are_not_finite_survive_as_valid_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN, total_steps=10, console=io.StringIO()) as writer:
        writer.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    json.loads(metrics_path(tmp_path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(metrics_path(tmp_path))
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", PLAIN, total_steps=10, enabled=False) as writer:
        writer.log(1, {"loss": 1.0})
        writer.rewind(0)
        with pytest.raises(ValueError):
            writer.log(1, {"ppl_joint": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["ppl_joint", "val/joint_perplexity", "JointNLL", "bits_per_byte_joint", "ce_joint/ppl"]
)
def test_a_joint_cross_entropy_cannot_be_sold_as_a_likelihood(tmp_path: Path, name: str) -> None:
    with MetricsWriter(tmp_path, PLAIN, total_steps=10, console=io.StringIO()) as writer:
        with pytest.raises(ValueError, match="a joint cross-entropy is no likelihood"):
            writer.log(1, {"loss": 1.0, name: 2.0})
        assert metrics_path(tmp_path).read_text() == ""


@pytest.mark.parametrize(
    "name", ["loss_ce_joint", "nelbo_subtoken", "val/ppl_nelbo_token", "bits_per_byte", "nll_chain"]
)
def test_honest_names_pass(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["step", "time"])
def test_the_keys_of_every_row_cannot_be_logged(name: str) -> None:
    with pytest.raises(ValueError, match="every row has this key"):
        check_name(name)


# --- reading and rewinding -------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_cut_before_new_rows(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = metrics_path(tmp_path)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps_in(path) == [1, 2]
    write_steps(tmp_path, 3)
    assert steps_in(path) == [1, 2, 3]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = metrics_path(tmp_path)
    path.write_text('{"step": 1}\n\0\0\0\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        read_metrics(path)
    aside = rewind(path, 10)
    assert aside is not None and aside.read_bytes() == b"\0\0\0\n"
    assert steps_in(path) == [1, 2]


def test_rewinding_moves_later_rows_into_numbered_files(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    path = metrics_path(tmp_path)
    for step, left, moved in ((3, [1, 2, 3], [4]), (1, [1], [2, 3])):
        aside = rewind(path, step)
        assert aside is not None
        assert (steps_in(path), steps_in(aside)) == (left, moved)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "metrics.rewound-1.jsonl",
        "metrics.rewound-2.jsonl",
    ]


def test_rewinding_to_the_end_changes_nothing(tmp_path: Path) -> None:
    assert rewind(metrics_path(tmp_path), 5) is None
    write_steps(tmp_path, 1, 2)
    before = metrics_path(tmp_path).read_bytes()
    assert rewind(metrics_path(tmp_path), 2) is None
    assert metrics_path(tmp_path).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_writer_that_is_rewound_goes_on_from_there(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, PLAIN, total_steps=10, console=io.StringIO()) as writer:
        for step in (2, 4, 6):
            writer.log(step, {"loss": float(step)})
        writer.rewind(2)
        writer.log(4, {"loss": -4.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(metrics_path(tmp_path))] == [(2, 2.0), (4, -4.0)]
    assert steps_in(tmp_path / "metrics.rewound-1.jsonl") == [4, 6]


def test_run_info_accumulates(tmp_path: Path) -> None:
    assert read_run_info(tmp_path) == {}
    update_run_info(tmp_path, a=1, b=2)
    assert update_run_info(tmp_path, b=3) == {"a": 1, "b": 3}
    assert read_run_info(tmp_path) == {"a": 1, "b": 3}


# --- other places ----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_same_numbers_and_forgets_what_was_rewound(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, MetricsConfig(), total_steps=10, console=io.StringIO()) as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": float(step), "note": "text"})
        writer.rewind(1)
        writer.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_is_an_option_and_its_absence_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'unmask\[wandb\]', or set metrics.wandb=off"):
        MetricsWriter(tmp_path, MetricsConfig(wandb="offline"), total_steps=1)


def test_wandb_keeps_one_identity_over_all_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def init(**options: Any) -> types.SimpleNamespace:
        calls.append(options)
        return types.SimpleNamespace(log=rows.append, finish=lambda: None, define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = MetricsConfig(tensorboard=False, wandb="offline")
    for step in (1, 2):
        with MetricsWriter(tmp_path, config, total_steps=9, console=io.StringIO()) as writer:
            writer.log(step, {"loss": 0.5})
    assert calls[0] == calls[1]
    assert calls[0]["id"] == read_run_info(tmp_path)["wandb_id"]
    assert (calls[0]["mode"], calls[0]["resume"]) == ("offline", "allow")
    assert rows == [{"trainer/step": 1, "loss": 0.5}, {"trainer/step": 2, "loss": 0.5}]


def test_importing_metrics_loads_neither_torch_nor_its_writers() -> None:
    program = "import sys, launch.metrics; assert not {'torch', 'tensorboard', 'wandb', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- the console -----------------------------------------------------------------------------------------------------


def test_off_a_terminal_progress_is_a_plain_line_now_and_then() -> None:
    console, clock = io.StringIO(), Clock()
    progress = Progress(100, 30.0, console, clock)
    for step in range(10, 101, 10):
        clock.now += 10
        progress.show(step, {"grad_norm": 1.0, "loss_ce_joint": 2.34567, "lr": 3e-4, "tokens_per_second": 12345.0})
    assert console.getvalue().splitlines() == [
        "step 10/100 | loss_ce_joint 2.3457 | lr 3.00e-04 | 12.3k tok/s | ETA 00:01:30",
        "step 40/100 | loss_ce_joint 2.3457 | lr 3.00e-04 | 12.3k tok/s | ETA 00:01:00",
        "step 70/100 | loss_ce_joint 2.3457 | lr 3.00e-04 | 12.3k tok/s | ETA 00:00:30",
        "step 100/100 | loss_ce_joint 2.3457 | lr 3.00e-04 | 12.3k tok/s | ETA 00:00:00",
    ]


def test_the_time_to_go_of_a_resumed_run_counts_from_where_it_resumed() -> None:
    console, clock = io.StringIO(), Clock()
    progress = Progress(100_000, 0.0, console, clock)
    progress.restart(50_000)
    clock.now += 20
    progress.show(50_010, {"loss": 1.0})
    assert console.getvalue() == "step 50010/100000 | loss 1.0000 | ETA 1d 03:46:20\n"


def test_rows_of_evaluations_and_checkpoints_do_not_move_the_progress_line() -> None:
    console = io.StringIO()
    progress = Progress(100, 0.0, console, Clock())
    progress.show(20, {"loss": 1.0})
    progress.show(20, {"val/nelbo_token": 3.0})
    progress.show(10, {"checkpoint/bytes": 3.0})
    assert len(console.getvalue().splitlines()) == 1


def test_on_a_terminal_progress_is_a_bar() -> None:
    console = Terminal()
    progress = Progress(100, 0.0, console)
    progress.restart(50)
    progress.show(60, {"loss": 1.5})
    progress.show(100, {"loss": 1.25, "tokens_per_second": 2e6})
    progress.close()
    last = console.getvalue().split("\r")[-1]
    assert "100/100" in last and "loss 1.2500, 2M tok/s" in last


# --- speed and memory ------------------------------------------------------------------------------------------------


def test_throughput_is_that_of_the_time_spent_training() -> None:
    clock = Clock()
    meter = Throughput(
        flops_per_token=50.0, device=torch.device("cpu"), world=2, peak_flops=10_000.0, clock=clock, flop_rule="6ND"
    )
    for seconds in (1.0, 3.0):
        clock.now += seconds
        meter.step(1000)
        with meter.paused("evaluate"):
            clock.now += 60
    row = meter.read()
    assert row.pop("memory_gib") == pytest.approx(memory_gib(torch.device("cpu")), rel=0.1)
    assert row == {
        "tokens_per_second": 500.0,  # 2000 tokens in 4 s
        "step_seconds": 2.0,
        "step_seconds_p50": 3.0,
        "step_seconds_p99": 3.0,
        "mfu": 500.0 * 50.0 / 20_000.0,
        "mfu_rule": "6ND",
        "seconds/evaluate": 120.0,
    }
    assert meter.read() == {}


def test_a_pause_within_a_step_does_not_count_as_its_time() -> None:
    clock = Clock()
    meter = Throughput(flops_per_token=1.0, device=torch.device("cpu"), world=1, clock=clock)
    clock.now += 1
    with meter.paused("checkpoint"):
        clock.now += 7
    clock.now += 1
    meter.step(10)
    row = meter.read()
    assert row["step_seconds"] == 2.0
    assert "mfu" not in row  # nobody knows the peak of this CPU


def test_laps_add_up_to_the_training_time() -> None:
    clock = Clock()
    meter = Throughput(flops_per_token=1.0, device=torch.device("cpu"), world=1, clock=clock)
    clock.now += 5
    assert meter.lap() == 5.0
    with meter.paused("sample"):
        clock.now += 100
    clock.now += 2
    assert meter.lap() == 2.0
    assert meter.lap() == 0.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2.25e15),
        ("Some CPU", None),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_device(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


@pytest.mark.parametrize("config", [MetricsConfig(console=-1.0), MetricsConfig(peak_flops=0.0)])
def test_impossible_values_are_refused(config: MetricsConfig) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.(console|peak_flops) = "):
        config.check("metrics")


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.file.write(content[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        self.file.close()


def test_rows_that_a_full_disk_refuses_are_written_whole_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricsWriter(tmp_path, MetricsConfig(tensorboard=False), total_steps=9)
    disk = FullDisk(metrics_path(tmp_path), room=100)
    writer._file = disk  # type: ignore[assignment]
    for step in range(1, 6):
        writer.log(step, {"loss": 0.5})
    assert [record.message for record in caplog.records] == [
        f"cannot write {metrics_path(tmp_path)}: [Errno 28] No space left on device; its rows are kept and will be "
        "written when it can be"
    ]
    assert metrics_path(tmp_path).stat().st_size == 100, "half a row is there, as of a writer that was killed"
    assert [row["step"] for row in read_metrics(metrics_path(tmp_path))] == [1, 2]
    disk.room = 10_000
    writer.log(6, {"loss": 0.5})
    writer.close()
    assert [row["step"] for row in read_metrics(metrics_path(tmp_path))] == [1, 2, 3, 4, 5, 6]


def test_rows_that_are_lost_at_the_end_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, MetricsConfig(tensorboard=False), total_steps=9)
    writer._file = FullDisk(metrics_path(tmp_path), room=0)  # type: ignore[assignment]
    for step in (1, 2):
        writer.log(step, {"loss": 0.5})
    writer.close()
    assert caplog.records[-1].message == f"the last 2 rows of {metrics_path(tmp_path)} are lost: the disk is full"

"""Whoever starts the processes, the run is the same: each test starts real launchers from the command line."""

import socket
from pathlib import Path

import pytest

from launch.stop import EXIT_OK, EXIT_USER_ERROR
from tests.runs import Ranks, Tiny, assert_equal_states, command, curve, start, state, train

CPU = {"ACCELERATE_USE_CPU": "true"}
STRATEGY = "engine.strategy=fsdp2"


@pytest.fixture(scope="module")
def reference(tiny: Tiny, shared: Path) -> Path:
    return train(tiny.prime, 2, shared / "two-ranks", STRATEGY)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_same_run(run: Path, reference: Path) -> None:
    assert curve(run) == curve(reference)
    assert_equal_states(state(run, 6), state(reference, 6))


def arguments(tiny: Tiny, run: Path) -> list[str]:
    return ["-m", "llm.train", str(tiny.prime), f"run.dir={run}", STRATEGY]


def run_two_machines(first: list[str], second: list[str], environment: dict[str, str]) -> None:
    processes = [start(*line, environment=environment) for line in (first, second)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_OK, EXIT_OK], "\n".join(outputs)


def test_unmask_train_with_2_processes(tiny: Tiny, reference: Path, tmp_path: Path) -> None:
    ended = command("unmask", "train", str(tiny.prime), "--nproc", "2", f"run.dir={tmp_path}", STRATEGY)
    assert ended.codes == [EXIT_OK], ended.output
    assert_same_run(tmp_path, reference)
    assert f"report: {tmp_path}/report.md" in ended.output


def test_torchrun_with_2_processes(tiny: Tiny, reference: Path, tmp_path: Path) -> None:
    ended = command("torchrun", "--standalone", "--nproc_per_node", "2", *arguments(tiny, tmp_path))
    assert ended.codes == [EXIT_OK], ended.output
    assert_same_run(tmp_path, reference)


def test_torchrun_on_two_machines(tiny: Tiny, reference: Path, tmp_path: Path, port: int) -> None:
    def machine(rank: int) -> list[str]:
        place = ["--nnodes", "2", "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        return ["torchrun", *place, "--nproc_per_node", "1", *arguments(tiny, tmp_path)]

    run_two_machines(machine(0), machine(1), {})
    assert_same_run(tmp_path, reference)


def test_accelerate_with_2_processes(tiny: Tiny, reference: Path, tmp_path: Path) -> None:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    ended = command(
        "accelerate", "launch", *options, "--dynamo_backend", "no", *arguments(tiny, tmp_path), environment=CPU
    )
    assert ended.codes == [EXIT_OK], ended.output
    assert_same_run(tmp_path, reference)


def test_accelerate_on_two_machines(tiny: Tiny, reference: Path, tmp_path: Path, port: int) -> None:
    def machine(rank: int) -> list[str]:
        place = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        place += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        return ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", *place, *arguments(tiny, tmp_path)]

    run_two_machines(machine(0), machine(1), CPU)
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ("ACCELERATE_USE_FSDP=true", "engine strategy fsdp2")),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ("ACCELERATE_USE_DEEPSPEED=true", "engine strategy fsdp2")),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("ACCELERATE_MIXED_PRECISION=bf16", "precision fp32")),
    ],
)
def test_what_accelerate_was_told_and_the_configuration_denies_stops_the_run_before_it_starts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: tuple[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = Ranks(tiny.prime, 1, tmp_path / "run", STRATEGY).wait()
    assert ended.codes == [EXIT_USER_ERROR]
    assert all(words in ended.output for words in named)
    assert not (tmp_path / "run").exists()


def test_accelerate_launch_with_mixed_precision_is_refused_by_every_process(tiny: Tiny, tmp_path: Path) -> None:
    options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "bf16"]
    ended = command(
        "accelerate", "launch", *options, "--dynamo_backend", "no", *arguments(tiny, tmp_path / "run"), environment=CPU
    )
    assert ended.codes != [EXIT_OK]
    assert "error: `accelerate launch` says ACCELERATE_MIXED_PRECISION=bf16" in ended.output
    assert "exitcode  : 2" in ended.output and not (tmp_path / "run").exists()

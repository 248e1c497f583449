import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import runtime
from launch.errors import ClusterError
from launch.local import (
    RENDEZVOUS_FILE,
    accelerate_command,
    check_accelerate_environment,
    exit_code,
    rank_environment,
    run_local,
    torchrun_command,
    usable_cores,
)
from launch.stop import EXIT_DIVERGED, EXIT_HUNG, EXIT_NOW, EXIT_STOPPED, EXIT_USER_ERROR

# The program of a rank: RANK is known, and so is how to leave a mark that the test can wait for.
HEADER = """
import os, signal, sys, time
from pathlib import Path
RANK = int(os.environ["RANK"])
def mark(name):
    Path(sys.argv[1], f"{name}-{RANK}").write_text(str(os.getpid()))
"""

WORK_UNTIL_STOPPED = """
from launch.stop import EXIT_STOPPED, StopFlag
with StopFlag() as flag:
    mark("ready")
    while not flag.code():
        time.sleep(0.01)
    mark(flag.request.reason)
    time.sleep({linger})
sys.exit(EXIT_STOPPED)
"""


def run(body: str, num_processes: int, folder: Path, *, grace_seconds: float = 5.0) -> int:
    command = [sys.executable, "-c", HEADER + body, str(folder)]
    return run_local(command, num_processes, log_dir=folder / "logs", grace_seconds=grace_seconds)


def start_launcher(body: str, num_processes: int, folder: Path) -> subprocess.Popen[str]:
    """A launcher in a process of its own, as `unmask train` is; returns when all ranks have left the mark "ready"."""
    command = [sys.executable, "-c", HEADER + body, str(folder)]
    program = f"import sys\nfrom launch.local import run_local\nsys.exit(run_local({command!r}, {num_processes}))"
    environ = os.environ | {"TMPDIR": str(folder)}  # a launcher that is killed cannot clear its folder away
    launcher = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environ)
    wait_for(lambda: all((folder / f"ready-{rank}").exists() for rank in range(num_processes)))
    return launcher


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returncodes", "first_failed", "expected"),
    [
        ([0, 0], None, 0),
        ([EXIT_STOPPED, EXIT_STOPPED], None, EXIT_STOPPED),
        ([0, EXIT_STOPPED], None, EXIT_STOPPED),
        ([EXIT_STOPPED, 1], 1, 1),  # somebody failed: do not promise a checkpoint
        ([1, -signal.SIGSEGV], 1, 139),  # rank 1 died, rank 0 only lost its peer
        ([1, EXIT_HUNG], 0, 1),  # rank 1 only lost its peer
        ([EXIT_HUNG, 1], 0, EXIT_HUNG),
        ([EXIT_HUNG, -signal.SIGKILL], 1, 137),
        ([EXIT_HUNG, EXIT_USER_ERROR], 0, EXIT_USER_ERROR),
        ([EXIT_DIVERGED, EXIT_DIVERGED], None, EXIT_DIVERGED),
        ([-signal.SIGTERM, -signal.SIGTERM], 0, 143),
        ([0, 3], None, 3),
    ],
)
def test_the_exit_code_of_a_run_is_the_one_that_says_most(
    returncodes: list[int], first_failed: int | None, expected: int
) -> None:
    assert exit_code(returncodes, first_failed) == expected


def test_every_rank_knows_its_place_and_rank_0_has_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "of another launcher")
    body = (
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'OMP_NUM_THREADS', 'MASTER_ADDR']\n"
        "print(*(os.environ.get(n) for n in names), Path(os.environ['UNMASK_RENDEZVOUS_FILE']).parent.is_dir())"
    )
    assert run(body, 2, tmp_path) == 0
    threads = max(1, usable_cores() // 2)
    assert capfd.readouterr().out == f"0 0 2 2 {threads} None True\n"
    assert (tmp_path / "logs/rank-1.log").read_text() == f"1 1 2 2 {threads} None True\n"
    assert not (tmp_path / "logs/rank-0.log").exists()


def test_launcher_and_runtime_mean_the_same_rendezvous_file() -> None:
    assert RENDEZVOUS_FILE == runtime.RENDEZVOUS_FILE
    environ = rank_environment({"OMP_NUM_THREADS": "7"}, 1, 4, rendezvous_file=Path("/somewhere"))
    assert environ["OMP_NUM_THREADS"] == "7"
    assert runtime.place_from_environment(environ) == runtime.Place(
        rank=1, world_size=4, local_rank=1, local_world_size=4
    )


def test_the_rendezvous_folder_is_gone_after_the_run(tmp_path: Path) -> None:
    assert run("(Path(sys.argv[1]) / 'where').write_text(os.environ['UNMASK_RENDEZVOUS_FILE'])", 1, tmp_path) == 0
    assert not Path((tmp_path / "where").read_text()).parent.exists()


def test_a_resumed_run_adds_to_its_logs(tmp_path: Path) -> None:
    for _ in range(2):
        run("print('hello')", 2, tmp_path)
    assert (tmp_path / "logs/rank-1.log").read_text() == "hello\nhello\n"


def test_when_a_rank_dies_the_others_are_killed_and_its_last_words_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = (
        "mark('ready')\n"
        "if RANK == 1:\n"
        "    print('the last word')\n"
        "    while not all((Path(sys.argv[1]) / f'ready-{r}').exists() for r in range(3)): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    assert run(body, 3, tmp_path, grace_seconds=0.2) == 128 + signal.SIGSEGV
    assert time.monotonic() - begin < 15
    words = capfd.readouterr().err
    assert "rank 1 of 3 was ended by SIGSEGV; the others end within 0.2 s" in words
    assert "| the last word" in words
    assert "killed, because they did not end: ranks 0, 2" in words


def test_helpers_of_a_killed_rank_are_killed_with_it(tmp_path: Path) -> None:
    body = (
        "import subprocess\n"
        "if RANK == 0:\n"
        "    helper = subprocess.Popen(['sleep', '60'])\n"
        "    (Path(sys.argv[1]) / 'helper').write_text(str(helper.pid))\n"
        "    time.sleep(60)\n"
        "while not (Path(sys.argv[1]) / 'helper').exists(): time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        "sys.exit(3)"
    )
    assert run(body, 2, tmp_path, grace_seconds=0.1) == 3
    helper = int((tmp_path / "helper").read_text())
    wait_for(lambda: not is_alive(helper))


def test_ranks_that_notice_a_dead_peer_end_by_themselves(tmp_path: Path) -> None:
    body = (
        "if RANK == 0:\n"
        "    sys.exit(9)\n"
        "time.sleep(0.3)\n"  # as long as a collective takes to fail
        "mark('noticed')\n"
        "sys.exit(1)"
    )
    assert run(body, 2, tmp_path) == 9
    assert (tmp_path / "noticed-1").exists()


def test_rank_0_may_write_its_report_when_the_others_have_left(tmp_path: Path) -> None:
    body = "if RANK == 0:\n    time.sleep(0.5)\n    mark('report')\nsys.exit({})"
    for code in (0, EXIT_STOPPED, EXIT_DIVERGED):
        assert run(body.format(code), 2, tmp_path, grace_seconds=0.0) == code
        (tmp_path / "report-0").unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_reaches_every_rank_and_they_decide(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start_launcher(WORK_UNTIL_STOPPED.format(linger=0), 2, tmp_path)
    launcher.send_signal(number)
    _, words = launcher.communicate(timeout=20)
    assert (launcher.returncode, words) == (EXIT_STOPPED, "")
    assert all((tmp_path / f"{number.name}-{rank}").exists() for rank in range(2))


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path) -> None:
    launcher = start_launcher(WORK_UNTIL_STOPPED.format(linger=60), 2, tmp_path)
    launcher.send_signal(signal.SIGINT)
    wait_for(lambda: all((tmp_path / f"SIGINT-{rank}").exists() for rank in range(2)))
    time.sleep(0.7)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert launcher.returncode == EXIT_NOW


def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    body = "for n in (1, 2, 10, 12, 15): signal.signal(n, signal.SIG_IGN)\nmark('ready')\ntime.sleep(60)"
    launcher = start_launcher(body, 2, tmp_path)
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    assert all(is_alive(pid) for pid in pids)
    launcher.kill()
    launcher.communicate(timeout=20)
    wait_for(lambda: not any(is_alive(pid) for pid in pids))


def test_the_launcher_gives_its_signal_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run("", 1, tmp_path)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_foreign_launcher_keeps_its_own_variables_and_never_hears_usr1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", RENDEZVOUS_FILE):
        monkeypatch.delenv(name, raising=False)
    body = (
        "import os, signal, sys, time\n"
        "assert not {'RANK', 'WORLD_SIZE', 'UNMASK_RENDEZVOUS_FILE'} & set(os.environ)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(60)"
    )
    assert run_local([sys.executable, "-c", body], 1, as_ranks=False) == 0


def test_zero_processes_are_refused() -> None:
    with pytest.raises(ClusterError, match="0 processes were asked for"):
        run_local(["true"], 0)


# --- command lines ---------------------------------------------------------------------------------------------------


def test_torchrun_on_one_machine_needs_no_address() -> None:
    line = shlex.join(torchrun_command("llm.train", ["a b.yaml", "train.steps=3"], processes=8))
    assert line == (
        "torchrun --standalone --nproc-per-node=8 --shutdown-timeout=300 -m llm.train 'a b.yaml' train.steps=3"
    )


def test_torchrun_on_several_machines_is_one_line_for_all_of_them() -> None:
    command = torchrun_command(
        "llm.train", ["c.yaml"], processes=4, num_nodes=2, endpoint="node001:29500", run_id="1234"
    )
    assert shlex.join(command) == (
        "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node001:29500 --rdzv-id=1234 --nproc-per-node=4 "
        "--shutdown-timeout=300 -m llm.train c.yaml"
    )


def test_accelerate_counts_all_processes_and_names_the_machine() -> None:
    command = accelerate_command(
        "llm.train", ["c.yaml"], processes=4, num_nodes=2, node_rank=1, endpoint="node001:29500"
    )
    assert shlex.join(command) == (
        "accelerate launch --multi_gpu --num_processes=8 --num_machines=2 --machine_rank=1 --main_process_ip=node001 "
        "--main_process_port=29500 --mixed_precision=no --dynamo_backend=no -m llm.train c.yaml"
    )


def test_accelerate_on_cpu_still_asks_for_multi_gpu() -> None:
    """Measured with accelerate 1.15: `--cpu --num_processes 2` starts one process without a word."""
    command = accelerate_command("llm.train", ["c.yaml"], processes=2, cpu=True)
    assert command[:2] == ["env", "ACCELERATE_USE_CPU=true"]
    assert "--multi_gpu" in command and "--cpu" not in command
    assert "--multi_gpu" not in accelerate_command("llm.train", [], processes=1, cpu=True)


@pytest.mark.parametrize("endpoint", [None, "node001", ":29500", "node001:port"])
def test_several_machines_need_an_endpoint(endpoint: str | None) -> None:
    with pytest.raises(ClusterError, match="2 nodes need an endpoint host:port"):
        torchrun_command("m", [], processes=1, num_nodes=2, endpoint=endpoint)
    with pytest.raises(ClusterError, match="2 nodes need an endpoint host:port"):
        accelerate_command("m", [], processes=1, num_nodes=2, endpoint=endpoint)


@pytest.mark.parametrize(
    ("environ", "strategy", "precision"),
    [
        ({}, "ddp", "fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}, "ddp", "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp", "bf16"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2", "fp32"),
        ({"ACCELERATE_USE_FSDP": "false"}, "ddp", "fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2", "fp32"),
    ],
)
def test_an_accelerate_environment_that_agrees_is_accepted(
    environ: dict[str, str], strategy: str, precision: str
) -> None:
    check_accelerate_environment(strategy, precision, environ)


@pytest.mark.parametrize(
    ("environ", "strategy", "precision", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "ddp", "fp32", "USE_FSDP=true.*strategy ddp"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp2", "fp32", "FSDP_VERSION=1.*strategy fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp2", "fp32", "USE_DEEPSPEED=true.*strategy fsdp2"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "zero1",
            "fp32",
            "ZERO_STAGE=3.*strategy zero1",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ddp", "fp32", "MIXED_PRECISION=bf16.*precision fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "ddp", "bf16", "MIXED_PRECISION=fp16.*precision bf16"),
    ],
)
def test_an_accelerate_environment_that_contradicts_the_config_is_refused(
    environ: dict[str, str], strategy: str, precision: str, words: str
) -> None:
    with pytest.raises(ClusterError, match=words) as refusal:
        check_accelerate_environment(strategy, precision, environ)
    assert "or change the configuration" in str(refusal.value)

"""Two hosts: network namespaces with addresses and names of their own, one cable between them, and a torchrun on each.

Needs root, and `ip` of iproute2. Nothing leaves the namespaces; they, and all that runs in them, end with the test.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cable import INTERFACE, Cable
from tests.runs import ROOT, Accident, Tiny, assert_equal_states, curve, scalars, state, steps_saved, train

NAMES, ADDRESSES = ("nodea", "nodeb"), ("10.0.0.1", "10.0.0.2")
SLOWLY = Accident(kind="slow", ranks=(0, 1), at=range(10**6), seconds=0.1)
OPTIONS = ("engine.strategy=fsdp2", "checkpoint.every_steps=2", "checkpoint.keep_last=100", "watch.interval=0.5")


def why_not() -> str | None:
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "making network namespaces needs `ip` (Debian package iproute2)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"namespaces are refused here: {probe.stderr.strip()}" if probe.returncode else None


REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow, pytest.mark.timeout(600)]


class Hosts:
    """The two ends of a cable; rank 0 is on the first."""

    def __init__(self, folder: Path, cable: Cable) -> None:
        self._folder, self.cable = folder, cable
        self._running: list[subprocess.Popen[bytes]] = []
        self._starts = 0
        self._hosts_file = folder / "hosts"  # torchrun's c10d rendezvous looks its own name up
        pairs = zip(ADDRESSES, NAMES, strict=True)
        self._hosts_file.write_text("".join(f"{a} {name}\n" for a, name in (("127.0.0.1", "localhost"), *pairs)))

    def start(
        self,
        config: Path,
        run: Path,
        *options: str,
        accident: Accident = SLOWLY,
        rendezvous: str = "static",
        fault: str = "",
        roots: tuple[Path, Path] = (ROOT, ROOT),
        before: tuple[str, str] = ("", ""),
    ) -> None:
        """`python -m tests.train` under one torchrun a host; `before` is shell that a host runs first."""
        self._starts += 1
        self._outputs = [self._folder / f"{name}-{self._starts}.log" for name in NAMES]
        self._running = []
        for number, name in enumerate(NAMES):
            place = ["--nnodes=2", f"--node_rank={number}", f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]
            if rendezvous == "c10d":
                place = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-id=test"]
                place += [f"--local-addr={ADDRESSES[number]}"]
            line = [str(Path(sys.executable).with_name("torchrun")), *place, "--nproc_per_node=1", "-m", "tests.train"]
            names = f"hostname {name} && mount --bind {self._hosts_file} /etc/hosts"
            script = f'{names} && {before[number] or "true"} && exec "$@"'
            variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(roots[number]), "GLOO_SOCKET_IFNAME": INTERFACE}
            variables |= accident.environment() | ({"UNMASK_FAULT": fault} if fault else {})
            place = ["ip", "netns", "exec", self.cable.hosts[number], "unshare", "--uts", "--mount"]
            with self._outputs[number].open("wb") as output:
                self._running.append(
                    subprocess.Popen(
                        [*place, "sh", "-c", script, "sh", *line, str(config), f"run.dir={run}", *OPTIONS, *options],
                        cwd=roots[number],
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                )

    @property
    def is_running(self) -> bool:
        return any(process.poll() is None for process in self._running)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait; an error if the run ends first."""
        while not condition():
            assert self.is_running, self.output()
            time.sleep(0.02)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes of the two torchruns."""
        deadline = time.monotonic() + timeout
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self.is_running, f"not finished after {timeout:g} s:\n{self.output()}"
        return [process.returncode for process in self._running]

    def output(self, host: int | None = None) -> str:
        return "".join(path.read_text() for path in (self._outputs if host is None else [self._outputs[host]]))

    def kill(self) -> None:
        for host in self.cable.hosts:
            found = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True)
            for pid in found.stdout.split():  # torchrun's workers are no children of ours
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self._running:
            process.wait()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Cable() as cable:
        made = Hosts(tmp_path, cable)
        try:
            yield made
        finally:
            made.kill()


@pytest.fixture(scope="module")
def whole(tiny: Tiny, shared: Path) -> Path:
    """The unbroken run on one machine."""
    return train(tiny.prime, 2, shared / "one-machine", *OPTIONS, "train.steps=24")


def last_row(run: Path) -> int:
    return max(curve(run), default=0) if (run / "metrics.jsonl").exists() else 0


def assert_same_run(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    assert_equal_states(state(run, 24), state(whole, 24))


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_hosts_train_as_one_machine_does_whatever_their_clocks_say(
    hosts: Hosts, tiny: Tiny, whole: Path, tmp_path: Path, rendezvous: str
) -> None:
    """The clock of the second host is three hours ahead: of every Python there, torchrun's agent included."""
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\nnow, now_ns = time.time, time.time_ns\n"
        "time.time = lambda: now() + 10800\ntime.time_ns = lambda: now_ns() + 10800 * 10**9\n"
    )
    run = tmp_path / "run"
    hosts.start(
        tiny.prime, run, "train.steps=24", rendezvous=rendezvous, before=("", f"export PYTHONPATH={ahead}:{ROOT}")
    )
    assert hosts.wait() == [0, 0], hosts.output()
    assert_same_run(run, whole)
    assert "the clock of nodeb is 1080" in hosts.output(0) and "s ahead of that of nodea" in hosts.output(0)
    assert steps_saved(run) == list(range(2, 25, 2)), "and no checkpoint was taken for an old one"


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_link_cut_in_mid_step_ends_both_hosts_within_the_time_out_and_loses_nothing(
    hosts: Hosts, tiny: Tiny, whole: Path, tmp_path: Path, rendezvous: str
) -> None:
    run = tmp_path / "run"
    options = ("train.steps=24", "engine.timeout=8")
    hosts.start(tiny.prime, run, *options, rendezvous=rendezvous)
    hosts.until(lambda: last_row(run) >= 7)
    hosts.cable.pull()
    before, begin = steps_saved(run), time.monotonic()
    hosts.until(lambda: all("exit code 76" in hosts.output(number) for number in (0, 1)))
    print(f"\n{rendezvous}: cut in mid-step, the ranks ended after {time.monotonic() - begin:.1f} s (limit 8 s)")
    if rendezvous == "static":
        assert 0 not in hosts.wait()
        print(f"and torchrun on both hosts after {time.monotonic() - begin:.1f} s")
        assert all("exitcode  : 76" in hosts.output(number) for number in (0, 1))
    else:  # the agent without the store waits for TCP to give up, for a quarter of an hour, with no worker left
        hosts.kill()
    assert time.monotonic() - begin < 8 + 45
    for number in (0, 1):
        said = hosts.output(number)
        assert f"rank {number} on {NAMES[number]}: lost another rank at step" in said, said
        assert "engine.timeout has passed" in said and "the network between hosts is down" in said
        assert f"unmask resume {run}" in said
    assert steps_saved(run)[: len(before)] == before and before[-1] >= 6
    hosts.cable.plug()
    hosts.start(tiny.prime, run, *options, rendezvous=rendezvous)
    assert hosts.wait() == [0, 0], hosts.output()
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("fault", "point", "kept"),
    [
        ("checkpoint.sync:hang:1:3", "step_00000006.tmp-*/state/rank-00001.safetensors", 4),
        ("checkpoint.manifest:hang:0:3", "step_00000006.tmp-*/MANIFEST.json", 4),
        ("checkpoint.after_rename:hang:0:3", "step_00000006/MANIFEST.json", 6),
    ],
    ids=["before-the-gather", "before-the-commit", "after-the-commit"],
)
def test_a_link_cut_in_mid_save_leaves_no_half_checkpoint(
    hosts: Hosts, tiny: Tiny, whole: Path, tmp_path: Path, fault: str, point: str, kept: int
) -> None:
    run = tmp_path / "run"
    options = ("train.steps=24", "engine.timeout=8")
    hosts.start(tiny.prime, run, *options, fault=fault)
    hosts.until(lambda: any((run / "checkpoints").glob(point)))
    hosts.cable.pull()
    begin = time.monotonic()
    assert 0 not in hosts.wait(), hosts.output()
    print(f"\n{fault}: cut in mid-save, both hosts ended after {time.monotonic() - begin:.1f} s; engine.timeout = 8 s")
    assert "exitcode  : 76" in hosts.output(0) and "exitcode  : 76" in hosts.output(1)
    assert steps_saved(run)[-1] == kept
    hosts.cable.plug()
    hosts.start(tiny.prime, run, *options)
    assert hosts.wait() == [0, 0], hosts.output()
    assert f"step {kept}, from its checkpoint" in hosts.output(0)
    assert_same_run(run, whole)
    assert not list((run / "checkpoints").glob("*.tmp-*"))


def test_a_link_that_comes_back_within_the_time_out_costs_time_alone(
    hosts: Hosts, tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    hosts.start(tiny.prime, run, "train.steps=24", "engine.timeout=60")
    hosts.until(lambda: last_row(run) >= 7)
    hosts.cable.pull()
    time.sleep(4)
    assert last_row(run) <= 9, "the step waits"
    hosts.cable.plug()
    assert hosts.wait() == [0, 0], hosts.output()
    assert_same_run(run, whole)


def test_a_host_that_hangs_ends_the_other_and_both_leave_their_stacks(hosts: Hosts, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    accident = Accident(kind="hang", ranks=(1,), at=range(24, 32))
    hosts.start(tiny.prime, run, "watch.timeout=4", "watch.first_step_timeout=60", accident=accident)
    assert 0 not in hosts.wait(), hosts.output()
    assert "no progress for 4 s (limit 4 s) at step 3" in hosts.output()
    assert "in sum_and_max" in (run / "health/rank-00000.stacks.txt").read_text()
    assert "in _strike" in (run / "health/rank-00001.stacks.txt").read_text()
    assert all("exitcode  : 76" in hosts.output(number) for number in (0, 1))


def test_a_host_with_another_checkout_is_refused_by_name(hosts: Hosts, tiny: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "checkout"
    for room in ("launch", "llm", "tests"):
        shutil.copytree(ROOT / room, other / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "launch/schedule.py").open("a") as file:
        file.write("# a later version\n")
    hosts.start(tiny.prime, tmp_path / "run", roots=(ROOT, other))
    assert 0 not in hosts.wait(), hosts.output()
    for number in (0, 1):
        assert "error: rank 1 on nodeb has code = " in hosts.output(number), hosts.output(number)
        assert "give every node the same checkout" in hosts.output(number)
    assert not (tmp_path / "run").exists()


def test_a_host_with_another_configuration_is_refused_by_name(hosts: Hosts, tiny: Tiny, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    for file in tiny.prime.parent.glob("*.yaml"):
        shutil.copy(file, configs)
    edited = (configs / "base.yaml").read_text().replace("lr: 1.0e-2", "lr: 2.0e-2")
    (tmp_path / "edited.yaml").write_text(edited)
    other = f"mount --bind {tmp_path}/edited.yaml {configs}/base.yaml"
    hosts.start(configs / "prime.yaml", tmp_path / "run", before=("", other))
    assert 0 not in hosts.wait(), hosts.output()
    for number in (0, 1):
        assert "error: rank 1 on nodeb has schedule.lr = 0.02, rank 0 on nodea has 0.01" in hosts.output(number)


def test_a_host_with_other_data_under_the_same_path_is_refused_by_name(
    hosts: Hosts, tiny: Tiny, tmp_path: Path
) -> None:
    other = tmp_path / "data"
    shutil.copytree(tiny.data, other)
    manifest = other / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    hosts.start(tiny.prime, tmp_path / "run", before=("", f"mount --bind {other} {tiny.data}"))
    assert 0 not in hosts.wait(), hosts.output()
    for number in (0, 1):
        assert "error: rank 1 on nodeb has data = " in hosts.output(number), hosts.output(number)
        assert "put the same prepared data set under the same path on every host" in hosts.output(number)
    assert not (tmp_path / "run").exists()


def test_a_host_whose_process_is_killed_ends_the_other_at_once_and_the_run_goes_on(
    hosts: Hosts, tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    accident = Accident(kind="kill", ranks=(1,), at=range(64, 72))
    begin = time.monotonic()
    hosts.start(tiny.prime, run, "train.steps=24", accident=accident)
    assert 0 not in hosts.wait(), hosts.output()
    assert time.monotonic() - begin < 60, "whatever engine.timeout is"
    assert "lost another rank at step 8" in hosts.output(0) and "its process ended" in hosts.output(0)
    hosts.start(tiny.prime, run, "train.steps=24")
    assert hosts.wait() == [0, 0], hosts.output()
    assert scalars(run, 24)["progress"]["step"] == 24
    assert_same_run(run, whole)

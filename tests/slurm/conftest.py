"""One real cluster of three nodes for all tests of this folder, and a short way to submit the tiny experiment to it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import Attempt, read_attempts, read_record
from tests.runs import ROOT, Tiny, write_tiny
from tests.slurm.cluster import Cluster, install

# A run of the tiny experiment is over in a second. With this many steps it lasts as long as a test needs it to.
ENDLESS = 10**6


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        install()
    except RuntimeError as error:
        if "UNMASK_REQUIRE_SLURM" in os.environ:
            raise
        pytest.skip(f"no SLURM can be started here: {error}")
    folder = Path(tempfile.mkdtemp(prefix="unmask-slurm-"))  # short: the path of a socket has a limit
    cluster = Cluster(folder)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


class Submitted:
    """A job of ours, and what can be learned of it."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        record = read_record(run)
        assert record is not None
        self.cluster, self.run, self.job_id = cluster, run, record.job_id

    @property
    def state(self) -> str:
        """What squeue says, or scontrol once the job has left the queue."""
        queue = self.cluster.run("squeue", "--noheader", "--array", f"--jobs={self.job_id}", "--format=%T", check=False)
        if queue.strip():
            return queue.split()[0]
        for word in self.cluster.run("scontrol", "show", "job", self.job_id).split():
            if word.startswith("JobState="):
                return word.removeprefix("JobState=")
        raise AssertionError(f"job {self.job_id} is unknown")

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return max((row["step"] for row in rows), default=0)

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.run)

    @property
    def outcomes(self) -> list[str | None]:
        return [attempt.outcome for attempt in self.attempts]

    @property
    def log(self) -> str:
        return "".join(
            f"--- {path}\n{path.read_text()}"
            for path in (self.run / "job.log", *sorted((self.run / "logs").glob("*")))
            if path.exists()
        )

    def wait_for(self, condition: Any, seconds: float = 120) -> None:
        try:
            self.cluster.wait_for(condition, seconds=seconds)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.state} {self.attempts}\n{self.log}") from None

    def wait_until_over(self, seconds: float = 150) -> str:
        """Until the job has left the queue for good; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.state in over, seconds)
        return self.state

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step >= step)


class Workplace:
    """Where a user would type `unmask ...`: the checkout, with the cluster at hand."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self._folder = cluster, folder

    def unmask(self, *arguments: str, code: int = 0) -> str:
        """Output of `unmask ...`, which must end with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", "launch", *arguments],
            cwd=ROOT,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        mine = {k: v for k, v in self.cluster.environment.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return mine | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def profile(self, **fields: Any) -> Path:
        """A profile that differs from configs/cluster/cpu.yaml in these fields."""
        path = self._folder / f"cluster-{len(list(self._folder.glob('cluster-*')))}.yaml"
        path.write_text(json.dumps({"base": str(ROOT / "configs" / "cluster" / "cpu.yaml"), **fields}))
        return path

    def submit(
        self, config: Path, run: Path, *overrides: str, options: tuple[str, ...] = (), **profile: Any
    ) -> Submitted:
        profile_path = self.profile(**profile)
        self.unmask("submit", str(config), f"run.dir={run}", *overrides, "--cluster", str(profile_path), *options)
        return Submitted(self.cluster, run)


@pytest.fixture
def workplace(cluster: Cluster, tmp_path: Path) -> Iterator[Workplace]:
    yield Workplace(cluster, tmp_path)
    cluster.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
    cluster.run("scancel", "--user=root", check=False)
    cluster.wait_for(lambda: not cluster.run("squeue", "--noheader").strip(), seconds=60)

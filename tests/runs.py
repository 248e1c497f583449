"""Training runs of a minuscule experiment with real processes, and what they leave behind.

    ranks = Ranks(tiny.prime, 2, run_dir, "train.steps=6")      # ranks start in milliseconds: see tests/processes.py
    assert ranks.wait().codes == [0, 0]

The ranks run `launch.entry.main`, as `python -m llm.train` does; a dead rank ends the others as our launcher would. For
the launchers themselves there is `command`, which starts a fresh Python and takes seconds.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from launch import entry
from launch.checkpoint import stream
from launch.errors import DataError
from launch.experiment import Experiment
from launch.metrics import read_metrics
from launch.stop import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED
from llm.config import LanguageConfig
from llm.data.shards import DatasetWriter, Source
from llm.data.tokenizers import train_bpe
from llm.task import LanguageTask
from tests import cable, processes

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 300
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*processes.PRELOADED, "launch.entry", "llm.task"])
ACCIDENT = "UNMASK_TEST_ACCIDENT"
_GRACE_S = 5.0  # what the others have when a rank has died, before they are killed
_ORPHAN_S = 5.0  # what a program that a killed rank has started (git, say) may take to end by itself

# --- the experiment --------------------------------------------------------------------------------------------------

_BASE = """
entry: llm.train
model: {{kind: llama, layers: 2, heads: 2, width: 16, ffn: 32, qk_norm: true}}
data: {{sources: [{{path: {data}}}], block_length: 16}}
train: {{steps: 6, global_batch: 8, micro_batch: 2, log_every: 1}}
schedule: {{kind: constant, lr: 1.0e-2, warmup_steps: 0}}
evaluation: {{sequences: 6, batch: 4}}
sampling: {{count: 1, length: 8, sampler: {{steps: 4}}}}
metrics: {{tensorboard: false}}
engine: {{timeout: 60}}
"""
_FAMILIES = {
    "ar": "diffusion: {family: ar, objective: ar}",
    "mdm": "diffusion: {family: mdm, objective: mdm}",
    "prime": "diffusion: {family: prime, granularity: 3, shuffle: true, objective: nelbo_subtoken+nelbo_token, "
    "p_group: 0.5}",
}


@dataclass(frozen=True)
class Tiny:
    """A data set, and one configuration file for each family that trains on it in milliseconds a step."""

    data: Path
    ar: Path
    mdm: Path
    prime: Path


def write_tiny(folder: Path) -> Tiny:
    """The text is that of the licence: real sentences that never change, a line a document."""
    texts = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = train_bpe(texts, VOCAB_SIZE)
    with DatasetWriter(folder / "data", tokenizer, shard_tokens=10**6) as writer:
        writer.add("train", "code", texts[40:])
        writer.add("validation", "code", texts[:20])
        writer.add("test", "code", texts[20:40])
        writer.publish([Source(name="code")])
    (folder / "base.yaml").write_text(_BASE.format(data=folder / "data"))
    for family, diffusion in _FAMILIES.items():
        (folder / f"{family}.yaml").write_text(f"base: base.yaml\n{diffusion}\n")
    return Tiny(folder / "data", *(folder / f"{family}.yaml" for family in _FAMILIES))


# --- accidents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Accident:
    """Makes a `LanguageTask` to which, on some ranks and at some samples of the global order, something happens.

    `where` it is not reading a batch, it happens at every call there, whatever `at` says.
    """

    kind: Literal[
        "sigterm", "kill", "stop",  # signals to the own process
        "hang", "hang_in_c",  # endless sleep; the latter holds the interpreter lock
        "slow", "nan",  # sleep for `seconds` each time; not a number as loss
        "unreadable", "truncate", "overwrite", "remove",  # a DataError; harm to `file`, by this rank, once
        "fill", "read_only",  # make `file` as large as the disk lets it; remount it; undone after `seconds`, if any
        "skew",  # from the start, the clock of this rank is `seconds` ahead
    ]  # fmt: skip
    ranks: tuple[int, ...]
    at: range = range(0)  # global positions; step s of a run without a rollback reads 8 s to 8 s + 7
    where: Literal["open", "build", "batch", "loss", "evaluate", "sample"] = "batch"
    seconds: float = 0.0  # kill: later by these, whatever the process does then
    file: str = ""

    def __call__(self, config: LanguageConfig, device: torch.device, open_data: bool = True) -> LanguageTask:
        is_here = int(os.environ.get("RANK", "0")) in self.ranks
        if is_here and self.kind == "skew":
            now, now_ns = time.time, time.time_ns
            time.time = lambda: now() + self.seconds
            time.time_ns = lambda: now_ns() + int(self.seconds * 1e9)
        if is_here and self.where == "open":
            self._strike()
        task = LanguageTask(config, device, open_data)
        if not is_here:
            return task
        if self.where in ("build", "evaluate", "sample"):
            name = {"build": "build_model"}.get(self.where, self.where)
            setattr(task, name, self._before(getattr(task, name)))
        read, loss_of = task.batch, task.loss
        struck_step, harmed = -1, False

        def batch(positions: np.ndarray, step: int) -> Any:
            nonlocal struck_step, harmed
            if any(int(position) in self.at for position in positions):
                struck_step = step
                if self.where == "batch" and not harmed:
                    self._strike()
                    harmed = self.kind in ("truncate", "overwrite", "remove", "fill", "read_only")
            elif step != struck_step:
                struck_step = -1
            return read(positions, step)

        def loss(model: nn.Module, made: Any) -> tuple[Tensor, dict[str, Tensor]]:
            if self.where == "loss" and struck_step >= 0:
                self._strike()
            loss_sum, figures = loss_of(model, made)
            return (loss_sum * float("nan") if self.kind == "nan" and struck_step >= 0 else loss_sum), figures

        task.batch, task.loss = batch, loss
        return task

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*arguments: Any) -> Any:
            self._strike()
            return function(*arguments)

        return struck

    def _strike(self) -> None:
        match self.kind:
            case "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            case "kill":
                threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(3600)
            case "hang_in_c":
                ctypes.PyDLL(None).sleep(3600)
            case "slow":
                time.sleep(self.seconds)
            case "unreadable":
                raise DataError("/data/train-00000.bin: Input/output error")
            case "truncate":
                os.truncate(self.file, os.path.getsize(self.file) // 2)
            case "overwrite":
                with open(self.file, "r+b") as file:
                    file.write(b"\0" * os.path.getsize(self.file))
            case "remove":
                os.unlink(self.file)
            case "fill":
                with open(self.file, "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(b"\0" * 512):
                        pass
                self._later(os.unlink, self.file)
            case "read_only":
                while subprocess.run(["mount", "-o", "remount,ro", self.file], check=False).returncode:
                    time.sleep(0.05)  # a save is in flight
                self._later(subprocess.run, ["mount", "-o", "remount,rw", self.file])

    def _later(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self.seconds:
            timer = threading.Timer(self.seconds, function, arguments)
            timer.daemon = True
            timer.start()

    def environment(self) -> dict[str, str]:
        """For `python -m tests.train`, which a launcher starts."""
        return {ACCIDENT: json.dumps(asdict(self) | {"at": [self.at.start, self.at.stop]})}

    @staticmethod
    def from_environment() -> "Accident":
        tree = json.loads(os.environ[ACCIDENT])
        return Accident(**(tree | {"at": range(*tree["at"]), "ranks": tuple(tree["ranks"])}))


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    codes: list[int]  # of each rank, negative for a signal
    output: str  # of all ranks, one after the other


class Ranks:
    """`world` processes of one training run.

    `schema` and `task` are importable, `fault` an UNMASK_FAULT, no file may grow beyond `largest_file` bytes, and rank
    r lives on `hosts[r]` (see tests/cable.py).
    """

    def __init__(
        self,
        config: Path,
        world: int,
        run: Path,
        *overrides: str,
        schema: type[Experiment] = LanguageConfig,
        task: Callable[..., Any] = LanguageTask,
        fault: str | None = None,
        largest_file: int | None = None,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="unmask-ranks-")
        argv = [str(config), f"run.dir={run}", *overrides]
        payload = pickle.dumps((argv, schema, task, fault, largest_file, hosts, dict(os.environ)))
        self._processes = [
            _CONTEXT.Process(target=_rank_main, args=(payload, rank, world, self._folder.name)) for rank in range(world)
        ]
        for process in self._processes:
            process.start()
        self.pids = [process.pid or 0 for process in self._processes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to these ranks (all of them) that are still there."""
        for rank, process in enumerate(self._processes):
            if process.exitcode is None and (ranks is None or rank in ranks):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid or 0, number)

    @property
    def running(self) -> bool:
        return any(process.exitcode is None for process in self._processes)

    @property
    def all_running(self) -> bool:
        return all(process.exitcode is None for process in self._processes)

    def wait(self, timeout: float = 120.0) -> Ended:
        deadline = time.monotonic() + timeout
        killed, failed_at = False, None
        with self:  # so that an interrupted test leaves nobody behind
            while self.running:
                failed = any(p.exitcode not in (None, EXIT_OK, EXIT_STOPPED, EXIT_DIVERGED) for p in self._processes)
                now = time.monotonic()
                failed_at = failed_at or (now if failed else None)
                if not killed and (now > deadline or (failed_at and now > failed_at + _GRACE_S)):
                    killed = True
                    self.send(signal.SIGKILL)
                time.sleep(0.02)
        codes = [process.exitcode for process in self._processes]
        output = "".join(path.read_text() for path in sorted(Path(self._folder.name).glob("output-*")))
        for process in self._processes:
            process.close()
        self._processes = []
        self._folder.cleanup()
        assert failed_at or not killed, f"not finished after {timeout:g} s:\n{output}"
        assert _end_within(self.pids, _ORPHAN_S), (
            f"processes of the sessions {self.pids} outlive their ranks:\n{output}"
        )
        return Ended([code for code in codes if code is not None], output)


def train(config: Path, world: int, run: Path, *overrides: str, **options: Any) -> Path:
    """A run that must reach its last step; its folder."""
    ended = Ranks(config, world, run, *overrides, **options).wait()
    assert ended.codes == [EXIT_OK] * world, ended.output
    return run


def _end_within(sessions: Sequence[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_is_a_group(session) for session in sessions):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _is_a_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def _rank_main(payload: bytes, rank: int, world: int, folder: str) -> None:
    os.setsid()  # so that what it starts and leaves behind can be found
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    argv, schema, task, fault, largest_file, hosts, environment = pickle.loads(payload)
    os.environ.clear()  # the fork server keeps the environment of its own start
    os.environ.update(environment)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), UNMASK_RENDEZVOUS_FILE=f"{folder}/rendezvous"
        )
    if fault is not None:
        os.environ["UNMASK_FAULT"] = fault
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write past the limit is an OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if hosts is not None:
        cable.enter(hosts[rank])
    torch.set_num_threads(1)
    entry.write_report = lambda folder, sections: folder  # its pictures take longer than the run
    sys.exit(entry.main(schema, task, argv))


def command(
    *arguments: str, environment: dict[str, str] | None = None, timeout: float = 240, within: Sequence[str] = ()
) -> Ended:
    """A command of this environment's Python (`unmask`, `torchrun`, ...), from the repository's root.

    `within`: a command that runs the one it is given, for example `unshare --mount`.
    """
    process = start(*arguments, environment=environment, within=within)
    output, _ = process.communicate(timeout=timeout)
    return Ended([process.returncode], output)


def start(
    *arguments: str, environment: dict[str, str] | None = None, within: Sequence[str] = ()
) -> subprocess.Popen[str]:
    program = Path(sys.executable).with_name(arguments[0])
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"} | (environment or {})
    return subprocess.Popen(
        [*within, str(program), *arguments[1:]],
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# --- what a run leaves -----------------------------------------------------------------------------------------------


def curve(run: Path, name: str = "loss") -> dict[int, float]:
    """Step -> value of the training rows; a step that is there twice is an error."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "grad_norm" in row]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), f"{run}: steps {steps}"
    return {row["step"]: row[name] for row in rows}


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_????????"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole: weights, both moments, average."""
    return dict(stream(checkpoint(run, step), ""))


def scalars(run: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(run, step) / "trainer.json").read_text())


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 0.0) -> None:
    """Bit for bit, or within `atol`."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if atol == 0.0:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")

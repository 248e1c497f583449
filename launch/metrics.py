"""What a run measured: one JSON object a line in RUN/metrics.jsonl, and the same numbers in other places.

metrics.jsonl is the source of truth; TensorBoard (RUN/tb), Weights & Biases and the progress line show its rows.
Every row has `step` and `time` (seconds since the epoch). Names of the training rows stand alone (`loss_ce_joint`,
`grad_norm`, `tokens_per_second`), others carry a prefix (`val/nelbo_subtoken`, `checkpoint/bytes`); the standard error
of `X` is `X_se`. A number that is not finite is written as a string ("nan", "inf"), because JSON has no such numbers.
"""

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from launch.config import Seconds
from launch.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch

Value = float | int | bool | str

# Dense peak of the tensor cores in bf16, FLOP/s of one device, from the makers' data sheets; the first match counts.
_PEAK_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    report: bool = True  # write RUN/report.md and its pictures at the end
    tensorboard: bool = True  # write RUN/tb for TensorBoard
    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases; offline keeps its files in RUN/wandb
    wandb_project: str = "unmask"  # the project that Weights & Biases shows the run under
    console: Seconds = 30.0  # time between progress lines where there is no terminal
    peak_flops: float | None = None  # FLOP/s of one device, for MFU; null: by the name of the GPU, no MFU on CPU

    def check(self, path: str) -> None:
        if self.console < 0:
            raise ConfigError(f"{path}.console = {self.console}; the smallest is 0 (a line for every row)")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ConfigError(f"{path}.peak_flops = {self.peak_flops}; need a positive number such as 989e12, or null")


# --- files -----------------------------------------------------------------------------------------------------------


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows. A torn last line (the writer was killed) is left out; damage elsewhere is a `DataError`."""
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line and number < len(lines):
            raise DataError(f"{path}, line {number} is not a JSON object; `unmask resume` sets such lines aside")
    return rows


def rewind(path: Path, step: int) -> Path | None:
    """Move rows past `step`, and lines that cannot be read, to metrics.rewound-N.jsonl beside `path`; returns that.

    Safe against a kill at any moment: nothing leaves `path` before it is stored elsewhere.
    """
    if not path.exists():
        return None
    kept, moved = [], []
    for line in path.read_bytes().split(b"\n"):
        row = _parse(line)
        (kept if row is not None and row["step"] <= step else moved).append(line + b"\n")
    moved = [line for line in moved if line != b"\n"]
    if not moved:
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.rewound-{number}.jsonl")).exists():
        number += 1
    _write_durably(aside, b"".join(moved))
    _write_durably(path, b"".join(kept))
    return aside


def read_run_info(run_dir: Path) -> dict[str, Any]:
    """RUN/run.json: facts about the run that survive its restarts; empty if there is none yet."""
    path = run_dir / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update_run_info(run_dir: Path, **facts: Any) -> dict[str, Any]:
    """Add to RUN/run.json; only rank 0 may."""
    info = read_run_info(run_dir) | facts
    _write_durably(run_dir / "run.json", (json.dumps(info, indent=2) + "\n").encode())
    return info


def check_name(name: str) -> None:
    """Refuse a name that sells something else as a likelihood.

    The cross-entropy of the joint of sub-tokens is a training loss; exp of it is no perplexity of the model, and no
    bound on one. What another model, a judge, makes of samples is a statement about these texts, with one name.
    """
    lowered = name.lower()
    likelihood = re.search(r"ppl|perplexity|nll|nelbo|bits|likelihood", lowered)
    if likelihood and "joint" in lowered:
        raise ValueError(
            f"metric {name!r}: a joint cross-entropy is no likelihood, so nothing made of it may be called "
            f"{likelihood[0]}; log it as loss_ce_joint, and take {likelihood[0]} from nelbo_subtoken, nelbo_token or "
            "nll_chain"
        )
    of_samples = re.search(r"generative|judge|sample", lowered)
    if likelihood and of_samples and not re.fullmatch(r"(?:[\w-]+/)*generative_ppl(?:_se)?", name):
        raise ValueError(
            f"metric {name!r}: what a judge makes of samples is no {likelihood[0]} of the model that drew them; call "
            "it generative_ppl, and log unigram_entropy beside it"
        )
    if name in ("step", "time"):
        raise ValueError(f"metric {name!r}: every row has this key already; choose another name")


def _encode(row: Mapping[str, Any]) -> bytes:
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}


def _write_durably(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# --- writing ---------------------------------------------------------------------------------------------------------


class MetricsWriter:
    """Writes rows on the rank where it is `enabled` (rank 0); on the others it only checks the names.

    Opening a run again goes on where the file ends; call `rewind` after a checkpoint has been loaded.

    A disk that is full must not end a run that could still train and, once there is room, save: rows that cannot be
    written are kept and written later, with a warning. A whole row or nothing is what a later reader finds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        total_steps: int,
        enabled: bool = True,
        console: TextIO | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._enabled = enabled
        self._tensorboard: Any = None
        self._shows_tensorboard = config.tensorboard
        self._purge_step: int | None = None  # TensorBoard hides what an earlier writer wrote from here on
        self._wandb: Any = None
        self._file: FileIO | None = None
        self._unwritten = b""  # rows, the first perhaps without its beginning, that the disk did not take
        self._is_stuck = False
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._progress = Progress(total_steps, config.console, console or sys.stderr)
            self._wandb = _start_wandb(run_dir, config)
            _cut_torn_tail(metrics_path(run_dir))
            self._file = metrics_path(run_dir).open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write one row. `step` is the number of optimizer steps done when the values were measured."""
        for name in values:
            check_name(name)
        if self._file is None:
            return
        self._unwritten += _encode({"step": step, "time": round(time.time(), 3), **values})
        self._write()
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        if self._shows_tensorboard:
            try:
                writer = self._tensorboard_writer()
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
            except OSError as error:  # it is a copy; the rows are safe in `_unwritten`
                self._shows_tensorboard = False
                logger.warning("TensorBoard ends at step %d until the next start: %s", step, error)
        if self._wandb is not None:
            self._wandb.log({"trainer/step": step, **values})
        self._progress.show(step, values)

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: set later rows aside, hide them in TensorBoard, and step back the progress."""
        if self._file is None:
            return
        self._write()
        self._file.close()
        rewind(metrics_path(self._run_dir), step)
        self._file = metrics_path(self._run_dir).open("ab", buffering=0)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self._purge_step = step + 1
        self._progress.restart(step)

    def close(self) -> None:
        """May be called twice."""
        if self._file is None:
            return
        self._write()
        if self._unwritten:
            rows = self._unwritten.count(b"\n")
            logger.error("the last %d rows of %s are lost: the disk is full", rows, metrics_path(self._run_dir))
        self._file.close()
        self._file = None
        self._progress.close()
        if self._tensorboard is not None and self._shows_tensorboard:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        """As much of `_unwritten` as the disk takes."""
        assert self._file is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._is_stuck:
                path = metrics_path(self._run_dir)
                logger.warning("cannot write %s: %s; its rows are kept and will be written when it can be", path, error)
            self._is_stuck = True
        else:
            self._is_stuck = False

    def _tensorboard_writer(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard.writer import SummaryWriter  # seconds of imports, so only where it writes

            self._tensorboard = SummaryWriter(str(self._run_dir / "tb"), purge_step=self._purge_step, flush_secs=30)
        return self._tensorboard


def _cut_torn_tail(path: Path) -> None:
    """Without this, the first new row would be glued to half a row of a writer that was killed."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _start_wandb(run_dir: Path, config: MetricsConfig) -> Any:
    if config.wandb == "off":
        return None
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            f"metrics.wandb = {config.wandb} needs the package wandb; pip install 'unmask[wandb]', or set "
            "metrics.wandb=off"
        ) from None
    # One curve over all restarts: the id is made once and stays with the run folder.
    info = read_run_info(run_dir)
    identity = info.get("wandb_id") or update_run_info(run_dir, wandb_id=uuid.uuid4().hex[:12])["wandb_id"]
    run = wandb.init(
        project=config.wandb_project,
        id=identity,
        name=run_dir.name,
        resume="allow",
        mode=config.wandb,
        dir=str(run_dir),
    )
    # Its own step counter only grows; after a rollback ours does not.
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="trainer/step")
    return run


# --- the console -----------------------------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal, else a line every `seconds`: step, loss, learning rate, tokens/s, time to go."""

    def __init__(
        self, total_steps: int, seconds: float, console: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_steps = total_steps
        self._seconds = seconds
        self._console = console
        self._clock = clock
        self._bar: Any = None
        self.restart(0)

    def restart(self, step: int) -> None:
        """Count from `step`; the time to go is estimated from what happens after this."""
        self._step = self._first_step = step
        self._begin = self._clock()
        self._shown_at = -math.inf
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show(self, step: int, values: Mapping[str, Value]) -> None:
        """Rows of an earlier step (a checkpoint that has just been written) and without a loss do not move the line."""
        loss = next((name for name in ("loss", *values) if name in values and name.startswith("loss")), None)
        if loss is None or step < self._step:
            return
        parts = [f"{loss} {values[loss]:.4f}"]
        if "lr" in values:
            parts.append(f"lr {values['lr']:.2e}")
        if "tokens_per_second" in values:
            parts.append(f"{_short(float(values['tokens_per_second']))} tok/s")
        if self._console.isatty():
            self._show_bar(step, ", ".join(parts))
        elif self._clock() - self._shown_at >= self._seconds or step >= self._total_steps:
            self._shown_at = self._clock()
            line = " | ".join([f"step {step}/{self._total_steps}", *parts, f"ETA {self._time_to_go(step)}"])
            with contextlib.suppress(OSError):  # a log on a full disk: there is nowhere to say so
                print(line, file=self._console, flush=True)
        self._step = step

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_bar(self, step: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total_steps, initial=self._first_step, file=self._console, unit="step", dynamic_ncols=True
            )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def _time_to_go(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        seconds = round((self._clock() - self._begin) / done * max(0, self._total_steps - step))
        days, rest = divmod(seconds, 86400)
        clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
        return f"{days}d {clock}" if days else clock


def _short(value: float) -> str:
    """Three digits and a unit: 1234567 is 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# --- speed and memory ------------------------------------------------------------------------------------------------


def peak_flops_of(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, by the name that CUDA gives it; None if it is not in the table."""
    name = device_name.upper()
    return next((peak for part, peak in _PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def memory_gib(device: "torch.device") -> float:
    """Largest memory so far, GiB: of the allocator on CUDA, of the process (resident set) on CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


class Throughput:
    """Tokens per second, step time and MFU of the time that is spent training.

    `flops_per_token` (forward and backward, by the rule that `flop_rule` names) and the tokens are those of all ranks
    together. MFU is model FLOP/s over the peak of all devices (Chowdhery et al., PaLM, appendix B), so recomputed
    activations do not count. Without a known peak (CPU) there is no MFU.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        device: "torch.device",
        world: int,
        flop_rule: str = "full",
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if peak_flops is None and device.type == "cuda":
            import torch

            peak_flops = peak_flops_of(torch.cuda.get_device_name(device))
        self._flops_per_token, self._flop_rule = flops_per_token, flop_rule
        self._peak = None if peak_flops is None else peak_flops * world
        self._device = device
        self._clock = clock
        self._paused = 0.0  # since the start, seconds
        self._pauses: dict[str, float] = {}  # since the last `read`, seconds by name
        self._tokens = 0
        self._step_seconds: list[float] = []
        self._step_begin = self._lap_begin = self._training_time()

    def step(self, tokens: int) -> None:
        """An optimizer step over `tokens` (all ranks) is done."""
        now = self._training_time()
        self._step_seconds.append(now - self._step_begin)
        self._step_begin = now
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """What runs inside is not training; its time is reported as `seconds/NAME`. Must not be nested."""
        begin = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - begin
            self._paused += seconds
            self._pauses[name] = self._pauses.get(name, 0.0) + seconds

    def lap(self) -> float:
        """Seconds of training since the last lap (or the start)."""
        now = self._training_time()
        seconds, self._lap_begin = now - self._lap_begin, now
        return seconds

    def read(self) -> dict[str, Value]:
        """The row of the steps since the last `read`; empty if there were none."""
        if not self._step_seconds:
            return {}
        ordered = sorted(self._step_seconds)
        # CUDA runs behind the host, so that one step's time means little; their sum, with a sync in it, means much.
        tokens_per_second = self._tokens / max(sum(ordered), 1e-9)
        row: dict[str, Value] = {
            "tokens_per_second": tokens_per_second,
            "step_seconds": sum(ordered) / len(ordered),
            "step_seconds_p50": ordered[len(ordered) // 2],
            "step_seconds_p99": ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)],
            "memory_gib": memory_gib(self._device),
        }
        if self._peak is not None:
            row["mfu"] = tokens_per_second * self._flops_per_token / self._peak
            row["mfu_rule"] = self._flop_rule
        row |= {f"seconds/{name}": seconds for name, seconds in self._pauses.items()}
        self._tokens, self._step_seconds, self._pauses = 0, [], {}
        return row

    def _training_time(self) -> float:
        return self._clock() - self._paused

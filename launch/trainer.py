"""The loop: batch, denominator, micro-steps, step, metrics, and what happens on a cadence.

Every decision that changes the course (stop, save, skip, roll back) is taken from values that are equal on all ranks:
one small exchange before each step carries the token count, the stop flag and the save timer; the gradient norm is
global by construction.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from launch.checkpoint import CheckpointStore, SaveFailure, SaveResult
from launch.data import micro_batches
from launch.engine import Engine
from launch.errors import CheckpointError, UserError
from launch.experiment import Experiment, Task
from launch.metrics import MetricsWriter, Throughput
from launch.runtime import Runtime
from launch.schedule import learning_rate
from launch.stop import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED, GO_ON, WARNED, StopFlag, ask_for_requeue
from launch.straggler import Stragglers
from launch.watch import LossGuard, Watchdog

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with every checkpoint as JSON."""

    step: int = 0  # optimizer steps taken or skipped
    passed_over: int = 0  # samples that a rollback left out of the order
    tokens: int = 0  # tokens read since the start, those of skipped steps included
    seconds: float = 0.0  # wall time spent in training, over all restarts


class Trainer:
    def __init__(
        self,
        config: Experiment,
        task: Task,
        engine: Engine,
        runtime: Runtime,
        store: CheckpointStore,
        metrics: MetricsWriter,
        watchdog: Watchdog,
        stop: StopFlag,
        hosts: Sequence[str],
    ):
        self.config, self.task, self.engine, self.runtime = config, task, engine, runtime
        self.store, self.metrics, self.watchdog, self.stop = store, metrics, watchdog, stop
        self.progress = Progress()
        self.guard = LossGuard(config.guard)
        self.throughput = Throughput(
            flops_per_token=task.flops_per_token(),
            device=runtime.device,
            world=runtime.world_size,
            peak_flops=config.metrics.peak_flops,
        )
        self.stragglers = Stragglers(
            config.watch.straggler_factor, runtime, strategy=config.engine.strategy, hosts=hosts
        )
        self._host = hosts[runtime.rank]
        self._figures: dict[str, torch.Tensor] = {}  # [numerator, denominator] since the last log line, on the device
        self._copies = runtime.world_size // engine.data_world_size  # ranks that compute each part of a batch
        self._grad_norm = 0.0
        self._save_failures = 0
        self._last_save = time.monotonic()

    def fit(self) -> int:
        """Collective. Train to the last step, or to a stop; returns the exit code."""
        steps = self.config.train.steps
        while self.progress.step < steps:
            before = self.progress.step
            code = self._step()
            if code is not None:
                return code
            step = self.progress.step
            if step <= before:  # rolled back: what is due at this step was done when the run first came here
                continue
            if step % self.config.train.log_every == 0 or step == steps:
                self._log()
            if _due(step, self.config.train.evaluate_every) and step < steps:
                self.evaluate()
            if _due(step, self.config.train.sample_every) and step < steps:
                self.sample()
            if _due(step, self.config.checkpoint.every_steps) and step < steps:
                self.save()
        self.save(block=True)
        self.evaluate()
        self.sample()
        return EXIT_OK

    def _step(self) -> int | None:
        """One optimizer step; an exit code if the run must end here."""
        config, step = self.config.train, self.progress.step
        self.watchdog.beat(step, "train")
        positions = micro_batches(
            step,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=self.engine.data_rank,
            world_size=self.engine.data_world_size,
        )
        with self.stragglers.reading():
            batches, unread = self._read(positions, step)
        local_count = sum(self.task.count(batch) for batch in batches)
        (counted,), (stop, save, failed) = self.runtime.sum_and_max(
            [local_count], [self.stop.code(), int(self._save_is_due()), int(unread is not None)]
        )
        if failed:
            self._end_without_data(unread)
        count = counted / self._copies
        if stop != GO_ON:
            return self._stop(warned=stop == WARNED)
        if save:
            self.save()
        local_loss = torch.zeros((), device=self.runtime.device)
        for i, batch in enumerate(batches):
            with self.stragglers.computing():
                loss_sum, figures = self.task.loss(self.engine.module, batch)
            self.engine.backward(loss_sum / count, last=i == len(batches) - 1)
            local_loss += loss_sum.detach() / count
            self._accumulate(figures)
        self._accumulate({"loss": torch.stack([local_loss, torch.ones_like(local_loss) / self.engine.data_world_size])})
        info = self.engine.step(
            learning_rate(self.config.schedule, step, config.steps), lambda norm: self._accepts(local_loss, norm)
        )
        self.progress.step += 1
        self.progress.tokens += config.global_batch * self.task.tokens_per_sample
        self.throughput.step(config.global_batch * self.task.tokens_per_sample)
        self._grad_norm = info.grad_norm
        if not info.applied:
            return self._refused()
        return None

    def _read(self, positions: Sequence[np.ndarray], step: int) -> tuple[list[Any], Exception | None]:
        """This rank's micro-batches, or why it has none; the others hear of that in the exchange of the step."""
        try:
            return [self.task.batch(p + self.progress.passed_over, step) for p in positions], None
        except Exception as error:  # raised on every rank by `_end_without_data`
            return [], error

    def _accepts(self, local_loss: torch.Tensor, grad_norm: float) -> bool:
        """Whether to apply the update. A broken loss shows in the gradient norm, which is global already; only the
        rule for spikes of the loss needs an exchange of its own."""
        watches_loss = self.config.guard.spike_sigma is not None
        loss = float(self.runtime.all_reduce_sum(local_loss)) / self._copies if watches_loss else None
        return self.guard.accepts(grad_norm, loss)

    def _accumulate(self, figures: dict[str, torch.Tensor]) -> None:
        for name, value in figures.items():
            self._figures[name] = self._figures[name] + value.double() if name in self._figures else value.double()

    def _log(self) -> None:
        names = sorted(self._figures)
        figures = torch.stack([self._figures[name] for name in names]).flatten()
        totals = self.runtime.all_reduce_sum(torch.cat([figures, self.stragglers.own().to(figures)]))
        totals, seconds = totals[: len(figures)].view(-1, 2).tolist(), totals[len(figures) :]
        values = {name: above / below for name, (above, below) in zip(names, totals, strict=True) if below > 0}
        values |= {
            "lr": learning_rate(self.config.schedule, self.progress.step - 1, self.config.train.steps),
            "grad_norm": self._grad_norm,
            "skipped_steps": self.guard.total_skips,
            "tokens": self.progress.tokens,
        }
        self._figures = {}
        self.metrics.log(self.progress.step, values | self.throughput.read() | self.stragglers.judge(seconds))
        self.watchdog.report_straggler(self.stragglers.words)

    def evaluate(self) -> dict[str, float]:
        """Collective. The task's evaluation with the averaged weights, off the throughput clock."""
        with self._aside("evaluate"), self.engine.evaluation() as model:
            values = self.task.evaluate(model, self.runtime)
        self.metrics.log(self.progress.step, {f"val/{name}": value for name, value in values.items()})
        return values

    def sample(self) -> None:
        with self._aside("sample"), self.engine.evaluation() as model:
            self.task.sample(model, self.runtime, self.progress.step, self.config.run.folder / "samples")

    # --- saving and restoring ----------------------------------------------------------------------------------------

    def save(self, *, block: bool = False) -> None:
        """Collective. Start a checkpoint of this step (and finish it, if `block`)."""
        self.progress.seconds += self.throughput.lap()
        scalars = {
            "progress": dataclasses.asdict(self.progress),
            "engine": self.engine.scalars(),
            "guard": self.guard.state(),
            "identity": dict(self.task.identity()),
            "seed": self.config.run.seed,
        }
        with self._aside("checkpoint"):
            outcomes = self.store.save(self.progress.step, self.engine.state(), scalars, block=block)
            self._report_saves(outcomes)
        if block and outcomes and isinstance(outcomes[-1], SaveFailure):
            raise outcomes[-1]  # the run ends here, and must not end as if its work were safe
        self._last_save = time.monotonic()

    def restore(self, step: int) -> None:
        """Collective. Take up the checkpoint of `step`, saved by any strategy on any number of ranks."""
        state = self.engine.state()
        scalars = self.store.load(step, state)
        check_identity(scalars["identity"], dict(self.task.identity()), where=f"the checkpoint of step {step}")
        self.engine.adopt(state, scalars["engine"])
        self.guard.load_state(scalars["guard"])
        self.progress = Progress(**scalars["progress"])

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every
        return every is not None and self.runtime.is_main and time.monotonic() - self._last_save > every

    def _report_saves(self, outcomes: list[SaveResult | SaveFailure]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, SaveResult):
                self._save_failures = 0
                self.metrics.log(
                    outcome.step,
                    {
                        "checkpoint/bytes": outcome.bytes,
                        "checkpoint/wait_seconds": outcome.wait_seconds,
                        "checkpoint/stage_seconds": outcome.stage_seconds,
                        "checkpoint/write_seconds": outcome.write_seconds,
                    },
                )
                continue
            self._save_failures += 1
            if self._save_failures >= self.config.checkpoint.max_failures:
                raise CheckpointError(
                    f"{outcome}. This was failure {self._save_failures} in a row (checkpoint.max_failures = "
                    f"{self.config.checkpoint.max_failures}); older checkpoints are intact: mend it and `unmask resume "
                    f"{self.config.run.folder}`"
                ) from outcome

    # --- endings and accidents ---------------------------------------------------------------------------------------

    def _stop(self, *, warned: bool) -> int:
        self.stop.acknowledge()
        self.save(block=True)
        if self.runtime.is_main:
            request = self.stop.request
            reason = request.reason if request else "another rank's signal"
            if warned:
                ask_for_requeue(self.config.run.folder, reason=reason, step=self.progress.step)
            logger.warning(
                "%s: stopped at step %d with a checkpoint; go on with: unmask resume %s",
                reason,
                self.progress.step,
                self.config.run.folder,
            )
        return EXIT_STOPPED

    def _end_without_data(self, unread: Exception | None) -> NoReturn:
        """Some rank could not read its part of the step: keep the steps before it, and end alike on all ranks."""
        if unread is not None:
            logger.error("rank %d on %s: %s", self.runtime.rank, self._host, unread)
        self.save(block=True)
        if self.runtime.is_main:
            logger.warning(
                "stopped at step %d with a checkpoint, because its data cannot be read; mend them and go on with: "
                "unmask resume %s",
                *(self.progress.step, self.config.run.folder),
            )

        def tell() -> None:
            if isinstance(unread, UserError):
                raise type(unread)(f"rank {self.runtime.rank} on {self._host}: {unread}")
            if unread is not None:
                raise unread

        self.runtime.together(tell)
        raise AssertionError("a rank said that it had no data, and then that it had")

    def _refused(self) -> int | None:
        """The guard refused the update of this step: go on, go back, or give up, alike on all ranks."""
        if self.runtime.is_main:
            logger.warning("step %d skipped: %s", self.progress.step - 1, self.guard.reason)
        verdict = self.guard.verdict()
        if verdict == "skip":
            return None
        self._report_saves(self.store.wait())
        target = self.store.latest_valid()
        if verdict == "give_up" or target is None:
            if self.runtime.is_main:
                kept = "there is no checkpoint" if target is None else f"the checkpoint of step {target} is intact"
                logger.error(
                    "giving up at step %d after %d skipped steps and %d rollbacks; %s. Try a lower schedule.lr, or "
                    "look at the data of these steps",
                    *(self.progress.step, self.guard.total_skips, self.guard.rollbacks, kept),
                )
            return EXIT_DIVERGED
        failed, guard = self.progress, self.guard.state()
        self.restore(target)
        self.guard.load_state(guard)  # the checkpoint knows nothing of what came after it
        self.guard.rolled_back()
        # The same data would fail the same way: the order goes on behind the samples that led here.
        behind = (failed.step - target) * self.config.train.global_batch
        self.progress = dataclasses.replace(
            self.progress, passed_over=failed.passed_over + behind, seconds=failed.seconds
        )
        self.metrics.rewind(target)
        self._figures = {}
        if self.runtime.is_main:
            logger.warning("rolled back from step %d to the checkpoint of step %d", failed.step, target)
        return None

    @contextlib.contextmanager
    def _aside(self, phase: str) -> Iterator[None]:
        """Something that is not training: known to the watchdog, off the throughput clock."""
        with self.watchdog.phase(self.progress.step, phase), self.throughput.paused(phase):
            yield


def check_identity(saved: dict[str, Any], mine: dict[str, Any], *, where: str) -> None:
    """Refuse a checkpoint whose codec, tokenizer or data are not those of this run."""
    for key in sorted(saved.keys() | mine.keys()):
        if saved.get(key) != mine.get(key):
            raise CheckpointError(
                f"{where} was made with {key} = {saved.get(key)!r}, this run has {mine.get(key)!r}; use the "
                "configuration that made it, or start a new run in another run.dir"
            )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

"""A soak: one training run of two ranks, hurt at many random moments, that may lose nothing and change no bit.

    python -m tests.soak                       # 100 moments; the last line is the summary
    python -m tests.soak --seed 3 --only 41    # that moment alone, on a run that nothing has hurt before

The run goes on in attempts, each `STRIDE` steps further than the one before should have come. Something happens to each
attempt: moment k, a function of (seed, k) alone. After each, everything that was published must still be there (or have
been retired for newer checkpoints), whole and equal to what an unbroken run had at that step; the metrics must be those
of the unbroken run, every step once; no process may be left; and the exit codes must be those that the moment allows.
What is hurt is the newest state of a run that has been hurt before: nothing is repaired in between.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from launch.checkpoint.commit import FAULT_POINTS
from launch.metrics import metrics_path
from launch.stop import EXIT_HUNG, EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR
from launch.watch import read_health
from tests.cable import Cable
from tests.disk import Disk
from tests.runs import Ranks, assert_equal_states, checkpoint, curve, state, steps_saved, train, write_tiny

STRIDE = 12  # steps from one moment to the next
KEEP = 3  # checkpoint.keep_last
OPTIONS = (
    *("engine.ema_decay=0.9", "checkpoint.every_steps=2", f"checkpoint.keep_last={KEEP}"),
    *("train.evaluate_every=6", "watch.interval=0.1"),
)
WORLD = 2
KILLED = -signal.SIGKILL
LOST = (1, EXIT_HUNG)  # what a rank ends with that has lost its peer: with a traceback, or as one that waits in vain
TRAINING = ("train", "checkpoint", "evaluate", "sample")  # phases between start-up and end


class Broken(AssertionError):
    """Something was lost, changed or left behind."""


# --- moments ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that things take on this machine."""

    start: float  # from the start of the ranks to the first step
    step: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An attempt under way."""

    ranks: Ranks
    run: Path
    pace: Pace
    cable: Cable
    disk: Disk

    def wait(self, at: float) -> str:
        """Until -1 <= `at` < 0 of the start-up (-1 is its begin), or `at` strides into the training; the phase then."""
        if at < 0:
            time.sleep((1 + at) * self.pace.start)
            return self.phase()
        while self.ranks.all_running and self.phase() not in TRAINING:
            time.sleep(0.01)
        time.sleep(at * STRIDE * self.pace.step)
        return self.phase()

    def phase(self) -> str:
        """That of the first rank which is not training, or else of rank 0; "over" if none is left."""
        if not self.ranks.running:
            return "over"
        known = {health.pid: health.phase for health in read_health(self.run)}
        phases = [known.get(pid, "start") for pid in self.ranks.pids]
        return next((phase for phase in phases if phase not in TRAINING), phases[0])


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How an attempt ended."""

    codes: list[int]
    phase: str  # when it was struck
    stacks: set[int]  # ranks that have written theirs
    output: str

    def only(self, *allowed: int) -> bool:
        return set(self.codes) <= set(allowed)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What happens to one attempt, and how that may end."""

    fault: str | None = None  # UNMASK_FAULT of the ranks
    largest_file: int | None = None  # bytes

    noun: ClassVar[str]  # for the summary
    overrides: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Literal["cable", "disk"] | None] = None

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        raise NotImplementedError

    def strike(self, scene: Scene) -> str:
        """Do it; the phase in which it struck. Nothing to do if it was arranged before the start."""
        del scene
        return "arranged"

    def struck(self, seen: Seen) -> bool:
        """Whether it came to pass."""
        return seen.phase != "over"

    def allows(self, seen: Seen) -> bool:
        raise NotImplementedError

    def afterwards(self, run: Path) -> int | None:
        """What happens when all processes have gone; the step whose checkpoint is damaged now."""

    def __str__(self) -> str:
        drawn = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        words = (
            f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in drawn.items()
        )
        return f"{type(self).__name__}({', '.join(words)})"


def _at(rng: random.Random) -> float:
    """In the start-up, in training, or (a stride takes longer than its steps) while the run ends."""
    return rng.uniform(-1, 0) if rng.random() < 0.25 else rng.uniform(0, 1.3)


@dataclass(frozen=True, kw_only=True)
class Kill(Moment):
    """SIGKILL of one rank, or of both, whatever they do."""

    at: float
    ranks: tuple[int, ...]
    noun = "kill"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(at=_at(rng), ranks=rng.choice([(0,), (1,), (0, 1)]))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        scene.ranks.send(signal.SIGKILL, self.ranks)
        return phase

    def allows(self, seen: Seen) -> bool:
        return seen.only(KILLED, *LOST, EXIT_OK)


@dataclass(frozen=True, kw_only=True)
class KillInSave(Moment):
    """SIGKILL between two operations of the protocol of launch/checkpoint/commit.py."""

    noun = "kill"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        point = rng.choice(FAULT_POINTS)
        everywhere = point in ("checkpoint.begin", "checkpoint.write", "checkpoint.sync")
        victim = rng.choice(["0", "1", "*"]) if everywhere else "0"
        return cls(fault=f"{point}:kill:{victim}:{rng.randint(1, STRIDE // 2)}")

    def struck(self, seen: Seen) -> bool:
        return KILLED in seen.codes

    def allows(self, seen: Seen) -> bool:
        return (KILLED in seen.codes and seen.only(KILLED, *LOST)) or seen.only(EXIT_OK)  # OK: point not reached


@dataclass(frozen=True, kw_only=True)
class Suspend(Moment):
    """SIGSTOP of one rank, or of both, and SIGCONT soon after: the run goes on."""

    at: float
    ranks: tuple[int, ...]
    seconds: float
    noun = "suspension"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        ranks = rng.choice([(0,), (1,), (0, 1)])
        return cls(at=_at(rng), ranks=ranks, seconds=rng.uniform(0.1, 3))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        scene.ranks.send(signal.SIGSTOP, self.ranks)
        time.sleep(self.seconds)
        scene.ranks.send(signal.SIGCONT, self.ranks)
        return phase

    def allows(self, seen: Seen) -> bool:
        return seen.only(EXIT_OK)


@dataclass(frozen=True, kw_only=True)
class Freeze(Moment):
    """SIGSTOP of one rank, for longer than the watchdog of the other waits; then SIGCONT into a run that is dead."""

    at: float
    rank: int
    noun = "suspension"
    overrides = (
        *("watch.timeout=4", "watch.first_step_timeout=4", "watch.phase_timeout=4"),
        "engine.timeout=12",  # where no watchdog is awake: while the run starts and while it ends
    )

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(at=_at(rng), rank=rng.choice([0, 1]))

    def strike(self, scene: Scene) -> str:
        scene.wait(self.at)
        scene.ranks.send(signal.SIGSTOP, [self.rank])
        time.sleep(1)
        phase = scene.phase()  # only now: the other has come as far as it can
        deadline = time.monotonic() + 30
        while scene.ranks.all_running and time.monotonic() < deadline:
            time.sleep(0.05)
        scene.ranks.send(signal.SIGCONT, [self.rank])
        return phase

    def allows(self, seen: Seen) -> bool:
        hung = {rank for rank, code in enumerate(seen.codes) if code == EXIT_HUNG}
        if not hung <= seen.stacks:
            return False
        if seen.phase == "train":
            return seen.codes[1 - self.rank] == EXIT_HUNG and seen.only(*LOST)
        return seen.only(*LOST, EXIT_OK, KILLED)


@dataclass(frozen=True, kw_only=True)
class Signal(Moment):
    """A request to stop, once or twice, to one rank or to both."""

    at: float
    ranks: tuple[int, ...]
    numbers: tuple[int, ...]
    gap: float  # seconds between the two
    noun = "signal"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        numbers = rng.choices([int(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)], k=rng.choice([1, 2]))
        ranks = rng.choice([(0,), (1,), (0, 1)])
        return cls(at=_at(rng), ranks=ranks, numbers=tuple(numbers), gap=rng.uniform(0, 0.3))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        for number in self.numbers:
            scene.ranks.send(number, self.ranks)
            phase = scene.phase() if phase in TRAINING else phase  # it may have come just behind the last step
            time.sleep(self.gap)
        return phase

    def struck(self, seen: Seen) -> bool:
        return not seen.only(EXIT_OK)

    def allows(self, seen: Seen) -> bool:
        if seen.only(EXIT_STOPPED) or seen.only(EXIT_OK):
            return True
        died = any(seen.codes[rank] == -number for rank in self.ranks for number in self.numbers)
        # Before the handlers are set up, while Python imports, and after the run is over, a signal ends the process.
        return died and seen.phase not in TRAINING and seen.only(*(-n for n in self.numbers), *LOST, EXIT_OK, KILLED)


@dataclass(frozen=True, kw_only=True)
class Cut(Moment):
    """The cable between the hosts of the two ranks is pulled out, and put back before anyone has noticed."""

    at: float
    seconds: float
    noun = "cut"
    needs = "cable"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(at=_at(rng), seconds=rng.uniform(0.05, 2))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        scene.cable.pull()
        time.sleep(self.seconds)
        scene.cable.plug()
        return phase

    def allows(self, seen: Seen) -> bool:
        # While they start, ranks make connections, and a host whose link is down refuses that at once.
        return seen.only(EXIT_OK) or (seen.phase not in TRAINING and seen.only(*LOST, KILLED))


@dataclass(frozen=True, kw_only=True)
class Sever(Moment):
    """The cable is pulled out for longer than a collective waits: both ranks end by themselves."""

    at: float
    noun = "cut"
    needs = "cable"
    overrides = ("engine.timeout=3",)

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(at=_at(rng))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        scene.cable.pull()
        deadline = time.monotonic() + 30
        while scene.ranks.running and time.monotonic() < deadline:
            time.sleep(0.05)
        scene.cable.plug()
        return phase

    def allows(self, seen: Seen) -> bool:
        return seen.only(*LOST, EXIT_OK)


@dataclass(frozen=True, kw_only=True)
class FullDisk(Moment):
    """The disk of the run folder fills up, to the last byte or nearly so, and is freed some time later."""

    at: float
    left: int  # bytes; a checkpoint takes 230 thousand, a row of metrics 600
    seconds: float
    noun = "full disk"
    needs = "disk"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(at=_at(rng), left=rng.choice([0, rng.randrange(250_000)]), seconds=rng.uniform(0.1, 3))

    def strike(self, scene: Scene) -> str:
        phase = scene.wait(self.at)
        scene.disk.fill(left=self.left)
        deadline = time.monotonic() + self.seconds
        while scene.ranks.running and time.monotonic() < deadline:
            time.sleep(0.02)
        scene.disk.empty()
        return phase

    def struck(self, seen: Seen) -> bool:
        return not seen.only(EXIT_OK) or "No space left" in seen.output

    def allows(self, seen: Seen) -> bool:
        return _as_a_full_disk_may_end(seen)


@dataclass(frozen=True, kw_only=True)
class FailedWrite(Moment):
    """One operation of one save finds the disk full."""

    noun = "full disk"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        point = rng.choice(FAULT_POINTS[1:])  # nothing is written at the first
        rank = rng.choice([0, 1]) if point in ("checkpoint.write", "checkpoint.sync") else 0
        return cls(fault=f"{point}:enospc:{rank}:{rng.randint(1, STRIDE // 2)}")

    def struck(self, seen: Seen) -> bool:
        return "No space left" in seen.output

    def allows(self, seen: Seen) -> bool:
        return seen.only(EXIT_OK) or seen.only(EXIT_USER_ERROR)  # the latter if it was the last save


@dataclass(frozen=True, kw_only=True)
class FileLimit(Moment):
    """No file may grow beyond a size that is too little for a checkpoint, and soon for the metrics."""

    noun = "full disk"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        return cls(largest_file=int(10 ** rng.uniform(3, 4.9)))

    def allows(self, seen: Seen) -> bool:
        return EXIT_USER_ERROR in seen.codes and _as_a_full_disk_may_end(seen)


def _as_a_full_disk_may_end(seen: Seen) -> bool:
    """Well; or with a sentence, on the rank that could not write at least."""
    if seen.only(EXIT_OK):
        return True
    return EXIT_USER_ERROR in seen.codes and seen.only(EXIT_USER_ERROR, *LOST) and "error: " in seen.output


@dataclass(frozen=True, kw_only=True)
class Damage(Moment):
    """When the attempt is over, the newest checkpoint loses what a disk had only promised to keep."""

    harm: Literal["truncated", "flipped", "missing"]
    file: str
    noun = "damaged checkpoint"

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        files = ["MANIFEST.json", "trainer.json", *(f"state/rank-{rank:05d}.safetensors" for rank in range(WORLD))]
        return cls(harm=rng.choice(["truncated", "flipped", "missing"]), file=rng.choice(files))

    def allows(self, seen: Seen) -> bool:
        return seen.only(EXIT_OK)

    def afterwards(self, run: Path) -> int:
        step = steps_saved(run)[-1]
        path = checkpoint(run, step) / self.file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        match self.harm:
            case "truncated":
                path.write_bytes(content[: len(content) // 2])
            case "flipped":
                path.write_bytes(content)
            case "missing":
                path.unlink()
        return step


SHARES: dict[type[Moment], int] = {
    Kill: 28,
    KillInSave: 18,
    Suspend: 9,
    Freeze: 6,
    Signal: 14,
    Cut: 7,
    Sever: 4,
    FullDisk: 6,
    FailedWrite: 4,
    FileLimit: 2,
    Damage: 5,
}


def draw(seed: int, index: int, *, without: Collection[str] = ()) -> Moment:
    """Moment `index`. Those that need what this machine is `without` are drawn again; the others stay as they are."""
    rng = random.Random(f"soak {seed} {index}")
    while True:
        kind = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
        if kind.needs not in without:
            return kind.draw(rng)


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The unbroken run, which has kept a checkpoint of every step."""

    folder: Path
    contents: dict[int, Any]  # by step, as `content` gives them
    curves: list[dict[int, float]]


class Run:
    """The run that is hurt."""

    def __init__(
        self,
        folder: Path,
        whole: Whole,
        config: Path,
        options: Sequence[str],
        *,
        pace: Pace,
        cable: Cable,
        disk: Disk,
    ) -> None:
        self.folder, self.whole = folder, whole
        self.checkpoints: set[int] = set()  # steps whose checkpoint was published
        self.steps_trained = 0
        self._config, self._options = config, options
        self._pace, self._cable, self._disk = pace, cable, disk
        self._held: set[int] = set()  # steps whose checkpoint was there and whole after the last attempt
        self._damaged: set[int] = set()

    def go_on(self, moment: Moment | None, target: int) -> tuple[Seen, str]:
        """An attempt to come to `target`, and everything that must be true after it; how it ended, and a line."""
        before = self._held
        begin = time.monotonic()
        options = (*self._options, *(moment.overrides if moment else ()), f"train.steps={target}")
        with Ranks(
            self._config,
            WORLD,
            self.folder,
            *options,
            fault=moment.fault if moment else None,
            largest_file=moment.largest_file if moment else None,
            hosts=self._cable.hosts if moment and moment.needs == "cable" else None,
        ) as ranks:
            scene = Scene(ranks=ranks, run=self.folder, pace=self._pace, cable=self._cable, disk=self._disk)
            phase = moment.strike(scene) if moment else "none"
            ended = ranks.wait()
        seconds = time.monotonic() - begin
        seen = Seen(codes=ended.codes, phase=phase, stacks=self._stacks(), output=ended.output)
        words = f"{moment or 'undisturbed'}, phase {phase}, {seconds:.1f} s: exit codes {seen.codes}"
        try:
            if not (moment.allows(seen) if moment else seen.only(EXIT_OK)):
                raise Broken("these exit codes are not allowed")
            self._held = self._check(before, seen, target)
        except AssertionError as error:
            raise Broken(f"{error}\n{words}\n{seen.output}") from error
        if moment and (step := moment.afterwards(self.folder)) is not None:
            self._damaged.add(step)
            self._held.remove(step)
        return seen, f"step {max(before, default=0)} -> {max(self._held, default=0)} of {target}; {words}"

    def check_end(self, last: int) -> None:
        """Every bit, every row, and nothing left of the saves that failed."""
        assert_equal_states(state(self.folder, last), state(self.whole.folder, last))
        if [len(found) for found in _curves(self.folder)] != [last, last]:
            raise Broken("metrics.jsonl does not end with the last step")
        names = sorted(path.name for path in (self.folder / "checkpoints").iterdir())
        if names != ["latest", *(checkpoint(self.folder, step).name for step in steps_saved(self.folder)[-KEEP:])]:
            raise Broken(f"the folder of checkpoints holds {names}")

    def _check(self, before: set[int], seen: Seen, target: int) -> set[int]:
        """Raises `Broken`, or returns what is published now."""
        after = self._published()
        self._damaged -= after
        if torn := set(steps_saved(self.folder)) - after - self._damaged:
            raise Broken(f"the checkpoints of steps {sorted(torn)} are published but not whole")
        announced = {int(step) for step in re.findall(r"saved step (\d+):", seen.output)}
        announced |= {int(step) for step in re.findall(r"stopped at step (\d+) with a checkpoint", seen.output)}
        announced |= {target} if seen.only(EXIT_OK) else set()
        for step in sorted((before | announced) - after):
            if sum(newer > step for newer in after) < KEEP:
                raise Broken(f"the published checkpoint of step {step} is lost")
        for step in after:
            if content(checkpoint(self.folder, step)) != self.whole.contents[step]:
                raise Broken(f"the checkpoint of step {step} is not that of the unbroken run")
        self.checkpoints |= after | announced

        resumed, newest = max(before, default=0), max(after, default=0)
        rows = _curves(self.folder)
        for found, expected in zip(rows, self.whole.curves, strict=True):
            if list(found) != list(range(1, len(found) + 1)) or len(found) < newest:
                raise Broken(f"metrics.jsonl has not every step up to {newest} once: {list(found)}")
            if wrong := [step for step in found if found[step] != expected[step]]:
                raise Broken(f"metrics.jsonl is not that of the unbroken run at steps {wrong}")
        if started := re.search(r"starts at +step (\d+)", seen.output):
            if int(started[1]) != resumed:
                raise Broken(f"it began at step {started[1]}, but the newest whole checkpoint was of step {resumed}")
            trained = len(rows[0]) - resumed
            self.steps_trained += trained
            step = _step_seconds(self.folder, trained)  # other work on the machine comes and goes
            self._pace = replace(self._pace, step=step or self._pace.step)
        return after

    def _published(self) -> set[int]:
        return {step for step in steps_saved(self.folder) if content(checkpoint(self.folder, step)) is not None}

    def _stacks(self) -> set[int]:
        paths = {rank: self.folder / f"health/rank-{rank:05d}.stacks.txt" for rank in range(WORLD)}
        return {rank for rank, path in paths.items() if path.exists() and path.stat().st_size}


def content(folder: Path) -> dict[str, Any] | None:
    """What makes a checkpoint the one it is, or None if a file is not what its manifest says.

    Made with json and hashlib alone, so that it does not rest on what is tested.
    """
    try:
        files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
        for name, written in files.items():
            data = (folder / name).read_bytes()
            if len(data) != written["bytes"] or hashlib.sha256(data).hexdigest() != written["sha256"]:
                return None
    except (OSError, ValueError, KeyError):
        return None
    scalars = json.loads((folder / "trainer.json").read_bytes())
    del scalars["progress"]["seconds"]
    return {"scalars": scalars} | {name: file["sha256"] for name, file in files.items() if name != "trainer.json"}


def train_whole(config: Path, folder: Path, options: Sequence[str], last: int) -> Whole:
    """The run to compare with: the same experiment, `last` steps in one go."""
    kept = ("checkpoint.every_steps=1", f"checkpoint.keep_last={last}")
    print(f"the unbroken run of {last} steps, to compare with", flush=True)
    with Ranks(config, WORLD, folder, *options, f"train.steps={last}", *kept) as ranks:
        while ranks.running:
            time.sleep(0.5)
            if sys.stdout.isatty():
                print(f"\rstep {max(steps_saved(folder), default=0)}", end="\r", flush=True)
        ended = ranks.wait()
    assert ended.codes == [EXIT_OK] * WORLD, ended.output
    contents = {step: content(checkpoint(folder, step)) for step in steps_saved(folder)}
    return Whole(folder=folder, contents=contents, curves=_curves(folder))


def rehearse(config: Path, folder: Path, options: Sequence[str]) -> Pace:
    begin = time.time()
    train(config, WORLD, folder, *options, f"train.steps={STRIDE}")
    step = _step_seconds(folder, STRIDE)
    assert step is not None
    return Pace(start=curve(folder, "time")[1] - begin - step, step=step)


def _step_seconds(run: Path, steps: int) -> float | None:
    """The median of the newest `steps` steps; None if there are not as many."""
    times = list(curve(run, "time").values()) if metrics_path(run).exists() else []
    times = times[len(times) - steps :]
    return statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 3 else None


def _curves(run: Path) -> list[dict[int, float]]:
    return [curve(run, name) if metrics_path(run).exists() else {} for name in ("loss", "grad_norm")]


# --- the command -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    line: str
    complete: bool  # every moment that was asked for was lived through
    steps_trained: int


def soak(
    folder: Path, indices: Sequence[int], *, seed: int, minutes: float = math.inf, strategy: str = "fsdp2"
) -> Summary:
    """Live through these moments in `folder`. Raises `Broken`, with the recipe, at the first that breaks something."""
    begin = time.monotonic()
    (folder / "run").mkdir(parents=True)
    config = write_tiny(folder).prime
    options = (*OPTIONS, f"engine.strategy={strategy}")
    done: list[Moment] = []
    missed = 0
    with ExitStack() as stack:
        cable, disk = Cable(), Disk(folder / "run", f"size={16 * 2**10 + 64 * len(indices)}k")
        without = {name for name, place in (("cable", cable), ("disk", disk)) if not _is_permitted(stack, place)}
        stack.enter_context(_kept_if_broken(folder / "run"))
        whole = train_whole(config, folder / "whole", options, STRIDE * (indices[-1] + 2))
        pace = rehearse(config, folder / "rehearsal", options)
        run = Run(folder / "run", whole, config, options, pace=pace, cable=cable, disk=disk)
        if indices[0] > 0:
            run.go_on(None, STRIDE * indices[0])
        target, first = STRIDE * indices[0], time.monotonic()
        for index in indices:
            if time.monotonic() > begin + 60 * minutes:
                break
            moment, target = draw(seed, index, without=without), STRIDE * (index + 1)
            try:
                seen, line = run.go_on(moment, target)
            except AssertionError as error:
                recipe = f"python -m tests.soak --seed {seed} --strategy {strategy} --only {index}"
                raise Broken(f"{error}\nsoak: broken at moment {index} of seed {seed}; alone: {recipe}") from error
            done.append(moment)
            missed += not moment.struck(seen)
            left = (time.monotonic() - first) / len(done) * (len(indices) - len(done))
            print(f"{len(done)}/{len(indices)}, {_duration(left)} to go | moment {index}: {line}", flush=True)
        last = target + STRIDE
        run.go_on(None, last)
        run.check_end(last)
    kinds = sorted(Counter(moment.noun for moment in done).items())
    line = (
        f"soak: {len(done)} moments ({', '.join(f'{n} {noun}' + 's' * (n != 1) for noun, n in kinds)}) in "
        f"{_duration(time.monotonic() - begin)}, seed {seed}, {strategy} on {WORLD} ranks: 0 of {len(run.checkpoints)} "
        f"published checkpoints lost, 0 wrong bits, {run.steps_trained} steps trained for a run of {last}"
    )
    if missed:
        line += f"; {missed} of the moments struck nothing: the attempt was over, or nothing was written just then"
    if without:
        line += f"; left out for want of permission: what needs a {' or a '.join(sorted(without))} of its own"
    if len(done) < len(indices):
        line += f"; {minutes:g} minutes were too short for {len(indices)} moments"
    return Summary(line=line, complete=len(done) == len(indices), steps_trained=run.steps_trained)


def _is_permitted(stack: ExitStack, place: Cable | Disk) -> bool:
    """Enter it for the length of `stack`, if this process may."""
    try:
        stack.enter_context(place)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def _kept_if_broken(run: Path) -> Iterator[None]:
    """A copy of the run beside it, because what lies on a disk of its own goes with that."""
    try:
        yield
    except AssertionError:
        shutil.copytree(run, run.with_name("broken"))
        raise


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Hurt a training run at random moments.")
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="K", help="moment K alone")
    parser.add_argument("--minutes", type=float, default=45, help="no new moment after this time")
    parser.add_argument("--strategy", default="fsdp2", help="engine.strategy: fsdp2, zero2, ...")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the runs go, and stay")
    arguments = parser.parse_args()
    indices = range(arguments.moments) if arguments.only is None else [arguments.only]
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="unmask-soak-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that ranks, cable and disk go too
    try:
        summary = soak(folder, indices, seed=arguments.seed, minutes=arguments.minutes, strategy=arguments.strategy)
    except Broken as error:
        print(f"{error}\nthe runs are kept in {folder}", flush=True)
        return 1
    if arguments.keep is None:
        shutil.rmtree(folder)
    print(summary.line, flush=True)
    return 0 if summary.complete else 1


if __name__ == "__main__":
    sys.exit(main())

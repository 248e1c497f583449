"""One save: the protocol by which all ranks together turn chunks in memory into a checkpoint, or into nothing.

Each step marked with who takes it:
  (rank 0) sweep what dead runs left; make step_N.tmp-<attempt>; tell the others
  (all)    write state/rank-R.safetensors, fsync, size and sha256
  (rank 0) hear of every rank; write trainer.json and, last, MANIFEST.json; fsync; rename to step_N; fsync the parent
  (rank 0) point `latest` at it, retire old ones; tell the others how it ended
Rank 0 tells its errors like its results, so that no rank waits for one that has left, and all report the same end.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from launch.checkpoint import layout, shards
from launch.checkpoint.layout import Box, Manifest, SavedFile, SavedTensor
from launch.errors import CheckpointError
from launch.faults import fault

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Where a test may strike, in the order of the protocol. Every rank passes `write` and `sync`, rank 0 all of them.
FAULT_POINTS = tuple(
    f"checkpoint.{name}"
    for name in (
        "begin", "mkdir", "write", "sync", "gather", "scalars", "manifest", "before_rename", "after_rename",
        "after_parent_sync", "after_latest", "after_trash", "end",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """A committed checkpoint and what it cost. Seconds are those of the slowest rank."""

    step: int
    path: Path
    bytes: int
    wait_seconds: float  # training stood still for the save before this one
    stage_seconds: float  # training stood still for the copy to host memory
    write_seconds: float  # beside training, if asynchronous


class SaveFailure(CheckpointError):
    """A save that did not become a checkpoint; the older ones are untouched. The same on every rank."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason

    def __str__(self) -> str:
        return f"the checkpoint of step {self.step} was not saved: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of a save. `described` is the global dtype and shape of ALL tensors, `boxes` what it owns."""

    step: int
    scalars: str
    described: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    boxes: dict[str, Box]
    chunks: dict[str, Tensor]
    wait_seconds: float
    stage_seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank tells rank 0 when its part is on disk, or is not."""

    error: str | None
    file: SavedFile | None  # None if this rank owns nothing
    boxes: dict[str, Box]
    fingerprint: str  # of `described`, which must be the same on all ranks
    wait_seconds: float
    stage_seconds: float


@dataclass(frozen=True, kw_only=True)
class Saver:
    """`group` is a gloo group that nothing else uses: this runs in a thread beside training."""

    folder: Path
    rank: int
    world_size: int
    group: dist.ProcessGroup
    keep_last: int
    keep_every: int | None
    hashed: bool

    def save(self, job: Job, damaged: Set[int]) -> SaveResult | SaveFailure:
        """Collective. `damaged` steps do not count as kept.

        RuntimeError if a peer is gone: nobody is left to agree with, and the checkpoint may have been committed or not.
        """
        try:
            outcome = self._write_and_commit(job, damaged)
        except Exception as error:  # of the group itself; those of the protocol have become a SaveFailure
            raise RuntimeError(f"saving step {job.step}: another rank did not answer; see its log") from error
        if self.rank == 0:
            if isinstance(outcome, SaveResult):
                logger.info("saved step %d: %s in %.1f s", outcome.step, size(outcome.bytes), outcome.write_seconds)
            else:
                logger.error("%s", outcome)
        return outcome

    def _write_and_commit(self, job: Job, damaged: Set[int]) -> SaveResult | SaveFailure:
        start = time.perf_counter()
        fault("checkpoint.begin")
        attempt, problem = self._from_rank_0(lambda: self._open_attempt(job.step))
        if attempt is None:
            return SaveFailure(job.step, problem)
        report = self._write_part(self.folder / attempt, job)
        reports: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(report, reports, dst=0, group=self.group)
        result, problem = self._from_rank_0(lambda: self._commit(attempt, job, reports or [], damaged, start))
        return result if result is not None else SaveFailure(job.step, problem)

    def _from_rank_0(self, function: Callable[[], T]) -> tuple[T | None, str]:
        """Rank 0 runs `function`; every rank gets (its value, "") or (None, the reason and the remedy)."""
        told: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                told[0] = function()
            except Exception as error:  # becomes the SaveFailure of every rank
                sweep(self.folder)  # before the remedy looks at how much is free
                told[1] = f"{_words(error)}; {remedy(_words(error), self.folder)}"
        dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0], told[1]

    def _open_attempt(self, step: int) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        # A fresh name each time: other nodes may still remember (NFS) that an old one did, or did not, exist.
        name = f"{layout.step_name(step)}.tmp-{os.getpid()}-{time.time_ns()}"
        (self.folder / name / layout.STATE).mkdir(parents=True)
        fault("checkpoint.mkdir")
        return name

    def _write_part(self, folder: Path, job: Job) -> Report:
        error, file, path = None, None, folder / layout.shard_name(self.rank)
        try:
            if job.chunks:
                shards.write_shard(path, job.chunks)
            fault("checkpoint.write")
            if job.chunks:
                layout.sync(path)
                file = SavedFile(bytes=path.stat().st_size, sha256=layout.file_sha256(path) if self.hashed else None)
            fault("checkpoint.sync")
        except Exception as caught:  # rank 0 waits for this report, whatever happened
            error = _words(caught)
        return Report(
            error=error,
            file=file,
            boxes=job.boxes,
            fingerprint=hashlib.sha256(repr(sorted(job.described.items())).encode()).hexdigest(),
            wait_seconds=job.wait_seconds,
            stage_seconds=job.stage_seconds,
        )

    def _commit(self, attempt: str, job: Job, reports: list[Report], damaged: Set[int], start: float) -> SaveResult:
        """Rank 0 alone."""
        if errors := [f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error]:
            raise CheckpointError("; ".join(errors[:3]))
        for rank, report in enumerate(reports):
            if report.fingerprint != reports[0].fingerprint:
                raise CheckpointError(
                    f"rank {rank} saves tensors of other names, shapes or dtypes than rank 0, so one of them is wrong"
                )
        folder, final = self.folder / attempt, self.folder / layout.step_name(job.step)
        fault("checkpoint.gather")
        layout.write_synced(folder / layout.SCALARS, job.scalars)
        fault("checkpoint.scalars")
        manifest = self._manifest(folder, job, reports)
        layout.write_synced(folder / layout.MANIFEST, layout.encode_manifest(manifest))
        fault("checkpoint.manifest")
        layout.sync(folder / layout.STATE)
        layout.sync(folder)
        if final.exists():  # damaged, or of a line that was given up: neither held nor loaded by this run
            _delete(final)
        fault("checkpoint.before_rename")
        folder.rename(final)
        fault("checkpoint.after_rename")
        layout.sync(self.folder)
        fault("checkpoint.after_parent_sync")
        result = SaveResult(
            step=job.step,
            path=final,
            bytes=manifest.bytes,
            wait_seconds=max(report.wait_seconds for report in reports),
            stage_seconds=max(report.stage_seconds for report in reports),
            write_seconds=time.perf_counter() - start,
        )
        try:
            self._retire(job.step, damaged)
        except OSError as error:  # the checkpoint is committed: this must not make it a failure
            logger.warning("saved step %d, but could not tidy up %s: %s", job.step, self.folder, error)
        return result

    def _manifest(self, folder: Path, job: Job, reports: list[Report]) -> Manifest:
        scalars = (folder / layout.SCALARS).stat().st_size
        files = {layout.SCALARS: SavedFile(bytes=scalars, sha256=layout.file_sha256(folder / layout.SCALARS))}
        chunks: dict[str, list[tuple[str, Box]]] = {name: [] for name in job.described}
        for rank, report in enumerate(reports):
            if report.file is not None:
                files[layout.shard_name(rank)] = report.file
            for name, box in report.boxes.items():
                chunks[name].append((layout.shard_name(rank), box))
        tensors = {
            name: SavedTensor(dtype=dtype, shape=shape, chunks=tuple(chunks[name]))
            for name, (dtype, shape) in job.described.items()
        }
        for name, tensor in tensors.items():
            layout.check_tiling(name, tensor)  # a state that was sharded wrongly is found now, not at the next load
        return Manifest(step=job.step, world_size=self.world_size, files=files, tensors=tensors)

    def _retire(self, step: int, damaged: Set[int]) -> None:
        new = self.folder / f"{layout.LATEST}.new"
        layout.write_synced(new, layout.step_name(step) + "\n")
        new.replace(self.folder / layout.LATEST)
        fault("checkpoint.after_latest")
        # Newer ones belong to a line that was given up, damaged ones may be of use to a person: both stay, uncounted.
        steps = [old for old in layout.committed_steps(self.folder) if old <= step and old not in damaged]
        for old in steps[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every != 0:
                _delete(self.folder / layout.step_name(old))
        fault("checkpoint.end")


def sweep(folder: Path) -> None:
    """Remove unfinished saves and deletions. Only while no save is in flight."""
    for path in layout.leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def remedy(words: str, folder: Path) -> str:
    """What to do about an operating system error, recognised by its number in Python's words or safetensors'."""
    match = re.search(r"(?:\[Errno |os error )(\d+)", words)
    code = int(match[1]) if match else 0
    if code == ENOSPC:
        free = shutil.disk_usage(_existing(folder)).free
        return f"free space at {folder} ({size(free)} are free now) or keep fewer checkpoints (checkpoint.keep_last)"
    if code == EDQUOT:
        return f"your quota at {folder} is used up; delete files there, or choose a run folder elsewhere"
    if code in (EACCES, EPERM, EROFS):
        return f"make {folder} writable, or choose a run folder elsewhere"
    if code == EFBIG:
        return "files may not become that large here; raise `ulimit -f`, or use more ranks (one file a rank)"
    return f"older checkpoints in {folder} are as they were"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _delete(path: Path) -> None:
    """Out of sight by one rename, then gone."""
    trash = path.with_name(layout.TRASH + path.name)
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    fault("checkpoint.after_trash")
    shutil.rmtree(trash)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

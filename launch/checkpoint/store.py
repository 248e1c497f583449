"""The checkpoints of one run: save beside training, find the newest whole one, load it at any world size.

A save copies what this rank owns to host memory and returns; a thread takes the copy through the protocol of commit.py
on a gloo group of its own, because a collective of that thread on a group shared with training would interleave with
training's and hang both (seen with torch 2.13). One save is in flight at most.

A save that fails (a full disk, a quota) fails on all ranks alike, leaves every older checkpoint as it was, removes what
it wrote, and comes back to the caller as a `SaveFailure`: whether training goes on is the caller's decision. A save in
which a rank is lost raises RuntimeError where it is joined: the run is over, and may be started again.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoint import layout, shards
from launch.checkpoint.commit import Job, SaveFailure, Saver, SaveResult
from launch.checkpoint.layout import Verify
from launch.checkpoint.preflight import Runtime, preflight
from launch.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints in `folder`. Every method is collective.

    The `keep_last` newest checkpoints stay, and every one whose step is a multiple of `keep_every`. `verify` says how
    closely a checkpoint is looked at before it is believed, and whether hashes are made when saving.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        *,
        asynchronous: bool,
        keep_last: int = 2,
        keep_every: int | None = None,
        verify: Verify = "hash",
    ) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last = {keep_last}, but the newest checkpoint is always kept; use 1 or more")
        self.folder, self.runtime, self.asynchronous = Path(folder), runtime, asynchronous
        self.keep_last = keep_last
        self.verify: Verify = verify
        self._saver = Saver(
            folder=self.folder,
            rank=runtime.rank,
            world_size=runtime.world_size,
            group=runtime.new_control_group(),
            keep_last=keep_last,
            keep_every=keep_every,
            hashed=verify == "hash",
        )
        self._staging = shards.Staging()
        self._thread: threading.Thread | None = None
        self._landed: SaveResult | SaveFailure | RuntimeError | None = None  # by the thread, until it is joined
        self._unreported: list[SaveResult | SaveFailure] = []
        self._held_step: int | None = None  # saved or loaded last by this store, so its state is on disk
        self._damaged: set[int] = set()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], *, block: bool = False
    ) -> list[SaveResult | SaveFailure]:
        """Save `tensors` (canonical name -> plain tensor or DTensor) and `scalars` (JSON-able; rank 0's are written).

        Waits for the save before this one. Returns the outcomes not yet reported, oldest first and the same on every
        rank: of the save before and, if `block` or if the store is not asynchronous, of this one. The tensors may be
        changed as soon as this returns. A step that this store has just saved or loaded is not written again.
        """
        start = time.perf_counter()
        self._join()
        if step == self._held_step:
            return self._report()
        joined = time.perf_counter()
        boxes = shards.owned_boxes(tensors, self.runtime.rank, self.runtime.world_size)
        chunks = {name: shards.local_tensor(tensors[name]) for name in boxes}
        in_background = self.asynchronous and not block
        job = Job(
            step=step,
            scalars=json.dumps(scalars, indent=1),
            described={name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
            boxes=boxes,
            chunks=self._staging.copy(chunks) if in_background else chunks,
            wait_seconds=joined - start,
            stage_seconds=time.perf_counter() - joined,
        )
        # Not a daemon: when training dies of its own error, the save in flight still completes.
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}")
        self._thread.start()
        if not in_background:
            self._join()
        return self._report()

    def wait(self) -> list[SaveResult | SaveFailure]:
        """Wait for the save in flight; the outcomes not yet reported. Call it before the process groups end."""
        self._join()
        return self._report()

    def damage(self, step: int) -> str | None:
        """Why the checkpoint of `step` cannot be believed, or None. Hashing is shared out over the ranks."""
        self._join()
        path = self.folder / layout.step_name(step)

        def examine() -> str | None:
            try:
                manifest = layout.read_manifest(path)
                layout.check_files(path, manifest, "size")
                mine = list(manifest.files)[self.runtime.rank :: self.runtime.world_size]
                layout.check_files(path, manifest, self.verify, mine)
            except CheckpointError as error:
                return str(error)
            return None

        return next((problem for problem in self.runtime.gather(examine()) if problem is not None), None)

    def latest_valid(self) -> int | None:
        """The newest step whose checkpoint is whole; None if there is no checkpoint at all.

        Damaged ones are passed over with a warning that names file and reason. If all are damaged it is an error: a
        run that has checkpoints must not begin again in silence.
        """
        self._join()
        steps = self.runtime.decide(lambda: layout.committed_steps(self.folder))
        problems = []
        for step in reversed(steps):
            problem = self.damage(step)
            if problem is None:
                self._warn_if_latest_differs(step)
                return step
            self._damaged.add(step)
            problems.append(problem)
            if self.runtime.rank == 0:
                logger.warning("skipping the damaged checkpoint of step %d: %s", step, problem)
        if problems:
            raise CheckpointError(
                f"{self.folder}: none of its {len(problems)} checkpoints is whole ({'; '.join(problems)}); restore one "
                "from a copy, or move the folder away to start from step 0"
            )
        return None

    def load(
        self, step: int, tensors: Mapping[str, Tensor], *, prefixes: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Fill `tensors` in place from the checkpoint of `step`; its scalars.

        Sharding and world size may differ from those it was saved with. With `prefixes` (for example `("ema.",)`) only
        names with one of them take part. `CheckpointError`, on all ranks, unless names, shapes and dtypes agree.
        """
        self._join()
        path = self.folder / layout.step_name(step)

        def read() -> dict[str, Any]:
            manifest = layout.read_manifest(path)
            layout.check_files(path, manifest, "size")
            shards.fill(path, manifest, tensors, prefixes)
            return layout.read_scalars(path)

        scalars = self.runtime.together(read)
        if prefixes is None:
            self._held_step = step
        return scalars

    def set_aside_after(self, step: int) -> list[int]:
        """Rename every checkpoint newer than `step` to `abandoned-step_N`, for a run that goes on from an older one.

        Otherwise the next restart would find them newest and follow the abandoned line. Returns their steps.
        """
        self._join()

        def rename() -> list[int]:
            newer = [other for other in layout.committed_steps(self.folder) if other > step]
            for other in newer:
                path = self.folder / layout.step_name(other)
                path.rename(self.folder / f"abandoned-{path.name}-{time.time_ns()}")
            return newer

        return self.runtime.decide(rename)

    def preflight(self, tensors: Mapping[str, Tensor]) -> None:
        """Prove, before the first step, that every rank can write here and that one checkpoint of `tensors` fits.

        `ClusterError` if the ranks do not see the same folder, `CheckpointError` if it cannot be written or is full.
        """
        self._join()
        preflight(self.folder, self.runtime, needed_bytes=shards.total_bytes(tensors), keep_last=self.keep_last)

    def _warn_if_latest_differs(self, step: int) -> None:
        if self.runtime.rank == 0 and (self.folder / layout.LATEST).exists():
            hint = (self.folder / layout.LATEST).read_text(errors="replace").strip()
            if hint != layout.step_name(step):
                logger.warning(
                    "%s says %r, but the newest whole checkpoint is that of step %d", layout.LATEST, hint, step
                )

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        assert self._landed is not None
        if isinstance(self._landed, RuntimeError):
            raise self._landed
        if isinstance(self._landed, SaveResult):
            self._held_step = self._landed.step
            self._damaged.discard(self._landed.step)
        self._unreported.append(self._landed)
        self._landed = None

    def _report(self) -> list[SaveResult | SaveFailure]:
        outcomes, self._unreported = self._unreported, []
        return outcomes

    def _run(self, job: Job) -> None:
        try:
            self._landed = self._saver.save(job, frozenset(self._damaged))
        except RuntimeError as error:  # a peer is gone: raised by `_join`, in the thread that trains
            self._landed = error

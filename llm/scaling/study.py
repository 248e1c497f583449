"""The folder of a study: which of its points are done, which have failed, and which a changed ladder makes differently.

STUDY/<family>/<size>-<budget>-s<seed>/   an ordinary run folder, and
    point.json                            which point it is, and all settings that decide its result
    experiment.yaml                       what `python -m llm.scaling.train` reads
    point.log                             what it printed, over all restarts (job.log: in a job)
    result.json                           written last: the point is done
    failure.json                          or why it is not
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import config as configs
from launch.errors import ConfigError
from launch.stop import EXIT_DIVERGED
from llm.scaling.plan import PlannedPoint
from llm.scaling.point import FACTS, RESULT, read_facts, read_hash, write_json

FAILURE = "failure.json"


@contextlib.contextmanager
def one_at_a_time(study: Path) -> Iterator[None]:
    """The kernel drops the lock with the process, of whatever cause it dies."""
    study.mkdir(parents=True, exist_ok=True)
    with (study / "study.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another `unmask scaling run` is at work in {study}; wait for it, or use another --out"
            ) from None
        yield


def is_finished(one: PlannedPoint, study: Path) -> bool:
    return read_hash(study / one.point.name / RESULT) == one.config_hash


def refuse_or_restart_changed(planned: Sequence[PlannedPoint], study: Path, *, restart: bool) -> None:
    """`ConfigError` that names each point which has begun with other settings; with `restart` delete them instead."""
    changed = {}
    for one in planned:
        folder = study / one.point.name
        has_begun = (folder / RESULT).exists() or any((folder / "checkpoints").glob("step_*"))
        if not has_begun:
            continue
        old = read_facts(folder)["identity"] if (folder / FACTS).exists() else {}
        if differences := configs.difference(old, one.identity()):
            words = [f"{key} = {before!r}, now {now!r}" for key, (before, now) in differences.items()]
            changed[folder] = ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
    if restart:
        for folder in changed:
            shutil.rmtree(folder)
    elif changed:
        lines = [f"  {folder}: {words}" for folder, words in changed.items()]
        raise ConfigError(
            f"{len(changed)} of {len(planned)} points in {study} have begun with other settings than the ladder's; "
            "train them again with --restart-changed, or use another --out:\n" + "\n".join(lines)
        )


def prepare(one: PlannedPoint, folder: Path, *, keep_checkpoints: str) -> None:
    """Write what the point's own process reads."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "point": configs.to_dict(one.point),
        "config_hash": one.config_hash,
        "judged": one.judged,
        "keep_checkpoints": keep_checkpoints,
        "identity": one.identity(),
    }
    write_json(folder / FACTS, facts)
    partial = folder / "experiment.yaml.tmp"
    partial.write_text(yaml.safe_dump(one.experiment, sort_keys=False, width=120))
    partial.replace(folder / "experiment.yaml")


def read_failure(one: PlannedPoint, folder: Path) -> dict[str, Any] | None:
    """Why this very point is not done; None if it did not fail, or has other settings now."""
    path = folder / FAILURE
    failure = json.loads(path.read_text()) if path.exists() else None
    return failure if failure is not None and failure["config_hash"] == one.config_hash else None


def write_failure(folder: Path, *, config_hash: str, code: int, reason: str) -> None:
    write_json(folder / FAILURE, {"config_hash": config_hash, "code": code, "reason": reason})


def to_do(planned: Sequence[PlannedPoint], study: Path) -> list[PlannedPoint]:
    """Points without a result, but for those that diverged: the same would happen again."""
    waiting = []
    for one in planned:
        failure = read_failure(one, study / one.point.name)
        if not is_finished(one, study) and (failure is None or failure["code"] != EXIT_DIVERGED):
            waiting.append(one)
    return waiting

"""A short soak, and what the soak would say if something were lost."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cable import Cable
from tests.disk import Disk
from tests.runs import checkpoint, steps_saved, write_tiny
from tests.soak import OPTIONS, STRIDE, Broken, Pace, Run, Whole, draw, soak, train_whole

SHORT = (*OPTIONS, "engine.strategy=fsdp2")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_nothing_is_lost_at_random_moments_and_no_bit_changes(tmp_path: Path, strategy: str) -> None:
    summary = soak(tmp_path, range(12), seed=0, strategy=strategy)
    assert summary.complete and summary.steps_trained >= 13 * STRIDE, summary.line


def test_a_moment_depends_on_seed_and_index_alone() -> None:
    moments = [draw(7, index) for index in range(200)]
    assert [draw(7, index) for index in reversed(range(200))] == moments[::-1]
    assert moments != [draw(8, index) for index in range(200)]
    poorer = [draw(7, index, without={"cable", "disk"}) for index in range(200)]
    assert not any(moment.needs for moment in poorer)
    assert all(moment.needs or moment == other for moment, other in zip(moments, poorer, strict=True))


# --- what it would say -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny")).prime


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return train_whole(config, tmp_path_factory.mktemp("whole"), SHORT, 2 * STRIDE)


def lose(run: Path) -> None:
    shutil.rmtree(checkpoint(run, steps_saved(run)[1]))


def tear(run: Path) -> None:
    (checkpoint(run, steps_saved(run)[-1]) / "trainer.json").write_text("{}")


def change_a_bit(run: Path) -> None:
    """Of a weight, before it was hashed: a mistake that no checksum finds."""
    folder = checkpoint(run, steps_saved(run)[-1])
    name = "state/rank-00000.safetensors"
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    manifest["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    del manifest["checksum"]
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps({"checksum": checksum, **manifest}))


def repeat_a_row(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STRIDE, "loss": 1.0, "grad_norm": 1.0}) + "\n")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lose, "the published checkpoint of step 10 is lost"),
        (tear, "published but not whole|it began at step 10"),
        (change_a_bit, "is not that of the unbroken run"),
        (repeat_a_row, "steps"),
    ],
)
def test_a_loss_is_found(config: Path, whole: Whole, tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    cable, disk = Cable(), Disk(tmp_path / "run", "")  # neither is used
    run = Run(tmp_path / "run", whole, config, SHORT, pace=Pace(start=1.0, step=0.1), cable=cable, disk=disk)
    run.go_on(None, STRIDE)
    harm(run.folder)
    with pytest.raises(Broken, match=words):
        run.go_on(None, STRIDE + 2)

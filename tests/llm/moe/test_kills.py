"""`unmask moe` killed or out of disk: finished layers stay, and what comes out in the end is the same bytes."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import runtime as runtimes
from launch.errors import CheckpointError
from launch.runtime import Runtime
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationText
from llm.moe.merge import merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import open_source
from tests import mixtures
from tests.disk import Disk
from tests.processes import spawn
from tests.shape_true import byte_tokenizer, write_shape

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk of its own")
REDUCED: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 1280, "num_attention_heads": 8}  # 63 MB a layer
COMMAND = "import sys; from llm.moe.command_line import main; sys.exit(main(sys.argv[1:]))"


def write_text(file: Path) -> Path:
    draw = random.Random(0)
    texts = (" ".join(str(draw.randrange(10**6)) for _ in range(40)) for _ in range(60))
    file.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each finished layer is: one that is written anew is another."""
    layers = folder.glob("layer_*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in layers}


# --- at every operation on a file -------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("verb", "least"), [("calibrate", 8), ("merge", 6), ("export", 5)])
def test_killed_at_any_operation_on_a_file_a_verb_ends_in_the_same_bytes(verb: str, least: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    mixtures.mixture("qwen3_moe", num_hidden_layers=3, vocab_size=256).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    write_text(tmp_path / "text.jsonl")
    before = contents(model)
    assert spawn(kill_verb, 1, tmp_path, verb, group=False, timeout=500)[0] >= least
    assert contents(model) == before


def kill_verb(folder: Path, verb: str) -> int:
    """At how many moments `verb` was killed; the verbs before it have peace."""
    text, statistics, merged = (str(folder / name) for name in ("text.jsonl", "statistics", "merged"))
    model, exported = str(folder / "model"), str(folder / "exported" / "compact")
    commands = {
        "calibrate": ("calibrate", model, "--data", text, "--blocks=2", "--block-length=16", "--out", statistics),
        "merge": ("merge", model, "--statistics", statistics, "experts=5", "--out", merged),
        "export": ("export", merged, "--no-verify", "--to", exported),
    }
    for name, command in commands.items():
        if name == verb:
            return kill_everywhere(command)
        assert forked(command, None) == 0
    raise AssertionError("unreachable")


def kill_everywhere(command: Sequence[str]) -> int:
    """Leaves the folder of the command as a run that nobody kills does; at how many moments one was killed."""
    folder = Path(command[-1])
    assert forked(command, None) == 0
    whole = contents(folder)
    for moment in itertools.count(1):
        shutil.rmtree(folder)
        status = forked(command, moment)
        if status == 0:
            return moment - 1
        assert status == -signal.SIGKILL
        kept = finished(folder)
        for torn in folder.glob("*.tmp"):
            torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        if folder.exists() and command[0] == "export":
            assert contents(folder) == whole, "a folder that has its name is whole"
            continue
        assert forked(command, None) == 0
        assert contents(folder) == whole, moment
        assert finished(folder).items() >= kept.items(), f"killed at {moment}, a finished layer was written again"
    raise AssertionError("unreachable")


def forked(argv: Sequence[str], moment: int | None) -> int:
    """The exit code of the command, killed before its `moment`-th operation on a file (None: of whoever else)."""
    child = os.fork()
    if child == 0:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "UNMASK_RENDEZVOUS_FILE"):
            os.environ.pop(name)
        if moment is not None:
            sys.addaudithook(_killer(moment, str(Path(argv[-1]).parent)))
        from llm.moe.command_line import main

        try:
            os._exit(main(argv))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killer(moment: int, folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """Ends this process at its `moment`-th change in `folder`: safetensors writes unseen, but renames are seen."""
    passed = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "shutil.copyfile", "os.chmod")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and str(arguments[0]).startswith(folder) and next(passed) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


# --- at moments that nobody chose ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_from_outside_again_and_again_calibration_and_merge_end_in_the_same_bytes(tmp_path: Path) -> None:
    model, text = tmp_path / "model", write_text(tmp_path / "text.jsonl")
    write_shape(model, "mixtral-8x7b", layers=3, **REDUCED)
    before, draw = contents(model), random.Random(0)
    calibration = ["calibrate", str(model), "--data", str(text), "--blocks=2", "--block-length=256", "--out"]
    assert run([*calibration, str(tmp_path / "statistics")], tmp_path / "statistics") == 0
    merging = ["merge", str(model), "--statistics", str(tmp_path / "statistics"), "experts=3", "fit=mixture", "--out"]
    assert run([*merging, str(tmp_path / "merged")], tmp_path / "merged") == 0
    for argv, name in ((calibration, "statistics"), (merging, "merged")):
        folder, kept = tmp_path / f"{name}-killed", {}
        for layer in (0, 1):
            code = run([*argv, str(folder)], folder, kill_after=layer, delay=draw.uniform(0, 0.3))
            assert code in (-signal.SIGKILL, 0)
            assert finished(folder).items() >= kept.items()
            kept = finished(folder)
            assert len(kept) > layer
        assert run([*argv, str(folder)], folder) == 0
        assert finished(folder).items() >= kept.items()
        assert contents(folder) == contents(tmp_path / name)
    assert contents(model) == before


def run(argv: Sequence[str], folder: Path, *, kill_after: int | None = None, delay: float = 0.0) -> int:
    """The exit code of a command of its own, killed `delay` seconds after a layer was finished in `folder`."""
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *argv], stderr=subprocess.DEVNULL)
    try:
        if kill_after is not None:
            file = folder / f"layer_{kill_after:03d}.safetensors"
            while process.poll() is None and not file.exists():
                time.sleep(0.01)
            time.sleep(delay)
            process.kill()
        return process.wait(timeout=300)
    finally:
        process.kill()


# --- a full disk -----------------------------------------------------------------------------------------------------

TEXT = CalibrationText(blocks=mixtures.tokens(rows=3, length=24), sources=("here",) * 3)


def verbs(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Each verb as a function of where it writes."""
    runtime = Runtime(runtimes.Place(), torch.device("cpu"), None, None)  # type: ignore[arg-type]
    mixtures.mixture("qwen3_moe", num_hidden_layers=3).save_pretrained(folder / "model")
    source = open_source(folder / "model")
    calibrate(source, lambda: TEXT, folder / "statistics", runtime)
    return {
        "calibrate": lambda out: calibrate(source, lambda: TEXT, out, runtime),
        "merge": lambda out: merge(source, folder / "statistics", MergeConfig(experts=5), out, runtime),
    }


@needs_root
@pytest.mark.parametrize("verb", ["calibrate", "merge"])
def test_a_full_disk_is_one_sentence_and_finished_layers_are_gone_on_from(verb: str, tmp_path: Path) -> None:
    write = verbs(tmp_path)[verb]
    write(tmp_path / "elsewhere")
    whole, before = contents(tmp_path / "elsewhere"), contents(tmp_path / "model")
    layer = len(whole["layer_000.safetensors"])
    others = sum(-(-len(value) // 4096) * 4096 for name, value in whole.items() if not name.startswith("layer"))
    with Disk(tmp_path / "disk", "size=4m") as disk:
        disk.fill(left=others + 2 * 4096 + int(1.5 * layer))
        out = tmp_path / "disk" / "out"
        with pytest.raises(CheckpointError, match=r"layer_001.safetensors was not written .*the same command goes on"):
            write(out)
        assert not list(out.glob("*.tmp")), "half a file takes no room from others"
        kept = finished(out)
        assert list(kept) == ["layer_000.safetensors"]
        disk.empty()
        write(out)
        assert finished(out).items() >= kept.items()
        assert contents(out) == whole
    assert contents(tmp_path / "model") == before

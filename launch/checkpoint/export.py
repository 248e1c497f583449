"""Weights out of a checkpoint into the folder layout of Hugging Face, and back. One process, no process group, no GPU.

    with publish(Path("export")) as folder:
        write_safetensors(stream(checkpoint, "model."), folder, dtype=torch.bfloat16, rename=names_of_llama)
        (folder / "config.json").write_text(...)        # the room's part

At most one output file (`max_file_bytes`) and one tensor are in memory at a time, whatever the checkpoint holds.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from launch.checkpoint import layout, shards
from launch.checkpoint.layout import Verify
from launch.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def stream(checkpoint: Path, prefix: str, *, verify: Verify = "hash") -> Iterator[tuple[str, Tensor]]:
    """(name without `prefix`, full CPU tensor) of one committed checkpoint folder, in the order of the names.

    `CheckpointError` if the checkpoint is damaged or holds nothing under `prefix` ("model." or "ema.").
    """
    manifest = layout.read_manifest(checkpoint)
    names = sorted(name for name in manifest.tensors if name.startswith(prefix))
    if not names:
        held = sorted({name.split(".")[0] + "." for name in manifest.tensors})
        raise CheckpointError(
            f"{checkpoint} holds no tensor under {prefix!r}; it has {', '.join(held) or 'none at all'}"
        )
    files = sorted({file for name in names for file, _ in manifest.tensors[name].chunks})
    layout.check_files(checkpoint, manifest, verify, files)
    for name in names:
        yield name.removeprefix(prefix), shards.read_whole(checkpoint, name, manifest.tensors[name])


def write_safetensors(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    rename: Callable[[str], str] = lambda name: name,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> int:
    """Write `model.safetensors`, or numbered files and their index if they exceed `max_file_bytes`; the bytes written.

    `dtype` converts floating-point tensors and leaves others as they are. A tensor larger than the limit has a file of
    its own. Fails if two tensors are renamed to the same name.
    """
    parts: list[dict[str, str]] = []  # (tensor name -> temporary file) of each file so far, in order
    held: dict[str, Tensor] = {}
    seen: dict[str, str] = {}
    total = held_bytes = 0

    def flush() -> None:
        nonlocal held, held_bytes
        path = folder / f"part-{len(parts) + 1:05d}.safetensors"
        save_file(held, path, metadata={"format": "pt"})  # transformers refuses files without this entry
        path.chmod(folder.stat().st_mode & 0o666)
        layout.sync(path)
        parts.append(dict.fromkeys(held, path.name))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        target = rename(name)
        if target in seen:
            raise CheckpointError(
                f"{name} and {seen[target]} are both renamed to {target}; give each a name of its own"
            )
        seen[target] = name
        cast = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        count = cast.numel() * cast.element_size()
        if held and held_bytes + count > max_file_bytes:
            flush()
        held[target] = cast.contiguous()
        held_bytes += count
        total += count
    if held or not parts:
        flush()
    _number(folder, parts, total)
    return total


def read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) of a Hugging Face folder, in the order of the names; the inverse of `write_safetensors`.

    `CheckpointError` if there are no safetensors files: pickled weights (*.bin, *.pt) are never opened.
    """
    if (folder / INDEX).exists():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    else:
        weight_map = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
    if not weight_map:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file; convert pickled weights elsewhere with save_pretrained, because "
            "opening them would run whatever code they carry"
        )
    for name in sorted(weight_map):
        path = folder / weight_map[name]
        if path.parent != folder or not path.is_file():
            raise CheckpointError(
                f"{folder / INDEX} places {name} in {weight_map[name]!r}, which is no file of {folder}"
            )
        with safe_open(str(path), framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                raise CheckpointError(f"{path} lacks {name}, which {INDEX} places in it; fetch the folder again")
            yield name, file.get_tensor(name)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` by one rename if the block succeeds and vanishes if not."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; delete it first, or choose another folder")
    new = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        layout.sync(new)
        new.rename(folder)
        layout.sync(folder.absolute().parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _number(folder: Path, parts: list[dict[str, str]], total: int) -> None:
    """Give the parts the names that say how many there are."""
    if len(parts) == 1:
        (folder / "part-00001.safetensors").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number:05d}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(part, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    layout.write_synced(folder / INDEX, json.dumps(index, indent=2))

"""What a checkpoint looks like on disk, and when one may be believed.

    checkpoints/
      step_00001000/                    committed: came into being by one rename, complete
        MANIFEST.json                   every file with its size and hash, every tensor with its shape and chunks
        trainer.json                    the scalars: step, samples seen, ...
        state/rank-00003.safetensors    the chunks that rank 3 wrote
      step_00002000.tmp-<attempt>/      being written, or left by a dead run; never read
      .trash-step_00000500/             being deleted; never read
      latest                            "step_00001000", a hint for people; never trusted

Why not torch.distributed.checkpoint: its default format keeps the index in a pickle, which runs code when read. Its
safetensors writer (hf_storage, torch 2.13) has no pickle, and what it saved at worlds of 1 to 4 (Shard(0), replicated)
loaded correctly, but it keeps no index: with the file of rank 1 of 3 deleted it loaded without an error and left that
part of each tensor unfilled. Every reader opens every file, saving took twice as long (52 MB, 2 ranks), and sizes,
hashes and the commit would stay ours to write. An index of our own makes both sides short: a rank writes the boxes it
owns with `safetensors`, and reads the boxes that overlap what it needs, at any world size.

Nothing here runs code that a checkpoint brings: JSON and safetensors only.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from launch.errors import CheckpointError

FORMAT = 1
MANIFEST, SCALARS, STATE, LATEST = "MANIFEST.json", "trainer.json", "state", "latest"
TRASH = ".trash-"

Verify = Literal["hash", "size"]
_COMMITTED = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"step_\d{8,}\.tmp-.+")
_FILE = re.compile(rf"{SCALARS}|{STATE}/rank-\d{{5,}}\.safetensors")  # nothing that points out of the folder


@dataclass(frozen=True, kw_only=True)
class Box:
    """A contiguous block of a tensor: `offsets` and `sizes` in elements, one entry a dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def overlap(self, other: "Box") -> "Box | None":
        """The common block in global coordinates, or None."""
        starts = [max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True)]
        ends = [min(a, b) for a, b in zip(self.ends, other.ends, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(offsets=tuple(starts), sizes=tuple(end - start for start, end in zip(starts, ends, strict=True)))

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    def slices_within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this block lies in a tensor that holds `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """`chunks`: (file, box) pairs that tile the tensor; in the file the chunk has the tensor's name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[str, Box], ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    bytes: int
    sha256: str | None  # None: saved with verify="size"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`files` is keyed by the path inside the checkpoint folder, `tensors` by canonical name."""

    step: int
    world_size: int
    files: Mapping[str, SavedFile]
    tensors: Mapping[str, SavedTensor]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed folders, oldest first. Says nothing about their health."""
    if not folder.is_dir():
        return []
    matches = (_COMMITTED.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def leftovers(folder: Path) -> list[Path]:
    """What a dead process left behind: unfinished saves and unfinished deletions."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if _UNFINISHED.fullmatch(entry.name) or entry.name.startswith(TRASH)]


def shard_name(rank: int) -> str:
    return f"{STATE}/rank-{rank:05d}.safetensors"


def check_tiling(name: str, tensor: SavedTensor) -> None:
    """`CheckpointError` unless the chunks cover every element of the tensor exactly once."""
    whole = Box(offsets=(0,) * len(tensor.shape), sizes=tensor.shape)
    boxes = sorted((box for _, box in tensor.chunks), key=lambda box: box.offsets)
    for index, box in enumerate(boxes):
        if box.overlap(whole) != box and tensor.shape:
            raise CheckpointError(f"tensor {name}: chunk {box} lies outside its shape {tensor.shape}")
        for other in islice(boxes, index + 1, None):
            if tensor.shape and other.offsets[0] >= box.ends[0]:
                break  # sorted by the first offset: nothing after this one can overlap either
            if box.overlap(other):
                raise CheckpointError(f"tensor {name}: chunks {box} and {other} overlap")
    covered = sum(box.numel for box in boxes)
    if covered != whole.numel:
        raise CheckpointError(f"tensor {name}: its chunks hold {covered} of {whole.numel} elements")


def encode_manifest(manifest: Manifest) -> str:
    body: dict[str, Any] = {
        "format": FORMAT,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "torch": str(torch.__version__),
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in manifest.files.items()},
        "tensors": {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": tensor.shape,
                "chunks": [[file, box.offsets, box.sizes] for file, box in tensor.chunks],
            }
            for name, tensor in manifest.tensors.items()
        },
    }
    return json.dumps({"checksum": _checksum(body), **body})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one checkpoint folder; `CheckpointError` with the reason if it cannot be believed."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is no committed checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        found = body.get("format") if isinstance(body, dict) else None
        raise CheckpointError(
            f"{folder / MANIFEST}: format {found!r}, but this version of Unmask reads format {FORMAT}"
        )
    if body.pop("checksum", None) != _checksum(body):
        raise CheckpointError(
            f"{folder / MANIFEST}: its checksum does not fit its content, so it was changed or damaged"
        )
    try:
        manifest = _decode(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of format {FORMAT} ({error!r})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    if folder.name != step_name(manifest.step):
        raise CheckpointError(f"{folder}: its manifest is of step {manifest.step}; was the folder renamed?")
    return manifest


def read_scalars(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SCALARS).read_bytes())


def check_files(folder: Path, manifest: Manifest, verify: Verify, names: Sequence[str] | None = None) -> None:
    """`CheckpointError` naming the first file (of `names`, or all) whose size, or hash, is not what was written."""
    for name in names if names is not None else list(manifest.files):
        path, saved = folder / name, manifest.files[name]
        try:
            size = path.stat().st_size
            if size != saved.bytes:
                raise CheckpointError(f"{path}: {size} bytes, but {saved.bytes} were written")
            if verify == "hash" and saved.sha256 is not None and file_sha256(path) != saved.sha256:
                raise CheckpointError(f"{path}: its sha256 is not that of what was written, so its content has changed")
        except OSError as error:
            raise CheckpointError(f"{path}: {os.strerror(error.errno) if error.errno else error}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync of a file, or of a folder (which makes the names in it durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _decode(body: dict[str, Any]) -> Manifest:
    files = {name: SavedFile(**entry) for name, entry in body["files"].items()}
    for name in files:
        if not _FILE.fullmatch(name):
            raise ValueError(f"file {name!r} is none that a checkpoint holds")
    tensors = {}
    for name, entry in body["tensors"].items():
        boxes = ((file, Box(offsets=tuple(offsets), sizes=tuple(sizes))) for file, offsets, sizes in entry["chunks"])
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"tensor {name}: dtype {entry['dtype']!r}")
        tensors[name] = SavedTensor(dtype=dtype, shape=tuple(entry["shape"]), chunks=tuple(boxes))
        if missing := {file for file, _ in tensors[name].chunks} - files.keys():
            raise ValueError(f"tensor {name} lies in {sorted(missing)}, which the file table does not have")
        check_tiling(name, tensors[name])
    return Manifest(step=body["step"], world_size=body["world_size"], files=files, tensors=tensors)

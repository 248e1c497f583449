"""Files that are written whole or not at all, so that a killed command goes on behind the last of them."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from launch.errors import CheckpointError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. CheckpointError if the disk does not take it."""
    with _whole(path) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)


def save_json(tree: Mapping[str, Any], path: Path) -> None:
    """CheckpointError if the disk does not take it."""
    with _whole(path) as partial:
        partial.write_text(json.dumps(tree, indent=1) + "\n")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` by one rename if the block succeeds and vanishes if not."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors gives its files to nobody else
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} was not written ({error}); what was finished before it is whole: make the disk take more, and the "
            "same command goes on"
        ) from error

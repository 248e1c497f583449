"""Do all ranks run the same thing? Asked once, before anything is built.

A node with an older checkout, another torch, or a configuration edited between two starts would train: to a wrong
model, or to a hang in the first collective whose shapes differ.
"""

import hashlib
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from launch import config as configs
from launch.errors import ClusterError
from launch.runtime import Runtime


def check_same_everywhere(config: Any, runtime: Runtime) -> None:
    """Collective. `ClusterError`, on every rank, that names the first rank that differs from rank 0, and in what."""
    mine = {
        "host": platform.node(),
        "configuration": configs.to_dict(config),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "code": code_fingerprint(),
    }
    everyone = runtime.gather(mine)
    for rank, other in enumerate(everyone):
        changed = configs.difference({**everyone[0], "host": None}, {**other, "host": None})
        if changed:
            key, (first, found) = next(iter(changed.items()))
            raise ClusterError(
                f"rank {rank} on {other['host']} has {key.removeprefix('configuration.')} = {found!r}, rank 0 on "
                f"{everyone[0]['host']} has {first!r}; give every node the same checkout, environment and command line"
            )


@cache
def code_fingerprint() -> str:
    """sha256 over the project's Python files: equal on all nodes whose checkouts are."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in ("launch", "llm", "vision", "rl"):
        for file in sorted((root / room).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]

"""Do all ranks run the same thing? Asked once, before anything is built.

A node with an older checkout, another torch, or a configuration edited between two starts would train: to a wrong
model, or to a hang in the first collective whose shapes differ.
"""

import hashlib
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from launch import config as configs
from launch.errors import ClusterError, DataError
from launch.runtime import Runtime

logger = logging.getLogger(__name__)

_CLOCK_TOLERANCE_SECONDS = 5.0  # a rank may leave an exchange this much later than another on a busy host


def check_same_everywhere(config: Any, runtime: Runtime) -> list[str]:
    """Collective. `ClusterError`, on every rank, that names the first rank that differs from rank 0, and in what.

    Returns the host of each rank. Clocks that differ are no error, for nothing depends on them; rank 0 says so.
    """
    mine = {
        "host": platform.node(),
        "configuration": configs.to_dict(config),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "code": code_fingerprint(),
    }
    everyone = runtime.gather(mine)
    hosts = [other["host"] for other in everyone]
    times = runtime.gather(time.time())  # the exchange before it has just brought all ranks to this line
    for rank, other in enumerate(everyone):
        changed = configs.difference({**everyone[0], "host": None}, {**other, "host": None})
        if changed:
            key, (first, found) = next(iter(changed.items()))
            raise ClusterError(
                f"rank {rank} on {hosts[rank]} has {key.removeprefix('configuration.')} = {found!r}, rank 0 on "
                f"{hosts[0]} has {first!r}; give every node the same checkout, environment and command line"
            )
    if runtime.is_main:
        for words in clock_differences(hosts, times):
            logger.warning("%s", words)
    return hosts


def check_same_data(identity: Mapping[str, Any], runtime: Runtime, hosts: Sequence[str]) -> None:
    """Collective. `DataError`, on every rank, if a rank found other data or another codec than rank 0 did."""
    everyone = runtime.gather(dict(identity))
    for rank, other in enumerate(everyone):
        for key in sorted(everyone[0].keys() | other.keys()):
            if other.get(key) != everyone[0].get(key):
                raise DataError(
                    f"rank {rank} on {hosts[rank]} has {key} = {other.get(key)!r}, rank 0 on {hosts[0]} has "
                    f"{everyone[0].get(key)!r}; put the same prepared data set under the same path on every host"
                )


def clock_differences(hosts: Sequence[str], times: Sequence[float]) -> list[str]:
    """A sentence for each host whose clock is off that of rank 0's, from what all clocks showed at one moment."""
    ahead: dict[str, float] = {}
    for host, moment in zip(hosts, times, strict=True):
        ahead.setdefault(host, moment - times[0])
    return [
        f"the clock of {host} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of {hosts[0]}; "
        "the run does not depend on it, but times in logs will not match: set both by NTP"
        for host, seconds in ahead.items()
        if abs(seconds) > _CLOCK_TOLERANCE_SECONDS
    ]


@cache
def code_fingerprint() -> str:
    """sha256 over the project's Python files: equal on all nodes whose checkouts are."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in ("launch", "llm", "vision", "rl"):
        for file in sorted((root / room).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]

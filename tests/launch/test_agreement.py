"""A rank that runs something else is found before the run begins, by all ranks."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import agreement
from launch import runtime as runtimes
from launch.errors import ClusterError, DataError
from tests.processes import spawn


@dataclass(frozen=True, kw_only=True)
class Train:
    micro_batch: int = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    train: Train = field(default_factory=Train)


def ask(folder: Path, odd: str | None) -> str:
    """What the check says where rank 1 differs in `odd`."""
    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtimes.start(device="cpu", timeout_seconds=60)
    differs: Any = here.rank == 1
    if odd == "code" and differs:
        agreement.code_fingerprint = lambda: "0123"
    config = Config(train=Train(micro_batch=4 if odd == "configuration" and differs else 2))
    try:
        agreement.check_same_everywhere(config, here)
    except ClusterError as error:
        return str(error)
    finally:
        here.close()
    return "the same"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (None, "the same"),
        ("configuration", "has train.micro_batch = 4, rank 0 on"),
        ("code", "has code = '0123', rank 0 on"),
    ],
)
def test_every_rank_hears_who_differs_and_in_what(tmp_path: Path, odd: str | None, words: str) -> None:
    for said in spawn(ask, 3, tmp_path, odd, group=False):
        assert words in said
        assert odd is None or said.startswith("rank 1 on ")


def test_the_fingerprint_of_the_code_is_that_of_its_files() -> None:
    agreement.code_fingerprint.cache_clear()
    first = agreement.code_fingerprint()
    agreement.code_fingerprint.cache_clear()
    assert agreement.code_fingerprint() == first and len(first) == 16


def ask_for_data(folder: Path, odd: str | None) -> str:
    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtimes.start(device="cpu", timeout_seconds=60)
    identity = {"data": "0123" if odd == "data" and here.rank == 2 else "4567", "vocab_size": 300}
    try:
        agreement.check_same_data(identity, here, ["node1", "node2", "node3"])
    except DataError as error:
        return str(error)
    finally:
        here.close()
    return "the same"


@pytest.mark.parametrize(
    ("odd", "words"), [(None, "the same"), ("data", "rank 2 on node3 has data = '0123', rank 0 on node1 has '4567'")]
)
def test_every_rank_hears_which_host_has_other_data(tmp_path: Path, odd: str | None, words: str) -> None:
    for said in spawn(ask_for_data, 3, tmp_path, odd, group=False):
        assert said.startswith(words)


def test_clocks_that_differ_are_named_by_host_once() -> None:
    hosts = ["node1", "node1", "node2", "node2", "node3"]
    assert agreement.clock_differences(hosts, [100.0, 100.4, 100.1, 101.0, 104.9]) == []
    ahead, behind = agreement.clock_differences(hosts, [100.0, 100.4, 3700.0, 3700.4, 40.0])
    assert ahead.startswith("the clock of node2 is 3600 s ahead of that of node1;")
    assert behind.startswith("the clock of node3 is 60 s behind that of node1;")

import errno
from collections.abc import Iterator

import pytest

from launch import faults


@pytest.fixture(autouse=True)
def _no_plan_survives() -> Iterator[None]:
    faults._plan_of_this_process.cache_clear()
    yield
    faults._plan_of_this_process.cache_clear()


def plan(monkeypatch: pytest.MonkeyPatch, text: str, rank: str = "0") -> None:
    """In the environment only, after the import: as a rank of a fork server meets it."""
    monkeypatch.setenv("UNMASK_FAULT", text)
    monkeypatch.setenv("RANK", rank)


def test_a_full_disk_strikes_at_its_point_and_its_hit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, "a.b:enospc:*:2", rank="3")
    faults.fault("a.c")
    faults.fault("a.b")
    with pytest.raises(OSError) as caught:
        faults.fault("a.b")
    assert caught.value.errno == errno.ENOSPC
    faults.fault("a.b")


@pytest.mark.parametrize(
    ("text", "rank", "strikes"), [("p:error", "0", True), ("p:error", "1", False), ("p:error:1", "1", True)]
)
def test_a_fault_strikes_its_own_rank_which_is_0_unless_named(
    monkeypatch: pytest.MonkeyPatch, text: str, rank: str, strikes: bool
) -> None:
    plan(monkeypatch, text, rank)
    if strikes:
        with pytest.raises(RuntimeError, match="fault at p"):
            faults.fault("p")
    else:
        faults.fault("p")


@pytest.mark.parametrize("text", ["p", "p:burn", "p:kill:x", "p:kill:0:1:2", ":kill"])
def test_a_fault_that_cannot_be_understood_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="POINT:ACTION"):
        faults._plan(text, "0")

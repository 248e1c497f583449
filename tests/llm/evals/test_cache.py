"""A cache gives back what was scored, to the same model under the same settings only, and survives a kill."""

from pathlib import Path

import pytest

from launch.errors import DataError
from llm.evals.cache import ScoreCache
from llm.evals.scoring import Request, Score

ONE = Request(context=(1, 2), continuation=(3,), group="a")
TWO = Request(context=(1, 2), continuation=(3,), group="b")
FOUND = Score(value=-1.25, standard_error=0.5, rows=7, is_greedy=True, cut=2)
IDENTITY = {"model": "f", "scoring": {"draws": 8}}


def test_what_was_added_is_found_again_by_any_rank(tmp_path: Path) -> None:
    for rank, request in enumerate((ONE, TWO)):
        cache = ScoreCache(tmp_path, IDENTITY, rank)
        cache.add(request, FOUND)
        cache.close()
    for rank in (0, 5):
        cache = ScoreCache(tmp_path, IDENTITY, rank)
        assert cache.find(ONE) == cache.find(TWO) == FOUND and len(cache) == 2
        assert cache.find(Request(context=(1,), continuation=(2, 3), group="a")) is None
        assert cache.find(Request(context=(1, 2), continuation=(3,), group="a", check_greedy=True)) is None


@pytest.mark.parametrize("other", [{"model": "g", "scoring": {"draws": 8}}, {"model": "f", "scoring": {"draws": 9}}])
def test_another_model_or_setting_finds_nothing(tmp_path: Path, other: dict) -> None:
    ScoreCache(tmp_path, IDENTITY, 0).add(ONE, FOUND)
    assert ScoreCache(tmp_path, other, 0).find(ONE) is None
    assert ScoreCache(tmp_path, IDENTITY, 0).find(ONE) == FOUND


def test_a_line_cut_short_costs_that_score_alone(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, IDENTITY, 0)
    cache.add(ONE, FOUND)
    cache.add(TWO, FOUND)
    cache.close()
    path = cache.folder / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = ScoreCache(tmp_path, IDENTITY, 0)
    assert again.find(ONE) == FOUND and again.find(TWO) is None
    again.add(TWO, FOUND)
    again.close()
    last = ScoreCache(tmp_path, IDENTITY, 1)
    assert last.find(ONE) == last.find(TWO) == FOUND


def test_a_folder_with_another_identity_than_its_name_is_refused(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, IDENTITY, 0)
    (cache.folder / "identity.json").write_text("{}")
    with pytest.raises(DataError, match=r"identity\.json is not what its folder's name says"):
        ScoreCache(tmp_path, IDENTITY, 0)

"""Codes by similarity and by frequency: permutations of the vocabulary that mean something."""

from pathlib import Path

import numpy as np
import pytest

from launch.errors import DataError
from llm.data.cli import main
from llm.data.codes import by_similarity, make_code, neighbour_counts, read_code
from llm.data.shards import TokenDataset
from tests.runs import Tiny

TWO_KINDS = np.array([0, 1] * 8)  # token v is of kind v mod 2


def alternating_counts() -> np.ndarray:
    """[16, 16]: a token is followed by tokens of the other kind only, all alike."""
    return 100.0 * (TWO_KINDS[:, None] != TWO_KINDS[None, :])


def test_tokens_of_one_kind_fill_one_half_of_the_order():
    order = by_similarity(alternating_counts())
    assert sorted(order) == list(range(16))
    halves = TWO_KINDS[order].reshape(2, 8)
    assert (halves == halves[:, :1]).all()


def test_the_table_is_a_permutation_that_depends_on_the_training_split_alone(tiny: Tiny, tmp_path: Path):
    places = make_code(tiny.data, "similarity", tmp_path / "a.json")
    again = make_code(tiny.data, "similarity", tmp_path / "b.json")
    assert np.array_equal(np.sort(places), np.arange(300)) and np.array_equal(places, again)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert np.array_equal(read_code(tmp_path / "a.json"), places)
    counts = neighbour_counts(TokenDataset.open(tiny.data, "train", 16))
    by_frequency = make_code(tiny.data, "frequency", tmp_path / "c.json")
    frequency = counts.sum(1)[by_frequency.argsort()]
    assert frequency[0] == frequency.max() and frequency[:10].sum() > 0.3 * frequency.sum()


def test_a_table_is_never_overwritten_and_a_damaged_one_is_named(tiny: Tiny, tmp_path: Path, capsys):
    out = tmp_path / "code.json"
    assert main(["code", str(tiny.data), "--out", str(out)]) == 0
    assert f"diffusion.code={out}" in capsys.readouterr().out
    with pytest.raises(DataError, match="exists, and models may have been trained with it"):
        main(["code", str(tiny.data), "--out", str(out)])
    out.write_text(out.read_text()[:40])
    with pytest.raises(DataError, match=r"code.json is no table of codes .*unmask data code"):
        read_code(out)

"""Calibration text: which documents, in which order, how many of each source."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.errors import ConfigError, DataError
from llm.data.documents import split_of
from llm.moe import calibration_text
from llm.moe.calibration_text import CalibrationConfig, CalibrationText, build_text, load_text, save_text


class Words:
    """A tokenizer for texts such as "17 17 17": ids are the numbers themselves."""

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def write(path: Path, documents: range, *, words: int = 4) -> Path:
    """A document for each number, which says it `words` times."""
    path.write_text("".join(json.dumps({"text": " ".join([str(n)] * words)}) + "\n" for n in documents))
    return path


def split_of_number(name: str, number: int, *, words: int = 4) -> str:
    key = hashlib.sha1(" ".join([str(number)] * words).encode()).hexdigest()
    return split_of(name, key)


def config(*data: Path | str, **settings: Any) -> CalibrationConfig:
    return CalibrationConfig(**{"data": tuple(map(str, data)), "blocks": 4, "block_length": 8, **settings})


def test_documents_lie_one_behind_the_other_in_the_order_of_a_hash_of_the_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", range(200))

    def rank(number: int) -> bytes:
        key = hashlib.sha1(" ".join([str(number)] * 4).encode()).hexdigest()
        return hashlib.sha256(f"42:a.jsonl:{key}".encode()).digest()

    expected = sorted((n for n in range(200) if split_of_number("a.jsonl", n) == "train"), key=rank)[:8]
    text = build_text(config(file), Words())
    assert text.blocks.dtype == torch.int64
    assert text.blocks.tolist() == [[a] * 4 + [b] * 4 for a, b in zip(expected[::2], expected[1::2], strict=True)]
    assert text.sources == (str(file),) * 4


def test_the_order_depends_on_the_seed_and_not_on_the_order_in_the_file(tmp_path: Path) -> None:
    first, second = tmp_path / "1" / "a.jsonl", tmp_path / "2" / "a.jsonl"
    for file in (first, second):
        file.parent.mkdir()
    write(first, range(100))
    second.write_text("".join(sorted(first.read_text().splitlines(keepends=True), reverse=True)))
    one, again = build_text(config(first), Words()), build_text(config(second), Words())
    assert torch.equal(one.blocks, again.blocks) and one.sha256 == again.sha256
    other = build_text(config(first, seed=43), Words())
    assert not torch.equal(one.blocks, other.blocks) and one.sha256 != other.sha256


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_documents_of_the_split_are_read(split: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", range(3000), words=2)
    text = build_text(config(file, blocks=10), Words(), split=split)
    numbers = set(text.blocks.flatten().tolist())
    assert len(numbers) == 40
    assert {split_of_number("a.jsonl", number, words=2) for number in numbers} == {split}


@pytest.mark.parametrize(
    ("weights", "blocks", "expected"),
    [
        (("", ""), 4, [2, 2]),
        (("=3", "=1"), 4, [3, 1]),
        (("=1", "=1", "=1"), 4, [2, 1, 1]),  # equal remainders: the first
        (("=0.5", "=0.3", "=0.2"), 7, [4, 2, 1]),  # 3.5, 2.1, 1.4
        (("=1e-3", "=1"), 5, [0, 5]),
        (("=0.25", "=0.74", "=0.01"), 10, [3, 7, 0]),  # 2.5, 7.4, 0.1
    ],
)
def test_blocks_are_dealt_by_largest_remainders(
    weights: tuple[str, ...], blocks: int, expected: list[int], tmp_path: Path
) -> None:
    files = [write(tmp_path / f"{n}.jsonl", range(1000 * n, 1000 * n + 100)) for n in range(len(weights))]
    data = [f"{file}{weight}" for file, weight in zip(files, weights, strict=True)]
    text = build_text(config(*data, blocks=blocks), Words())
    counted = Counter(text.sources)
    assert [counted[str(file)] for file in files] == expected and len(text.blocks) == blocks
    for block, source in zip(text.blocks, text.sources, strict=True):
        assert {n // 1000 for n in block.tolist()} == {int(Path(source).stem)}


def test_a_name_may_hold_the_sign_of_equality(tmp_path: Path) -> None:
    file = write(tmp_path / "lr=high.jsonl", range(100))
    assert build_text(config(file), Words()).sources == (str(file),) * 4
    assert build_text(config(f"{file}=2"), Words()).sources == (str(file),) * 4


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_weight_that_is_no_positive_number_is_refused(weight: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the weight of a source is a positive number"):
        build_text(config(f"{write(tmp_path / 'a.jsonl', range(100))}={weight}"), Words())


def test_too_little_text_is_an_error_that_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", range(30))
    there = sum(split_of_number("a.jsonl", n) == "train" for n in range(30))
    with pytest.raises(DataError) as error:
        build_text(config(file, blocks=1000, block_length=64), Words())
    assert f"gives {4 * there} tokens in {there} documents of its train split" in str(error.value)
    assert "1000 blocks of 64 need 64,000" in str(error.value)


def test_more_documents_are_read_if_the_first_are_short_and_the_text_begins_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", range(300), words=1)
    found = build_text(config(file, blocks=2, block_length=100), Words())  # 32 documents are not enough, nor are 128
    monkeypatch.setattr(calibration_text, "_DOCUMENTS_PER_BLOCK", 1000)
    assert torch.equal(found.blocks, build_text(config(file, blocks=2, block_length=100), Words()).blocks)


def test_text_comes_back_from_its_file(tmp_path: Path) -> None:
    text = build_text(config(write(tmp_path / "a.jsonl", range(100))), Words())
    save_text(text, tmp_path / "text.safetensors")
    again = load_text(tmp_path / "text.safetensors")
    assert torch.equal(again.blocks, text.blocks) and again.sources == text.sources and again.sha256 == text.sha256
    assert text.sha256 == hashlib.sha256(text.blocks.numpy().tobytes()).hexdigest()
    (tmp_path / "text.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        load_text(tmp_path / "text.safetensors")


def test_the_hash_tells_texts_apart_whose_ids_differ() -> None:
    text = CalibrationText(blocks=torch.arange(8).view(2, 4))
    assert text.sha256 == CalibrationText(blocks=torch.arange(8).view(2, 4)).sha256
    assert text.sha256 != CalibrationText(blocks=torch.arange(1, 9).view(2, 4)).sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"data": ()}, "data is empty"), ({"blocks": 0}, "blocks = 0"), ({"block_length": 0}, "block_length = 0")],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        build_text(replace(config(tmp_path / "a.jsonl"), **changes), Words())

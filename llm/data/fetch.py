"""Fetch corpora, tokenizers and evaluation data through pip, npm and apt, once, into the user's cache.

    archives/<part>/<file>       what the client downloaded, checked against the pinned sha256
    corpora/<name>/              documents.jsonl ({source, key, text} a line) and manifest.json
    tokenizers/<name>/           tokenizer.json and tokenizer_config.json
    folders/<name>/              a package unpacked whole
    models/<name>/               config.json, model.safetensors, a tokenizer, and manifest.json with sizes and hashes

The clients run with their own configuration (index, mirror, proxy). A folder appears by rename when it is complete, so
a second run finds either all of it or nothing, and does nothing in the first case.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from launch.errors import DataError
from llm.data.documents import Document, split_of
from llm.data.packages import CORPORA, FOLDERS, MODELS, TOKENIZERS, ModelPart, Package, TextPart, TokenizerPart
from llm.data.shards import SPLITS, sha256_of

CORPUS_FORMAT = "unmask-corpus-1"
MANIFEST = "manifest.json"
NAMES = (*CORPORA, "tokenizers", *FOLDERS, *MODELS)
Report = Callable[[str], object]


def cache_folder() -> Path:
    """$UNMASK_CACHE, else unmask/ in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if override := os.environ.get("UNMASK_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"


def corpus_folder(name: str, cache: Path | None = None) -> Path:
    """The folder of a fetched corpus; DataError that names the command to run if it is not there."""
    return _fetched("corpora", name, name, cache)


def tokenizer_folder(name: str, cache: Path | None = None) -> Path:
    return _fetched("tokenizers", name, "tokenizers", cache)


def package_folder(name: str, cache: Path | None = None) -> Path:
    return _fetched("folders", name, name, cache)


def model_folder(name: str, cache: Path | None = None) -> Path:
    """The folder of a fetched model; DataError also if a file of it is gone or has another size than it was given."""
    folder = _fetched("models", name, name, cache)
    if damaged := _damaged(folder, hashes=False):
        raise DataError(f"{damaged} in {folder} is not what was fetched; repair it with `unmask data fetch {name}`")
    return folder


def fetch(names: Sequence[str], *, cache: Path, allow_missing: bool = False, report: Report = print) -> list[str]:
    """Bring `names` (of NAMES) into `cache` and return what is missing, a sentence each.

    Tries every part. DataError with all that is missing unless `allow_missing`; a corpus is then built of the rest, and
    built anew by the next fetch.
    """
    for name in names:
        if name not in NAMES:
            raise DataError(f"there is nothing called {name!r} to fetch; known: {', '.join(NAMES)}")
    missing: list[str] = []
    for name in names:
        if name in CORPORA:
            missing += _fetch_corpus(name, cache, allow_missing=allow_missing, report=report)
        elif name == "tokenizers":
            for tokenizer, part in TOKENIZERS.items():
                missing += _fetch_tokenizer(tokenizer, part, cache, report)
        elif name in MODELS:
            missing += _fetch_model(name, MODELS[name], cache, report)
        else:
            missing += _fetch_folder(name, FOLDERS[name], cache, report)
    if missing and not allow_missing:
        raise DataError("missing: " + "; ".join(missing) + " (--allow-missing goes on without)")
    return missing


# --- building --------------------------------------------------------------------------------------------------------


def _fetch_tokenizer(name: str, part: TokenizerPart, cache: Path, report: Report) -> list[str]:
    def build(files: Path, partial: Path) -> None:
        part.build(files).save(partial)

    missing = _build_once(cache / "tokenizers" / name, part.package, cache, report, build, "built")
    return [f"tokenizer {sentence}" for sentence in missing]


def _fetch_folder(name: str, package: Package, cache: Path, report: Report) -> list[str]:
    def build(files: Path, partial: Path) -> None:
        files.rename(partial)

    return _build_once(cache / "folders" / name, package, cache, report, build, "unpacked")


def _fetch_model(name: str, part: ModelPart, cache: Path, report: Report) -> list[str]:
    def build(files: Path, partial: Path) -> None:
        report(f"{name}: converting; a minute or two")
        partial.mkdir()
        part.convert(files, partial)
        written = {file.name: [file.stat().st_size, sha256_of(file)] for file in sorted(partial.iterdir())}
        manifest = {"title": part.title, "package": part.package.name, "version": part.package.version}
        (partial / MANIFEST).write_text(json.dumps({**manifest, "files": written}, indent=1), encoding="utf-8")

    folder = cache / "models" / name
    if folder.exists():
        if not (damaged := _damaged(folder, hashes=True)):
            report(f"{name}: present in {folder}")
            return []
        report(f"{name}: {damaged} in {folder} is not what was fetched; making it anew")
    return _build_once(folder, part.package, cache, report, build, "converted", anew=True)


def _damaged(folder: Path, *, hashes: bool) -> str | None:
    """A file of a model that is gone or not what its manifest says: sizes alone, or the sha256 too (a second a GB)."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, sha256) in files.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size or (hashes and sha256_of(file) != sha256):
                return name
    except (OSError, ValueError, KeyError, TypeError):
        return MANIFEST
    return None


def _build_once(
    folder: Path,
    package: Package,
    cache: Path,
    report: Report,
    build: Callable[[Path, Path], None],
    done: str,
    *,
    anew: bool = False,
) -> list[str]:
    """Make `folder` of an unpacked package by build(files, partial), whole or not at all; returns why not, if so.

    anew: also where there is one.
    """
    name = folder.name
    if folder.exists() and not anew:
        report(f"{name}: present in {folder}")
        return []
    try:
        archive = _fetch_archive(package, cache, report)
        with _publishing(folder) as partial, _unpacked(package, archive) as files:
            build(files, partial)
    except DataError as error:
        return [f"{name} ({error})"]
    report(f"{name}: {done} in {folder}")
    return []


def _fetch_corpus(name: str, cache: Path, *, allow_missing: bool, report: Report) -> list[str]:
    folder = cache / "corpora" / name
    if folder.exists():
        if not json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["missing"]:
            report(f"{name}: present in {folder}")
            return []
        report(f"{name}: present without some of its parts; trying those again")
    missing: dict[str, str] = {}
    archives: dict[str, Path] = {}
    for part in CORPORA[name]:  # all downloads first: what cannot be had is known before the long work
        try:
            archives[part.source] = _fetch_archive(part.package, cache, report)
        except DataError as error:
            missing[part.source] = f"{part.source} of {name} ({error})"
    if missing and not (allow_missing and archives):
        return list(missing.values())
    with _publishing(folder) as partial:
        partial.mkdir()
        parts = []
        with (partial / "documents.jsonl").open("wb") as out:
            for part in (part for part in CORPORA[name] if part.source in archives):
                begin = out.tell()
                try:
                    entry = _write_part(part, archives[part.source], out)
                except DataError as error:
                    if not allow_missing:
                        raise
                    missing[part.source] = f"{part.source} of {name} ({error})"
                    out.seek(begin)
                    out.truncate()
                    continue
                parts.append(entry)
                report(f"{name}: {part.source}: {entry['documents']:,} documents, {entry['chars']:,} characters")
        chars = sum(part["chars"] for part in parts)
        manifest = {
            "format": CORPUS_FORMAT,
            "name": name,
            "sha256": sha256_of(partial / "documents.jsonl"),
            "chars": chars,
            "parts": parts,
            "missing": sorted(missing),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    report(f"{name}: {chars:,} characters in {folder}")
    return list(missing.values())


def _write_part(part: TextPart, archive: Path, out: IO[bytes]) -> dict[str, Any]:
    """Append the documents of a part as JSON lines; returns its entry in the manifest."""
    text_hash = hashlib.sha256()
    documents, chars = 0, dict.fromkeys(SPLITS, 0)
    try:
        with _unpacked(part.package, archive) as files:
            for key, raw in part.read(files):
                text = raw.replace("\r\n", "\n").strip()
                if not text:
                    continue
                document = Document(source=part.source, key=key, text=text)
                out.write(json.dumps(vars(document), ensure_ascii=False).encode() + b"\n")
                text_hash.update(text.encode())
                chars[split_of(document.source, document.key)] += len(text)
                documents += 1
    except (OSError, ValueError, KeyError) as error:  # a package of another layout than the reader knows
        raise DataError(f"{archive} cannot be read as {part.source}: {type(error).__name__}: {error}") from error
    if not documents:
        raise DataError(f"{archive} holds no document where {part.source} expects them; its layout has changed")
    return {
        "source": part.source,
        "kind": part.package.kind,
        "package": part.package.name,
        "version": part.package.version or archive.name.split("_")[1],  # Debian: name_version_architecture.deb
        "archive_sha256": sha256_of(archive),
        "licence": part.package.licence,
        "documents": documents,
        "chars": sum(chars.values()),
        "split_chars": chars,
        "text_sha256": text_hash.hexdigest(),
    }


@contextmanager
def _publishing(folder: Path) -> Iterator[Path]:
    """A path to build in, moved to `folder` on success (in place of an older one) and removed on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        partial = Path(work) / "new"
        yield partial
        if folder.exists():
            folder.rename(Path(work) / "old")
        partial.rename(folder)


def _fetched(kind: str, name: str, target: str, cache: Path | None) -> Path:
    folder = (cache or cache_folder()) / kind / name
    if not folder.is_dir():
        raise DataError(f"{name} is not in {folder.parent}; bring it with `unmask data fetch {target}`")
    return folder


# --- package clients -------------------------------------------------------------------------------------------------


def _fetch_archive(package: Package, cache: Path, report: Report) -> Path:
    """The downloaded file of `package`; DataError if its client cannot get it or its sha256 is not the pinned one."""
    folder = cache / "archives" / f"{package.name.replace('/', '-')}-{package.version or 'distribution'}"
    if not folder.exists():
        report(f"{package.kind}: {package.name} {package.version or ''}".rstrip())
        with _publishing(folder) as partial:
            partial.mkdir()
            _download(package, partial)
            (archive,) = partial.iterdir()
            if package.sha256 and (digest := sha256_of(archive)) != package.sha256:
                raise DataError(
                    f"{archive.name} has sha256 {digest}, expected {package.sha256}: the registry has another file "
                    "than the one that this version of Unmask knows"
                )
    (archive,) = folder.iterdir()
    return archive


def _download(package: Package, folder: Path) -> None:
    pinned = f"{package.name}{'@' if package.kind == 'npm' else '=='}{package.version}"
    if package.kind == "pip":
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        _run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), pinned], folder)
    elif package.kind == "npm":
        _run(["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), pinned], folder)
    else:
        _run(["apt-get", "--quiet", "download", package.name], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
        )
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"`{' '.join(command)}` did not end within 900 s") from None
    if done.returncode or not any(folder.iterdir()):
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        hint = "; if its lists are old or absent run `apt-get update`" if command[0] == "apt-get" else ""
        raise DataError(f"`{' '.join(command)}` ended with status {done.returncode}: {said}{hint}")


@contextmanager
def _unpacked(package: Package, archive: Path) -> Iterator[Path]:
    """A temporary folder, beside the archives because it may be large, with the files of a package."""
    with tempfile.TemporaryDirectory(dir=archive.parents[1], prefix=".unpacked.") as work:
        folder = Path(work) / "files"
        folder.mkdir()
        if package.kind == "pip":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        elif package.kind == "npm":
            with tarfile.open(archive) as tarball:
                tarball.extractall(folder, filter="data")
        else:
            # Unpacked, not installed: its dependencies (R, dictd) and scripts stay away, and no root is needed.
            _run(["dpkg-deb", "--extract", str(archive), str(folder)], folder)
        yield folder

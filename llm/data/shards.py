"""Token shards: the files that `unmask data prepare` writes once and every rank of every run reads.

    manifest.json                tokenizer, dtype, and tokens / documents / text bytes / sha256 of every shard
    tokenizer.json               with tokenizer_config.json: the tokenizer that made the ids
    train-00000.bin              token ids, little-endian uint16 (vocabulary up to 65536) or uint32
    train-00000.idx              int64 [documents + 1] token offsets of the documents, last one = tokens of the shard

A document is `[BOS] tokens EOS` (BOS only if the tokenizer has one) and never spans shards; a shard holds documents of
one source, so that a source can be read alone. Documents are packed by concatenation: block i of a split is tokens
[i * L, (i + 1) * L) of its shards in manifest order, across documents and shards; a last part shorter than L is unused.

Shards are read with `pread`, not `mmap`: both are served from the page cache, but a mapped file that shrinks kills the
process by SIGBUS, while a short read is an error that can be named. A shard that is written to while a run reads it is
noticed by its time of modification, and believed only if its sha256 is still that of the manifest.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from launch.errors import DataError
from llm.data import tokenizers
from llm.data.tokenizers import TextTokenizer

FORMAT = "unmask-tokens-1"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_OPEN_FILES = 256  # well below the usual limit of 1024 per process


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One .bin file and its .idx; sizes follow from `tokens` and `documents`."""

    file: str  # name of the .bin file inside the data set's folder
    source: str
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents' text, the denominator of bits per byte
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents came from; a manifest lists every source of its text."""

    name: str
    licence: str = "unknown"
    origin: str = ""  # package and version, path or data set name
    origin_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    dtype: str  # "uint16" or "uint32"
    sources: tuple[Source, ...]
    text_sha256: dict[str, str]  # split -> sha256 of its documents' texts, concatenated
    splits: dict[str, tuple[Shard, ...]]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the data set in folder `path`; DataError if it is absent, torn or of another format."""
    file = Path(path) / "manifest.json"
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if (found := tree.pop("format", None)) != FORMAT:
            raise DataError(f"{file} is of format {found!r}, this version reads {FORMAT!r}; prepare the data again")
        tree["sources"] = tuple(Source(**source) for source in tree["sources"])
        tree["splits"] = {split: tuple(Shard(**shard) for shard in shards) for split, shards in tree["splits"].items()}
        return Manifest(**tree)
    except FileNotFoundError:
        raise DataError(
            f"{file} does not exist: {path} is no prepared data set; see `unmask data prepare -h`"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); prepare the data again") from None


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


class DatasetWriter:
    """Writes a data set beside `folder` and moves it there, whole, in `publish`; nothing is left on failure.

    with DatasetWriter(folder, tokenizer, shard_tokens=10**8) as writer:
        writer.add("train", "novels", texts)
        writer.publish([Source(name="novels")])
    """

    def __init__(self, folder: str | Path, tokenizer: TextTokenizer, *, shard_tokens: int) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise DataError(f"{self.folder} exists already; remove it or choose another --out")
        if shard_tokens < 1:
            raise DataError(f"a shard holds at least 1 token, not {shard_tokens}")
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.partial = self.folder.with_name(f".{self.folder.name}.partial-{os.getpid()}")
        self.partial.mkdir(parents=True)
        self._open: dict[tuple[str, str], _ShardWriter] = {}
        self._shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self._num_opened = dict.fromkeys(SPLITS, 0)
        self._text_hashes = {split: hashlib.sha256() for split in SPLITS}

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open.values():
            shard.close()
        shutil.rmtree(self.partial, ignore_errors=True)  # gone already when published

    def add(self, split: Split, source: str, texts: Sequence[str]) -> int:
        """Append documents to a split; returns their number of tokens, delimiters included."""
        tokenizer, num_tokens = self.tokenizer, 0
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            encoded = text.encode("utf-8")
            self._text_hashes[split].update(encoded)
            shard = self._shard(split, source)
            shard.add(np.array([*start, *ids, tokenizer.eos_id], dtype=self.dtype), len(encoded))
            num_tokens += len(start) + len(ids) + 1
            if shard.num_tokens >= self.shard_tokens:
                self._shards[split].append(shard.close())
                del self._open[split, source]
        return num_tokens

    def publish(self, sources: Sequence[Source]) -> Manifest:
        """Close the shards, write the manifest and rename the folder into place."""
        for (split, _), shard in sorted(self._open.items()):
            self._shards[split].append(shard.close())
        self._open.clear()
        self.tokenizer.save(self.partial)
        manifest = Manifest(
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            dtype=self.dtype.name,
            sources=tuple(sources),
            text_sha256={split: digest.hexdigest() for split, digest in self._text_hashes.items()},
            splits={split: tuple(sorted(shards, key=lambda s: s.file)) for split, shards in self._shards.items()},
        )
        with (self.partial / "manifest.json").open("w", encoding="utf-8") as stream:
            stream.write(manifest.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        try:
            self.partial.rename(self.folder)
        except OSError as error:
            raise DataError(
                f"{self.folder} appeared while it was being prepared ({error}); remove one of them"
            ) from None
        return manifest

    def _shard(self, split: Split, source: str) -> "_ShardWriter":
        if (split, source) not in self._open:
            name = f"{split}-{self._num_opened[split]:05d}"
            self._num_opened[split] += 1
            self._open[split, source] = _ShardWriter(self.partial / name, source)
        return self._open[split, source]


class _ShardWriter:
    def __init__(self, stem: Path, source: str) -> None:
        self._path, self._source = stem.with_name(stem.name + ".bin"), source
        self._stream = self._path.open("wb")
        self._hash = hashlib.sha256()
        self._offsets = [0]
        self._text_bytes = 0

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        data = ids.tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._text_bytes += text_bytes

    def close(self) -> Shard:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        index = np.array(self._offsets, dtype="<i8").tobytes()
        self._path.with_suffix(".idx").write_bytes(index)
        return Shard(
            file=self._path.name,
            source=self._source,
            tokens=self.num_tokens,
            documents=len(self._offsets) - 1,
            text_bytes=self._text_bytes,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )


# --- reading ---------------------------------------------------------------------------------------------------------


class TokenDataset:
    """One split of a data set (or one source of it) as blocks of `block_length` tokens.

    Safe after a fork (reads carry their own offset) and to pickle (files are opened again); one thread at a time.
    """

    def __init__(
        self, path: Path, manifest: Manifest, shards: tuple[Shard, ...], split: str, block_length: int
    ) -> None:
        self.path, self.manifest, self.shards = path, manifest, shards
        self.split, self.block_length = split, block_length
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)
        self.text_bytes = sum(shard.text_bytes for shard in shards)
        self._first_token = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._files: dict[int, int] = {}  # shard number -> file descriptor
        self._modified: dict[int, int] = {}  # shard number -> when it was, in ns, at its first opening

    @classmethod
    def open(
        cls, path: str | Path, split: Split, block_length: int, *, source: str | None = None, verify: bool = False
    ) -> "TokenDataset":
        """Check the sizes of the files (with `verify` their sha256, too) and return the data set.

        DataError if a file is missing or damaged, or if there is less than one block of tokens.
        """
        path = Path(path).expanduser()
        manifest = read_manifest(path)
        if block_length < 1:
            raise DataError(f"block_length is {block_length}; it must be at least 1")
        if split not in manifest.splits:
            raise DataError(f"{path} has no split {split!r}, only {', '.join(manifest.splits)}")
        shards = tuple(s for s in manifest.splits[split] if source in (None, s.source))
        check_shards(path, manifest, shards, verify=verify)
        dataset = cls(path, manifest, shards, split, block_length)
        if len(dataset) == 0:
            known = ", ".join(sorted({s.source for s in manifest.splits[split]})) or "none"
            raise DataError(
                f"{path}: split {split!r}{f' of source {source!r}' if source else ''} holds {dataset.num_tokens} "
                f"tokens, less than one block of {block_length} (sources: {known}); give `unmask data prepare` more "
                "documents (2% of them go to validation, 2% to test) or lower block_length"
            )
        return dataset

    def __len__(self) -> int:
        """Number of whole blocks."""
        return self.num_tokens // self.block_length

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token: bits per byte = nats per token / ln 2 / bytes_per_token."""
        return self.text_bytes / self.num_tokens

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources with text in this split, for `open(..., source=name)`."""
        return tuple(dict.fromkeys(shard.source for shard in self.shards))

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        tokenizer = tokenizers.load(self.path)
        if tokenizer.sha256 != self.manifest.tokenizer_sha256:
            raise DataError(
                f"{self.path}/tokenizer.json is not the tokenizer that made these ids; prepare the data again"
            )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides what block i is: equal fingerprints, equal blocks."""
        facts = [FORMAT, self.manifest.tokenizer_sha256, self.manifest.dtype, self.split, self.block_length]
        return hashlib.sha256(json.dumps([*facts, *(s.sha256 for s in self.shards)]).encode()).hexdigest()

    def blocks(self, indices: ArrayLike) -> Tensor:
        """Token ids, int64 [n, L], of the blocks `indices` (int [n], each in [0, len(self)))."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"blocks {wanted.min()} to {wanted.max()} asked of {len(self)}")
        out = np.empty((len(wanted), self.block_length), dtype=np.int64)
        for row, index in zip(out, wanted.tolist(), strict=True):
            self._read_tokens(index * self.block_length, row)
        return torch.from_numpy(out)

    def document(self, index: int) -> Tensor:
        """Token ids, int64 [length], of one document with its delimiters."""
        for number, shard in enumerate(self.shards):
            if index < shard.documents:
                file = self.path / shard.index_file
                begin, end = np.fromfile(file, dtype="<i8", count=2, offset=8 * index).tolist()
                out = np.empty(end - begin, dtype=np.int64)
                self._read_tokens(int(self._first_token[number]) + begin, out)
                return torch.from_numpy(out)
            index -= shard.documents
        raise IndexError(f"document {index + self.num_documents} asked of {self.num_documents}")

    def _read_tokens(self, first: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from position `first` of the split on, across shard borders."""
        number = int(np.searchsorted(self._first_token, first, side="right")) - 1
        filled = 0
        while filled < len(out):
            shard = self.shards[number]
            offset = first + filled - int(self._first_token[number])
            count = min(len(out) - filled, shard.tokens - offset)
            data = os.pread(self._file(number), count * self.dtype.itemsize, offset * self.dtype.itemsize)
            if len(data) != count * self.dtype.itemsize:
                raise self._cut_short(number)
            self._check_unmodified(number)
            part = out[filled : filled + count]
            part[:] = np.frombuffer(data, dtype=self.dtype)
            if part.max() >= self.manifest.vocab_size:
                raise DataError(
                    f"{self.path / shard.file} is damaged: it holds token {part.max()} of a vocabulary of "
                    f"{self.manifest.vocab_size}; check it with `unmask data inspect --verify {self.path}`"
                )
            filled, number = filled + count, number + 1

    def _file(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._close()
            file = self.path / self.shards[number].file
            try:
                self._files[number] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{file} disappeared while in use ({error.strerror}); restore it and resume") from None
            self._modified.setdefault(number, os.fstat(self._files[number]).st_mtime_ns)
        return self._files[number]

    def _check_unmodified(self, number: int) -> None:
        """After a read: were these the tokens of the manifest? One system call, unless somebody wrote to the file."""
        shard, found = self.shards[number], os.fstat(self._file(number))
        if found.st_mtime_ns == self._modified[number]:
            return
        if found.st_size != shard.tokens * self.dtype.itemsize:
            raise self._cut_short(number)
        with os.fdopen(os.dup(self._file(number)), "rb") as stream:  # not by name: that may be another file by now
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != shard.sha256:
            raise DataError(
                f"{self.path / shard.file} was written to while in use: its sha256 is {digest}, the manifest says "
                f"{shard.sha256}; restore the file, then resume with data.verify=true to have every shard checked"
            )
        self._modified[number] = found.st_mtime_ns

    def _cut_short(self, number: int) -> DataError:
        shard, found = self.shards[number], os.fstat(self._file(number)).st_size
        return DataError(
            f"{self.path / shard.file} was cut short while in use: it has {found} of "
            f"{shard.tokens * self.dtype.itemsize} bytes; restore the file (its sha256 is {shard.sha256}) and resume"
        )

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def check_shards(path: Path, manifest: Manifest, shards: Sequence[Shard], *, verify: bool) -> None:
    """DataError unless every file of `shards` has the size (and with `verify` the sha256) that the manifest states."""
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in shards:
        for name, size, sha256 in (
            (shard.file, shard.tokens * itemsize, shard.sha256),
            (shard.index_file, (shard.documents + 1) * 8, shard.index_sha256),
        ):
            file = path / name
            remedy = f"copy it again or repeat `unmask data prepare` into a new folder than {path}"
            if not file.is_file():
                raise DataError(f"{file} is missing, the manifest lists it with {size} bytes; {remedy}")
            if (found := file.stat().st_size) != size:
                raise DataError(f"{file} has {found} bytes, the manifest says {size}; {remedy}")
            if verify and (digest := sha256_of(file)) != sha256:
                raise DataError(
                    f"{file} has sha256 {digest}, the manifest says {sha256}: its content changed; {remedy}"
                )

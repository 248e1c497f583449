import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from small_corpus import some_texts, write
from tokenizers import Tokenizer, models, pre_tokenizers

from launch.errors import DataError
from llm.data import shards
from llm.data.shards import DatasetWriter, Source, TokenDataset, read_manifest
from llm.data.tokenizers import TextTokenizer


def packed(tokenizer: TextTokenizer, texts: list[str]) -> list[int]:
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [i for ids in tokenizer.encode_batch(texts) for i in (*start, *ids, tokenizer.eos_id)]


def words_tokenizer(vocab_size: int, *, bos: bool = False) -> TextTokenizer:
    vocabulary = {f"w{i}": i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TextTokenizer(backend=backend, bos_id=1 if bos else None, eos_id=2)


@pytest.mark.parametrize("shard_tokens", [10**6, 500, 1])
def test_blocks_are_the_packed_documents_whatever_the_shards(
    tmp_path: Path, bpe: TextTokenizer, shard_tokens: int
) -> None:
    texts = some_texts(60)
    manifest = write(tmp_path / "d", bpe, {"tales": texts}, shard_tokens=shard_tokens)
    expected = packed(bpe, texts)
    assert len(manifest.splits["train"]) == {10**6: 1, 500: 4, 1: 60}[shard_tokens]
    dataset = TokenDataset.open(tmp_path / "d", "train", 17, verify=True)
    assert dataset.num_tokens == len(expected) and len(dataset) == len(expected) // 17
    blocks = dataset.blocks(range(len(dataset)))
    assert blocks.dtype == torch.int64 and blocks.shape == (len(dataset), 17)
    assert blocks.flatten().tolist() == expected[: 17 * len(dataset)]
    assert dataset.blocks([5, 0, 5]).tolist() == [blocks[5].tolist(), blocks[0].tolist(), blocks[5].tolist()]
    assert dataset.blocks([]).shape == (0, 17)


def test_documents_come_back_with_their_delimiters(tmp_path: Path, bpe: TextTokenizer) -> None:
    texts = some_texts(20)
    write(tmp_path / "d", bpe, {"tales": texts}, shard_tokens=200)
    dataset = TokenDataset.open(tmp_path / "d", "train", 8)
    assert [dataset.document(i).tolist() for i in range(20)] == [packed(bpe, [text]) for text in texts]
    assert [dataset.tokenizer.decode(dataset.document(i).tolist()) for i in range(20)] == texts
    with pytest.raises(IndexError, match="20"):
        dataset.document(20)


@pytest.mark.parametrize("vocab_size, dtype, itemsize", [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_dtype_follows_the_vocabulary_and_the_largest_id_survives(tmp_path: Path, vocab_size, dtype, itemsize) -> None:
    tokenizer = words_tokenizer(vocab_size, bos=True)
    manifest = write(tmp_path / "d", tokenizer, {"words": [f"w{vocab_size - 1} w7"]})
    assert manifest.dtype == dtype
    assert (tmp_path / "d/train-00000.bin").stat().st_size == 4 * itemsize
    dataset = TokenDataset.open(tmp_path / "d", "train", 4, verify=True)
    assert dataset.blocks([0]).tolist() == [[1, vocab_size - 1, 7, 2]]  # BOS w w EOS


def test_bytes_per_token_counts_the_utf8_of_the_text(tmp_path: Path, bpe: TextTokenizer) -> None:
    texts = some_texts(30)
    write(tmp_path / "d", bpe, {"tales": texts})
    dataset = TokenDataset.open(tmp_path / "d", "train", 8)
    assert dataset.text_bytes == sum(len(text.encode()) for text in texts) > sum(map(len, texts))
    assert dataset.bytes_per_token == dataset.text_bytes / len(packed(bpe, texts))


def test_a_source_can_be_read_alone_even_if_sources_alternate(tmp_path: Path, bpe: TextTokenizer) -> None:
    texts = some_texts(40)
    with DatasetWriter(tmp_path / "d", bpe, shard_tokens=300) as writer:
        for number, text in enumerate(texts):
            writer.add("train", "odd" if number % 2 else "even", [text])
        writer.publish([Source(name="odd"), Source(name="even")])
    whole = TokenDataset.open(tmp_path / "d", "train", 1)
    assert set(whole.sources) == {"odd", "even"}
    for remainder, source in enumerate(("even", "odd")):
        part = TokenDataset.open(tmp_path / "d", "train", 1, source=source)
        assert part.blocks(range(len(part))).flatten().tolist() == packed(bpe, texts[remainder::2])
    with pytest.raises(DataError, match=r"source 'ood' holds 0 tokens.*sources: even, odd"):
        TokenDataset.open(tmp_path / "d", "train", 1, source="ood")


def test_manifest_reads_back_and_the_same_text_gives_the_same_bytes(tmp_path: Path, bpe: TextTokenizer) -> None:
    first = write(tmp_path / "a", bpe, {"tales": some_texts(30)}, shard_tokens=200)
    second = write(tmp_path / "b", bpe, {"tales": some_texts(30)}, shard_tokens=200)
    assert read_manifest(tmp_path / "a") == first == second
    open_a, open_b = (TokenDataset.open(tmp_path / name, "train", 16) for name in "ab")
    assert open_a.fingerprint == open_b.fingerprint
    assert TokenDataset.open(tmp_path / "a", "train", 8).fingerprint != open_a.fingerprint
    write(tmp_path / "c", bpe, {"tales": some_texts(29)}, shard_tokens=200)
    assert TokenDataset.open(tmp_path / "c", "train", 16).fingerprint != open_a.fingerprint


def test_nothing_is_left_when_writing_fails(tmp_path: Path, bpe: TextTokenizer) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "d", bpe, shard_tokens=100) as writer:
        writer.add("train", "tales", some_texts(3))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "d", bpe, {"tales": some_texts(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "d", bpe, {"tales": some_texts(3)})


@pytest.fixture
def folder(tmp_path: Path, bpe: TextTokenizer) -> Path:
    write(tmp_path / "d", bpe, {"tales": some_texts(60)}, shard_tokens=500)
    return tmp_path / "d"


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx"])
def test_damage_is_found_at_open_and_named(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    flipped = bytes([data[0], data[1] ^ 1, *data[2:]])
    (folder / name).write_bytes(flipped)
    TokenDataset.open(folder, "train", 8)  # the size is right; only the hash can tell
    with pytest.raises(DataError, match=rf"{name} has sha256 .* its content changed; copy it again"):
        TokenDataset.open(folder, "train", 8, verify=True)
    (folder / name).write_bytes(data[:-2])
    with pytest.raises(DataError, match=rf"{name} has {len(data) - 2} bytes, the manifest says {len(data)}"):
        TokenDataset.open(folder, "train", 8)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenDataset.open(folder, "train", 8)


def test_a_shard_cut_short_or_gone_while_reading_is_an_error_not_a_crash(folder: Path) -> None:
    dataset = TokenDataset.open(folder, "train", 8)
    dataset.blocks(range(len(dataset)))
    with (folder / "train-00002.bin").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DataError, match=r"train-00002.bin was cut short while in use.*resume"):
        dataset.blocks(range(len(dataset)))
    fresh = pickle.loads(pickle.dumps(dataset))  # no files open yet
    (folder / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000.bin disappeared while in use.*resume"):
        fresh.blocks([0])


def test_a_shard_that_is_written_to_while_reading_is_believed_only_if_it_is_what_it_was(folder: Path) -> None:
    dataset, file = TokenDataset.open(folder, "train", 8), folder / "train-00000.bin"
    before = dataset.blocks([0])
    content = bytearray(file.read_bytes())
    os.utime(file)
    assert torch.equal(dataset.blocks([0]), before), "touched"
    content[20] ^= 1  # another token of the vocabulary, in a block that is not read
    with file.open("r+b") as stream:
        stream.write(content)
    with pytest.raises(DataError, match=r"train-00000.bin was written to while in use.*data.verify=true"):
        dataset.blocks([0])
    content[20] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)
    assert torch.equal(dataset.blocks([0]), before), "restored in place"


def test_an_id_outside_the_vocabulary_names_the_shard(folder: Path) -> None:
    data = bytearray((folder / "train-00000.bin").read_bytes())
    data[20:22] = b"\xff\xff"
    (folder / "train-00000.bin").write_bytes(data)
    dataset = TokenDataset.open(folder, "train", 8)
    with pytest.raises(DataError, match=r"train-00000.bin is damaged: it holds token 65535 of a vocabulary of 300"):
        dataset.blocks([1])


def test_manifests_that_are_absent_torn_or_foreign_are_named(folder: Path) -> None:
    file = folder / "manifest.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        read_manifest(folder)
    for torn in ("[]", json.dumps({**json.loads(text), "extra": 1})):
        file.write_text(torn)
        with pytest.raises(DataError, match=r"manifest.json is damaged"):
            read_manifest(folder)
    file.write_text(json.dumps({**json.loads(text), "format": "other-1"}))
    with pytest.raises(DataError, match=r"format 'other-1', this version reads"):
        read_manifest(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"is no prepared data set"):
        read_manifest(folder)


def test_requests_that_cannot_be_met_say_why(folder: Path) -> None:
    with pytest.raises(DataError, match=r"split 'validation' holds 0 tokens, less than one block of 8"):
        TokenDataset.open(folder, "validation", 8)
    with pytest.raises(DataError, match="no split 'dev'"):
        TokenDataset.open(folder, "dev", 8)  # type: ignore[arg-type]
    dataset = TokenDataset.open(folder, "train", 8)
    with pytest.raises(IndexError, match=f"asked of {len(dataset)}"):
        dataset.blocks([len(dataset)])
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"w', '"v', 1))
    with pytest.raises(DataError):
        _ = dataset.tokenizer


def test_more_shards_than_open_files_can_be_read(tmp_path: Path, bpe: TextTokenizer, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    texts = some_texts(20)
    write(tmp_path / "d", bpe, {"tales": texts}, shard_tokens=1)
    dataset = TokenDataset.open(tmp_path / "d", "train", 1)
    for _ in range(2):
        assert dataset.blocks(range(len(dataset))).flatten().tolist() == packed(bpe, texts)

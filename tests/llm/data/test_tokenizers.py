import hashlib
import json
from pathlib import Path

import pytest
from small_corpus import some_texts
from transformers import AutoTokenizer

from launch.errors import DataError
from llm.data import tokenizers
from llm.data.fetch import tokenizer_folder
from llm.data.tokenizers import TextTokenizer, train_bpe

AWKWARD = [
    "Hello world",
    "  two  spaces\tand a tab",
    "def f(x):\n\n    return x",
    "\u65e5\u672c\u8a9e na\u00efve \U0001f999",
    "</s> <|endoftext|> <s>",
    "",
]


def test_a_trained_bpe_has_the_size_asked_for_and_round_trips(bpe: TextTokenizer) -> None:
    assert bpe.vocab_size == 300 and bpe.eos_id == 0 and bpe.bos_id is None
    assert [bpe.decode(ids) for ids in bpe.encode_batch(AWKWARD)] == AWKWARD


def test_training_twice_gives_the_same_identity(bpe: TextTokenizer) -> None:
    assert train_bpe(some_texts(200), 300).sha256 == bpe.sha256


def test_text_that_spells_a_special_token_stays_text(bpe: TextTokenizer) -> None:
    (ids,) = bpe.encode_batch(["a <|endoftext|> b"])
    assert bpe.eos_id not in ids


def test_identity_is_the_hash_of_the_saved_file_and_survives_loading(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    assert hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest() == bpe.sha256
    for loaded in (tokenizers.load(tmp_path), tokenizers.load(tmp_path / "tokenizer.json")):
        assert (loaded.sha256, loaded.bos_id, loaded.eos_id) == (bpe.sha256, None, 0)
        assert loaded.encode_batch(AWKWARD) == bpe.encode_batch(AWKWARD)


def test_a_saved_tokenizer_opens_in_transformers(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.eos_token_id == bpe.eos_id
    assert stock("the white whale")["input_ids"] == bpe.encode_batch(["the white whale"])[0]


def test_a_vocabulary_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(DataError, match=r"supports \d+ vocabulary entries, not 5000; .*bpe:\d+"):
        train_bpe(["a whale"], 5000)
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(["a whale"], 100)


def test_files_that_are_no_tokenizers_are_named(bpe: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        tokenizers.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizers.load(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(DataError, match="eos_token '<nope>' is not in the vocabulary"):
        tokenizers.load(tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    "name, size, bos, eos, text, ids",
    [
        ("gpt2", 50257, None, 50256, "Hello world", [15496, 995]),
        ("mistral", 32000, 1, 2, "Hello world", [22557, 1526]),
        ("mistral", 32000, 1, 2, "x  y", [1318, 28705, 337]),  # SentencePiece's; AutoTokenizer's conversion differs
        ("llama2", 32000, 1, 2, "Hello world", [15043, 3186]),
    ],
)
def test_known_tokenizers_give_known_ids(fetched, name, size, bos, eos, text, ids) -> None:
    tokenizer = tokenizers.load(fetched(tokenizer_folder, name))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
    assert tokenizer.encode_batch([text]) == [ids]
    assert [tokenizer.decode(row) for row in tokenizer.encode_batch(AWKWARD)] == AWKWARD
    with_bos = [] if bos is None else [bos]
    assert tokenizer.backend.encode(text).ids == with_bos + ids

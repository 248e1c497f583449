"""`unmask eval --sets`: the figures of the ordinary evaluators on blocks that are known token by token."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.errors import ConfigError, DataError
from launch.runtime import Runtime
from llm import export
from llm.data import tokenizers
from llm.data.shards import TokenDataset
from llm.evals.perplexity_sets import FramedBlocks, format_table, tokenise
from llm.evals.published_texts import find_copies, measure
from llm.evaluate import RECORD, main
from llm.heldout import evaluate_bounds
from llm.pretrained import load_pretrained
from tests.processes import RankFailed, spawn
from tests.runs import ROOT, Tiny

LINES = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()][:60]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text as two of the sets, one of them detokenised on the way."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "ag_news.jsonl").write_text("".join(f"{json.dumps({'text': line})}\n" for line in LINES))
    (folder / "ptb.txt").write_text("".join(f"{line} <unk> 's N\n" for line in LINES))
    return folder


def evaluate(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def last(run: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / RECORD).read_text().splitlines()][-count:]


def on_sets(run: Path, root: Path, sets: str, *arguments: str) -> tuple[str, ...]:
    return (str(run), "--sets", sets, "--data-root", str(root), "--allow-other-text", "--draws", "2", *arguments)


# --- packing ---------------------------------------------------------------------------------------------------------


def test_rows_become_documents_that_end_with_eos_and_fill_contiguous_blocks(
    root: Path, tiny: Tiny, tmp_path: Path
) -> None:
    tokenizer = tokenizers.load(tiny.data)
    (copy,) = find_copies(["ptb"], root, hub=False)
    tokenise(copy, measure(copy, allow_other=True), tokenizer, tmp_path / "ptb")
    dataset = TokenDataset.open(tmp_path / "ptb", "validation", 16)
    texts = [f"{line} ?'s N".strip() for line in LINES]
    expected = [token for ids in tokenizer.encode_batch(texts) for token in (*ids, tokenizer.eos_id)]
    assert dataset.blocks(range(len(dataset))).flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert (dataset.num_tokens, dataset.text_bytes) == (len(expected), sum(len(text.encode()) for text in texts))


def test_framed_blocks_stand_between_bos_and_eos_and_a_causal_model_is_given_the_first(tiny: Tiny) -> None:
    stream = TokenDataset.open(tiny.data, "validation", 6)
    eos = stream.manifest.eos_id
    masked = FramedBlocks(stream=stream, first=7, is_causal=False)
    causal = FramedBlocks(stream=stream, first=7, is_causal=True)
    inner = stream.blocks([2, 0]).tolist()
    assert masked.blocks([2, 0]).tolist() == [[7, *row, eos] for row in inner]
    assert causal.blocks([2, 0]).tolist() == [[*row, eos] for row in inner]
    assert len(masked) == len(causal) == len(stream)
    for framed, length in ((masked, 8), (causal, 7)):  # the text behind a block is that of its 6 tokens
        assert framed.bytes_per_token * length == pytest.approx(stream.bytes_per_token * 6)


def test_tokens_are_made_once_and_those_of_another_text_are_refused(root: Path, tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(tiny.data)
    (copy,) = find_copies(["ptb"], root, hub=False)
    text = measure(copy, allow_other=True)
    tokenise(copy, text, tokenizer, tmp_path / "ptb")
    written = (tmp_path / "ptb" / "manifest.json").stat().st_mtime_ns
    tokenise(copy, text, tokenizer, tmp_path / "ptb")
    assert (tmp_path / "ptb" / "manifest.json").stat().st_mtime_ns == written
    (tmp_path / "ptb.txt").write_text("another text\n")
    (other,) = find_copies(["ptb"], tmp_path, hub=False)
    with pytest.raises(DataError, match=r"holds the tokens of another text or tokenizer; remove it"):
        tokenise(other, measure(other, allow_other=True), tokenizer, tmp_path / "ptb")


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ar", "mdm", "prime"])
def test_the_figures_are_those_of_unmask_eval_on_the_same_tokens(
    runs: dict[str, Path], root: Path, family: str
) -> None:
    run = runs[family]
    evaluate(*on_sets(run, root, "ag_news", "--sequences", "9"))
    expected_names = {"ar": ["nll_ar"], "mdm": ["nelbo_token"], "prime": ["nelbo_token", "nelbo_subtoken"]}[family]
    found = last(run, len(expected_names))
    assert [row["estimate"] for row in found] == expected_names
    bounds = () if family == "ar" else ("--bounds", *expected_names)
    data = ("--data", str(run / "sets" / "ag_news"), "--split", "test")
    evaluate(str(run), *data, *bounds, "--draws", "2", "--sequences", "9")
    for mine, theirs in zip(found, last(run, len(expected_names)), strict=True):
        shared = theirs.keys() - {"unigram_nats_per_token"}
        assert {key: mine[key] for key in shared} == {key: theirs[key] for key in shared}
        assert theirs["unigram_nats_per_token"] is None and mine["unigram_nats_per_token"] > 0  # of the training set
        words, tokens = mine["text"]["words"], TokenDataset.open(run / "sets" / "ag_news", "test", 1).num_tokens
        assert mine["ppl_per_word"] == pytest.approx(math.exp(mine[mine["estimate"]] * tokens / words))


class Listed:
    """Blocks from a table of tokens [N, L]."""

    bytes_per_token = 1.0

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def blocks(self, indices: np.ndarray) -> torch.Tensor:
        return self.tokens[torch.from_numpy(indices)]


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_framed_figures_are_those_of_tokens_framed_by_hand(
    runs: dict[str, Path], root: Path, family: str, cpu_runtime: Runtime
) -> None:
    run = runs[family]
    loaded = load_pretrained(run, torch.device("cpu"))
    (copy,) = find_copies(["ag_news"], root, hub=False)
    eos, words = loaded.tokenizer.eos_id, sum(len(line.split()) for line in LINES)
    texts = loaded.tokenizer.encode_batch(list(copy.read()))
    flat = [token for ids in texts for token in (*ids, eos)]
    table = torch.tensor([[eos, *flat[i : i + 14], eos] for i in range(0, len(flat) - 13, 14)])
    table = table[:, 1:] if family == "ar" else table
    config = replace(loaded.config.evaluation, draws=2)
    names = loaded.language.bounds(["nelbo_token"])
    chosen = np.arange(5) * len(table) // 5
    (expected,) = evaluate_bounds(loaded.model, loaded.language, Listed(table), chosen, names, config, cpu_runtime)
    cpu_runtime.close()
    evaluate(*on_sets(run, root, "ag_news", "--packing", "framed", "--sequences", "5"))
    (found,) = last(run, 1)
    assert (found["tokens"], found["ppl"]) == (5 * table.shape[1], pytest.approx(expected.estimate.ppl))  # type: ignore
    nats = found[names[0]] * table.shape[1] / 14  # for each token of the text
    assert found["ppl_per_word"] == pytest.approx(math.exp(nats * len(flat) / words))
    bits = nats / math.log(2) / (sum(len(line.encode()) for line in LINES) / len(flat))
    assert found[f"{names[0]}_bits_per_byte"] == pytest.approx(bits, rel=0.01)  # whole bytes of five blocks


def test_neither_processes_nor_a_second_run_of_tokenising_change_a_figure(runs: dict[str, Path], root: Path) -> None:
    arguments = on_sets(runs["prime"], root, "ptb,ag_news", "--sequences", "7")
    spawn(evaluate, 2, *arguments, group=False)
    first = last(runs["prime"], 4)
    evaluate(*arguments)
    for mine, theirs in zip(first, last(runs["prime"], 4), strict=True):
        assert [mine[k] for k in ("set", "estimate", "tokens", "text")] == [
            theirs[k] for k in ("set", "estimate", "tokens", "text")
        ]
        assert mine[mine["estimate"]] == pytest.approx(theirs[theirs["estimate"]], rel=1e-6)


def test_an_exported_folder_has_the_figures_of_its_run(runs: dict[str, Path], root: Path, tmp_path: Path) -> None:
    assert export.main([str(runs["mdm"]), "--to", str(tmp_path / "exported")]) == 0
    for folder in (runs["mdm"], tmp_path / "exported"):
        evaluate(*on_sets(folder, root, "ptb", "--sequences", "4"))
    (mine,), (theirs,) = last(runs["mdm"], 1), last(tmp_path / "exported", 1)
    assert mine["nelbo_token"] == pytest.approx(theirs["nelbo_token"], rel=1e-6)


def test_the_table_names_the_estimate_of_every_perplexity(runs: dict[str, Path], root: Path) -> None:
    evaluate(*on_sets(runs["prime"], root, "ptb", "--sequences", "2"))
    header, _, *lines = format_table(last(runs["prime"], 2)).splitlines()
    assert header.split(" | ")[2:7] == ["estimate", "nats/token (s.e.)", "ppl (s.e.)", "ppl/word", "bits/byte"]
    assert [line.split(" | ")[:3:2] for line in lines[:2]] == [
        ["| ptb (other text)", "nelbo_token"],
        ["| ptb (other text)", "nelbo_subtoken"],
    ]
    assert "nelbo_... is an upper bound" in lines[-1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sets", "ptb", "--bounds", "loss_ce_joint"), "loss_ce_joint is no likelihood"),
        (("--sets", "ptb", "--split", "test"), "--split belongs to the run's own data"),
        (("--sets", "ptb", "--data", "data/x"), "--data data/x is a data set of bounds"),
        (("--sets", "ptb", "--tasks", "piqa"), "--sets belongs to bounds"),
        (("--sets", "nonsense"), "no set 'nonsense'"),
        (("--sets", ","), "no set ''; --sets knows wikitext2"),
        (("--packing", "framed"), "--packing needs --sets"),
        (("--sets", "ptb", "--draws", "0"), "draws = 0; the smallest is 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    runs: dict[str, Path], arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        main([str(runs["prime"]), *arguments])


def test_missing_sets_are_refused_on_all_ranks_before_any_work(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = (str(runs["ar"]), "--sets", "ptb,lm1b", "--data-root", str(tmp_path))
    with pytest.raises(RankFailed, match=r"(?s)ptb \(none of ptb\.jsonl.*lm1b \(none of lm1b\.jsonl"):
        spawn(evaluate, 2, *arguments, group=False)
    assert not (runs["ar"] / "sets" / "ptb").exists()


def test_another_text_than_the_published_is_refused_without_leave(runs: dict[str, Path], root: Path) -> None:
    with pytest.raises(DataError, match=r"ag_news.jsonl has 60 rows, the published test split 7600"):
        main([str(runs["ar"]), "--sets", "ag_news", "--data-root", str(root)])

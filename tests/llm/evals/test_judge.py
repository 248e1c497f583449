"""A judge's word on texts is what its own model says, never without their entropy, and never a masked model's."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.errors import ConfigError, DataError
from llm.data.shards import DatasetWriter, Source, TokenDataset
from llm.data.tokenizers import train_bpe
from llm.diffusion.sampler import SamplerConfig
from llm.evals import judge as judges
from llm.evals.judge import Judge, features, judge_texts, open_judge, reference_texts, text_of
from llm.evals.models import HuggingFaceTokenizer, Scorable
from llm.evals.text_metrics import LEAST_FOR_MAUVE
from llm.evals.text_report import format_table, judge_samples, write_judged
from llm.generate import generate
from llm.pretrained import export, load_pretrained
from llm.sample import main
from tests.llm.evals.oracles import TEXT, tiny_huggingface, tokenizer
from tests.llm.evals.oracles import tiny as tiny_scorable
from tests.llm.test_metric_names import assert_truthful
from tests.runs import Tiny, command

CPU = torch.device("cpu")
TEXTS = ["the cat sat on the mat", "", "the dog lay on the log while it rained all day", "aaaa aaaa", "xyz"]


@pytest.fixture(scope="module")
def llama() -> Judge:
    return Judge(name="llama", scorable=tiny_huggingface("llama"))


def losses(scorable: Scorable, texts: list[str]) -> tuple[list[float], list[int]]:
    """Nats and tokens of each text by transformers' own loss, one text at a time."""
    assert isinstance(scorable.tokenizer, HuggingFaceTokenizer)
    model: Any = scorable.model
    nats, counts = [], []
    for text in texts:
        ids = scorable.tokenizer.backend(text, add_special_tokens=False)["input_ids"]
        inputs = torch.tensor([[scorable.tokenizer.eos_id, *ids]])
        nats.append(float(model(input_ids=inputs, labels=inputs).loss.double()) * len(ids) if ids else 0.0)
        counts.append(len(ids))
    return nats, counts


def test_generative_perplexity_is_exp_of_the_mean_loss_that_transformers_computes(llama: Judge) -> None:
    nats, counts = losses(llama.scorable, TEXTS)
    judged = judge_texts(llama, TEXTS)
    figures = judged.figures()
    assert [len(tokens) for tokens in judged.tokens] == counts and figures["tokens"] == sum(counts)
    assert figures["tokens_per_text"] == pytest.approx(sum(counts) / len(TEXTS))
    assert judged.nats == pytest.approx(nats, rel=1e-5)
    assert figures["generative_ppl"] == pytest.approx(math.exp(sum(nats) / sum(counts)), rel=1e-5)


def test_the_first_token_of_our_own_judge_stands_behind_eos() -> None:
    scorable = tiny_scorable("ar")
    judged = judge_texts(Judge(name="ar", scorable=scorable), ["the cat"])
    (ids,) = scorable.tokenizer.encode_batch(["the cat"])
    inputs = torch.tensor([[scorable.tokenizer.eos_id, *ids[:-1]]])
    logits = scorable.model(inputs, lambda hidden, weight, bias: hidden @ weight.T)[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
    assert judged.nats == pytest.approx([float(expected)], rel=1e-5)


def test_standard_errors_are_over_texts(llama: Judge) -> None:
    texts = ["".join(letters) for letters in ("qzvx", "zqvv", "xxqz", "vzqx")]  # no merges: four tokens each
    judged = judge_texts(llama, texts)
    assert {len(tokens) for tokens in judged.tokens} == {4}
    figures = judged.figures()
    error = np.std(judged.nats, ddof=1) / 2.0 / 4.0
    assert figures["generative_ppl_se"] == pytest.approx(figures["generative_ppl"] * error)
    entropies = [math.log(4), 1.5 * math.log(2), 1.5 * math.log(2), math.log(4)]
    assert figures["unigram_entropy"] == pytest.approx(np.mean(entropies))
    assert figures["unigram_entropy_se"] == pytest.approx(np.std(entropies, ddof=1) / 2.0)


def test_one_text_has_no_standard_error_and_no_company(llama: Judge) -> None:
    figures = judge_texts(llama, TEXTS[:1]).figures()
    assert not [name for name in figures if name.endswith("_se") or "bleu" in name]
    assert {"generative_ppl", "unigram_entropy"} <= figures.keys()


def test_features_are_the_last_hidden_state_of_the_last_token_whatever_stands_in_the_batch(
    llama: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = llama.scorable.model
    found = features(llama, TEXTS)
    for tokens, feature in zip(judge_texts(llama, TEXTS).tokens, found, strict=True):
        states = model(input_ids=torch.tensor([[0, *tokens]]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(feature, states[-1][0, -1].numpy(), rtol=0, atol=1e-5)
    monkeypatch.setattr(judges, "_BATCH_TOKENS", 1)
    np.testing.assert_allclose(features(llama, TEXTS), found, rtol=0, atol=1e-5)


def test_a_text_longer_than_the_judges_input_is_read_in_parts(llama: Judge) -> None:
    text = f"{TEXT} {TEXT}"
    long = judge_texts(llama, [text])
    assert len(long.tokens[0]) > llama.scorable.max_length and math.isfinite(long.nats[0])
    assert features(llama, [text]).shape == (1, 32)


def test_texts_that_are_all_empty_are_no_texts(llama: Judge) -> None:
    with pytest.raises(DataError, match="all of the 2 texts are empty"):
        judge_texts(llama, ["", ""])


# --- who may judge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mdm", "prime"])
def test_a_masked_model_is_refused_by_its_name(runs: dict[str, Path], family: str) -> None:
    with pytest.raises(ConfigError, match=rf"{family} is a masked model \({family}\).*autoregressive run"):
        open_judge(str(runs[family]), CPU)


def test_a_model_that_looks_ahead_is_refused_though_transformers_opens_it_as_causal(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

    shape: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bidirectional = BertLMHeadModel(BertConfig(vocab_size=270, **shape))
        causal = BertLMHeadModel(BertConfig(vocab_size=270, is_decoder=True, **shape))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend, eos_token="<|endoftext|>")
    for name, model in {"bert": bidirectional, "decoder": causal}.items():
        model.save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"bert \(BertLMHeadModel\) looks ahead"):
        open_judge(str(tmp_path / "bert"), CPU)
    assert open_judge(str(tmp_path / "decoder"), CPU).name == "decoder"


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_causal_models_pass_the_same_trial(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "open_scorable", lambda *_: tiny_huggingface(kind))
    assert open_judge(f"models/{kind}", CPU).name == kind


# --- what is judged --------------------------------------------------------------------------------------------------


def test_documents_within_a_sample_become_paragraphs() -> None:
    tokens = tokenizer()
    cat, dog = tokens.encode_batch(["the cat", "the dog"])
    end = tokens.eos_id
    assert text_of([*cat, end, *dog], tokens) == "the cat\n\nthe dog"
    assert text_of([end, *cat, end, end], tokens) == "the cat"
    assert text_of([end, end], tokens) == ""


def test_reference_texts_are_heldout_blocks_and_the_others_are_none_of_them(tiny: Tiny) -> None:
    dataset = TokenDataset.open(tiny.data, "validation", 8)
    texts, others = reference_texts(tiny.data, dataset.tokenizer, length=8, count=6)
    every = [text_of(ids, dataset.tokenizer) for ids in dataset.blocks(np.arange(len(dataset))).tolist()]
    assert len(texts) == len(others) == 6 and len({*texts, *others}) == 12
    assert {*texts, *others} <= set(every)
    assert reference_texts(tiny.data, dataset.tokenizer, length=8, count=len(dataset)) == (every, [])


def test_a_reference_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    ours = TokenDataset.open(tiny.data, "validation", 8).tokenizer
    with pytest.raises(DataError, match=r"fewer than the 999 samples; lower --count"):
        reference_texts(tiny.data, ours, length=8, count=999)
    with DatasetWriter(tmp_path / "other", train_bpe([TEXT], 260), shard_tokens=1000) as writer:
        writer.add("validation", "x", [TEXT])
        writer.publish([Source(name="x")])
    with pytest.raises(DataError, match="of another tokenizer than the model"):
        reference_texts(tmp_path / "other", ours, length=8, count=1)


# --- the report ------------------------------------------------------------------------------------------------------


def many(seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(TEXT.split(), 6)) for _ in range(LEAST_FOR_MAUVE)]


def test_the_report_never_has_generative_perplexity_without_entropy(llama: Judge, tmp_path: Path) -> None:
    texts = many(0)
    judged, found = judge_samples(llama, texts, (texts, many(1)), seed=0)
    assert found["samples"]["mauve_llama"] == pytest.approx(1.0)  # of the same texts
    assert 0.0 < found["reference"]["mauve_llama"] < 1.0 and found["notes"] == []
    assert {k: v for k, v in found["samples"].items() if "mauve" not in k} == {
        k: v for k, v in found["reference"].items() if "mauve" not in k
    }
    path = write_judged(tmp_path, judged, {"run": "x"} | found)
    saved = json.loads(path.read_text())
    assert assert_truthful(saved) == {"generative_ppl", "generative_ppl_se"}
    assert saved["judge"]["fingerprint"] == llama.scorable.fingerprint and saved["run"] == "x"
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    total = sum(line["judge_nats"] for line in lines) / sum(line["judge_tokens"] for line in lines)
    assert saved["samples"]["generative_ppl"] == pytest.approx(math.exp(total))
    table = format_table(saved)
    for line in table.splitlines():
        assert ("generative_ppl" in line) == ("unigram_entropy" in line)
    figures = saved["samples"]
    assert f"{figures['generative_ppl']:.1f} ({figures['generative_ppl_se']:.1f}) at " in table
    assert "| mauve_llama | 1.0000 |" in table and llama.scorable.fingerprint[:12] in table


def test_too_few_texts_for_mauve_are_said_to_be_so(llama: Judge) -> None:
    texts = many(0)
    _, found = judge_samples(llama, texts[1:], (texts[1:], texts[1:]), seed=0)
    assert "mauve_llama" not in found["samples"] and "99 texts: it needs 100 (--count)" in found["notes"][0]
    assert found["notes"][0] in format_table(found)
    _, found = judge_samples(llama, texts, (texts, []), seed=0)
    assert "mauve_llama" in found["samples"] and "fewer than 200 texts" in found["notes"][0]
    assert re.search(r"\| mauve_llama \| 1\.0000 \| - \|", format_table(found))


def test_a_figure_under_a_name_that_sells_it_as_the_models_is_not_written(llama: Judge, tmp_path: Path) -> None:
    judged, found = judge_samples(llama, TEXTS, None, seed=0)
    found["samples"]["ppl"] = found["samples"]["generative_ppl"]
    with pytest.raises(ValueError, match="call it generative_ppl"):
        write_judged(tmp_path, judged, found)
    assert not list(tmp_path.iterdir())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_batch_changes_no_sample(runs: dict[str, Path]) -> None:
    for family in ("ar", "prime"):
        loaded = load_pretrained(runs[family], CPU)
        shape: dict[str, Any] = dict(config=SamplerConfig(steps=4), count=5, length=8, seed=3, device=CPU)
        whole, parts = (generate(loaded.model, loaded.language, batch=batch, **shape) for batch in (None, 2))
        assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.idle_steps, parts.idle_steps)
        assert parts.steps == whole.steps and parts.evaluations > whole.evaluations


def test_the_command_judges_a_masked_run_by_a_stock_model(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(runs["ar"], tmp_path / "exported")
    stock = tmp_path / "stock"
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported").save_pretrained(stock)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stock / name).write_bytes((tmp_path / "exported" / name).read_bytes())
    (stock / "config.json").write_text((stock / "config.json").read_text().replace("unmask_config", "their_config"))
    export(runs["prime"], tmp_path / "run")
    arguments = ("--count", "3", "--length", "8", "--judge", str(stock), "--reference", str(tiny.data))
    ended = command("python", "-m", "launch", "sample", str(tmp_path / "run"), *arguments)
    assert ended.codes == [0], ended.output
    assert re.search(r"\| generative_ppl at unigram_entropy \| [\d.]+ \([\d.]+\) at [\d.]+ ", ended.output)
    assert "no mauve_stock of 3 texts" in ended.output
    (path,) = (tmp_path / "run" / "samples").glob("judged_*.json")
    saved = json.loads(path.read_text())
    assert saved["judge"]["family"] == "huggingface" and saved["samples"]["texts"] == saved["reference"]["texts"] == 3
    assert saved["sampling"]["length"] == 8 and saved["data"] == str(tiny.data)
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--reference", "data/x"), "name a judge"),
        (("--judge", "smollm2", "--prompt", "the"), "leave --prompt and --suffix out"),
        (("--batch", "0"), "--batch 0"),
        (("--judge", "no/model/here"), "neither a run folder"),
    ],
)
def test_what_cannot_be_judged_is_refused(runs: dict[str, Path], arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main([str(runs["mdm"]), *arguments])
    assert not list((runs["mdm"] / "samples").glob("judged_*"))

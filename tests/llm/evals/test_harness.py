"""Our models under lm-evaluation-harness: figures computed by hand, and the harness's own model on the same weights."""

import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from torch import Tensor

from launch import runtime as runtimes
from launch.errors import ConfigError
from llm.data.tokenizers import train_bpe
from llm.diffusion.codec import build_codec
from llm.evals.generation import GenerationConfig, generate_until
from llm.evals.harness import HarnessModel
from llm.evals.models import HuggingFaceTokenizer, Scorable
from llm.evals.scoring import ScoringConfig
from tests.llm.evals.oracles import TEXT, known, tiny, tiny_huggingface, tokenizer
from tests.processes import RankFailed, spawn

BYTES = train_bpe(["a"], 257)  # EOS and 256 bytes: a token a byte


def byte_law(seed: int = 0) -> Tensor:
    """log p [257] of every byte, known to all models of this file."""
    return torch.randn(257, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def unigram(family: Any, **settings: Any) -> Scorable:
    law = byte_law()
    return known(lambda x: law.expand(*x.shape[:2], -1), build_codec(257, 1), family=family, tokens=BYTES, **settings)


def bigram(**settings: Any) -> Scorable:
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)
    return known(lambda x: table[x.squeeze(-1)], build_codec(257, 1), family="ar", tokens=BYTES, **settings)


def nats(text: str) -> float:
    """log p of a text under `byte_law`."""
    return sum(float(byte_law()[token]) for token in BYTES.encode_batch([text])[0])


def task(name: str, rows: list[dict], **fields: Any) -> dict[str, Any]:
    def load(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": load, "test_split": "test", **fields}


CHOICES = task(
    "choices",
    [
        {"question": "what is it", "options": ["a cat", "dog", "the mouse"], "answer": 1},
        {"question": "who sat", "options": ["I", "the cat sat on it", "you"], "answer": 0},
        {"question": "on what", "options": ["mat", "log", "a thing"], "answer": 2},
    ],
    output_type="multiple_choice",
    doc_to_text="{{question}}",
    doc_to_choice="options",
    doc_to_target="answer",
    metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
)
ROLLING = task(
    "rolling",
    [{"text": "the cat sat"}, {"text": "on the mat all day"}],
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="text",
    metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
)
LAST_WORD = task(
    "last_word",
    [{"text": "the cat sat on the", "last": "mat"}, {"text": "it rained all", "last": "day"}],
    output_type="loglikelihood",
    doc_to_text="{{text}}",
    doc_to_target=" {{last}}",
    metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
)


def evaluate(model: HarnessModel, *tasks: Any, **settings: Any) -> Any:
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings)


def instances(pairs: list[tuple[str, ...]], kind: Any = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


# --- figures by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "estimator"), [("ar", "auto"), ("mdm", "nll_chain")])
def test_accuracies_and_perplexities_of_known_laws_are_those_computed_by_hand(family: Any, estimator: Any) -> None:
    model = HarnessModel(unigram(family), ScoringConfig(estimator=estimator))
    found = evaluate(model, CHOICES, ROLLING, LAST_WORD)["results"]

    rows = CHOICES["custom_dataset"]()["test"]
    plain, normed = 0, 0
    for row in rows:
        scores = [nats(f" {option}") for option in row["options"]]
        plain += scores.index(max(scores)) == row["answer"]
        each = [score / len(option) for score, option in zip(scores, row["options"], strict=True)]
        normed += each.index(max(each)) == row["answer"]
    assert (plain, normed) != (0, 0) and plain != normed
    assert found["choices"]["acc,none"] == plain / 3 and found["choices"]["acc_norm,none"] == normed / 3

    texts = [row["text"] for row in ROLLING["custom_dataset"]()["test"]]
    total = sum(map(nats, texts))
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert found["rolling"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-6)
    assert found["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-6)
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-6)

    mean = (nats(" mat") + nats(" day")) / 2
    assert found["last_word"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-6)
    assert found["last_word"]["acc,none"] == 0.0


@pytest.mark.parametrize("longest", [1, 2, 7, 100])
def test_a_law_without_context_gives_a_text_the_same_total_in_any_windows(longest: int) -> None:
    scorable = unigram("ar", max_length=longest)
    (found,) = HarnessModel(scorable).loglikelihood_rolling(instances([("the cat sat on the mat",)]))
    assert found == pytest.approx(nats("the cat sat on the mat"), abs=1e-6)


@pytest.mark.parametrize("longest", [1, 2, 5, 100])
def test_a_law_of_one_token_of_context_gives_a_text_its_exact_chain_in_any_windows(longest: int) -> None:
    scorable = bigram(max_length=longest)
    ids = [BYTES.eos_id, *BYTES.encode_batch(["the cat sat on the mat"])[0]]
    table = scorable.model.predict(torch.tensor(ids)[None, :, None])[0]  # type: ignore[operator]
    expected = sum(float(table[i, ids[i + 1]]) for i in range(len(ids) - 1))
    (found,) = HarnessModel(scorable).loglikelihood_rolling(instances([("the cat sat on the mat",)]))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_chain_of_a_masked_model_scores_every_token_of_a_rolling_text_once() -> None:
    scorable = unigram("mdm", max_length=8)
    model = HarnessModel(scorable, ScoringConfig(estimator="nll_chain"))
    (found,) = model.loglikelihood_rolling(instances([("the cat sat on the mat",)]))
    assert found == pytest.approx(nats("the cat sat on the mat"), abs=1e-6)
    drawn = HarnessModel(scorable, ScoringConfig(draws=64)).loglikelihood_rolling(instances([("the cat sat on",)]))
    assert drawn[0] == pytest.approx(nats("the cat sat on"), rel=0.05)


# --- the harness's own model -----------------------------------------------------------------------------------------


def mixed_requests(count: int = 50) -> list[tuple[str, str]]:
    """Contexts of 0 to 80 tokens, options of one or many, some too long for 48 tokens."""
    words = TEXT.split()
    draw = random.Random(0)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        context = " ".join(draw.choices(words, k=draw.choice([0, 1, 3, 10, 30])))
        options = draw.choice([["y", "n"], [" cat", " dog", " mat"], [" " + " ".join(draw.choices(words, k=4))]])
        pairs += [(context, option) for option in options]
    return pairs[:count]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("with_bos", [False, True])
def test_scores_are_those_of_the_harness_own_model_on_the_same_weights(kind: str, with_bos: bool) -> None:
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    scorable = tiny_huggingface(kind)
    backend = scorable.tokenizer.backend
    if with_bos:
        template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        backend.backend_tokenizer.post_processor = template
        scorable = Scorable(**(vars(scorable) | {"tokenizer": HuggingFaceTokenizer(backend), "add_bos": True}))
    theirs = HFLM(pretrained=scorable.model, tokenizer=backend, batch_size=4, softmax_dtype="float32")  # type: ignore[arg-type]
    requests = instances(mixed_requests())
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    model = HarnessModel(scorable)
    found = model.loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        atol=1e-5,
        rtol=1e-6,
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert model.get_model_info()["truncations"] > 0
    if not with_bos:  # with BOS the harness scores BOS itself, behind another BOS
        texts = instances([("the cat sat on the mat " * 6,), ("a dog",)], "loglikelihood_rolling")
        rolled = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
        assert model.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(rolled, rel=1e-6)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_continued_with_what_each_request_asks_for_as_the_model_was_told_to() -> None:
    scorable = tiny("mdm", max_length=48)
    pairs = [("the cat", {"until": ["og"], "max_gen_toks": 4}), ("a dog", {"until": [], "max_gen_toks": 8})]
    requests = [Instance(request_type="generate_until", doc={}, arguments=pair, idx=0) for pair in pairs]
    found = []
    for config in (GenerationConfig(), GenerationConfig(temperature=1.0, seed=4)):
        model = HarnessModel(scorable, ScoringConfig(add_bos=False), config)
        found.append(model.generate_until(requests, disable_tqdm=True))
        assert found[-1] == generate_until(scorable, pairs, config, add_bos=False)
        assert model.get_model_info()["generation"]["seed"] == config.seed
    assert found[0] != found[1]
    with pytest.raises(ConfigError, match=r"generation\.guidance = 0\.5"):
        HarnessModel(tiny("ar"), generation=GenerationConfig(guidance=0.5))


# --- processes -------------------------------------------------------------------------------------------------------


def _evaluate_on_a_rank(family: Any) -> Any:
    runtime = runtimes.start()
    found = evaluate(HarnessModel(tiny(family), ScoringConfig(draws=8), runtime=runtime), CHOICES, ROLLING, LAST_WORD)
    runtime.close()
    if found is None:
        return None
    samples = sorted((s["doc_id"], name, str(s["resps"])) for name in found["samples"] for s in found["samples"][name])
    counts = {name: {k: v for k, v in row.items()} for name, row in found["results"].items()}
    return counts, samples, found["n-samples"], {k: found["config"][k] for k in ("requests", "questions", "world_size")}


@pytest.mark.parametrize("family", ["mdm", "ar"])
def test_two_processes_give_the_results_of_one(family: str) -> None:
    (single,) = spawn(_evaluate_on_a_rank, 1, family, group=False)
    first, second = spawn(_evaluate_on_a_rank, 2, family, group=False)
    assert second is None
    for name, row in single[0].items():
        for metric, value in row.items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert first[0][name][metric] == expected, (name, metric)
    assert first[2] == single[2] and len(first[1]) == len(single[1])
    assert first[3]["questions"] == 3 and first[3]["world_size"] == 2


# --- what is refused, counted and cached -----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"guidance": 1.0}, {"temperature": 0.5}, {"estimator": "ce_joint"}])
def test_what_is_no_likelihood_may_rank_options_and_nothing_else(settings: dict[str, Any]) -> None:
    model = HarnessModel(tiny("prime"), ScoringConfig(draws=4, **settings))
    found = evaluate(model, CHOICES)
    assert found["results"]["choices"]["sample_len"] == 3
    if "estimator" in settings:
        assert found["config"]["scoring"]["estimator"] == "score_joint"
    for refused in (ROLLING, LAST_WORD):
        with pytest.raises(ConfigError, match="reports a likelihood"):
            evaluate(model, refused)


def test_greedy_filling_is_done_for_documents_of_one_continuation_alone() -> None:
    best = BYTES.decode([int(byte_law().argmax())])
    model = HarnessModel(unigram("mdm"))
    (single,) = model.loglikelihood(instances([("x", best)]))
    assert single[1]
    options = [
        Instance(request_type="loglikelihood", doc={}, arguments=("x", o), idx=i, metadata=("t", 0, 1))
        for i, o in enumerate([best, "yy"])
    ]
    assert [greedy for _, greedy in model.loglikelihood(options)] == [False, False]


def test_the_facts_of_an_evaluation_are_told() -> None:
    model = HarnessModel(tiny("mdm", max_length=12), ScoringConfig(draws=8, boundary="longest_prefix"))
    evaluate(model, CHOICES, ROLLING)
    model.loglikelihood(instances([("the cat", "")]))
    info = model.get_model_info()
    assert info["family"] == "mdm" and info["fingerprint"] == "tiny mdm 0" and info["dtype"] == "float32"
    assert info["parameters"] == sum(p.numel() for p in model.scorable.model.parameters())
    assert info["tokenizer_sha256"] == tokenizer().sha256 and info["add_bos"] and info["boundary"] == "longest_prefix"
    assert info["scoring"] == {
        "estimator": "nelbo_token",
        "temperature": 1.0,
        "max_length": 12,
        "draws": 8,
        "variant": "E2",
        "guidance": 0.0,
        "seed": 0,
    }
    assert (info["requests"], info["rolling_requests"], info["questions"]) == (10, 2, 3)
    assert info["empty_continuations"] == 1 and info["truncations"] > 0
    assert info["mean_monte_carlo_error"] > 0 and 0 <= info["share_within_two_errors"] <= 1


def test_a_single_draw_knows_no_error() -> None:
    model = HarnessModel(tiny("mdm"), ScoringConfig(draws=1))
    evaluate(model, CHOICES)
    info = model.get_model_info()
    assert info["mean_monte_carlo_error"] is None and info["share_within_two_errors"] is None


def test_the_cache_of_the_harness_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would serve those of another model"):
        evaluate(HarnessModel(tiny("ar")), CHOICES, use_cache=str(tmp_path / "cache"))


def _die_in_the_middle(cache: Path, batches: int) -> None:
    scorable = tiny("mdm")
    seen = []

    def kill(*_: Any) -> None:
        seen.append(1)
        if len(seen) > batches:
            os.kill(os.getpid(), signal.SIGKILL)

    scorable.model.register_forward_pre_hook(kill)
    model = HarnessModel(scorable, ScoringConfig(draws=8, batch_tokens=64), cache=cache)
    model.loglikelihood(instances(mixed_requests()), disable_tqdm=True)


def forwards(scorable: Scorable) -> Callable[[], int]:
    seen: list[int] = []
    scorable.model.register_forward_pre_hook(lambda *_: seen.append(1))
    return lambda: len(seen)


def test_an_evaluation_that_was_killed_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    requests = instances(mixed_requests())
    settings = ScoringConfig(draws=8, batch_tokens=64)
    whole, resumed, third = tiny("mdm"), tiny("mdm"), tiny("mdm")
    count = forwards(whole)
    expected = HarnessModel(whole, settings).loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(RankFailed, match="SIGKILL"):
        spawn(_die_in_the_middle, 1, tmp_path, count() // 2, group=False)
    again = forwards(resumed)
    model = HarnessModel(resumed, settings, cache=tmp_path)
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert [g for _, g in found] == [g for _, g in expected]
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-5)
    assert 0 < again() < count() and model.get_model_info()["cached_scores"] > 5
    last = forwards(third)
    assert HarnessModel(third, settings, cache=tmp_path).loglikelihood(requests, disable_tqdm=True) == found
    assert last() == 0


def test_a_cache_is_not_served_to_another_checkpoint_seed_or_estimator(tmp_path: Path) -> None:
    requests = instances(mixed_requests(20))
    HarnessModel(tiny("mdm"), ScoringConfig(draws=8), cache=tmp_path).loglikelihood(requests, disable_tqdm=True)
    for scorable, settings in (
        (tiny("mdm", seed=1), ScoringConfig(draws=8)),
        (tiny("mdm"), ScoringConfig(draws=8, seed=1)),
        (tiny("mdm"), ScoringConfig(draws=8, estimator="nll_chain")),
    ):
        model = HarnessModel(scorable, settings, cache=tmp_path)
        model.loglikelihood(requests, disable_tqdm=True)
        assert model.get_model_info()["cached_scores"] == 0


def test_the_command_line_of_the_harness_builds_the_model_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = f"path={runs['mdm']},draws=4,estimator=nll_chain,cache={tmp_path},generation.steps=3"
    assert spawn(_from_arguments, 1, arguments, group=False) == [("mdm", 4, "nll_chain", 3)]
    for text, words in (
        ("path=RUN,draw=4", "unknown key 'draw'; did you mean 'draws'"),
        ("path=RUN,generation.step=4", "unknown key 'generation.step'; did you mean 'generation"),
        ("draws=4", "needs --model_args path=RUN"),
    ):
        with pytest.raises(ConfigError, match=words):
            _from_arguments(text)


def _from_arguments(text: str) -> tuple[str, int, str, int | None]:
    from lm_eval.api.registry import get_model

    model = get_model("unmask").create_from_arg_string(text, {"batch_size": 1, "device": "cpu"})
    assert isinstance(model, HarnessModel)
    return model.scorable.family, model.scoring.draws, model.scoring.estimator, model.generation.steps

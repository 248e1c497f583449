"""Judging merged models: likelihoods as transformers computes them, and texts that can be repeated."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.moe import judge
from llm.moe.judge import judge_generation, judge_likelihood, repeated_4grams, unigram_entropy
from tests import mixtures


def blocks() -> Tensor:
    return mixtures.tokens(rows=5, length=20)


def changed() -> Any:
    """The model of `mixtures` with one other expert."""
    model = mixtures.mixture("mixtral")
    model.model.layers[1].mlp.experts.down_proj[2].mul_(-1.0)
    return model


def test_nats_are_the_loss_of_transformers_and_their_spread_is_over_blocks() -> None:
    model = mixtures.mixture("mixtral")
    losses = torch.tensor([float(model(block[None], labels=block[None]).loss) for block in blocks()]).double()
    found = judge_likelihood(model, model, blocks(), batch=2)
    assert found.nats_per_token == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.nats_per_token == pytest.approx(float(model(blocks(), labels=blocks()).loss), rel=1e-6)
    assert found.standard_error == pytest.approx(float(losses.std() / math.sqrt(5)), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    assert math.isnan(judge_likelihood(model, model, blocks()[:1]).standard_error)


def test_a_model_does_not_diverge_from_itself_nor_from_its_equal() -> None:
    model = mixtures.mixture("qwen3_moe")
    for original in (model, mixtures.mixture("qwen3_moe")):
        found = judge_likelihood(model, original, blocks())
        assert found.divergence == 0.0 and found.agreement == 1.0


def test_divergence_is_that_of_the_model_from_the_original_by_the_definition() -> None:
    model, original = changed(), mixtures.mixture("mixtral")
    model.lm_head.weight.mul_(2.0)  # far enough apart for directions to differ
    own, reference = (mixtures.logits(m, blocks())[:, :-1].double().log_softmax(-1) for m in (model, original))
    divergence = (reference.exp() * (reference - own)).sum(-1).mean()
    backwards = (own.exp() * (own - reference)).sum(-1).mean()
    found = judge_likelihood(model, original, blocks(), batch=3)
    assert found.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert abs(float(divergence - backwards)) > 1e-2 * float(divergence)  # the other direction is another number
    same = (own.argmax(-1) == reference.argmax(-1)).double().mean()
    assert 0 < float(same) < 1 and found.agreement == pytest.approx(float(same))


class Bigram(nn.Module):
    """Next-token probabilities that depend on the last token alone, with the face of a causal model."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.logits = probabilities.log()
        self.texts: list[Tensor] = []

    def forward(self, tokens: Tensor, past_key_values: Tensor | None = None, use_cache: bool = False) -> Any:
        whole = tokens if past_key_values is None else torch.cat([past_key_values, tokens], 1)
        self.texts.append(whole)
        found = nn.Module()
        found.logits, found.past_key_values = self.logits[tokens], whole
        return found


def written(model: Any, **settings: Any) -> tuple[Any, Tensor]:
    """The judgement, and what the original read."""
    original = Bigram(torch.full((97, 97), 1 / 97))
    found = judge_generation(model, original, blocks()[:, :6], length=7, **settings)
    return found, torch.cat(original.texts)


def test_texts_are_repeatable_differ_by_seed_and_do_not_depend_on_the_batch() -> None:
    model = mixtures.mixture("mixtral")
    found, text = written(model)
    assert text.shape == (5, 13) and torch.equal(text[:, :6], blocks()[:, :6])
    assert found.nats_under_original == pytest.approx(math.log(97)) and found.standard_error < 1e-6
    again, batched, other = written(model), written(model, batch=2), written(model, seed=1)
    assert torch.equal(again[1], text) and again[0] == found
    assert torch.equal(batched[1], text)
    assert not torch.equal(other[1], text)
    rows = text[:, 6:].tolist()
    assert found.unigram_entropy == pytest.approx(sum(map(unigram_entropy, rows)) / 5)
    assert found.repeated_4grams == pytest.approx(sum(map(repeated_4grams, rows)) / 5)


def test_models_that_agree_write_the_same_text_and_near_ones_nearly_the_same() -> None:
    _, text = written(mixtures.mixture("mixtral"))
    _, equal = written(mixtures.mixture("mixtral"))
    _, near = written(changed())
    assert torch.equal(text, equal)
    shared = (text[:, 6] == near[:, 6]).float().mean()  # the first token follows the same beginning
    assert float(shared) > 0.5


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    """10,000 first tokens of a known distribution, of which one token never comes."""
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0]).repeat(4, 1)
    model = Bigram(probabilities)
    beginnings = torch.zeros(10_000, 1, dtype=torch.int64)
    judge_generation(model, model, beginnings, length=1, batch=10_000)
    drawn = torch.bincount(model.texts[-1][:, 1], minlength=4) / 10_000
    assert drawn[3] == 0
    assert (drawn - probabilities[0]).abs().max() < 4 * 0.005  # four standard errors


def test_a_draw_of_zero_takes_no_token_that_cannot_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "uniform", lambda _key, rows, count, dtype: torch.zeros(len(rows), count, dtype=dtype))
    model = Bigram(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    judge_generation(model, model, torch.zeros(1, 1, dtype=torch.int64), length=2)
    assert model.texts[-1].tolist() == [[0, 1, 1]]


def test_nats_under_the_original_are_those_of_what_was_written_alone() -> None:
    """The writer knows one word, to which the original gives 1/4 after any other and 1/2 after itself."""
    writer = Bigram(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    original = Bigram(torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    found = judge_generation(writer, original, torch.zeros(2, 3, dtype=torch.int64), length=4)
    assert found.nats_under_original == pytest.approx((math.log(4) + 3 * math.log(2)) / 4)
    assert found.unigram_entropy == 0.0 and found.repeated_4grams == 0.0
    assert judge_generation(
        writer, original, torch.zeros(1, 3, dtype=torch.int64), length=8
    ).repeated_4grams == pytest.approx(4 / 5)


def test_entropy_and_repetition_of_a_text_by_hand() -> None:
    assert unigram_entropy([7, 7, 8, 8]) == pytest.approx(math.log(2))
    assert unigram_entropy([1, 1, 1, 2]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert unigram_entropy([5, 5, 5]) == 0.0
    assert repeated_4grams([1, 2, 3, 4, 5]) == 0.0
    assert repeated_4grams([1, 2, 1, 2, 1, 2, 1]) == 0.5  # 1212 2121 1212 2121
    assert repeated_4grams([1, 2]) == 0.0

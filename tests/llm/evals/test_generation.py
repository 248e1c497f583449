"""Continuing texts: what is written, where it ends, and what it may not depend on."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.errors import ConfigError
from llm.data.tokenizers import TextTokenizer
from llm.diffusion import sampler
from llm.diffusion.codec import build_codec
from llm.evals import generation
from llm.evals.filling import MaskedFiller, Texts, _draw
from llm.evals.generation import GenerationConfig, continue_texts, generate_until, read_arguments
from llm.evals.models import Scorable
from tests.llm.evals.oracles import known, tiny, tiny_huggingface, tokenizer

FAMILIES = ("ar", "mdm", "prime", "huggingface")
PROMPTS = ["the cat", "the dog lay on the log while", "it rained all day", "a", "the mat and the dog"]
WRITTEN = "and the dog lay on the log"


def open_family(family: str) -> Scorable:
    return tiny_huggingface("llama") if family == "huggingface" else tiny(family, max_length=48)  # type: ignore[arg-type]


def always(words: Sequence[int], *, after: int, vocab: int) -> Callable[[Tensor], Tensor]:
    """A model that is certain of words[i] at position after + i, the surer the further to the left."""

    def predict(digits: Tensor) -> Tensor:
        batch, length, _ = digits.shape
        logits = torch.zeros(batch, length, vocab)
        for position in range(length):
            number = position - after
            if 0 <= number < len(words):
                logits[:, position, words[number]] = 40.0 - 0.1 * number
        return logits

    return predict


def writer(words: Sequence[int], tokens: TextTokenizer, prompt: str, *, family: str = "mdm") -> Scorable:
    after = len(tokens.encode_batch([prompt])[0]) + 1
    codec = build_codec(tokens.vocab_size, 1 if family == "mdm" else 2)
    predict = always(words, after=after, vocab=tokens.vocab_size)
    return known(predict, codec, family=family, tokens=tokens, max_length=64)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["mdm", "prime"])
@pytest.mark.parametrize(("block_length", "steps"), [(1, 1), (4, None), (5, 2), (None, 1)])
@pytest.mark.parametrize("order", ["confidence", "random", "left_to_right"])
def test_a_model_that_wants_one_string_writes_it_whatever_the_blocks_steps_and_order(
    family: str, block_length: int | None, steps: int | None, order: Any
) -> None:
    tokens = tokenizer()
    words = tokens.encode_batch([" " + WRITTEN])[0]
    config = GenerationConfig(length=len(words), block_length=block_length, steps=steps, order=order)
    assert continue_texts(writer(words, tokens, "the cat", family=family), ["the cat"], [], config) == [" " + WRITTEN]


@pytest.mark.parametrize(("block_length", "steps"), [(1, 1), (4, 4), (4, 2), (6, 3), (12, 12), (12, 5)])
def test_every_step_of_every_block_is_one_pass_and_fixes_the_tokens_of_the_schedule(
    block_length: int, steps: int
) -> None:
    tokens = tokenizer()
    words = tokens.encode_batch([WRITTEN])[0][:12]
    model = writer(words, tokens, "the cat")
    config = GenerationConfig(length=12, block_length=block_length, steps=steps)
    continue_texts(model, ["the cat"], [], config)
    seen: list[Tensor] = model.model.seen  # type: ignore[assignment]
    blocks = 12 // block_length
    assert len(seen) == steps * blocks
    mask = model.language.codec.mask_symbol  # type: ignore[union-attr]
    hidden = torch.tensor([int((digits == mask).sum()) for digits in seen] + [0])
    share = [block_length // steps + (step < block_length % steps) for step in range(steps)]
    assert (hidden[:-1] - hidden[1:]).tolist() == share * blocks
    assert not bool((seen[0][:, : seen[0].shape[1] - 12] == mask).any())  # the prompt is always visible


def test_the_text_ends_before_the_earliest_stop_string_in_whatever_order_they_come() -> None:
    tokens = tokenizer()
    words = tokens.encode_batch([" " + WRITTEN])[0]
    config = GenerationConfig(length=len(words), block_length=4)
    for until in (["log", "dog", "lay"], ["lay", "dog"], ["dog", "log"]):
        assert continue_texts(writer(words, tokens, "the cat"), ["the cat"], until, config) == [" and the "]


def test_a_text_ends_at_its_first_end_of_text() -> None:
    tokens = tokenizer()
    words = tokens.encode_batch([" " + WRITTEN])[0]
    words = [*words[:5], tokens.eos_id, *words[5:]]
    config = GenerationConfig(length=len(words), block_length=None)
    expected = tokens.decode(words[:5])
    assert continue_texts(writer(words, tokens, "the cat"), ["the cat"], [], config) == [expected]


@pytest.mark.parametrize("family", ["mdm", "prime"])
@pytest.mark.parametrize("end", ["stop string", "end of text"])
def test_blocks_after_the_end_are_never_computed_and_change_nothing(family: str, end: str) -> None:
    tokens = tokenizer()
    words = tokens.encode_batch([" " + WRITTEN + " " + WRITTEN])[0]
    until = ["dog"] if end == "stop string" else []
    if end == "end of text":
        words[6] = tokens.eos_id
    length = len(words)
    texts, passes = {}, {}
    for name, block_length in (("blocks", 2), ("whole", length)):
        model = writer(words, tokens, "the cat", family=family)
        config = GenerationConfig(length=length, block_length=block_length)
        texts[name] = continue_texts(model, ["the cat"], until, config)
        passes[name] = len(model.model.seen)  # type: ignore[arg-type]
    assert texts["blocks"] == texts["whole"]
    assert passes["blocks"] < passes["whole"] // 2


@pytest.mark.parametrize("family", ["mdm", "prime"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_one_by_one_are_the_sampler_in_blocks(family: str, temperature: float) -> None:
    """With no noise the driver and the library's own blocks agree; with noise the first block does."""
    model = tiny(family, max_length=48)  # type: ignore[arg-type]
    language = model.language
    assert language is not None
    config = GenerationConfig(length=12, block_length=4, temperature=temperature, seed=3)
    texts = Texts.of([[1, 5, 9], [2, 4, 6, 8, 10]], [12, 12], [11, 12], model.device)
    filler = MaskedFiller(model, config.sampler(4), seed=3)
    ours = texts
    for begin in (0, 4, 8):
        ours = replace(ours, tokens=filler.fill(ours, begin, begin + 4))
    number = texts.numbers()
    room = (number >= 0) & (number < 12)
    real = number < 12

    def predict(digits: Tensor, where: Tensor) -> Tensor:
        def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return torch.nn.functional.linear(hidden[where], weight, bias)

        return model.model(language.inputs(digits), logits, attention_mask=real)

    start = language.codec.encode(texts.tokens).masked_fill(room.unsqueeze(-1), language.codec.mask_symbol)
    theirs = sampler.sample(
        start,
        ~room,
        codec=language.codec,
        predict=predict,
        draw=_draw(3, 0, texts),
        config=replace(config.sampler(4), block_length=4),
    )
    compared = room if temperature == 0.0 else room & (number < 4)
    assert torch.equal(ours.tokens[compared], theirs.tokens[compared])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_depends_neither_on_its_batch_nor_on_its_place_in_it(family: str, temperature: float) -> None:
    model = open_family(family)
    config = GenerationConfig(length=14, block_length=4, steps=2, temperature=temperature, seed=5)
    alone = [continue_texts(model, [prompt], ["og"], config)[0] for prompt in PROMPTS]
    together = continue_texts(model, PROMPTS, ["og"], config)
    assert together == alone
    turned = continue_texts(model, PROMPTS[::-1], ["og"], replace(config, batch_tokens=60))
    assert turned[::-1] == alone
    shares = [continue_texts(model, PROMPTS[rank::2], ["og"], config) for rank in range(2)]  # as two processes would
    assert [shares[i % 2][i // 2] for i in range(len(PROMPTS))] == alone


@pytest.mark.parametrize("order", ["random", "ancestral"])
def test_the_plan_of_a_text_does_not_depend_on_the_padding_of_its_batch(order: Any) -> None:
    model = tiny("prime", max_length=48)
    config = GenerationConfig(length=10, block_length=5, order=order, group="digit", steps=4, temperature=1.0)
    alone = [continue_texts(model, [prompt], [], config)[0] for prompt in PROMPTS]
    assert continue_texts(model, PROMPTS, [], config) == alone


def test_a_model_that_reveals_digits_in_layers_writes_each_block_so_unless_told_otherwise() -> None:
    model, seen = tiny("prime", max_length=48, order="layers"), []
    forward = model.model.forward

    def spy(inputs: Tensor, *args: Any, **named: Any) -> Any:
        seen.append(inputs == model.language.codec.mask_symbol)  # type: ignore[union-attr]
        return forward(inputs, *args, **named)

    model.model.forward = spy  # type: ignore[method-assign]
    config = GenerationConfig(length=8, block_length=4)
    text = continue_texts(model, ["the cat"], [], config)
    ahead = [bool((hidden[..., :-1] & ~hidden[..., 1:]).any()) for hidden in seen]  # a digit behind a hidden one
    partly = [bool((hidden.any(-1) & ~hidden.all(-1)).any()) for hidden in seen]
    assert not any(ahead) and any(partly) and 8 < len(seen) <= 2 * 4 * 3
    seen.clear()
    assert text == continue_texts(model, ["the cat"], [], replace(config, order="layers", group="digit"))
    continue_texts(model, ["the cat"], [], replace(config, order="confidence", group="token"))
    assert not any(bool((hidden.any(-1) & ~hidden.all(-1)).any()) for hidden in seen[-8:])
    with pytest.raises(ConfigError, match=r"generation\.order = layers .* generation\.group = token"):
        continue_texts(model, ["the cat"], [], replace(config, group="token"))


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_zero_is_deterministic_and_a_seed_changes_what_is_drawn(family: str) -> None:
    model = open_family(family)
    greedy = GenerationConfig(length=12, block_length=4)
    assert continue_texts(model, PROMPTS, [], greedy) == continue_texts(model, PROMPTS, [], replace(greedy, seed=9))
    drawn = replace(greedy, temperature=1.0)
    assert continue_texts(model, PROMPTS, [], drawn) == continue_texts(model, PROMPTS, [], drawn)
    assert continue_texts(model, PROMPTS, [], drawn) != continue_texts(model, PROMPTS, [], replace(drawn, seed=9))


def test_the_greedy_text_of_a_hugging_face_model_is_its_own_greedy_text() -> None:
    model = open_family("huggingface")
    config = GenerationConfig(length=20)
    ours = continue_texts(model, PROMPTS, [], config, add_bos=True)
    for prompt, text in zip(PROMPTS, ours, strict=True):
        ids = [model.first_token, *model.tokenizer.encode_batch([prompt])[0]]
        whole = model.model.generate(  # type: ignore[operator]
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=model.tokenizer.eos_id, pad_token_id=0
        )[0].tolist()
        assert text == generation.finish(model.tokenizer, ids, whole[len(ids) :], [])[0]


@pytest.mark.parametrize("remembers", [True, False])
def test_remembered_keys_and_values_change_no_text(remembers: bool) -> None:
    model = open_family("huggingface")
    model.model._is_stateful = not remembers  # type: ignore[assignment]
    config = GenerationConfig(length=20, temperature=1.0)
    found = continue_texts(model, PROMPTS, ["og"], config)
    model.model._is_stateful = remembers  # type: ignore[assignment]
    assert continue_texts(model, PROMPTS, ["og"], config) == found


def test_requests_of_the_harness_are_grouped_by_arguments_and_answered_in_order() -> None:
    model = tiny("mdm", max_length=48)
    config = GenerationConfig(block_length=4)
    short, long = {"until": ["og"], "max_gen_toks": 4}, {"until": "\n", "max_gen_toks": 12, "do_sample": False}
    found = generate_until(model, [(p, (short, long)[i % 2]) for i, p in enumerate(PROMPTS)], config)
    for i, (prompt, text) in enumerate(zip(PROMPTS, found, strict=True)):
        arguments = (["og"], 4) if i % 2 == 0 else (["\n"], 12)
        assert text == continue_texts(model, [prompt], arguments[0], replace(config, length=arguments[1]))[0]


def test_repeats_of_a_question_differ_where_something_is_drawn() -> None:
    model = tiny("mdm", max_length=48)
    arguments = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    found = generate_until(model, [("the cat", arguments)] * 3, GenerationConfig())
    assert len(set(found)) == 3
    assert found[0] == generate_until(model, [("the cat", arguments)], GenerationConfig())[0]


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [
        ({}, 0.3),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.8}, 0.0),
        ({"do_sample": True}, 0.3),
        ({"do_sample": True, "temperature": 0.8}, 0.8),
        ({"temperature": 0.8}, 0.8),
    ],
)
def test_sampling_arguments_of_a_request_come_before_the_configuration(
    arguments: dict[str, Any], temperature: float
) -> None:
    assert read_arguments(arguments, GenerationConfig(temperature=0.3))[0].temperature == temperature


def test_sampling_without_a_temperature_draws_from_the_model() -> None:
    assert read_arguments({"do_sample": True}, GenerationConfig())[0].temperature == 1.0


def test_an_unknown_argument_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    generation._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            read_arguments({"until": [], "num_beams": 4}, GenerationConfig())
    assert [record.message.split()[0] for record in caplog.records] == ["num_beams"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_loses_its_beginning_down_to_half_of_an_input_and_no_further(
    family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_family(family)
    prompt = " ".join(PROMPTS * 4)
    begun: list[tuple[Any, Any]] = []
    of = Texts.of

    def spy(*given: Any) -> Texts:
        begun.append(given[:2])
        return of(*given)

    monkeypatch.setattr(Texts, "of", spy)
    with caplog.at_level(logging.WARNING):
        continue_texts(model, [prompt], [], GenerationConfig(length=256, block_length=None, steps=2))
    assert "1 of 1 prompts lost their beginning" in caplog.text
    kept = model.tokenizer.encode_batch([prompt])[0][-24:]
    assert begun == [([kept], [25 if model.is_causal else 24])]  # a causal model never reads the last token


@pytest.mark.parametrize("family", ["mdm", "prime"])
def test_guidance_hides_the_prompt_and_not_what_was_written(family: str) -> None:
    model = tiny(family, max_length=48)  # type: ignore[arg-type]
    seen: list[Tensor] = []
    forward = model.model.forward

    def spy(inputs: Tensor, *args: Any, **named: Any) -> Any:
        seen.append(inputs if inputs.dim() == 3 else inputs.unsqueeze(-1))
        return forward(inputs, *args, **named)

    model.model.forward = spy  # type: ignore[method-assign]
    continue_texts(model, ["the cat"], [], GenerationConfig(length=8, block_length=4, guidance=0.5))
    prompt = 1 + len(model.tokenizer.encode_batch(["the cat"])[0])
    mask = model.language.codec.mask_symbol  # type: ignore[union-attr]
    assert len(seen) == 2 * 8
    assert bool((seen[-1][:, :prompt] == mask).all())
    assert not bool((seen[-1][:, prompt : prompt + 4] == mask).any())


def test_guidance_of_a_causal_model_and_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"generation\.guidance = 0\.5"):
        continue_texts(tiny("ar"), ["a"], [], GenerationConfig(guidance=0.5))
    for changes in ({"length": 0}, {"block_length": 0}, {"steps": 0}, {"temperature": -1.0}, {"guidance": -0.5}):
        with pytest.raises(ConfigError, match=rf"generation\.{next(iter(changes))} = "):
            GenerationConfig(**changes).check()  # type: ignore[arg-type]


def test_no_prompts_are_no_texts() -> None:
    assert continue_texts(tiny("ar"), [], [], GenerationConfig()) == []
    assert generate_until(tiny("ar"), [], GenerationConfig()) == []

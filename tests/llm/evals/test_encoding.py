"""Where a context ends, by both rules, on a tokenizer whose merges are known."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm.data.tokenizers import TextTokenizer
from llm.evals.encoding import Encoder

EOS, A, B, AB, C, SPACE, SPACE_A = range(7)


def merging() -> TextTokenizer:
    """a, b, c and the space, of which "ab" and " a" are tokens of their own."""
    vocabulary = {"<|endoftext|>": EOS, "a": A, "b": B, "ab": AB, "c": C, "Ġ": SPACE, "Ġa": SPACE_A}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend=backend, bos_id=None, eos_id=EOS)


def encode(context: str, continuation: str, **settings: Any) -> tuple[tuple[list[int], list[int]], int]:
    encoder = Encoder(**({"tokenizer": merging(), "prefix": EOS, "add_bos": False} | settings))
    (pair,), straddling = encoder.pairs([(context, continuation)])
    return pair, straddling


@pytest.mark.parametrize("boundary", ["harness", "longest_prefix"])
@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("ca", "c", ([C, A], [C])),
        ("c ", "a", ([C], [SPACE_A])),  # trailing space belongs to the continuation
        ("c", " a", ([C], [SPACE_A])),
        ("", "ab", ([EOS], [AB])),
        ("  ", "b", ([EOS], [SPACE, SPACE, B])),
        ("c", "", ([C], [])),
        ("", "", ([EOS], [])),
    ],
)
def test_where_no_token_straddles_both_rules_agree(boundary: str, context: str, continuation: str, expected) -> None:
    assert encode(context, continuation, boundary=boundary) == (expected, 0)


def test_a_token_that_straddles_the_boundary_is_counted_and_cut_as_the_rule_says() -> None:
    assert encode("ca", "bc", boundary="harness") == (([C, A], [C]), 1)  # whole: c ab c; two tokens of context
    assert encode("ca", "bc", boundary="longest_prefix") == (([C], [AB, C]), 1)
    assert encode("a", "b", boundary="longest_prefix") == (([], [AB]), 1)


def test_a_continuation_that_the_context_swallows_is_tokenised_alone() -> None:
    assert encode("a", "b", boundary="harness") == (([A], [B]), 1)


def test_the_prefix_stands_before_texts_if_wanted_and_never_twice() -> None:
    assert encode("ca", "c", add_bos=True) == (([EOS, C, A], [C]), 0)
    assert encode("", "c", add_bos=True) == (([EOS], [C]), 0)
    encoder = Encoder(tokenizer=merging(), prefix=C, add_bos=True)
    assert encoder.pairs([("ca", "b"), ("", "ca"), ("", "c")]) == ([([C, A], [B]), ([C], [A]), ([C], [])], 1)
    assert encoder.texts(["a", "ca"]) == [[C, A], [C, A]]
    assert encoder.texts(["a"], special=False) == [[A]]


def test_each_text_is_tokenised_once() -> None:
    seen: list[str] = []

    class Counting:
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            seen.extend(texts)
            return merging().encode_batch(texts)

    encoder = Encoder(tokenizer=Counting(), prefix=EOS, add_bos=False)  # type: ignore[arg-type]
    encoder.pairs([("ca", option) for option in ("c", "a", "cc", "c")] * 2 + [("", "c"), ("", "c")])
    assert sorted(seen) == sorted(["ca", "cac", "caa", "cacc", "c"])

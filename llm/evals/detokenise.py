"""The detokenisers of published zero-shot perplexities: tokenised corpora as text, as MDLM's evaluation reads them.

Ordered lists of replacements, kept with all their oddities (MDLM, arXiv 2406.07524, repository kuleshov-group/mdlm,
`dataloader.py`; the one of WikiText is Megatron-LM's): WikiText turns a lone "N" into "1", for example, and so do the
scientific papers. A repaired rule would be a better text and another figure.
"""

import re
from collections.abc import Iterable

Step = tuple[str | re.Pattern[str], str]
"""(what, by what): every occurrence is replaced, from left to right."""


def wikitext(text: str) -> str:
    return _apply(_WIKITEXT, text)


def penn_treebank(text: str) -> str:
    return _apply(_PENN_TREEBANK, text)


def lm1b(text: str) -> str:
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    return lm1b(wikitext(text))


def unchanged(text: str) -> str:
    return text


def _apply(steps: Iterable[Step], text: str) -> str:
    for what, by in steps:
        text = text.replace(what, by) if isinstance(what, str) else what.sub(by, text)
    return text


def _spaced(marks: str) -> tuple[Step, ...]:
    """Marks with a space on both sides lose the one before."""
    return tuple((f" {mark} ", f"{mark} ") for mark in marks)


def _enclosed(opening: str, closing: str) -> Step:
    """Text between two marks loses the space at its ends, however much there is."""
    inside = re.escape(closing)
    return re.compile(rf"{re.escape(opening)}\s*([^{inside}]*?)\s*{inside}"), rf"{opening}\1{closing}"


def _one_space_enclosed(opening: str, closing: str) -> Step:
    """The same, of one space at each end, and only around marks with no other such mark between them."""
    others = re.escape("".join(dict.fromkeys(opening + closing)))
    return re.compile(rf"{re.escape(opening)} ([^{others}]+) {re.escape(closing)}"), rf"{opening}\1{closing}"


_WIKITEXT: tuple[Step, ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),  # the slashes are of another language's patterns: it hardly ever applies
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *_spaced(":;.!?,"),
    *(_enclosed(*marks) for marks in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

_PENN_TREEBANK: tuple[Step, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *((" N ", " 1 "),) * 10,  # "N N N" shares its spaces, so one pass leaves every second
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

_LM1B: tuple[Step, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *_spaced(",:;"),
    (" / ", "/"),
    *(_one_space_enclosed(*marks) for marks in ('""', "''", "()", "[]")),
    ("$ ", "$"),
    ("£ ", "£"),
)

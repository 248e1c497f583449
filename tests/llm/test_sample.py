"""`unmask sample`: what was given stays, what is asked for comes, and what cannot be is refused."""

import itertools
from pathlib import Path

import pytest

from launch.errors import ConfigError
from llm.sample import main


def texts(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out.split("\n---\n")[:-1]


@pytest.mark.parametrize(
    ("order", "group"),
    [
        *itertools.product(("ancestral", "random", "left_to_right", "confidence"), ("digit", "token")),
        ("ancestral", "schedule"),
    ],
)
def test_prompt_and_suffix_stay_in_every_order_and_group(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], order: str, group: str
) -> None:
    arguments = ("--prompt", "the", "--suffix", "law.", "--length", "12", "--count", "2", "--steps", "6")
    found = texts(capsys, str(runs["prime"]), *arguments, "--order", order, "--group", group)
    assert len(found) == 2
    assert all(text.startswith("the") and text.endswith("law.") for text in found)


@pytest.mark.parametrize("family", ["ar", "mdm", "prime"])
def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    arguments = (str(runs[family]), "--count", "2", "--length", "10", "--steps", "5", "--seed")
    first, again, other = (texts(capsys, *arguments, seed) for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("prime", ("--prompt", "of the License", "--length", "2"), "raise --length"),
        ("ar", ("--suffix", "x"), "leave --suffix out"),
        ("prime", ("--steps", "0"), "steps = 0"),
        ("prime", ("--group", "schedule", "--order", "random"), "Use group token or digit, or order ancestral"),
        ("prime", ("--top-p", "1.5"), "top_p = 1.5"),
        ("prime", ("--length", "0"), "length = 0"),
        ("prime", ("--count", "0"), "count = 0"),
    ],
)
def test_what_cannot_be_is_refused(runs: dict[str, Path], family: str, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        main([str(runs[family]), *arguments])

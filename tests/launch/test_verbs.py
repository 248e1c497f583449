"""A room's own verbs: the one that is named is called, and no other module is imported."""

import sys

import pytest

from launch.errors import ConfigError
from launch.verbs import Verb, run_verb

VERBS = {
    "weigh": Verb(text="how heavy it is", function="json:dumps"),
    "sink": Verb(text="how deep it is", function="no_such_module:main"),
}


def test_a_verb_gets_the_remaining_arguments() -> None:
    assert run_verb("ship", "Ships.", VERBS, ["weigh", "--tons", "3"]) == '["--tons", "3"]'
    assert "no_such_module" not in sys.modules


def test_an_unknown_verb_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"there is no verb 'weih'; did you mean 'weigh'\?; weigh, sink"):
        run_verb("ship", "Ships.", VERBS, ["weih"])


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_without_a_verb_the_verbs_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_verb("ship", "Ships.", VERBS, arguments)
    said = capsys.readouterr()
    assert "weigh" in said.out + said.err

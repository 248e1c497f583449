"""Verbs below a verb of a room, as in `unmask scaling plan`: each in a module that is imported when it is called."""

import argparse
import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Verb:
    text: str  # what it does
    function: str  # "module:function", called with the remaining arguments; returns the exit code


def run_verb(room: str, description: str, verbs: Mapping[str, Verb], arguments: Sequence[str]) -> int:
    """Call the verb that `arguments` begin with. ConfigError for one that there is not; without one, the help."""
    parser = argparse.ArgumentParser(
        prog=f"unmask {room}",
        description=description,
        epilog="  ".join(f"{name}: {verb.text}." for name, verb in verbs.items()),
    )
    parser.add_argument("verb", metavar="VERB", help=f"one of {', '.join(verbs)}; unmask {room} VERB --help")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments or ["--help"])
    name, rest = arguments[0], arguments[1:]
    if name not in verbs:
        near = difflib.get_close_matches(name, verbs, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no verb {name!r}{hint}; {', '.join(verbs)}")
    module, _, function = verbs[name].function.partition(":")
    return getattr(importlib.import_module(module), function)(rest)

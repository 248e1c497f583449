"""One sentence for every name that is none of the known ones.

The published command lines of HC-SMoE ask for `--cluster hirarchical`, and its code takes whatever it does not know for
k-means. Here nothing is taken for anything else.
"""

import difflib
from typing import Any, get_args

from launch.errors import ConfigError


def check_choice(option: str, value: str, choices: Any) -> None:
    """ConfigError unless `value` is one of the `Literal` type `choices`; names the nearest."""
    known = get_args(choices)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{option} = {value!r} is unknown; expected one of {', '.join(map(repr, known))}{hint}")

"""`unmask scaling plan|run|fit|report`: scaling laws from ladders of small models."""

import sys
from collections.abc import Sequence

from launch.verbs import Verb, run_verb

VERBS = {
    "plan": Verb(
        text="the points of a ladder: sizes, tokens, FLOPs, time; trains nothing", function="llm.scaling.table:main"
    ),
    "run": Verb(text="train and judge the points, or those that are missing", function="llm.scaling.run:main"),
    "fit": Verb(text="scaling laws from the results of a study", function="llm.scaling.report:main_fit"),
    "report": Verb(text="tables and figures of a study", function="llm.scaling.report:main_report"),
}
_DESCRIPTION = "Scaling laws from ladders of small models at matched FLOPs, under valid likelihood bounds."


def main(argv: Sequence[str] | None = None) -> int:
    return run_verb("scaling", _DESCRIPTION, VERBS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

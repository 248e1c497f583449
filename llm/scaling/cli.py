"""`unmask scaling plan|run|fit|report`: scaling laws from ladders of small models."""

import argparse
import difflib
import sys
from collections.abc import Sequence

from launch.errors import ConfigError

VERBS = {
    "plan": "the points of a ladder: sizes, tokens, FLOPs, time; trains nothing",
    "run": "train and judge the points, or those that are missing",
    "fit": "scaling laws from the results of a study",
    "report": "tables and figures of a study",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="unmask scaling",
        description="Scaling laws from ladders of small models at matched FLOPs, under valid likelihood bounds.",
        epilog="  ".join(f"{verb}: {text}." for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", metavar="VERB", help=f"one of {', '.join(VERBS)}; unmask scaling VERB --help")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
    verb, rest = arguments[0], arguments[1:]
    if verb == "plan":
        from llm.scaling import table

        return table.main(rest)
    if verb == "run":
        from llm.scaling import run

        return run.main(rest)
    if verb in ("fit", "report"):
        from llm.scaling import report

        return report.main_fit(rest) if verb == "fit" else report.main_report(rest)
    near = difflib.get_close_matches(verb, VERBS, n=1)
    raise ConfigError(f"there is no verb {verb!r}{f'; did you mean {near[0]!r}?' if near else ''}; {', '.join(VERBS)}")


if __name__ == "__main__":
    sys.exit(main())

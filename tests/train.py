"""`llm.train` with an accident that the environment names, for tests whose ranks a real launcher must start.

A configuration with `entry: tests.train` brings `unmask train` here.
"""

import sys
from collections.abc import Sequence

from launch import entry
from llm.config import LanguageConfig
from tests.runs import Accident


def main(argv: Sequence[str] | None = None) -> int:
    entry.write_report = lambda folder, sections: folder  # its pictures take longer than the run
    return entry.main(LanguageConfig, Accident.from_environment(), argv)


if __name__ == "__main__":
    sys.exit(main())

"""Train a language model: `python -m llm.train CONFIG key=value ...`; see launch/entry.py."""

import sys
from collections.abc import Sequence

from launch import entry
from llm.config import LanguageConfig
from llm.task import LanguageTask


def main(argv: Sequence[str] | None = None) -> int:
    return entry.main(LanguageConfig, LanguageTask, argv)


if __name__ == "__main__":
    sys.exit(main())

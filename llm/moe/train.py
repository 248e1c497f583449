"""Train a mixture of experts: `python -m llm.moe.train CONFIG key=value ...`; see launch/entry.py."""

import sys
from collections.abc import Sequence

from launch import entry
from llm.moe.config import MoeExperiment
from llm.moe.task import MoeTask


def main(argv: Sequence[str] | None = None) -> int:
    return entry.main(MoeExperiment, MoeTask, argv)


if __name__ == "__main__":
    sys.exit(main())

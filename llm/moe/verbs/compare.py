"""`unmask moe compare COMPARISON.yaml --out DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch import config as configs
from launch import runtime as runtimes
from llm.moe.comparison import ComparisonConfig, compare, table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask moe compare",
        description=(
            "Merge models by many recipes and judge all of them by the same held-out text, by what they write, and by "
            "tasks. Killed, the same command goes on; what has a result is left alone."
        ),
        epilog="example: unmask moe compare configs/llm/moe/compare_tiny.yaml --out runs/moe/comparison",
    )
    parser.add_argument("comparison", type=Path, metavar="YAML", help="models, numbers of experts, recipes")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    options = parser.parse_intermixed_args(argv)
    config, _ = configs.load(ComparisonConfig, options.comparison, options.overrides)
    runtime = runtimes.start()
    try:
        found = table(compare(config, options.out, runtime))
    finally:
        runtime.close()
    (options.out / "table.md").write_text(found + "\n")
    print(found)
    return 0

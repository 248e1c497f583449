"""Predicted against measured peak memory of training: every strategy, small experiments, exact allocations on CPU.

The measured runs are those of tests/llm/test_plan_memory.py: the real engine, trainer and data under torch's profiler.
"""

import sys
import tempfile
from pathlib import Path

from measure import parser, print_table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases are the tests'
from tests.memory import CASES, configured, measured_peak, predicted
from tests.runs import write_tiny


def main() -> None:
    arguments = parser(__doc__)
    chosen = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as folder:
        tiny = write_tiny(Path(folder))
        for name in list(CASES)[: 4 if chosen.quick else None]:
            config, ranks = configured(name, tiny, Path(folder) / name.replace(" ", "-"))
            measured, estimate = measured_peak(config, ranks), predicted(config, ranks)
            parts = " + ".join(f"{part} {size / 1e6:.1f}" for part, size in estimate.parts.items() if size >= 5e4)
            rows.append(
                (
                    *(name, CASES[name][0], str(ranks), f"{measured / 1e6:.2f}", f"{estimate.peak / 1e6:.2f}"),
                    *(f"{estimate.peak / measured:.3f}", parts),
                )
            )
    header = ("strategy", "family", "ranks", "measured MB", "predicted MB", "ratio", "parts of the prediction, MB")
    print_table("Peak memory of a rank (goal: ratio within 0.9 to 1.1)", header, rows)


if __name__ == "__main__":
    main()

"""What a checkpoint costs training: the share of training time that saving stops it, asynchronous and not.

The whole trainer, saving every few steps, takes turns with the same trainer that never saves. `stopped` is what the
steps waited for (agreement of the ranks, copy to host memory, and for `blocking` the writing itself); the ratio of the
turns also has what the writing beside training takes away from it.
"""

import tempfile
from pathlib import Path

from bench_trainer import load, our_trainer
from corpus import write_corpus
from measure import Turn, alternate, loops, median, parser, print_table, ratio

from launch.metrics import read_metrics

SIZES = {  # model shape: overrides of the tiny experiment
    "tiny": (),
    "d = 256": ("model.width=256", "model.heads=4", "model.layers=2", "model.ffn=768"),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--every", type=int, default=20, help="steps between checkpoints, and of one turn")
    arguments.add_argument("--turns", type=int, default=3, help="turns of each side")
    arguments.add_argument("--processes", type=int, default=2, help="world size")
    chosen = arguments.parse_args()
    every, turns = (2, 2) if chosen.quick else (chosen.every, chosen.turns)
    for label, shape in SIZES.items():
        rows = []
        with tempfile.TemporaryDirectory(prefix="unmask-bench-") as name:
            folder = Path(name)
            data = write_corpus(folder / "data", documents=100 if chosen.quick else 600)
            saving = ("engine.strategy=fsdp2", f"train.log_every={every}", *shape)
            configs = {
                "asynchronous": load("primev2", data, folder / "async", *saving, f"checkpoint.every_steps={every}"),
                "blocking": load(
                    *("primev2", data, folder / "blocking", *saving, f"checkpoint.every_steps={every}"),
                    "checkpoint.asynchronous=false",
                ),
                "none": load("primev2", data, folder / "none", *saving),
            }
            sides = {side: (our_trainer, (config,)) for side, config in configs.items()}
            with loops(sides, steps=every, ranks=chosen.processes) as ready:
                costs = alternate(dict[str, Turn](ready), turns)
            step = median(costs["none"]).wall / every
            for side in ("asynchronous", "blocking"):
                metrics = read_metrics(configs[side].run.folder / "metrics.jsonl")
                stopped = sorted(row["seconds/checkpoint"] for row in metrics if "seconds/checkpoint" in row)[1:]
                size = next(row["checkpoint/bytes"] for row in metrics if "checkpoint/bytes" in row)
                middle = stopped[len(stopped) // 2]
                slower = ratio(costs[side], costs["none"]).wall
                rows.append(
                    (
                        *(side, f"{size / 2**20:,.1f}", f"{1e3 * step:,.0f}", f"{1e3 * middle:,.1f}"),
                        *(f"{100 * middle / (every * step):.2f} %", f"{slower:.3f}"),
                    )
                )
        header = (
            "checkpoint",
            "MiB",
            "step ms",
            "stopped ms",
            f"stopped / time of {every} steps",
            "time / never saving",
        )
        print_table(
            f"{label}: saving every {every} steps, fsdp2 x {chosen.processes} (goal <= 5 %; median of {turns} turns)",
            header,
            rows,
        )


if __name__ == "__main__":
    main()

"""Time and memory of `unmask moe calibrate` and `merge` against HC-SMoE's published procedure, whole model in memory.

Both sides of a case run in one go, by turns, each in a fresh process with one thread: ours reads the model layer by
layer and writes files; theirs (official_hc_smoe.py) loads it whole. Same tokens, average linkage of mean outputs, merge
by frequency. Labels must be equal, and merged weights but for the rounding of their type.

cluster     from what calibration left to the labels
merge       the weighted sums alone
with files  all of `unmask moe merge`, which reads the layers again; theirs: cluster, merge, and torch.save of the model
peak        VmHWM of the process: libraries (`imports alone`), allocations, and resident pages of mapped files. It is
            what ru_maxrss counts, which begins at the size of the process that started this one instead of at 0.

Ours needs one layer however many there are. Theirs grows by each: `whole depth` draws the line through the numbers of
layers that were measured on to the published model's.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import official_hc_smoe as official
import torch
from measure import Cost, median, parser, print_table, ratio
from numpy.typing import NDArray

from launch import runtime as runtimes
from launch.runtime import Runtime
from llm.moe import merge as merging
from llm.moe.assemble import load_tokenizer
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationConfig, CalibrationText, build_text
from llm.moe.recipe import MergeConfig
from llm.moe.source import open_source

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkpoints are the tests'
from tests.shape_true import SHAPES, blocks, write_shape

Array = NDArray[np.float32]

SIDES = ("ours", "official")
STEPS = ("calibrate", "cluster", "merge", "with files")
DEPTHS = {"mixtral-8x7b": 32, "qwen3-30b-a3b": 48}
KEPT = {"mixtral-8x7b": 4, "qwen3-30b-a3b": 64}
QUICK: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_INNER = {"mixtral-8x7b": "intermediate_size", "qwen3-30b-a3b": "moe_intermediate_size"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one run of a side took and made."""

    costs: dict[str, Cost]
    peak: int  # bytes
    labels: dict[int, list[int]]  # of the experts, by layer
    rows: dict[int, Array]  # [r, f]: the first row of each merged down projection, by layer


class Stopwatch:
    """Adds up the costs of named parts."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = dict.fromkeys(STEPS, Cost(0.0, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        found, before = Cost(time.perf_counter() - wall, time.process_time() - cpu), self.costs[name]
        self.costs[name] = Cost(before.wall + found.wall, before.cpu + found.cpu)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call


def ours(model: Path, text: CalibrationText, kept: int, folder: Path) -> Found:
    runtime = Runtime(runtimes.Place(), torch.device("cpu"), None, None)  # type: ignore[arg-type]
    source, watch = open_source(model), Stopwatch()
    with watch.part("calibrate"):
        calibrate(source, lambda: text, folder / "statistics", runtime)
    with (
        mock.patch.object(merging, "group_all", watch.around("cluster", merging.group_all)),
        mock.patch.object(merging, "read_layers", watch.around("cluster", merging.read_layers)),
        mock.patch.object(merging, "merge_layer", watch.around("merge", merging.merge_layer)),
        watch.part("with files"),
    ):
        config = MergeConfig(experts=kept, shares="frequency_top2")
        merging.merge(source, folder / "statistics", config, folder / "merged", runtime)
    peak = peak_memory()
    layers = {n: merging.load_layer(folder / "merged", n) for n in source.shape.moe_layers}
    return Found(
        costs=watch.costs,
        peak=peak,
        labels={n: layer.expert_map.tolist() for n, layer in layers.items()},
        rows={n: layer.experts.down[:, 0].float().numpy() for n, layer in layers.items()},
    )


def theirs(model: Path, text: CalibrationText, kept: int, folder: Path) -> Found:
    source, watch = open_source(model), Stopwatch()
    whole = official.load(source)
    with watch.part("calibrate"):
        means, counts = official.calibrate(whole, source, text.blocks)
    groups, rows, labels = {}, {}, {}
    with watch.part("with files"):
        with watch.part("cluster"):
            groups = {n: official.cluster(means[n], kept) for n in source.shape.moe_layers}
        with watch.part("merge"):
            for n in source.shape.moe_layers:
                official.merge(whole.model.layers[n].mlp.experts, groups[n], counts[n])
        torch.save(whole.state_dict(), folder / "model.pth")
    peak = peak_memory()
    for n, found in groups.items():
        experts = whole.model.layers[n].mlp.experts
        rows[n] = torch.stack([experts[group[0]].down[0] for group in found]).float().numpy()
        labels[n] = [next(c for c, group in enumerate(found) if j in group) for j in range(source.shape.num_experts)]
    return Found(costs=watch.costs, peak=peak, labels=labels, rows=rows)


def imports_alone() -> int:
    """Peak bytes of a process that only imports, and learns what transformers needs to know of the model classes."""
    from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM  # noqa: F401

    return peak_memory()


def peak_memory() -> int:
    """Bytes that were resident at most, of this process since it began."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} ended by itself") from None
    finally:
        process.join()


def _send(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def compare(title: str, model: Path, text: CalibrationText, kept: int, turns: int) -> dict[str, int]:
    """Prints the table of a case; the peaks of both sides."""
    runs: dict[str, list[Found]] = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            with tempfile.TemporaryDirectory(prefix="unmask-bench-") as folder:
                function = ours if side == "ours" else theirs
                found = in_own_process(function, model, text, kept, Path(folder))
            runs[side].append(found)
            print(f"{side}: {found.costs}, peak {found.peak / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
    agree(runs["ours"][0], runs["official"][0])
    costs = {side: [after(found) for found in runs[side]] for side in SIDES}
    peaks = {side: max(found.peak for found in runs[side]) for side in SIDES}
    names = (*STEPS, "cluster + merge")
    rows = []
    for side in SIDES:
        middle = [median([cost[name] for cost in costs[side]]) for name in names]
        rows.append((side, *(f"{m.wall:.2f} ({m.cpu:.2f})" for m in middle), f"{peaks[side] / 2**20:,.0f}"))
    ratios = [ratio(*([cost[name] for cost in costs[side]] for side in reversed(SIDES))) for name in names]
    quotient = peaks["official"] / peaks["ours"]
    rows.append(("official / ours", *(f"{r.wall:.2f} ({r.cpu:.2f})" for r in ratios), f"{quotient:.2f}"))
    print_table(f"{title}; seconds (CPU), labels are equal", ("", *names, "peak MiB"), rows)
    return peaks


def after(found: Found) -> dict[str, Cost]:
    cluster, merge = found.costs["cluster"], found.costs["merge"]
    return found.costs | {"cluster + merge": Cost(cluster.wall + merge.wall, cluster.cpu + merge.cpu)}


def agree(ours: Found, official: Found) -> None:
    if ours.labels != official.labels:
        raise SystemExit(f"labels differ: {ours.labels} and {official.labels}")
    for layer, rows in ours.rows.items():
        others = official.rows[layer]
        reached = others.any(-1)  # a cluster that no token reaches becomes zeros there, and the plain mean here
        np.testing.assert_allclose(rows[reached], others[reached], rtol=0.02, atol=1e-3)


def whole_depth(shape: str, peaks: dict[int, dict[str, int]]) -> None:
    """The line through the fewest and the most layers that were measured."""
    fewest, most = min(peaks), max(peaks)
    row = [f"{shape}, {DEPTHS[shape]} layers"]
    ends = []
    for side in SIDES:
        slope = (peaks[most][side] - peaks[fewest][side]) / (most - fewest)
        ends.append(peaks[fewest][side] + slope * (DEPTHS[shape] - fewest))
        row += [f"{slope / 2**20:,.0f}", f"{ends[-1] / 2**20:,.0f}"]
    header = ("whole depth, by the line", "ours: MiB a layer", "MiB", "official: MiB a layer", "MiB", "official / ours")
    print_table(f"{shape}: not measured", header, [(*row, f"{ends[1] / ends[0]:.1f}")])


def main() -> None:
    chosen = _parser().parse_args()
    turns = 1 if chosen.quick else chosen.turns
    alone = in_own_process(imports_alone)
    print(f"imports alone: {alone / 2**20:,.0f} MiB; goals: cluster + merge >= 5, peak >= 4")
    for folder in chosen.model:
        kept = chosen.experts or open_source(folder).shape.num_experts // 2
        text = read_text(folder, chosen.data, chosen.blocks, chosen.block_length)
        compare(f"{folder.name}, {kept} experts kept, {text.blocks.numel()} tokens", folder, text, kept, turns)
    for shape in chosen.shapes if not chosen.model else ():
        count, length = (2, 16) if chosen.quick else (chosen.blocks, chosen.block_length)
        text = CalibrationText(blocks=blocks(count, length), sources=("random",) * count)
        peaks = {}
        for layers in (1, 2) if chosen.quick else chosen.layers:
            with tempfile.TemporaryDirectory(prefix="unmask-bench-", dir=chosen.folder) as folder:
                changes = QUICK | {_INNER[shape]: 32} if chosen.quick else {}
                model = write_shape(Path(folder) / shape, shape, layers=layers, **changes)
                kept = chosen.experts or KEPT[shape]
                title = f"{shape}, layers: {layers}, {kept} experts kept, {count} x {length} tokens"
                peaks[layers] = compare(title, model, text, kept, turns)
        if len(peaks) > 1 and not chosen.quick:
            whole_depth(shape, peaks)


def read_text(model: Path, data: Sequence[str], count: int, length: int) -> CalibrationText:
    """Real text, or random tokens of the model's vocabulary."""
    if data:
        config = CalibrationConfig(data=tuple(data), blocks=count, block_length=length)
        return build_text(config, load_tokenizer(model))
    vocab_size = open_source(model).config.vocab_size
    return CalibrationText(blocks=blocks(count, length, vocab_size=vocab_size), sources=("random",) * count)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--model", type=Path, nargs="+", default=[], metavar="DIR", help="trained models, and no shapes")
    made.add_argument("--data", nargs="+", default=[], metavar="TEXT", help="of --model (random tokens)")
    made.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    made.add_argument("--layers", type=int, nargs="+", default=[1, 2], help="of the shapes (1 2)")
    made.add_argument("--experts", type=int, help="that a layer keeps (half)")
    made.add_argument("--blocks", type=int, default=2, help="of text (2)")
    made.add_argument("--block-length", type=int, default=64, help="tokens of a block (64)")
    made.add_argument("--turns", type=int, default=1, help="runs of each side (1)")
    made.add_argument(
        "--folder", type=Path, help="where the shapes are written, some GB (the folder of temporary files)"
    )
    return made


if __name__ == "__main__":
    main()

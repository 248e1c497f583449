"""`unmask moe inspect STATISTICS --layer N`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from launch.errors import ConfigError
from llm.moe.calibrate import statistics_file
from llm.moe.clustering import Dendrogram, Labels, Linkage, check_clusters, dendrogram, labels
from llm.moe.recipe import MergeConfig
from llm.moe.representations import Array, combined, distances
from llm.moe.statistics import LayerStatistics, load_statistics


def main(argv: Sequence[str]) -> int:
    usual = MergeConfig(experts=1)
    parser = argparse.ArgumentParser(
        prog="unmask moe inspect",
        description="Which experts of a layer are alike: dendrogram, map of distances, and how often each is selected.",
        epilog="example: unmask moe inspect statistics/mixtral --layer 16 --experts 4",
    )
    parser.add_argument("statistics", type=Path, metavar="STATISTICS", help="folder of `unmask moe calibrate`")
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="a layer with experts")
    parser.add_argument(
        "--representation", default=usual.representation, help=f"as in a recipe ({usual.representation})"
    )
    parser.add_argument("--linkage", choices=get_args(Linkage), default=usual.linkage, help=f"({usual.linkage})")
    parser.add_argument("--experts", type=int, metavar="R", help="also list R clusters")
    parser.add_argument("--out", type=Path, metavar="PNG", help="figure (STATISTICS/layer_N.png)")
    options = parser.parse_args(argv)
    file = statistics_file(options.statistics, options.layer)
    if not file.exists():
        there = sorted(int(path.stem.split("_")[1]) for path in options.statistics.glob("layer_*.safetensors"))
        if not there:
            raise ConfigError(f"{options.statistics} holds no statistics; calibrate first: unmask moe calibrate")
        raise ConfigError(f"--layer {options.layer}: {options.statistics} has statistics of layers {there}")
    statistics, gram = load_statistics(file)
    if options.experts is not None:
        check_clusters(options.experts, statistics.num_experts)
    terms = MergeConfig(experts=1, representation=options.representation).terms
    one = next(iter(terms))
    matrix = distances(statistics, gram, one) if len(terms) == 1 else combined(statistics, gram, terms)
    tree = dendrogram(matrix, options.linkage)
    path = options.out or options.statistics / f"layer_{options.layer:03d}.png"
    title = f"layer {options.layer}, {options.representation}, {options.linkage} linkage"
    draw(tree, matrix, statistics, path, title)
    print(path)
    if options.experts is not None:
        print(cluster_table(labels(tree, options.experts), statistics))
    return 0


def cluster_table(found: Labels, statistics: LayerStatistics) -> str:
    shares = statistics.frequency().numpy()
    lines = ["| cluster | experts | share of selections |", "|---|---|---|"]
    for cluster in range(int(found.max()) + 1):
        members = np.flatnonzero(found == cluster)
        lines.append(f"| {cluster} | {', '.join(map(str, members))} | {shares[members].sum():.1%} |")
    return "\n".join(lines)


def draw(tree: Dendrogram, matrix: Array, statistics: LayerStatistics, path: Path, title: str) -> None:
    """A PNG: the dendrogram above the map of distances, both in the dendrogram's order, and the selections below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.cluster import hierarchy

    experts = len(matrix)
    rc: Any = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(rc=rc):
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, figsize=(6, 8.4), height_ratios=[1.2, 3, 0.6], layout="constrained"
        )
        drawn = hierarchy.dendrogram(tree.rows, ax=top, color_threshold=0, above_threshold_color="#0072B2")
        order = drawn["leaves"]
        top.set(title=title, ylabel="distance", xticks=[])
        image = middle.imshow(matrix[np.ix_(order, order)], cmap="viridis", aspect="auto")
        ticks = np.arange(0, experts, -(-experts // 20))
        names = [str(order[tick]) for tick in ticks]
        middle.set(xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names, ylabel="expert")
        figure.colorbar(image, ax=middle, label="distance", shrink=0.8)
        bottom.bar(np.arange(experts), statistics.frequency().numpy()[order], color="#0072B2")
        bottom.set(xlim=(-0.5, experts - 0.5), ylabel="selections", xlabel="expert", xticks=ticks, xticklabels=names)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)

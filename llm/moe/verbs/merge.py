"""`unmask moe merge MODEL --statistics STATISTICS --out MERGED key=value ...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch import config as configs
from launch.errors import ConfigError
from llm.moe.clustering import check_clusters
from llm.moe.formats import plan, predicted_bytes
from llm.moe.merge import merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import Source, open_source
from llm.moe.verbs.ranks import on_ranks

_EXAMPLES = """\
examples:
  unmask moe merge models/mixtral-8x7b --statistics statistics/mixtral --out merged/hc4 experts=4
  unmask moe merge models/mixtral-8x7b --statistics statistics/mixtral --out merged/single4 experts=4 linkage=single
  unmask moe merge models/qwen3-30b --statistics statistics/qwen3 --out merged/reap64 \\
      --recipe configs/llm/moe/recipes/reap.yaml experts=64
keys and their meanings: unmask moe merge --explain
"""


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(argv)
    models = [word for word in options.words if "=" not in word or Path(word).exists()]
    overrides = [word for word in options.words if word not in models]
    if options.explain:
        print(explain(options.recipe, overrides))
        return 0
    if len(models) != 1 or options.statistics is None or options.out is None:
        raise ConfigError("unmask moe merge needs one MODEL, --statistics and --out; see unmask moe merge --help")
    config, _ = configs.load(MergeConfig, options.recipe, overrides)
    source = open_source(Path(models[0]))
    check_clusters(config.experts, source.shape.num_experts)
    if options.dry_run:
        print(forecast(source, config))
        return 0
    return on_ranks(
        "merge",
        argv,
        processes=options.nproc,
        device=options.device,
        work=lambda runtime: merge(source, options.statistics, config, options.out, runtime),
        done=f"{options.out}: {len(source.shape.moe_layers)} layers; next: unmask moe export {options.out}",
    )


def explain(recipe: Path | None, overrides: Sequence[str]) -> str:
    """Every key of a recipe; the number of experts need not be known yet."""
    named = "experts" in configs.read_tree(recipe, overrides)
    config, sources = configs.load(MergeConfig, recipe, overrides if named else [*overrides, "experts=1"])
    return configs.explain(config, sources if named else sources | {"experts": "required"}, None)


def forecast(source: Source, config: MergeConfig) -> str:
    """Sizes, and whether the text is read again."""
    shape = source.shape
    saved = (shape.num_experts - config.experts) * len(shape.moe_layers) * shape.expert_parameters
    before = predicted_bytes(plan(source, "expanded", dict.fromkeys(shape.moe_layers, shape.num_experts)))
    after = predicted_bytes(plan(source, "compact", dict.fromkeys(shape.moe_layers, config.experts)))
    return "\n".join(
        [
            f"experts     {shape.num_experts} -> {config.experts} in {len(shape.moe_layers)} layers",
            f"parameters  {saved:,} fewer; those that work on a token stay as many ({shape.rule.top_k} experts)",
            f"size        {before:,} -> {after:,} bytes in the compact format",
            f"text        {'goes through the layers again' if config.reads_tokens else 'is not read again'}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unmask moe merge",
        description=(
            "Make fewer experts of those of each layer from the statistics of `unmask moe calibrate`, one layer in "
            "memory. Killed, the same command goes on with the next layer; the model itself is never touched."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="MODEL key=value",
        help="the Hugging Face folder that was calibrated, and keys of the recipe: experts=4 ...",
    )
    parser.add_argument("--statistics", type=Path, metavar="STATISTICS", help="folder of `unmask moe calibrate`")
    parser.add_argument("--out", type=Path, metavar="MERGED", help="folder of the merged layers")
    parser.add_argument("--recipe", type=Path, metavar="YAML", help="a recipe: configs/llm/moe/recipes/*.yaml")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what comes out, stop")
    parser.add_argument("--explain", action="store_true", help="print all keys of a recipe with values and meanings")
    return parser

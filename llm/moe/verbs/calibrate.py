"""`unmask moe calibrate MODEL --data TEXT --out STATISTICS`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.runtime import Runtime
from llm.moe.architectures import MoeShape
from llm.moe.assemble import load_tokenizer
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationConfig, build_text
from llm.moe.source import Source, check_length, open_source
from llm.moe.verbs.ranks import check_processes, on_ranks

_EXAMPLES = """\
examples:
  unmask moe calibrate models/mixtral-8x7b --data c4.jsonl --out statistics/mixtral --dry-run
  unmask moe calibrate models/mixtral-8x7b --data c4.jsonl=3 code.jsonl=1 --out statistics/mixtral-mixed
  unmask moe calibrate runs/moe/hf --data prose-21 --blocks 16 --block-length 512 --out statistics/small --nproc 2
  torchrun --nproc-per-node 8 -m llm.moe.command_line calibrate models/qwen3-30b --data c4.jsonl --out statistics/qwen3
"""


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    config = CalibrationConfig(
        data=tuple(options.data),
        blocks=options.blocks,
        block_length=options.block_length,
        seed=options.seed,
        text_field=options.text_field,
    )
    config.check()
    source = open_source(options.model)
    check_length(source, config.block_length, f"--block-length {config.block_length}")
    check_processes(options.nproc)
    if options.dry_run:
        print(forecast(source, config, options.nproc))
        return 0
    return on_ranks(
        "calibrate",
        argv,
        processes=options.nproc,
        device=options.device,
        work=lambda runtime: _calibrate(source, config, options, runtime),
        done=f"{options.out}: statistics of {len(source.shape.moe_layers)} layers",
    )


def _calibrate(source: Source, config: CalibrationConfig, options: argparse.Namespace, runtime: Runtime) -> None:
    calibrate(source, lambda: build_text(config, load_tokenizer(options.model)), options.out, runtime)


def forecast(source: Source, config: CalibrationConfig, ranks: int) -> str:
    """Work and memory of a calibration, from shapes alone."""
    shape, tokens = source.shape, config.blocks * config.block_length
    mine = -(-config.blocks // ranks) * config.block_length
    layer = layer_bytes(source)
    return "\n".join(
        [
            f"text        {config.blocks} blocks x {config.block_length} = {tokens:,} tokens, {mine:,} a rank",
            f"layers      {len(shape.moe_layers)} of {shape.num_layers} with {shape.num_experts} experts",
            f"work        {calibration_flops(shape, tokens):.3g} FLOPs in the experts, each of which sees all tokens",
            f"reads       {sum(file_bytes(source)):,} bytes a rank",
            f"memory      {layer:,} bytes of a layer's experts, {mine * shape.width * 4:,} of text, and a block's work",
        ]
    )


def calibration_flops(shape: MoeShape, tokens: int) -> float:
    """2 for each parameter of each expert and each token, and what the layer's own output takes."""
    experts = shape.num_experts + shape.rule.top_k
    return 2.0 * tokens * len(shape.moe_layers) * experts * shape.expert_parameters


def layer_bytes(source: Source) -> int:
    """Of the experts of a layer, as they are stored."""
    shape = source.shape
    sample = source.tensor(shape.architecture.expert(shape.moe_layers[0], 0, "down"))
    return shape.num_experts * shape.expert_parameters * sample.element_size()


def file_bytes(source: Source) -> list[int]:
    return [(source.folder / file).stat().st_size for file in sorted(set(source.shards.values()))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unmask moe calibrate",
        description=(
            "Send calibration text through a mixture of experts, a layer in memory at a time, and keep sums from which "
            "any number of merges can be made. Killed, the same command goes on with the next layer."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder: Mixtral, Qwen2-MoE, Qwen3-MoE")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="TEXT[=WEIGHT]", help="files, folders or fetched corpora, mixed"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STATISTICS", help="folder of the sums")
    parser.add_argument("--blocks", type=int, default=32, help="of text (32)")
    parser.add_argument("--block-length", type=int, default=2048, help="tokens of a block (2048)")
    parser.add_argument("--seed", type=int, default=42, help="of the order of documents (42)")
    parser.add_argument("--text-field", default="text", help="of JSON lines and Parquet (text)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (1)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what it takes, stop")
    return parser

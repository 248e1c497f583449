"""`unmask moe report MERGED --data TEXT`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm.moe.assemble import load_tokenizer
from llm.moe.calibration_text import CalibrationConfig, build_text
from llm.moe.fidelity import LayerFidelity, judge_layers
from llm.moe.formats import plan, predicted_bytes
from llm.moe.merge import load_map, read_merge
from llm.moe.source import Source, check_length, open_source


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask moe report",
        description=(
            "What a merge does to each layer on held-out text (error, distinct experts a token, collisions of gates) "
            "and to sizes. Written as report.md and report.json beside the merged layers."
        ),
        epilog="example: unmask moe report merged/hc4 --data c4.jsonl --blocks 8",
    )
    parser.add_argument("merged", type=Path, metavar="MERGED", help="folder of `unmask moe merge`")
    parser.add_argument("--data", nargs="+", required=True, metavar="TEXT[=WEIGHT]", help="its test split is read")
    parser.add_argument("--blocks", type=int, default=8, help="of text (8)")
    parser.add_argument("--block-length", type=int, default=512, help="tokens of a block (512)")
    options = parser.parse_args(argv)
    config = CalibrationConfig(data=tuple(options.data), blocks=options.blocks, block_length=options.block_length)
    config.check("report")
    manifest = read_merge(options.merged)
    source = open_source(Path(manifest["model_folder"]))
    check_length(source, config.block_length, f"--block-length {config.block_length}")
    text = build_text(config, load_tokenizer(source.folder), split="test")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judged = judge_layers(source, options.merged, dict(enumerate(text.blocks)), device)
    layers = list(tqdm(judged, "report", total=len(source.shape.moe_layers), unit="layer"))
    sizes = sizes_of(source, options.merged)
    tree = {"recipe": manifest["recipe"], **sizes, "layers": [dataclasses.asdict(layer) for layer in layers]}
    (options.merged / "report.json").write_text(json.dumps(tree, indent=1) + "\n")
    page = f"# Merged layers of {source.folder.name}\n\n{size_table(sizes)}\n\n{layer_table(layers)}\n"
    (options.merged / "report.md").write_text(page)
    print(page)
    return 0


def sizes_of(source: Source, merged: Path) -> dict[str, Any]:
    """Bytes of all tensors, on disk and in memory, parameters, and FLOPs of a token, before and after."""
    shape = source.shape
    counts = {n: int(load_map(merged, n).max()) + 1 for n in shape.moe_layers}
    dropped = sum((shape.num_experts - count) * shape.expert_parameters for count in counts.values())
    active = len(shape.moe_layers) * shape.rule.top_k * shape.expert_parameters
    return {
        "bytes_before": predicted_bytes(plan(source, "expanded", dict.fromkeys(counts, shape.num_experts))),
        "bytes_compact": predicted_bytes(plan(source, "compact", counts)),
        "parameters_dropped": dropped,
        "expert_flops_of_a_token": 2 * active,
        "expert_flops_of_a_token_after": 2 * active,  # k experts run, whether or not two of them are one
    }


def size_table(sizes: dict[str, Any]) -> str:
    return "\n".join(
        [
            "| | before | after |",
            "|---|---|---|",
            f"| bytes (compact; disk and memory) | {sizes['bytes_before']:,} | {sizes['bytes_compact']:,} |",
            f"| parameters | | {sizes['parameters_dropped']:,} fewer |",
            f"| FLOPs of a token in its experts | {sizes['expert_flops_of_a_token']:,} | unchanged |",
        ]
    )


def layer_table(layers: Sequence[LayerFidelity]) -> str:
    head = (
        "| layer | experts | largest cluster | alone | relative error | distinct a token | collisions | dropped mass |"
    )
    rows = [
        f"| {f.layer} | {f.experts} | {f.largest_cluster} | {f.singletons} | {f.relative_error:.4f} | "
        f"{f.distinct_experts:.2f} | {f.collisions:.1%} | {f.dropped_mass:.3f} |"
        for f in layers
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])

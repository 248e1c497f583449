"""`unmask moe upcycle DENSE --to DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from llm.moe.upcycle import Kind, UpcycleConfig, upcycle


def main(argv: Sequence[str]) -> int:
    usual = UpcycleConfig()
    parser = argparse.ArgumentParser(
        prog="unmask moe upcycle",
        description=(
            "Write a mixture of experts that computes what a dense Llama does, to be trained further: configs/llm/moe."
        ),
        epilog="example: unmask moe upcycle ~/.cache/unmask/models/smollm2 --to models/smollm2-mixtral --noise 0.1",
    )
    parser.add_argument("dense", type=Path, metavar="DENSE", help="Hugging Face folder of a Llama without biases")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--kind", choices=get_args(Kind), default=usual.kind, help=f"architecture ({usual.kind})")
    parser.add_argument("--experts", type=int, default=usual.experts, help=f"of each layer ({usual.experts})")
    parser.add_argument("--top-k", type=int, default=usual.top_k, help=f"that a token selects ({usual.top_k})")
    parser.add_argument("--expert-width", type=int, help="inner width of a routed expert of qwen2_moe (dense / top-k)")
    parser.add_argument("--every", type=int, default=usual.every, help="qwen2_moe: every N-th layer gets experts (1)")
    parser.add_argument("--noise", type=float, default=usual.noise, help="mixtral: relative disturbance of experts (0)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of everything new (0)")
    options = parser.parse_args(argv)
    settings = {k: v for k, v in vars(options).items() if k not in ("dense", "to")}
    config = upcycle(options.dense, options.to, UpcycleConfig(**settings))
    print(f"{options.to}: {config['model_type']} of {options.experts} experts, {options.top_k} a token")
    return 0

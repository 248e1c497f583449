"""`unmask export RUN --to DIR`: a Hugging Face style folder from a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llm.pretrained import export


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask export",
        description=(
            "Write the model of a run as a folder with model.safetensors, config.json and tokenizer.json, read it back "
            "and compare. Autoregressive models open with AutoModelForCausalLM.from_pretrained; `unmask eval` and "
            "`unmask sample` take such a folder in place of a run."
        ),
        epilog="example: unmask export runs/tiny-arm --to exports/tiny-arm --dtype bf16",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to export (the newest whole one)")
    parser.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="auto: the average, if kept"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the exported weights (fp32)")
    options = parser.parse_args(argv)
    dtype = torch.bfloat16 if options.dtype == "bf16" else None
    print(export(options.run, options.to, weights=options.weights, dtype=dtype, step=options.step))
    return 0


if __name__ == "__main__":
    sys.exit(main())

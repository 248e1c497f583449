"""`unmask moe export MERGED --format FORMAT --to DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from launch.checkpoint.commit import size
from llm.moe.finish import FinishConfig, finish
from llm.moe.formats import Format
from llm.moe.router import RouterPolicy

_FORMATS = """\
formats:
  compact    exactly what was merged, in fewer bytes; opened by `unmask` and with trust_remote_code
  expanded   exactly what was merged, in the bytes of the original; opened by any tool that opens the original
  shrunk     fewer bytes for any tool, with a smaller router that only comes near the merged model's
examples:
  unmask moe export merged/hc4 --to models/mixtral-4
  unmask moe export merged/hc4 --format shrunk --router fit --to models/mixtral-4-stock
"""


def main(argv: Sequence[str]) -> int:
    usual = FinishConfig()
    parser = argparse.ArgumentParser(
        prog="unmask moe export",
        description="Write merged layers as a checkpoint, reload it in a fresh process, and compare the logits.",
        epilog=_FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("merged", type=Path, metavar="MERGED", help="folder of `unmask moe merge`")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--format", choices=get_args(Format), default=usual.format, help=f"({usual.format})")
    parser.add_argument("--router", choices=get_args(RouterPolicy), default=usual.router, help="shrunk: its rows")
    parser.add_argument("--top-k", type=int, metavar="K", help="shrunk: experts that a token selects from now on")
    parser.add_argument("--no-verify", action="store_true", help="for models that do not fit into memory")
    options = parser.parse_args(argv)
    config = FinishConfig(
        format=options.format, router=options.router, top_k=options.top_k, verify=not options.no_verify
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = finish(options.merged, options.to, config, device)
    print(f"{options.to}: {config.format}, {size(report['bytes'])}")
    if "verification" in report:
        found = report["verification"]
        print(
            f"reloaded: logits differ by at most {found['max_difference']:.2g} from the merged layers' "
            f"(KL {found['kl_divergence']:.2g} nats a token, same first choice {found['top1_agreement']:.1%})"
        )
    return 0

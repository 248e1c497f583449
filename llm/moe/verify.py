"""A written model opened again in a process of its own, and its logits compared with those that it should give.

python -m llm.moe.verify FOLDER EXCHANGE DTYPE      # what `verify` starts; EXCHANGE is a temporary folder
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.errors import CheckpointError
from llm.moe import modeling
from llm.moe.formats import Format

Type = Literal["float32", "bfloat16"]
TOLERANCE: dict[Type, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of a logit in the exact formats, as a part of the largest logit, or of 1 if all are smaller."""

_REQUEST, _ANSWER = "request.safetensors", "answer.json"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A reloaded model against the logits that were expected of it."""

    tokens: int  # compared positions
    largest_logit: float  # absolute, of the expected ones
    max_difference: float  # absolute, of a logit
    kl_divergence: float  # nats a token, from the expected distributions to the reloaded model's
    top1_agreement: float  # share of positions with the same most probable token


def verify(folder: Path, reference: Tensor, tokens: Tensor, *, form: Format, dtype: Type = "float32") -> Verification:
    """Open `folder` in a fresh process, on the CPU, and compare.

    reference: logits [N, L, V] of `tokens` int64 [N, L] by the merged model in memory (for shrunk: by the model that it
    stands for). dtype: of the computation; that of the reference. CheckpointError if the folder does not open, or if a
    format that promises exactness (compact, expanded) breaks the promise; shrunk promises nothing.
    """
    with tempfile.TemporaryDirectory() as exchange:
        request = {"tokens": tokens.cpu().contiguous(), "logits": reference.cpu().float().contiguous()}
        save_file(request, Path(exchange) / _REQUEST)
        command = [sys.executable, "-m", "llm.moe.verify", str(folder), exchange, dtype]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode != 0:
            said = process.stderr.strip().splitlines()
            reason = said[-1] if said and process.returncode > 0 else f"it ended with {process.returncode}"
            raise CheckpointError(f"{folder} does not open in a fresh process ({reason}); it must not be used")
        found = Verification(**json.loads((Path(exchange) / _ANSWER).read_text()))
    limit = TOLERANCE[dtype] * max(1.0, found.largest_logit)
    if form != "shrunk" and not found.max_difference <= limit:  # NaN is not
        raise CheckpointError(
            f"{folder} gives logits that differ by {found.max_difference:.2g} from the merged model's, more than "
            f"{limit:.2g} in {dtype}; it must not be used"
        )
    return found


@torch.no_grad()
def compare(model: Any, reference: Tensor, tokens: Tensor) -> Verification:
    """One block at a time. Shapes as in `verify`."""
    largest = difference = divergence = 0.0
    agreed = 0
    for block, expected in zip(tokens, reference.float(), strict=True):
        found = model(block[None]).logits[0].float()  # [L, V]
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, float((found - expected).abs().max().nan_to_num(torch.inf)))
        logs = expected.log_softmax(-1)
        divergence += float((logs.exp() * (logs - found.log_softmax(-1))).sum())
        agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
    count = tokens.numel()
    return Verification(
        tokens=count,
        largest_logit=largest,
        max_difference=difference,
        kl_divergence=divergence / count,
        top1_agreement=agreed / count,
    )


def main(argv: Sequence[str] | None = None) -> int:
    folder, exchange, dtype = sys.argv[1:] if argv is None else argv
    from transformers import AutoModelForCausalLM

    modeling.register()
    request = load_file(Path(exchange) / _REQUEST)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    if wrong := [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]:
        raise CheckpointError(f"{wrong[0]} and {len(wrong)} entries in all are missing, unknown or of another shape")
    answer = asdict(compare(model, request["logits"], request["tokens"]))
    (Path(exchange) / _ANSWER).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())

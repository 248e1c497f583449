"""`unmask export RUN` for a run of llm.moe.train: the stock Hugging Face folder that merging starts from."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from launch import config as configs
from launch.checkpoint import layout, publish, stream, write_safetensors
from llm.data import tokenizers
from llm.moe.architectures import MoeShape
from llm.moe.config import MoeExperiment
from llm.moe.experts import Experts
from llm.moe.task import MoeTask
from llm.pretrained import newest_step

_FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="unmask export",
        description="Write a run of llm.moe.train as a folder that AutoModelForCausalLM and `unmask moe` open.",
        epilog="example: unmask export runs/moe --to models/moe",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to export (the newest whole one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the exported weights (fp32)")
    options = parser.parse_args(argv)
    step = export(
        options.run,
        options.to,
        step=options.step,
        dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
    )
    print(f"{options.to}: step {step}; next: unmask moe calibrate {options.to} --data TEXT --out STATISTICS")
    return 0


def export(run: Path, to: Path, *, step: int | None = None, dtype: torch.dtype = torch.float32) -> int:
    """Write the new folder `to` and open it with transformers; the step of the checkpoint."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    config = configs.from_dict(MoeExperiment, tree, source=str(run / "config.yaml"))
    tokenizer = tokenizers.load(run)  # the data may be gone
    data = dataclasses.replace(config.data, vocab_size=tokenizer.vocab_size)
    task = MoeTask(dataclasses.replace(config, data=data), torch.device("cpu"), open_data=False)
    step = newest_step(run) if step is None else step
    prefix = "ema." if config.engine.ema_decay is not None else "model."
    checkpoint = run / "checkpoints" / layout.step_name(step)
    kinds = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
    described = task.model_config.to_dict() | {
        "architectures": [f"{kinds[task.shape.architecture.model_type]}ForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        **dict.fromkeys(task.shape.architecture.count_keys, task.shape.num_experts),
    }
    with publish(to) as folder:
        write_safetensors(on_disk(stream(checkpoint, prefix), task.shape), folder, dtype=dtype)
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        tokenizer.save(folder)
        _open(folder)
    return step


def on_disk(tensors: Iterator[tuple[str, Tensor]], shape: MoeShape) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a `task.Mixture` under the names of a checkpoint, an entry for each matrix of each expert."""
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        name = name.removeprefix("model.")
        if not name.endswith(_FUSED):
            yield name.replace(".mlp.gate.", f".{shape.architecture.block}.gate."), tensor
            continue
        block, _, kind = name.rpartition(".")
        parts = fused.setdefault(block, {})
        parts[kind] = tensor
        if len(parts) == 2:
            layer = int(block.split(".")[2])
            experts = Experts(gate_up=parts["gate_up_proj"], down=parts["down_proj"])
            for expert in range(len(experts)):
                for matrix in ("gate", "up", "down"):
                    place = getattr(experts, matrix)[expert].clone()
                    yield shape.architecture.expert(layer, expert, matrix), place
            del fused[block]


def _open(folder: Path) -> None:
    """Raises unless transformers finds every weight."""
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    problems = {key: names for key, names in opened[1].items() if names}
    if problems:
        raise AssertionError(f"transformers does not open what was exported: {problems}")


if __name__ == "__main__":
    sys.exit(main())

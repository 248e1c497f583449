"""Tokens per second of the trainer, against a bare PyTorch loop and against transformers.Trainer.

1. bare loop: the same model, data and objective; fused AdamW and gradient clipping, and nothing else. What is compared
   is everything a run has beside them: keyed data order and noise, agreement of the ranks, guard, metrics, watchdog.
2. transformers.Trainer: our autoregressive model against Qwen3 of the same shape (RMSNorm, rotary, SwiGLU, QK-norm) on
   the same blocks, with the same batch, accumulation, optimizer and logging interval; no evaluation, no saving.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import write_corpus
from measure import Turn, alternate, loops, median, parser, print_table, ratio
from torch import nn

from launch import config as configs
from launch import entry
from launch.runtime import Runtime, start
from llm.config import LanguageConfig
from llm.diffusion import masking
from llm.diffusion.objective import MaskedBatch, Readout, ar_inputs, ar_readout, masked_readout
from llm.task import Batch, LanguageTask

CONFIGS = Path(__file__).parent.parent / "configs" / "llm" / "tiny"


class TakingTurns(LanguageTask):
    """The language-model task, standing still between the turns of a benchmark; no evaluation, no samples."""

    def __init__(self, config: LanguageConfig, device: torch.device, open_data: bool, pause: Callable[[], None]):
        super().__init__(config, device, open_data)
        self._pause, self._step = pause, -1

    def batch(self, positions: np.ndarray, step: int) -> Batch:
        if step != self._step:
            self._pause()
            self._step = step
        return super().batch(positions, step)

    def evaluate(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        del model, runtime
        return {}

    def sample(self, model: nn.Module, runtime: Runtime, step: int, folder: Path) -> None:
        del model, runtime, step, folder


def load(experiment: str, data: Path, run: Path, *overrides: str) -> LanguageConfig:
    """A tiny experiment on the invented corpus, without an end and without checkpoints unless asked for."""
    fixed = [f"data.sources=[{{path: {data}}}]", f"run.dir={run}", "train.steps=1000000", "schedule.warmup_steps=0"]
    fixed += [
        "engine.device=cpu",
        "engine.strategy=ddp",
        "train.log_every=4",
        "schedule.kind=constant",
        "checkpoint.every_steps=null",
    ]
    return configs.load(LanguageConfig, CONFIGS / f"{experiment}.yaml", [*fixed, *overrides])[0]


def our_trainer(pause: Callable[[], None], config: LanguageConfig) -> None:
    """The whole run as `python -m llm.train` makes it."""
    entry.run(config, lambda c, device, open_data: TakingTurns(c, device, open_data, pause))


def bare_loop(pause: Callable[[], None], config: LanguageConfig) -> None:
    """What one writes in an afternoon: data in memory, torch's own random numbers, AdamW, clipping."""
    torch.manual_seed(0)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    task = LanguageTask(config, torch.device("cpu"))
    assert task.stream is not None
    blocks = task.stream.datasets[0].blocks(np.arange(len(task.stream.datasets[0])))
    model: Any = task.build_model()
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, torch.Generator().manual_seed(0))
    module: nn.Module = model
    if world > 1:
        start(device="cpu")
        module = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.schedule.lr, betas=(0.9, 0.98), fused=True)
    size, micro_steps = config.train.micro_batch, config.train.global_batch // config.train.micro_batch // world
    rows = torch.Generator().manual_seed(rank)
    while True:
        pause()
        for micro_step in range(micro_steps):
            tokens = blocks[torch.randint(len(blocks), (size,), generator=rows)]
            inputs, readout = bare_objective(task, tokens)
            silent = world > 1 and micro_step < micro_steps - 1
            with module.no_sync() if silent else contextlib.nullcontext():  # type: ignore[operator]
                loss_sum = module(inputs, lambda *a, readout=readout: readout(*a).loss_sum)
                (loss_sum / (tokens.numel() * micro_steps)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bare_objective(task: LanguageTask, tokens: torch.Tensor) -> tuple[torch.Tensor, Readout]:
    if task.objective is None:
        return ar_inputs(tokens, bos=0), ar_readout(tokens)
    batch, granularity = len(tokens), task.codec.granularity
    times = (torch.rand(()) + torch.randperm(batch) / batch) % 1.0
    grouped = torch.rand(batch) < task.config.diffusion.p_group
    mask = masking.random_mask(torch.rand(*tokens.shape, granularity), times, grouped=grouped)
    masked = MaskedBatch(tokens=tokens, mask=mask, times=times, grouped=grouped)
    return task.language.inputs(masked.inputs(task.codec)), masked_readout(task.objective, masked, task.codec)


def transformers_trainer(pause: Callable[[], None], config: LanguageConfig) -> None:
    import transformers

    task = LanguageTask(config, torch.device("cpu"))
    assert task.stream is not None
    blocks = task.stream.datasets[0].blocks(np.arange(len(task.stream.datasets[0])))
    model = config.model
    shape = transformers.Qwen3Config(
        vocab_size=task.codec.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tied,
        max_position_embeddings=config.data.block_length,
        use_cache=False,
    )

    class Pausing(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pause()

    trainer = transformers.Trainer(
        model=transformers.Qwen3ForCausalLM(shape),
        args=transformers.TrainingArguments(
            output_dir=str(config.run.folder),
            max_steps=config.train.steps,
            per_device_train_batch_size=config.train.micro_batch,
            gradient_accumulation_steps=config.train.global_batch // config.train.micro_batch,
            learning_rate=config.schedule.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=1.0,
            logging_steps=config.train.log_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in blocks],  # type: ignore[arg-type]
        callbacks=[Pausing()],
    )
    trainer.train()


def compare(title: str, sides: dict[str, Turn], turns: int, tokens: int, goal: str) -> None:
    """Table of tokens per second; the last side is what the others are compared with."""
    costs = alternate(sides, turns)
    reference = list(costs)[-1]
    rows = []
    for name, measured in costs.items():
        middle, quotient = median(measured), ratio(costs[reference], measured)
        rate = (f"{tokens / middle.wall:,.0f}", f"{tokens / middle.cpu:,.0f}")
        rows.append((name, *rate, f"{quotient.wall:.3f}", f"{quotient.cpu:.3f}"))
    header = ("side", "tokens/s", "tokens/CPU-s", "speed / reference (wall)", "(CPU)")
    print_table(f"{title} (goal {goal}; median of {turns} pairs)", header, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=4, help="optimizer steps of one turn")
    arguments.add_argument("--turns", type=int, default=9, help="turns of each side")
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="world sizes (bare loop)")
    chosen = arguments.parse_args()
    steps, turns = (1, 2) if chosen.quick else (chosen.steps, chosen.turns)
    with tempfile.TemporaryDirectory(prefix="unmask-bench-") as name:
        data = write_corpus(Path(name) / "data", documents=100 if chosen.quick else 600)

        size = ["train.global_batch=16", "train.micro_batch=8"] if chosen.quick else []

        def config(experiment: str, run: str) -> LanguageConfig:
            return load(experiment, data, Path(name) / run, *size)

        tokens = steps * config("arm", "").train.global_batch * config("arm", "").data.block_length
        for world in chosen.processes:
            for experiment in ("arm", "primev2"):
                ours = config(experiment, f"{experiment}-{world}")
                sides = {"our trainer": (our_trainer, (ours,)), "bare loop": (bare_loop, (ours,))}
                with loops(sides, steps=steps, ranks=world) as ready:
                    compare(
                        f"tiny {experiment}, world size {world}: against a bare loop", ready, turns, tokens, ">= 0.98"
                    )
        ours, theirs = config("arm", "ours"), config("arm", "theirs")
        sides = {"our trainer": (our_trainer, (ours,)), "transformers.Trainer": (transformers_trainer, (theirs,))}
        with loops(sides, steps=steps) as ready:
            compare("tiny arm, world size 1: against transformers.Trainer", ready, turns, tokens, "> 1")


if __name__ == "__main__":
    main()

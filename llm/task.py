"""The language-model task: what a batch is, what its loss is, and how a model is judged while it trains.

Everything random about a batch is a function of (seed, step, row of the global batch), so neither the number of
processes nor a restart changes it.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launch.checkpoint import layout
from launch.errors import ConfigError
from launch.random import stream_key, uniform
from launch.runtime import Runtime
from llm import backbones
from llm.config import LanguageConfig
from llm.data.codes import keep_code
from llm.data.stream import TrainingStream, open_datasets
from llm.diffusion import masking
from llm.diffusion.objective import Loss, MaskedBatch, Readout, ar_inputs, ar_readout, masked_readout
from llm.generate import Language, generate, write_samples
from llm.heldout import evaluate_bounds, heldout_blocks
from llm.pretrained import initial_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: B sequences of L tokens, and what their masks are drawn from."""

    tokens: Tensor  # int64 [B, L]
    masked: MaskedBatch | None  # None for the autoregressive family
    dropout_key: int  # seeds the generator that torch's dropout draws from


class LanguageTask:
    def __init__(self, config: LanguageConfig, device: torch.device, open_data: bool = True):
        """With `open_data` the data set must exist and fit; without, `data.vocab_size` must say what it would be."""
        folder = config.run.folder
        if layout.committed_steps(folder / "checkpoints"):  # else a copy there is of another, older start
            config = config.with_code_of(folder)
        self.config, self.device = config, device
        self.stream = TrainingStream(config.data) if open_data else None
        vocab_size = self.stream.vocab_size if self.stream else config.data.vocab_size
        if vocab_size is None:
            raise ConfigError(
                "data.vocab_size is not set and the data are not read; add data.vocab_size=N, or let "
                "`unmask train CONFIG --dry-run` read the data"
            )
        if config.data.vocab_size not in (None, vocab_size):
            raise ConfigError(
                f"data.vocab_size = {config.data.vocab_size}, but {config.data.sources[0].path} was made with a "
                f"tokenizer of {vocab_size} tokens; set it to {vocab_size}, or prepare the data again"
            )
        self.codec = config.diffusion.codec(vocab_size).to(device)
        self.input_spec = config.diffusion.input_spec(config.model, self.codec)
        self.language = Language(
            family=config.diffusion.family,
            codec=self.codec,
            first_token=_first_token(self.stream) if self.stream and config.diffusion.family == "ar" else 0,
            order=config.diffusion.order,
        )
        self.objective = config.diffusion.objective_for(self.codec) if config.diffusion.family != "ar" else None
        self._zero_shot = _zero_shot(config) if self.stream else None
        self._steps = config.train.steps  # that the weights have seen; a run that is resumed at its end has no batch

    @property
    def tokens_per_sample(self) -> int:
        return self.config.data.block_length

    def build_model(self) -> backbones.Llama | backbones.DiT:
        return backbones.build(
            self.config.model,
            input_layer=self.input_spec,
            num_classes=self.codec.vocab_size,
            causal=self.config.diffusion.family == "ar",
        )

    def initial_weights(self) -> Iterator[tuple[str, Tensor]] | None:
        if self.config.initial_weights is None:
            return None
        assert self.stream is not None
        return initial_weights(Path(self.config.initial_weights), self.config.model, self.codec, self.stream.tokenizer)

    # --- a training step ---------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray, step: int) -> Batch:
        """The blocks at these global positions, cut to the step's length, with their masks."""
        assert self.stream is not None
        self._steps = step + 1
        diffusion, seed = self.config.diffusion, self.config.run.seed
        tokens = self.stream.blocks(positions).to(self.device)
        if diffusion.random_length_probability > 0:
            noise = uniform(stream_key(seed, "length", step), torch.zeros(1, dtype=torch.int64), 2)[0]
            tokens = tokens[
                :, : masking.random_length(noise, tokens.shape[1], probability=diffusion.random_length_probability)
            ]
        global_batch = self.config.train.global_batch
        rows = torch.from_numpy(positions % global_batch).to(self.device)  # place in the global batch
        # Fused dropout has one generator for the whole micro-batch; every world size cuts a step into the same ones.
        dropout_key = stream_key(seed, "dropout", step, int(positions[0] % global_batch))
        if self.objective is None:
            return Batch(tokens=tokens, masked=None, dropout_key=dropout_key)

        times = self._times(rows, step, global_batch)
        shape = (*tokens.shape, self.codec.granularity)
        noise = uniform(stream_key(seed, "mask", step), rows, shape[1] * shape[2]).view(shape)
        grouped = None
        if diffusion.chunk_point is not None:
            grouped = masking.granularity_by_time(times, chunk_point=diffusion.chunk_point)
        elif diffusion.draws_whole_tokens:
            choice = uniform(stream_key(seed, "granularity", step), rows, 1)[:, 0]
            share = diffusion.group_share(step / max(1, self.config.train.steps - 1))
            grouped = masking.random_granularity(choice, p_group=share)
        layer = None
        if diffusion.order == "layers":
            layer, within = masking.layer_at(times, self.codec.granularity)
            whole = torch.zeros_like(times, dtype=torch.bool) if grouped is None else grouped
            times = torch.where(whole, times, within)
            by_layer = masking.layered(masking.random_mask(noise[..., :1], times), layer, self.codec.granularity)
            mask = torch.where(whole[:, None, None], masking.random_mask(noise, times, grouped=whole), by_layer)
        else:
            mask = masking.random_mask(noise, times, grouped=grouped)
        masked = MaskedBatch(tokens=tokens, mask=mask, times=times, grouped=grouped, layer=layer)
        return Batch(tokens=tokens, masked=masked, dropout_key=dropout_key)

    def example_batch(self, size: int) -> Batch:
        """Every digit of every token is masked, so that every position carries loss."""
        tokens = torch.zeros(size, self.config.data.block_length, dtype=torch.int64, device=self.device)
        if self.objective is None:
            return Batch(tokens=tokens, masked=None, dropout_key=0)
        mask = torch.ones(*tokens.shape, self.codec.granularity, dtype=torch.bool, device=self.device)
        times = torch.ones(size, device=self.device)
        mixes = self.config.diffusion.chunk_point is not None or self.config.diffusion.draws_whole_tokens
        grouped = torch.zeros(size, dtype=torch.bool, device=self.device) if mixes else None
        layer = (
            torch.zeros(size, dtype=torch.int64, device=self.device)
            if self.config.diffusion.order == "layers"
            else None
        )
        masked = MaskedBatch(tokens=tokens, mask=mask, times=times, grouped=grouped, layer=layer)
        return Batch(tokens=tokens, masked=masked, dropout_key=0)

    def _times(self, rows: Tensor, step: int, global_batch: int) -> Tensor:
        """float32 [B]: noise times of these rows of the global batch."""
        key = stream_key(self.config.run.seed, "time", step)
        everyone = uniform(key, torch.arange(global_batch + 1, device=self.device), 1)[:, 0]
        if self.config.diffusion.time_sampling == "uniform":
            return everyone[rows]
        return masking.stratified_times(everyone[-1], everyone[:-1], rows)

    def count(self, batch: Batch) -> float:
        return batch.tokens.numel()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum of a micro-batch, and [numerator, denominator] of every figure worth logging."""
        if batch.masked is None or self.objective is None:
            inputs = ar_inputs(batch.tokens, bos=self.language.first_token)
            readout = ar_readout(batch.tokens)
        else:
            inputs = self.language.inputs(batch.masked.inputs(self.codec))
            readout = masked_readout(self.objective, batch.masked, self.codec)
        if self.config.model.dropout:
            torch.manual_seed(batch.dropout_key)
        loss_sum, metrics = model(inputs, _in_plain_containers(readout))
        is_process = self.config.diffusion.chunk_point is None or self.codec.granularity == 1
        return loss_sum, _figures(metrics, self.codec.granularity, is_process=is_process)

    # --- judging -----------------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Collective. Nats per token, standard error and bits per byte of each bound on validation blocks.

        And zero-shot tasks, where the configuration names some and the step has them.
        """
        evaluation = self.config.evaluation
        names = self.language.bounds(evaluation.bounds)
        figures: dict[str, float] = {}
        for dataset in self._validation:
            suffix = f"/{Path(dataset.path).name}" if len(self._validation) > 1 else ""
            blocks = heldout_blocks(dataset, evaluation.sequences)
            for result in evaluate_bounds(model, self.language, dataset, blocks, names, evaluation, runtime):
                figures |= {f"{key}{suffix}": value for key, value in result.figures(dataset.bytes_per_token).items()}
        if self._zero_shot is not None and self._zero_shot.are_due(self._steps):
            assert self.stream is not None
            figures |= self._zero_shot.figures(model, self.language, self.stream.tokenizer, runtime)
        return figures

    def sample(self, model: nn.Module, runtime: Runtime, step: int, folder: Path) -> None:
        """Collective. Rank 0 writes samples; the others wait at the next agreement."""

        def write() -> None:
            assert self.stream is not None
            sampling = self.config.sampling
            samples = generate(
                model,
                self.language,
                config=sampling.sampler,
                count=sampling.count,
                length=sampling.length or self.config.data.block_length,
                seed=sampling.seed,
                device=self.device,
            )
            path = folder / f"step_{step:08d}.md"
            try:
                write_samples(path, samples, self.stream.tokenizer, language=self.language)
            except OSError as error:  # a full disk costs samples; whether it ends the run is for checkpoints to say
                logger.warning("cannot write %s: %s", path, error)

        runtime.decide(write)

    @cached_property
    def _validation(self) -> list[Any]:
        return open_datasets(self.config.data, "validation")

    def keep_files(self, folder: Path) -> None:
        """The table of codes, without which no checkpoint of the run means anything."""
        if self.config.diffusion.code is not None:
            keep_code(Path(self.config.diffusion.code), folder)

    # --- facts -------------------------------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        assert self.stream is not None
        return {"codec": self.codec.describe(), "data": self.stream.fingerprint, "vocab_size": self.codec.vocab_size}

    def facts(self) -> Mapping[str, Any]:
        spec, causal = self.input_spec, self.config.diffusion.family == "ar"
        counts = backbones.count_parameters(
            self.config.model, input_layer=spec, num_classes=self.codec.vocab_size, causal=causal
        )
        codec = self.codec
        digits = f" as {codec.granularity} digits of base {codec.base}" if codec.granularity > 1 else ""
        return {
            "model": f"{self.config.diffusion.family}, {self.config.model.kind}, {codec.vocab_size} tokens{digits}",
            "parameters": (
                f"{counts.total:,} in all; {counts.non_embedding:,} without tables and head (N), "
                f"{counts.label:,} by the papers' label 12 layers width^2"
            ),
        }

    def flops_per_token(self) -> float:
        """Training FLOPs of a token by the full rule (6N, head and attention)."""
        flops = backbones.training_flops(
            self.config.model,
            input_layer=self.input_spec,
            num_classes=self.codec.vocab_size,
            causal=self.config.diffusion.family == "ar",
            length=self.config.data.block_length,
            tokens=1,
        )
        return flops.full

    def report_sections(self, run_folder: Path) -> list[tuple[str, str]]:
        samples = sorted((run_folder / "samples").glob("*.md"))
        return [("Samples", samples[-1].read_text())] if samples else []


def _in_plain_containers(readout: Readout) -> Any:
    """The readout with its result as a tuple: DDP and FSDP2 look for tensors in plain containers only."""

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss: Loss = readout(hidden, weight, bias)
        return loss.loss_sum, loss.metrics

    return plain


def _figures(metrics: Mapping[str, Tensor], granularity: int, *, is_process: bool) -> dict[str, Tensor]:
    """Name -> [numerator, denominator], from the sums that the objective reports.

    Masks that are no process (whole tokens above a chunk point, digits below) cover a part of the times with each kind
    of charge, so that none of the sums bounds anything.
    """
    tokens = metrics["num_tokens"]
    figures = {}
    for key, value in metrics.items():
        name = key.removesuffix("_sum")
        is_told_twice = granularity == 1 and name == "loss_ce_joint"  # l = 1: it is the bound
        if name == key or is_told_twice or not (is_process or name == "loss_ce_joint"):
            continue
        figures[name] = torch.stack([value.double(), metrics.get(f"num_tokens_{name}", tokens).double()])
    if "num_loss_positions" in metrics:
        figures["loss_positions"] = torch.stack([metrics["num_loss_positions"].double(), tokens.double()])
    return figures


def _zero_shot(config: LanguageConfig) -> Any:
    """The tasks to score while training; None for none, and then the harness need not be installed."""
    if not config.evaluation.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"evaluation.tasks = {', '.join(config.evaluation.tasks)} need lm-evaluation-harness; install it with "
            "`pip install 'unmask[eval]'`"
        )
    from llm.evals.during import TrainingTasks

    return TrainingTasks(config)


def _first_token(stream: TrainingStream) -> int:
    """What an autoregressive model reads before the first token of a block."""
    tokenizer = stream.tokenizer
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

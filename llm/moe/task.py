"""The training task of a mixture of experts: next tokens, and a loss that keeps the experts evenly loaded."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.checkpoint import read_safetensors
from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.data.shards import TokenDataset
from llm.data.stream import TrainingStream, open_datasets
from llm.moe.architectures import moe_shape, read_config
from llm.moe.config import MoeExperiment, huggingface_config


class Mixture(nn.Module):
    """A causal mixture of experts of transformers, with the face that engines expect."""

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        config._attn_implementation = "sdpa"
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._deviation = config.initializer_range
        self.model.model.rotary_emb = _Rotary(self.model.model.rotary_emb)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """As transformers does it: norms are ones, biases zeros, all else normal."""
        if "norm" in name:
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0.0, self._deviation, generator=generator)

    def no_decay(self, name: str) -> bool:
        return "norm" in name or name.endswith("bias") or "embed_tokens" in name

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Nats of tokens 1..L-1 [B, L-1], the load-balancing loss, and router logits [B x L, E] by MoE layer."""
        found = self.model(input_ids=tokens, use_cache=False, output_router_logits=True)
        logits = found.logits[:, :-1].float().flatten(0, 1)
        nats = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        return nats.view(tokens.shape[0], -1), found.aux_loss, found.router_logits


class _Rotary(nn.Module):
    """Rotary embedding without buffers, which a model built on the meta device would find unfilled."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self._kind, self._config = type(rotary), rotary.config
        self._made: list[Any] = []  # not a submodule: its buffers are nobody's state

    def forward(self, inputs: Tensor, position_ids: Tensor) -> Any:
        if not self._made:
            with torch.device(inputs.device):
                self._made.append(self._kind(config=self._config))
        return self._made[0](inputs, position_ids)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How a router uses its experts, as sums over T tokens and all MoE layers."""

    entropy: Tensor  # of p(x), nats, over T x layers
    load: Tensor  # [layers, E]: selections

    def figures(self, num_tokens: int, top_k: int) -> dict[str, float]:
        """router_entropy: mean over tokens, over log E. load_entropy: of the experts' shares, over log E; 1 is even."""
        layers, experts = self.load.shape
        shares = self.load / (num_tokens * top_k)
        spread = -(shares * shares.clamp_min(1e-30).log()).sum(-1).mean()
        scale = math.log(experts)
        return {
            "router_entropy": float(self.entropy) / (num_tokens * layers * scale),
            "load_entropy": float(spread) / scale,
        }


def balance_of(router_logits: tuple[Tensor, ...], top_k: int) -> Balance:
    probabilities = torch.stack([logits.float().softmax(-1) for logits in router_logits])  # [layers, T, E]
    chosen = torch.zeros_like(probabilities).scatter_(2, probabilities.topk(top_k, dim=-1).indices, 1.0)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum()
    return Balance(entropy=entropy.double(), load=chosen.double().sum(1))


class MoeTask:
    def __init__(self, config: MoeExperiment, device: torch.device, open_data: bool = True):
        """With `open_data` the data set must exist; without, `data.vocab_size` must say its vocabulary."""
        self.config, self.device = config, device
        self.stream = TrainingStream(config.data) if open_data else None
        vocab_size = self.stream.vocab_size if self.stream else config.data.vocab_size
        if vocab_size is None:
            raise ConfigError("data.vocab_size is not set and the data are not read; add data.vocab_size=N")
        if config.data.vocab_size not in (None, vocab_size):
            raise ConfigError(
                f"data.vocab_size = {config.data.vocab_size}, but {config.data.sources[0].path} was made with a "
                f"tokenizer of {vocab_size} tokens; set it to {vocab_size}, or prepare the data again"
            )
        self.model_config = self._model_config(vocab_size)
        self.shape = moe_shape(self.model_config, Path(config.model.start or "model"))

    def _model_config(self, vocab_size: int) -> Any:
        start, length = self.config.model.start, self.config.data.block_length
        if start is None:
            tokenizer = self.stream.tokenizer if self.stream else None
            return huggingface_config(
                self.config.model,
                vocab_size=vocab_size,
                length=length,
                bos=tokenizer.bos_id if tokenizer else None,
                eos=tokenizer.eos_id if tokenizer else 0,
            )
        found = read_config(Path(start))
        if found.vocab_size < vocab_size:
            raise ConfigError(
                f"model.start = {start} has {found.vocab_size} tokens, the data {vocab_size}; prepare the data with "
                f"--tokenizer {start}"
            )
        if found.max_position_embeddings < length:
            raise ConfigError(
                f"data.block_length = {length}; {start} takes {found.max_position_embeddings} tokens at most"
            )
        return found

    @property
    def tokens_per_sample(self) -> int:
        return self.config.data.block_length

    def build_model(self) -> Mixture:
        return Mixture(self.model_config)

    def initial_weights(self) -> Iterator[tuple[str, Tensor]] | None:
        """The weights of `model.start`, with experts fused as the model has them."""
        if self.config.model.start is None:
            return None
        return started_weights(Path(self.config.model.start), tied=self.model_config.tie_word_embeddings)

    # --- a training step ---------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray, step: int) -> Tensor:
        """int64 [B, L]."""
        assert self.stream is not None
        return self.stream.blocks(positions).to(self.device)

    def example_batch(self, size: int) -> Tensor:
        return torch.zeros(size, self.config.data.block_length, dtype=torch.int64, device=self.device)

    def count(self, batch: Tensor) -> float:
        return batch.shape[0] * (batch.shape[1] - 1)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nats, imbalance, router_logits = model(batch)
        count = torch.tensor(nats.numel(), dtype=torch.float64, device=nats.device)
        loss_sum = nats.sum() + self.config.model.balance * imbalance * nats.numel()
        with torch.no_grad():
            used = balance_of(router_logits, self.shape.rule.top_k).figures(batch.numel(), self.shape.rule.top_k)
        figures = {"nll_ar": nats.detach().double().sum(), "imbalance": imbalance.detach().double() * count}
        figures |= {name: count * value for name, value in used.items()}
        return loss_sum, {name: torch.stack([value, count]) for name, value in figures.items()}

    # --- judging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Collective. Exact nats per token of validation blocks given their first tokens, and how experts are used."""
        figures: dict[str, float] = {}
        for dataset in self._validation:
            suffix = f"/{Path(dataset.path).name}" if len(self._validation) > 1 else ""
            found = self._judge(model, dataset, runtime)
            figures |= {f"{name}{suffix}": value for name, value in found.items()}
        return figures

    def _judge(self, model: nn.Module, dataset: TokenDataset, runtime: Runtime) -> dict[str, float]:
        evaluation, top_k = self.config.evaluation, self.shape.rule.top_k
        count = len(dataset) if evaluation.sequences is None else min(evaluation.sequences, len(dataset))
        mine = (np.arange(count) * len(dataset) // count)[runtime.rank :: runtime.world_size]
        experts, layers = self.shape.num_experts, len(self.shape.moe_layers)
        sums = torch.zeros(4 + layers * experts, dtype=torch.float64)  # blocks, nats, their squares, entropy, load
        for start in range(0, len(mine), evaluation.batch):
            tokens = dataset.blocks(mine[start : start + evaluation.batch]).to(self.device, torch.int64)
            nats, _, router_logits = model(tokens)
            blocks = nats.double().mean(-1).cpu()
            used = balance_of(router_logits, top_k)
            parts = [torch.tensor([len(blocks), blocks.sum(), (blocks**2).sum(), used.entropy.cpu()])]
            sums += torch.cat([*parts, used.load.flatten().cpu()])
        total = runtime.all_reduce_sum(sums)
        blocks, mean = float(total[0]), float(total[1] / total[0])
        variance = max(0.0, float(total[2]) / blocks - mean**2) / max(1.0, blocks - 1)
        used = Balance(entropy=total[3], load=total[4:].view(layers, experts))
        tokens = round(blocks) * self.config.data.block_length
        return {"nll_ar": mean, "nll_ar_se": math.sqrt(variance), **used.figures(tokens, top_k)}

    def sample(self, model: nn.Module, runtime: Runtime, step: int, folder: Path) -> None:
        """Collective. Rank 0 writes a greedy and a sampled continuation of nothing but the first token."""

        def write() -> None:
            assert self.stream is not None
            tokenizer = self.stream.tokenizer
            first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            tokens = _continue(model, first, min(128, self.config.data.block_length), self.device)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"step_{step:08d}.md").write_text(f"```\n{tokenizer.decode(tokens)}\n```\n")

        runtime.decide(write)

    @cached_property
    def _validation(self) -> list[TokenDataset]:
        return open_datasets(self.config.data, "validation")

    def keep_files(self, folder: Path) -> None:
        """The tokenizer, by which `unmask export` makes a folder that stock tools open."""
        assert self.stream is not None
        self.stream.tokenizer.save(folder)

    # --- facts -------------------------------------------------------------------------------------------------------

    def identity(self) -> Mapping[str, Any]:
        assert self.stream is not None
        return {"data": self.stream.fingerprint, "vocab_size": self.stream.vocab_size}

    def facts(self) -> Mapping[str, Any]:
        shape = self.shape
        total = sum(p.numel() for p in self._meta.parameters())
        idle = len(shape.moe_layers) * (shape.num_experts - shape.rule.top_k) * shape.expert_parameters
        return {
            "model": f"{shape.architecture.model_type}, {shape.num_experts} experts in {len(shape.moe_layers)} of "
            f"{shape.num_layers} layers, {shape.rule.top_k} a token",
            "parameters": f"{total:,} in all; {total - idle:,} work on a token",
        }

    def flops_per_token(self) -> float:
        """6 for each parameter that works on a token, the head included and the table not, and attention."""
        shape, config = self.shape, self.model_config
        idle = len(shape.moe_layers) * (shape.num_experts - shape.rule.top_k) * shape.expert_parameters
        table = 0 if config.tie_word_embeddings else config.vocab_size * shape.width
        active = sum(p.numel() for p in self._meta.parameters()) - idle - table
        features = config.num_attention_heads * (
            getattr(config, "head_dim", None) or shape.width // config.num_attention_heads
        )
        attention = 6 * shape.num_layers * self.config.data.block_length * features
        return 6.0 * active + attention

    @cached_property
    def _meta(self) -> Mixture:
        with torch.device("meta"):
            return self.build_model()

    def report_sections(self, run_folder: Path) -> list[tuple[str, str]]:
        samples = sorted((run_folder / "samples").glob("*.md"))
        return [("Samples", samples[-1].read_text())] if samples else []


def started_weights(folder: Path, *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(parameter name of a `Mixture`, float32 tensor) of a Hugging Face MoE."""
    from llm.moe.source import open_source

    source = open_source(folder)
    for layer in source.shape.moe_layers:
        experts = source.experts(layer)
        prefix = f"model.model.layers.{layer}.mlp.experts."
        yield f"{prefix}gate_up_proj", experts.gate_up.float()
        yield f"{prefix}down_proj", experts.down.float()
    for name, tensor in read_safetensors(folder):
        if source.is_expert(name) or (tied and name == "lm_head.weight"):
            continue
        yield f"model.{name.replace(f'.{source.shape.architecture.block}.', '.mlp.')}", tensor.float()


@torch.no_grad()
def _continue(model: nn.Module, first: int, length: int, device: torch.device) -> list[int]:
    """Greedy, without a cache: a few hundred tokens of a small model."""
    inner: Any = model
    tokens = torch.tensor([[first]], device=device)
    while tokens.shape[1] < length:
        logits = inner.model(input_ids=tokens, use_cache=False).logits[0, -1]
        tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
    return tokens[0].tolist()

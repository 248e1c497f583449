"""The configuration of a mixture-of-experts model that is trained here, from scratch or from weights on disk."""

from dataclasses import dataclass, field
from typing import Any, Literal

from launch.config import Count
from launch.errors import ConfigError
from launch.experiment import Experiment
from llm.data.stream import DataConfig
from llm.moe.architectures import ARCHITECTURES

ROW = 8  # rows of whole 16 bytes in bf16, which torch's grouped matrix product of all experts wants


@dataclass(frozen=True, kw_only=True)
class MoeModelConfig:
    """A causal mixture of experts of transformers; with `start` everything but `balance` comes from there."""

    start: str | None = None  # folder of a Hugging Face MoE to start from (unmask moe upcycle); null: random weights
    kind: Literal["mixtral", "qwen2_moe", "qwen3_moe"] = "mixtral"  # the transformers architecture
    layers: int = 4  # decoder layers
    width: int = 128  # of the residual stream, d
    heads: int = 4  # attention heads; width / heads features each
    kv_heads: int | None = None  # key and value heads; null: as many as heads
    experts: int = 8  # routed experts of a layer, E
    top_k: int = 2  # experts that a token selects
    expert_width: int = 128  # inner width of an expert, f
    shared_width: int | None = None  # inner width of the shared expert of qwen2_moe; null: top_k x expert_width
    dense_layers: tuple[int, ...] = ()  # layers without experts, of the qwen kinds; as wide as top_k experts
    tied: bool = False  # one table for embedding and head
    balance: float = 0.01  # factor of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4)

    def check(self, path: str) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "experts", "expert_width", "shared_width"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is 1")
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads):
            raise ConfigError(
                f"{path}.heads = {self.heads} must divide {path}.width = {self.width}, and be a multiple of "
                f"{path}.kv_heads = {self.kv_heads}"
            )
        for name in ("width", "expert_width"):
            if (value := getattr(self, name)) % ROW:
                raise ConfigError(f"{path}.{name} = {value}; grouped matrix products take multiples of {ROW}")
        if self.width // self.heads % 2:
            raise ConfigError(
                f"{path}.width / {path}.heads = {self.width // self.heads} must be even: positions rotate features in "
                "pairs; choose another number of heads"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"{path}.top_k = {self.top_k}; a token selects 1 to {path}.experts = {self.experts}")
        if self.balance < 0:
            raise ConfigError(f"{path}.balance = {self.balance}; the smallest is 0, which balances nothing")
        if self.dense_layers and self.kind == "mixtral":
            raise ConfigError(f"{path}.dense_layers = {list(self.dense_layers)}: every layer of a Mixtral has experts")
        if not set(self.dense_layers) < set(range(self.layers)):
            raise ConfigError(
                f"{path}.dense_layers = {list(self.dense_layers)}; layers are 0 to {self.layers - 1}, and one of them "
                "at least has experts"
            )
        if self.shared_width is not None and self.kind != "qwen2_moe":
            raise ConfigError(
                f"{path}.shared_width = {self.shared_width}: only qwen2_moe has a shared expert; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class MoeEvaluationConfig:
    """Likelihood of held-out text, while training."""

    sequences: Count | None = 64  # validation blocks; null for all
    batch: Count = 8  # blocks at a time

    def check(self, path: str) -> None:
        for name in ("sequences", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is 1")


@dataclass(frozen=True, kw_only=True)
class MoeExperiment(Experiment):
    model: MoeModelConfig = field(default_factory=MoeModelConfig)
    data: DataConfig
    evaluation: MoeEvaluationConfig = field(default_factory=MoeEvaluationConfig)

    def check(self, _path: str) -> None:
        if self.data.block_length < 2:
            raise ConfigError(
                f"data.block_length = {self.data.block_length}; the first token of a block is given, so 2 are needed "
                "to have one to learn"
            )


def huggingface_config(model: MoeModelConfig, *, vocab_size: int, length: int, bos: int | None, eos: int) -> Any:
    """The transformers configuration of a model that is trained from scratch on blocks of `length` tokens."""
    import transformers

    architecture = ARCHITECTURES[model.kind]
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.width // model.heads,
        "max_position_embeddings": length,
        "num_experts_per_tok": model.top_k,
        "tie_word_embeddings": model.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": None,
        architecture.count_keys[-1]: model.experts,
        architecture.inner_key: model.expert_width,
    }
    if model.kind != "mixtral":
        dense = model.top_k * model.expert_width
        settings |= {"intermediate_size": dense, "norm_topk_prob": True, "mlp_only_layers": list(model.dense_layers)}
    if model.kind == "qwen2_moe":
        shared = model.top_k * model.expert_width if model.shared_width is None else model.shared_width
        settings |= {"shared_expert_intermediate_size": shared}
    kinds = {"mixtral": "MixtralConfig", "qwen2_moe": "Qwen2MoeConfig", "qwen3_moe": "Qwen3MoeConfig"}
    return getattr(transformers, kinds[model.kind])(**settings)

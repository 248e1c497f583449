"""What a backbone is built from: its own numbers (`ModelConfig`) and the symbols it reads (`InputSpec`).

The two are apart because the first is chosen by the experiment and the second follows from tokenizer and granularity.
"""

import math
from dataclasses import dataclass
from typing import Literal

from launch.errors import ConfigError

InputKind = Literal["token", "cat-share", "cat", "sum", "sum+token"]


def resolve_input_kind(embedding: Literal["auto", InputKind], *, granularity: int, width: int) -> InputKind:
    """The input layer that `embedding` asks for. A granularity of 1 leaves a plain token table, whatever is asked.

    "auto" keeps the digits of a token apart (`cat`) where they fill the width exactly, and else sums them, because
    `cat` would have to pad with zeros.
    """
    if granularity == 1:
        return "token"
    if embedding == "auto":
        return "cat" if width % granularity == 0 else "sum"
    return embedding


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The symbols that enter the model: token ids [B, L], or the digits [B, L, l] of sub-tokens."""

    kind: InputKind = "token"  # token: a table of ids; the others: how the digits of a token are merged (inputs.py)
    num_symbols: int  # token: rows of the table, V plus mask or BOS; digits: the base b plus the mask symbol
    granularity: int = 1  # digits per token, l

    def check(self, path: str) -> None:
        if self.num_symbols < 1:
            raise ConfigError(f"{path}.num_symbols = {self.num_symbols} leaves the input table empty; use at least 1")
        if (self.kind == "token") != (self.granularity == 1):
            raise ConfigError(
                f"{path}.granularity = {self.granularity} does not go with {path}.kind = {self.kind!r}: 'token' reads "
                "one symbol per token, the other kinds merge 2 or more"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a transformer. Nothing here depends on the vocabulary or on the training objective."""

    kind: Literal["llama", "dit"] = "llama"  # llama: RMSNorm and SwiGLU; dit: MDLM's adaLN transformer
    layers: int  # number of transformer blocks
    heads: int  # query heads
    kv_heads: int | None = None  # key and value heads, each shared by heads / kv_heads query heads; null = heads
    width: int  # size of the residual stream
    ffn: int | None = None  # hidden size of the feed-forward layer; null = 4 * width
    qk_norm: bool = False  # RMSNorm on every query and key head before the rotation
    tied: bool = False  # read the logits off the input token table (llama with token inputs only)
    dropout: float = 0.0  # results then depend on train.micro_batch and engine.tensor_parallel, which draws share
    rope_base: float = 10000.0  # wavelength base of the rotary position embedding
    norm_eps: float = 1e-5  # added to the mean square (or variance) in every norm
    init: Literal["tinyllama", "megatron", "mdlm"] = "tinyllama"  # initial weights; dit needs mdlm, llama the others
    cond_dim: int = 128  # dit: size of the conditioning vector behind adaLN

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_width(self) -> int:
        return 4 * self.width if self.ffn is None else self.ffn

    def check(self, path: str) -> None:
        for name in ("layers", "heads", "width", "num_kv_heads", "ffn_width", "cond_dim"):
            value = getattr(self, name)
            if value < 1:
                key = {"num_kv_heads": "kv_heads", "ffn_width": "ffn"}.get(name, name)
                raise ConfigError(f"{path}.{key} = {value} must be at least 1")
        if self.width % (2 * self.heads):
            near = max(1, round(self.width / (2 * self.heads))) * 2 * self.heads
            raise ConfigError(
                f"{path}.width = {self.width} is not a multiple of 2 x {path}.heads = {2 * self.heads}, and rotary "
                f"embeddings need heads of one even size; use width {near} or another number of heads"
            )
        if self.heads % self.num_kv_heads:
            divisors = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ConfigError(
                f"{path}.kv_heads = {self.kv_heads} does not divide {path}.heads = {self.heads}; use one of {divisors}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{path}.dropout = {self.dropout} is outside [0, 1); use 0 to switch it off")
        if self.norm_eps <= 0.0 or self.rope_base <= 1.0:
            raise ConfigError(
                f"{path}.norm_eps = {self.norm_eps} must be above 0 and {path}.rope_base = {self.rope_base} above 1; "
                "usual values are 1e-5 and 10000"
            )
        if (self.kind == "dit") != (self.init == "mdlm"):
            schemes = "'mdlm'" if self.kind == "dit" else "'tinyllama' or 'megatron'"
            raise ConfigError(
                f"{path}.init = {self.init!r} is not defined for {path}.kind = {self.kind!r}; use {schemes}"
            )
        if self.kind == "dit" and self.tied:
            raise ConfigError(
                f"{path}.tied = true does not go with {path}.kind = 'dit', whose head starts at zero while its token "
                "table does not; use tied: false or kind: llama"
            )


def check_input(config: ModelConfig, input_layer: InputSpec, num_classes: int) -> None:
    """Raise ConfigError where the shape of the model and the symbols it reads contradict each other."""
    config.check("model")
    input_layer.check("input")
    if input_layer.kind == "cat-share" and config.width % input_layer.granularity:
        raise ConfigError(
            f"model.width = {config.width} is not a multiple of the granularity {input_layer.granularity}, so the "
            "embedding 'cat-share' cannot fill it; use the embedding 'sum' or 'auto', or another granularity"
        )
    if input_layer.kind == "cat" and config.width < input_layer.granularity:
        raise ConfigError(
            f"model.width = {config.width} is below the granularity {input_layer.granularity}, so the embedding 'cat' "
            "has no dimension for each digit; use the embedding 'sum' or a larger width"
        )
    if config.tied and input_layer.kind != "token":
        raise ConfigError(
            f"model.tied = true needs a token table to share, and the inputs are sub-tokens (granularity "
            f"{input_layer.granularity}); set model.tied to false"
        )
    if config.tied and input_layer.num_symbols < num_classes:
        raise ConfigError(
            f"model.tied = true needs a row of the token table for each of the {num_classes} classes, and it has "
            f"{input_layer.num_symbols}; set model.tied to false"
        )


def check_tensor_parallel(config: ModelConfig, ranks: int) -> None:
    """Raise ConfigError unless every block can be split evenly over a tensor group of `ranks`."""
    if ranks <= 1:  # `EngineConfig` refuses what is below
        return
    if config.kind == "dit":
        raise ConfigError(
            f"engine.tensor_parallel = {ranks} does not go with model.kind = 'dit', whose layers have no plan for it; "
            "use engine.tensor_parallel=1, or kind: llama"
        )
    numbers = {"heads": config.heads, "kv_heads": config.num_kv_heads, "ffn": config.ffn_width}
    for key, value in numbers.items():
        if value % ranks:
            common = math.gcd(*numbers.values())
            divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ConfigError(
                f"engine.tensor_parallel = {ranks} does not divide model.{key} = {value}; use one of {divisors}, which "
                "divide heads, kv_heads and ffn"
            )

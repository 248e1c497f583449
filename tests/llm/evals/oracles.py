"""Models whose every probability is known, and minuscule real ones, as things to score."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from launch.random import generator
from llm import backbones
from llm.backbones import InputSpec, ModelConfig
from llm.data.tokenizers import TextTokenizer, train_bpe
from llm.diffusion.codec import Codec, build_codec
from llm.evals.models import Family, HuggingFaceTokenizer, Scorable, wrap_huggingface
from llm.generate import Language
from tests.llm.diffusion import enumeration as exact

TEXT = "the cat sat on the mat and the dog lay on the log while it rained all day long in the town"


def tokenizer(vocab_size: int = 270) -> TextTokenizer:
    return train_bpe([TEXT], vocab_size)


class Known(nn.Module):
    """A backbone that looks its logits up: predict(digits [B, L, l]) -> [B, L, V]. Counts rows and forwards."""

    def __init__(self, predict: exact.Predict, vocab_size: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.predict, self.vocab_size = predict, vocab_size
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor, readout: Callable[..., Any], *, attention_mask: Tensor | None = None) -> Any:
        digits = inputs if inputs.dim() == 3 else inputs.unsqueeze(-1)
        self.seen.append(digits)
        return exact.as_backbone(self.predict, self.vocab_size)(digits, readout)


def known(
    predict: exact.Predict,
    codec: Codec,
    *,
    family: Family = "mdm",
    max_length: int = 64,
    tokens: Any = None,
    order: Any = "uniform",
) -> Scorable:
    """An oracle as a scorable; `tokens` is its tokenizer, `order` that in which digits are revealed."""
    found = tokens or tokenizer()
    return Scorable(
        family=family,
        model=Known(predict, codec.vocab_size),
        language=Language(family=family, codec=codec, first_token=found.eos_id, order=order),  # type: ignore[arg-type]
        tokenizer=found,
        max_length=max_length,
        fingerprint="known",
    )


def tiny(family: Family, *, max_length: int = 32, seed: int = 0, order: Any = "uniform", **changes: Any) -> Scorable:
    """A real backbone with large random weights, so that contexts matter; `changes` are of its `ModelConfig`."""
    tokens = tokenizer()
    codec = build_codec(tokens.vocab_size, 3 if family == "prime" else 1, shuffle_seed=1 if family == "prime" else None)
    shape = ModelConfig(**({"layers": 2, "heads": 2, "width": 24, "ffn": 32, "qk_norm": True} | changes))
    spec = InputSpec(
        kind=backbones.resolve_input_kind("auto", granularity=codec.granularity, width=24),
        num_symbols=codec.vocab_size if family == "ar" else codec.base + 1,
        granularity=codec.granularity,
    )
    model = backbones.build(shape, input_layer=spec, num_classes=codec.vocab_size, causal=family == "ar")
    draw = generator(seed)
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, draw)
        if "norm" not in name:
            parameter.data.normal_(0.0, 0.4, generator=draw)
    return Scorable(
        family=family,
        model=model.eval().requires_grad_(False),
        language=Language(family=family, codec=codec, first_token=tokens.eos_id, order=order),  # type: ignore[arg-type]
        tokenizer=tokens,
        max_length=max_length,
        fingerprint=f"tiny {family} {seed}",
    )


def tiny_huggingface(kind: str, *, seed: int = 0) -> Scorable:
    """A random Llama or Mixtral of transformers, 270 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    shape: dict[str, Any] = dict(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**shape))
        else:
            model = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    backend = tokenizer().backend
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return wrap_huggingface(model, HuggingFaceTokenizer(fast))

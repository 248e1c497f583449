"""Checkpoints whose layers have the true shapes of published models, but few layers, a small vocabulary and random
weights: what shows time and memory of work that goes layer by layer.

    python -m tests.shape_true mixtral-8x7b --layers 1 --to /tmp/mixtral        # 3.0 GB, in the memory of one expert

Every matrix is a stretch of one bank of random numbers, begun at a place of its own. The bank's length is prime: no two
rows of a matrix are equal.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.checkpoint import write_safetensors
from launch.random import stream_key
from llm.moe.architectures import moe_shape

VOCAB_SIZE = 256  # bytes
_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": None, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
    },
}
_BANK = 4_194_301  # numbers; prime
_SPREAD = 0.02  # standard deviation, as the published models are initialised


def write_shape(to: Path, name: str, *, layers: int, seed: int = 0, **changes: Any) -> Path:
    """A new folder with a model of SHAPES[name], and a byte tokenizer. changes: of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**_COMMON, **SHAPES[name], "num_hidden_layers": layers, **changes}
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    to.mkdir(parents=True)
    shape = moe_shape(config, to)
    expert_bytes = 2 * shape.expert_parameters
    others = {n: tuple(t.shape) for n, t in model.state_dict().items() if ".mlp.experts." not in n}

    def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        for entry, size in others.items():
            yield entry.replace(".mlp.", f".{shape.architecture.block}."), size
        for layer in shape.moe_layers:
            for expert in range(shape.num_experts):
                for matrix in ("gate", "up", "down"):
                    wide = (shape.inner_width, shape.width)
                    yield shape.architecture.expert(layer, expert, matrix), wide[::-1] if matrix == "down" else wide

    bank = torch.randn(_BANK, generator=torch.Generator().manual_seed(seed)).mul_(_SPREAD).bfloat16()
    tensors = ((entry, _matrix(entry, size, bank, seed)) for entry, size in shapes())
    write_safetensors(tensors, to, max_file_bytes=max(expert_bytes, 10**8))
    (to / "config.json").write_text(json.dumps({**config.to_dict(), **fields}, indent=1, default=str) + "\n")
    byte_tokenizer().save_pretrained(to)
    return to


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def blocks(count: int, length: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Random token ids int64 [count, length]."""
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def _matrix(entry: str, size: tuple[int, ...], bank: Tensor, seed: int) -> Tensor:
    if len(size) == 1:  # of a norm
        return torch.ones(size, dtype=bank.dtype)
    count = math.prod(size)
    start = stream_key(seed, entry) % len(bank)
    return bank.repeat(-(-(start + count) // len(bank)))[start : start + count].clone().view(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to create")
    options = parser.parse_args()
    print(write_shape(options.to, options.shape, layers=options.layers))


if __name__ == "__main__":
    main()

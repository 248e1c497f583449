"""A trained model ready for use, from a run folder or from an exported folder; and the export itself.

An exported folder is what the Hugging Face tools expect: safetensors, config.json, tokenizer.json. An autoregressive
Llama-style model is written as the stock architecture that it is (Llama, or Qwen3 where queries and keys are normed),
so `AutoModelForCausalLM.from_pretrained` opens it. Masked and partial-masking models have no stock architecture; their
config.json names `unmask` as the type. Either way `unmask_config` holds the experiment, so that we can read it back.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from launch import config as configs
from launch.checkpoint import layout, publish, read_safetensors, stream, write_safetensors
from launch.errors import CheckpointError, ConfigError
from llm import backbones
from llm.backbones import ModelConfig
from llm.config import LanguageConfig
from llm.data import tokenizers
from llm.data.codes import keep_code
from llm.data.tokenizers import TextTokenizer
from llm.diffusion.codec import Codec
from llm.generate import Language

logger = logging.getLogger(__name__)

_STOCK_NAMES = (  # our names -> those of transformers' Llama and Qwen3
    ("input.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight"),
    ("norm.weight", "model.norm.weight"),
    ("blocks.", "model.layers."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attention.q_norm.", ".self_attn.q_norm."),
    (".attention.k_norm.", ".self_attn.k_norm."),
    (".attention.q.", ".self_attn.q_proj."),
    (".attention.k.", ".self_attn.k_proj."),
    (".attention.v.", ".self_attn.v_proj."),
    (".attention.out.", ".self_attn.o_proj."),
    (".mlp.gate.", ".mlp.gate_proj."),
    (".mlp.up.", ".mlp.up_proj."),
    (".mlp.down.", ".mlp.down_proj."),
)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model in evaluation mode and what one needs to talk to it."""

    config: LanguageConfig
    model: nn.Module
    language: Language
    tokenizer: TextTokenizer
    step: int  # of the checkpoint; 0 for an exported folder
    weights: str  # "ema" or "model"


def load_pretrained(path: Path, device: torch.device, *, weights: str = "auto", step: int | None = None) -> Pretrained:
    """The model of a run folder or of an exported folder.

    weights: "ema" or "model"; "auto" takes the average where one is kept. step: None takes the newest whole checkpoint.
    """
    exported = (path / "config.json").exists()
    config = read_config(path)
    tokenizer = tokenizers.load(path if exported else Path(config.data.sources[0].path))
    codec = config.diffusion.codec(tokenizer.vocab_size)
    prefix = ""
    if exported:
        tensors, step = _exported_weights(path), 0
        check_codec(json.loads((path / "config.json").read_text())["codec"], codec.describe(), path)
    else:
        step = newest_step(path) if step is None else step
        checkpoint = path / "checkpoints" / layout.step_name(step)
        check_codec(layout.read_scalars(checkpoint)["identity"]["codec"], codec.describe(), checkpoint)
        prefix = weights
        if weights == "auto":
            prefix = "ema" if config.engine.ema_decay is not None else "model"
        tensors = stream(checkpoint, f"{prefix}.")
    model = build_model(config, tokenizer.vocab_size, device)
    fill(dict(model.named_parameters()), tensors, where=path)
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    language = Language(
        family=config.diffusion.family, codec=codec.to(device), first_token=first, order=config.diffusion.order
    )
    return Pretrained(
        config=config,
        model=model.eval().requires_grad_(False),
        language=language,
        tokenizer=tokenizer,
        step=step,
        weights=prefix or "exported",
    )


def read_config(path: Path) -> LanguageConfig:
    """The experiment of a run folder or of an exported folder."""
    if (path / "config.json").exists():
        saved = json.loads((path / "config.json").read_text())
        if "unmask_config" not in saved:
            raise ConfigError(
                f"{path}/config.json has no unmask_config; only folders written by `unmask export` are read"
            )
        config = configs.from_dict(LanguageConfig, saved["unmask_config"], source=str(path / "config.json"))
        return config.with_code_of(path)
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} is neither a run folder (config.yaml) nor an exported folder (config.json)")
    tree = yaml.safe_load((path / "config.yaml").read_text())
    return configs.from_dict(LanguageConfig, tree, source=str(path / "config.yaml")).with_code_of(path)


def newest_step(run: Path) -> int:
    """The newest step of a run whose checkpoint is whole; damaged ones are passed over with a warning."""
    folder = run / "checkpoints"
    for step in reversed(layout.committed_steps(folder) if folder.exists() else []):
        checkpoint = folder / layout.step_name(step)
        try:
            layout.check_files(checkpoint, layout.read_manifest(checkpoint), "hash")
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        return step
    raise CheckpointError(f"{folder} holds no whole checkpoint; train first: unmask resume {run}")


def build_model(config: LanguageConfig, vocab_size: int, device: torch.device) -> nn.Module:
    """The backbone of an experiment, uninitialised, on `device`."""
    codec = config.diffusion.codec(vocab_size)
    with torch.device(device):
        return backbones.build(
            config.model,
            input_layer=config.diffusion.input_spec(config.model, codec),
            num_classes=vocab_size,
            causal=config.diffusion.family == "ar",
        )


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], *, where: Path) -> None:
    """Copy `tensors` into the parameters of their names; `CheckpointError` unless they match one to one."""
    missing = set(parameters)
    for name, tensor in tensors:
        if name not in parameters or parameters[name].shape != tensor.shape:
            mine = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise CheckpointError(f"{where}: {name} is {tuple(tensor.shape)}, the model has {mine}; use its own config")
        parameters[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(sorted(missing)[:3])} and {len(missing)} in all; export it again"
        )


def check_codec(saved: Mapping[str, Any], mine: Mapping[str, Any], where: Path) -> None:
    """A checkpoint of another permutation has other digits for every token: refuse it."""
    if saved["sha256"] != mine["sha256"]:
        differing = ", ".join(f"{k} {saved.get(k)} (here {mine.get(k)})" for k in mine if saved.get(k) != mine.get(k))
        raise CheckpointError(f"{where} was made with another codec: {differing}; use the config.yaml of that run")


def initial_weights(
    path: Path, model: ModelConfig, codec: Codec, tokenizer: TextTokenizer
) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, full float32 tensor) of an exported folder, for a new run to start from.

    Refuses weights that would fit by their shapes and yet mean something else: other tokens, digits or attention.
    """
    if not (path / "config.json").exists():
        raise ConfigError(
            f"initial_weights = {path} is not an exported folder (it has no config.json); write one with: unmask "
            f"export RUN --to {path}"
        )
    saved = configs.to_dict(read_config(path).model)
    changed = configs.difference(saved, configs.to_dict(model))
    for key, (old, new) in changed.items():
        if key not in ("dropout", "init"):
            raise ConfigError(f"initial_weights = {path} have model.{key} = {old!r}, this run {new!r}; make them equal")
    if tokenizers.load(path).sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"initial_weights = {path} were trained with another tokenizer than the data; prepare the data with "
            f"--tokenizer {path}"
        )
    check_codec(json.loads((path / "config.json").read_text())["codec"], codec.describe(), path)
    return _exported_weights(path)


# --- export ----------------------------------------------------------------------------------------------------------


def export(
    run: Path, to: Path, *, weights: str = "auto", dtype: torch.dtype | None = None, step: int | None = None
) -> str:
    """Write the exported folder `to`, read it back, and return one line on how far its outputs are from the run's."""
    ours = load_pretrained(run, torch.device("cpu"), weights=weights, step=step)
    checkpoint = run / "checkpoints" / layout.step_name(ours.step)
    stock = stock_config(ours)
    description = {
        **(stock.to_dict() if stock is not None else {"model_type": "unmask", "vocab_size": ours.tokenizer.vocab_size}),
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "codec": ours.language.codec.describe(),
        "unmask_config": configs.to_dict(ours.config),
        "unmask_step": ours.step,
    }
    with publish(to) as folder:
        rename = _stock_name if stock is not None else (lambda name: name)
        write_safetensors(stream(checkpoint, f"{ours.weights}."), folder, rename=rename, dtype=dtype)
        (folder / "config.json").write_text(json.dumps(description, indent=1))
        if ours.config.diffusion.code is not None:
            keep_code(Path(ours.config.diffusion.code), folder)
        ours.tokenizer.save(folder)
    return _compare(ours, to, is_stock=stock is not None)


def stock_config(ours: Pretrained) -> Any | None:
    """The transformers configuration of the same network, or None if transformers has no such architecture."""
    model = ours.config.model
    if ours.config.diffusion.family != "ar" or model.kind != "llama":
        return None
    import transformers

    kind = transformers.Qwen3Config if model.qk_norm else transformers.LlamaConfig
    return kind(
        vocab_size=ours.tokenizer.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=ours.config.data.block_length + 1,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        tie_word_embeddings=model.tied,
        bos_token_id=ours.language.first_token,
        eos_token_id=ours.tokenizer.eos_id,
        architectures=["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
    )


def _compare(ours: Pretrained, to: Path, *, is_stock: bool) -> str:
    """The largest difference of the logits between the run and its export, on one fixed input."""
    again = load_pretrained(to, torch.device("cpu"))
    length = min(16, ours.config.data.block_length)
    tokens = torch.arange(length).unsqueeze(0) * 7 % ours.tokenizer.vocab_size  # [1, L]
    inputs = tokens if ours.language.family == "ar" else ours.language.inputs(ours.language.codec.encode(tokens))

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(hidden, weight, bias)

    expected = ours.model(inputs, logits)
    found = {"read back by unmask": again.model(inputs, logits)}
    if is_stock:
        from transformers import AutoModelForCausalLM

        stock = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
        found["opened by transformers"] = stock(tokens).logits
    differences = [f"{name}: logits differ by at most {(x - expected).abs().max():.2g}" for name, x in found.items()]
    return f"{to}: step {ours.step}, {ours.weights} weights; " + "; ".join(differences)


def _exported_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    is_stock = json.loads((path / "config.json").read_text())["model_type"] != "unmask"
    for name, tensor in read_safetensors(path):
        yield (_our_name(name) if is_stock else name), tensor.float()


def _stock_name(name: str) -> str:
    for mine, theirs in _STOCK_NAMES:
        if name.startswith(mine) if not mine.startswith(".") else mine in name:
            name = name.replace(mine, theirs, 1)
    return name


def _our_name(name: str) -> str:
    for mine, theirs in _STOCK_NAMES:
        if theirs in name:
            name = name.replace(theirs, mine, 1)
    return name

"""Anything that can be scored: our checkpoints, exported folders, and causal models of Hugging Face, MoE included.

All of them become one `Scorable`: the network, a tokenizer with one face, the longest input, and a fingerprint
that no other weights share, so that a cache of scores can never serve another model.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from launch import config as configs
from launch.errors import ConfigError
from llm.data.fetch import model_folder
from llm.data.packages import MODELS
from llm.data.tokenizers import TextTokenizer
from llm.generate import Language
from llm.pretrained import load_pretrained

Family = Literal["ar", "mdm", "prime", "huggingface"]


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """A transformers tokenizer with the face of a `TextTokenizer`."""

    backend: Any

    @property
    def bos_id(self) -> int | None:
        return self.backend.bos_token_id

    @property
    def eos_id(self) -> int:
        return self.backend.eos_token_id

    @cached_property
    def vocab_size(self) -> int:
        return len(self.backend)

    @cached_property
    def sha256(self) -> str:
        fast = getattr(self.backend, "backend_tokenizer", None)
        text = json.dumps(self.backend.get_vocab(), sort_keys=True) if fast is None else fast.to_str(pretty=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own settings put BOS before a text."""
        return self.bos_id is not None and self.backend.encode("a")[:1] == [self.bos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


ScoringTokenizer = TextTokenizer | HuggingFaceTokenizer
"""bos_id, eos_id, vocab_size, sha256, encode_batch (ids without BOS and EOS) and decode."""


@dataclass(frozen=True, kw_only=True)
class Scorable:
    """A model in evaluation mode and everything that its scores depend on."""

    family: Family
    model: nn.Module
    language: Language | None  # of our own families; None for Hugging Face
    tokenizer: ScoringTokenizer
    max_length: int  # tokens of the longest input
    fingerprint: str  # sha256 over weights, architecture, digits and tokenizer
    add_bos: bool = True  # whether texts began with `first_token` in training; `ScoringConfig.add_bos` may overrule it

    @property
    def first_token(self) -> int:
        """What stands before a text: BOS, or EOS where the tokenizer marks ends alone."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def is_causal(self) -> bool:
        """Whether a token is predicted from the tokens before it, and scores are exact."""
        return self.family in ("ar", "huggingface")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def open_scorable(
    path_or_name: str | Path,
    device: torch.device,
    *,
    weights: str = "auto",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scorable:
    """The model of a run folder, of an exported folder, or of a Hugging Face folder or name (causal, MoE included).

    A name of `unmask data fetch` that is no folder here is the model that it brought; DataError if it did not.
    weights and step choose within a run, as in `load_pretrained`. dtype: of the weights; probabilities are float32
    whatever it is. Code that comes with a Hugging Face model is never run. ConfigError if nothing can be opened.
    """
    path = Path(path_or_name)
    if is_fetched(path_or_name):
        path = model_folder(str(path_or_name))
    if not _is_ours(path):
        return _open_huggingface(str(path if path.exists() else path_or_name), device, dtype)
    loaded = load_pretrained(path, device, weights=weights, step=step)
    model = loaded.model.to(dtype)
    language = loaded.language
    description = {
        "family": language.family,
        "model": configs.to_dict(loaded.config.model),
        "embedding": loaded.config.diffusion.embedding,
        "codec": language.codec.sha256,
        "tokenizer": loaded.tokenizer.sha256,
        "first_token": language.first_token,
    }
    return Scorable(
        family=language.family,
        model=model,
        language=language,
        tokenizer=loaded.tokenizer,
        max_length=loaded.config.data.block_length,
        fingerprint=weights_fingerprint(model, description),
    )


def is_fetched(path_or_name: str | Path) -> bool:
    """Whether it names a model that `unmask data fetch` brings; a folder of that name here comes first."""
    return str(path_or_name) in MODELS and not Path(path_or_name).exists()


def weights_fingerprint(model: nn.Module, description: dict[str, Any]) -> str:
    """sha256 of `description` and of every tensor of the model, by name, type and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """Its elements as an array of bytes, without a copy where it lies on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _is_ours(path: Path) -> bool:
    if (path / "config.yaml").exists():
        return True
    file = path / "config.json"
    return file.exists() and "unmask_config" in json.loads(file.read_text())


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _open_huggingface(name: str, device: torch.device, dtype: torch.dtype) -> Scorable:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm.moe import modeling

    modeling.register()  # models of merged experts carry the code of these classes, which is not run
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError) as error:  # what transformers raises for "not there" and "not known", in many words
        raise ConfigError(
            f"{name} is neither a run folder (config.yaml), nor an exported folder, nor a causal model that "
            f"transformers opens: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.eos_id is None:
        raise ConfigError(f"the tokenizer of {name} names no EOS token; set eos_token in its tokenizer_config.json")
    return wrap_huggingface(model.to(device), tokenizer)


def wrap_huggingface(model: Any, tokenizer: HuggingFaceTokenizer) -> Scorable:
    """A loaded transformers model and its tokenizer as a `Scorable`; the longest input as the configuration says."""
    text_config = model.config.get_text_config()
    limit = next((getattr(text_config, key, None) for key in ("max_position_embeddings", "n_positions", "n_ctx")), None)
    volatile = ("_name_or_path", "transformers_version", "dtype")
    architecture = {key: str(value) for key, value in model.config.to_dict().items() if key not in volatile}
    description = {"family": "huggingface", "architecture": architecture, "tokenizer": tokenizer.sha256}
    return Scorable(
        family="huggingface",
        model=model.eval().requires_grad_(False),
        language=None,
        tokenizer=tokenizer,
        max_length=limit or 2048,
        fingerprint=weights_fingerprint(model, description),
        add_bos=tokenizer.adds_bos,
    )

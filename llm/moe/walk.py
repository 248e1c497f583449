"""Calibration text through a model that never is in memory as a whole: a layer at a time, all of the text.

What passes from layer to layer is the text's hidden states. A block of text is the unit of all work: it goes through a
layer alone, on one rank, so that what comes out does not depend on how many ranks there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from launch.errors import DataError
from llm.moe.architectures import layer_prefix
from llm.moe.experts import Experts, LayerTokens, MergedLayer, merged_output, mixture, route
from llm.moe.source import Source

_MATMUL = {"cpu": torch.float32}  # bfloat16 is correct on most CPUs and ten times slower
OnTokens = Callable[[int, LayerTokens], None]
"""Gets a block's number and what a MoE layer sees of it."""


@dataclass(kw_only=True, eq=False)
class Walk:
    """Blocks of text on their way through the layers of a model."""

    source: Source
    device: torch.device
    hidden: dict[int, Tensor]  # by number of the block: [L, d], before the layer that comes next, on the CPU
    dtype: torch.dtype  # of all computation
    model: Any  # the base model of transformers without weights: layers lend their code, and are filled in turn

    @torch.no_grad()
    def layer(self, index: int, experts: Experts | MergedLayer | None) -> None:
        """Take all blocks through layer `index`.

        experts: those of a MoE layer, on the walk's device, or the merged layer in their place; None for a dense layer.
        """
        rule = self.source.shape.rule

        def compute(tokens: LayerTokens) -> Tensor:
            if isinstance(experts, MergedLayer):
                return merged_output(experts, tokens, rule)
            assert experts is not None
            return mixture(experts, tokens.hidden, route(tokens.logits, rule))

        decoder = self._decoder(index, compute)
        for number, hidden in self.hidden.items():
            self.hidden[number] = self._pass(decoder, index, hidden).to(hidden)

    @torch.no_grad()
    def look(self, index: int, on_tokens: OnTokens) -> None:
        """Show what the experts of MoE layer `index` get of each block; all blocks stay before the layer."""
        waiting = list(self.hidden)

        def show(tokens: LayerTokens) -> Tensor:
            on_tokens(waiting.pop(0), tokens)
            return torch.zeros_like(tokens.hidden)

        decoder = self._decoder(index, show)
        for hidden in self.hidden.values():
            self._pass(decoder, index, hidden)

    @torch.no_grad()
    def logits(self) -> dict[int, Tensor]:
        """After the last layer: float32 [L, V] by number of the block."""
        norm, table = "model.norm.weight", "model.embed_tokens.weight"
        head = self.source.tensor(table if self.source.config.tie_word_embeddings else "lm_head.weight")
        with torch.device("meta"):
            last = type(self.model.norm)(self.source.config.hidden_size, eps=self.source.config.rms_norm_eps)
        last.load_state_dict({"weight": self.source.tensor(norm).to(self.device, self.dtype)}, assign=True)
        weight = head.to(self.device, self.dtype)
        return {
            number: functional.linear(last(hidden.to(self.device, self.dtype)), weight).float()
            for number, hidden in self.hidden.items()
        }

    def _pass(self, decoder: Any, index: int, hidden: Tensor) -> Tensor:
        inputs = hidden.to(self.device, self.dtype)[None]  # [1, L, d]
        found = decoder(inputs, **self._positions(index, inputs))
        return (found if isinstance(found, Tensor) else found[0])[0]

    def _decoder(self, index: int, compute: Callable[[LayerTokens], Tensor]) -> Any:
        """Layer `index` with its weights, and with `compute` for its experts, if it has some."""
        prefix = layer_prefix(index)
        state = {
            name.removeprefix(prefix).replace(f"{self.source.shape.architecture.block}.", "mlp."): self.source.tensor(
                name
            ).to(self.device, self.dtype)
            for name in self.source.layer_entries(index)
        }
        with torch.device("meta"):
            decoder = type(self.model.layers[index])(self.source.config, index).eval()
        absent, surplus = decoder.load_state_dict(state, strict=False, assign=True)
        absent = [name for name in absent if not name.startswith("mlp.experts.")]
        if absent or surplus:
            problem = f"lacks {absent[0]}" if absent else f"has an entry {surplus[0]} that its class does not know"
            raise DataError(f"layer {index} of {self.source.folder} {problem}; is config.json that of these weights?")
        if index in self.source.shape.moe_layers:
            decoder.mlp.experts = block = _Experts(compute)
            decoder.mlp.gate.register_forward_hook(lambda _module, _inputs, found: block.take_logits(found[0]))
        return decoder

    def _positions(self, index: int, inputs: Tensor) -> dict[str, Any]:
        """The rotary embedding and the causal mask, as the model itself would pass them on."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        config = self.source.config
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        layer_types = getattr(config, "layer_types", None)
        is_sliding = layer_types[index] == "sliding_attention" if layer_types else bool(config.sliding_window)
        make_mask = create_sliding_window_causal_mask if is_sliding else create_causal_mask
        mask = make_mask(
            config=config, inputs_embeds=inputs, attention_mask=None, past_key_values=None, position_ids=positions
        )
        rotary = self.model.rotary_emb(inputs, position_ids=positions)
        return {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}


class _Experts(nn.Module):
    """In place of a layer's fused experts: hands their input and the router's logits on."""

    def __init__(self, compute: Callable[[LayerTokens], Tensor]) -> None:
        super().__init__()
        self._compute = compute
        self._logits: Tensor | None = None

    def take_logits(self, logits: Tensor) -> None:
        self._logits = logits

    def forward(self, hidden: Tensor, _selected: Tensor, _gates: Tensor) -> Tensor:
        assert self._logits is not None
        return self._compute(LayerTokens(hidden=hidden, logits=self._logits))


def start_walk(source: Source, blocks: dict[int, Tensor], device: torch.device) -> Walk:
    """The embeddings of `blocks`: token ids int64 [L] by number."""
    from transformers import AutoModel

    dtype = _MATMUL.get(device.type, torch.bfloat16)
    source.config._attn_implementation = "sdpa"  # eager attention without a mask would look ahead
    with torch.device("meta"):
        model: Any = AutoModel.from_config(source.config)
    model.rotary_emb = type(model.rotary_emb)(config=source.config).to(device)
    table = "model.embed_tokens.weight"
    hidden = {number: source.rows(table, ids).to(dtype) for number, ids in blocks.items()}
    return Walk(source=source, device=device, hidden=hidden, dtype=dtype, model=model)

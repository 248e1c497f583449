"""The first layer: token ids, or the digits of sub-tokens, to vectors. [B, L] or [B, L, l] -> [B, L, D].

Sub-tokens are merged before the first block, so the transformer always works on L positions, whatever the granularity
(MDM-Prime, arXiv 2505.18495). There is no projection and no activation: each layer is table look-ups only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.backbones.config import InputSpec


def table_shape(spec: InputSpec, width: int) -> tuple[int, int]:
    """Rows and columns of the one table that an input layer holds."""
    match spec.kind:
        case "token":
            return spec.num_symbols, width
        case "cat-share":
            return spec.num_symbols, width // spec.granularity
        case "cat":
            return spec.granularity * spec.num_symbols, width // spec.granularity
        case "sum":
            return spec.granularity * spec.num_symbols, width
        case "sum+token":
            return spec.granularity * spec.num_symbols + (spec.num_symbols - 1) ** spec.granularity, width


class InputLayer(nn.Module):
    """`token`: row of each id. `cat-share`: one table for the digits at all places, their rows concatenated in order.

    `cat`: a table for each place (digit j reads rows j * num_symbols onward), concatenated and, where l does not divide
    the width, filled up with zeros. `sum`: a table of full width for each place, the rows added. `sum+token`: behind
    these, a row for each code, added where all digits of a token are visible, so that a revealed token has a vector of
    its own as in plain masked diffusion; the mask symbol is the last one, b = num_symbols - 1.
    """

    def __init__(self, spec: InputSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.weight = nn.Parameter(torch.empty(table_shape(spec, width)))

    def forward(self, symbols: Tensor) -> Tensor:
        """int64 [B, L] (token) or [B, L, l] (digits) -> [B, L, D]."""
        spec = self.spec
        if spec.kind == "token":
            return F.embedding(symbols, self.weight)
        if spec.kind == "cat-share":
            return F.embedding(symbols, self.weight).flatten(-2)
        place = torch.arange(spec.granularity, device=symbols.device) * spec.num_symbols  # [l]
        rows = symbols + place
        if spec.kind == "cat":
            merged = F.embedding(rows, self.weight).flatten(-2)
            return F.pad(merged, (0, self.width - merged.shape[-1]))
        # A bag adds the rows as it reads them; look-up and sum would hold [B, L, l, D] first.
        merged = F.embedding_bag(rows.flatten(0, -2), self.weight, mode="sum").unflatten(0, symbols.shape[:-1])
        return merged + self._visible_tokens(symbols) if spec.kind == "sum+token" else merged

    def _visible_tokens(self, symbols: Tensor) -> Tensor:
        """[B, L, D]: the own row of every token all of whose digits [B, L, l] are visible; 0 for the others."""
        base, granularity = self.spec.num_symbols - 1, self.spec.granularity
        place_value = base ** torch.arange(granularity - 1, -1, -1, device=symbols.device)
        is_visible = (symbols < base).all(-1)
        code = torch.where(is_visible, (symbols * place_value).sum(-1), 0)
        return F.embedding(granularity * self.spec.num_symbols + code, self.weight) * is_visible.unsqueeze(-1)

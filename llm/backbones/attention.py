"""Self-attention with rotary positions, grouped queries and optional QK-norm, shared by the two backbones.

Shapes: B batch, L positions, D width, H query heads, G key and value heads, E = D / H size of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.backbones.config import ModelConfig


class Rotary:
    """Cosines and sines [L, 1, E / 2], float32.

    Neither a tuple of tensors nor a dataclass, on purpose: FSDP2 casts every floating tensor that it finds in either
    among a block's inputs to bfloat16, which would round the angles. It does not look inside other objects.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> Rotary:
    """Angles position * base^(-2k / head_dim), k < head_dim / 2, position = token index (RoFormer, 2104.09864)."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, base**-exponent).unsqueeze(1)
    return Rotary(angle.cos(), angle.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs (k, k + E/2) of each head of x [B, L, H, E], in float32; the half-split layout of Llama."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = rotary.cos, rotary.sin
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)


def sdpa_mask(attention_mask: Tensor | None, *, causal: bool) -> Tensor | None:
    """Which keys each query sees, bool [B, 1, 1 or L, L], from the real tokens bool [B, L]; None where all are real."""
    if attention_mask is None:
        return None
    keys = attention_mask[:, None, None, :]
    if not causal:
        return keys
    length = attention_mask.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device)
    # Everyone sees itself: a padded query in front of the first real token would else see nothing, and softmax of
    # nothing is NaN.
    return (keys & ones.tril()) | torch.eye(length, dtype=torch.bool, device=attention_mask.device)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; torch accumulates in float32 whatever the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        # One dtype for both: under autocast q and k are bfloat16 and the weight is not, which leaves the fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention without biases. q, k and v are three layers so that each can be split by heads."""

    def __init__(self, config: ModelConfig, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.causal = causal
        self.dropout = dropout
        kv_width = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """[B, L, D] -> [B, L, D]; mask as `sdpa_mask` makes it."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))  # [B, L, H|G, E]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and mask is not None:
            # CUDA has no fused kernel for grouped heads under a mask; the fallback would hold [B, H, L, L] scores.
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))

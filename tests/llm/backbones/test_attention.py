"""Rotary positions, grouped heads and the norm, each against its definition."""

import math

import pytest
import torch

from llm.backbones.attention import Attention, RMSNorm, rotary_table, rotate, sdpa_mask
from llm.backbones.config import ModelConfig


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_products_of_rotated_vectors_depend_on_the_distance_of_their_positions_only():
    table = rotary_table(64, 16, 10000.0, torch.device("cpu"))
    q, k = (rotate(random(1, 1, 1, 16, seed=s).expand(1, 64, 1, 16), table)[0, :, 0] for s in (0, 1))
    scores = q @ k.T
    for distance in (-9, 0, 1, 30):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_rotation_turns_each_pair_by_position_times_frequency():
    table = rotary_table(6, 8, 100.0, torch.device("cpu"))
    x = random(1, 6, 1, 8)
    rotated = rotate(x, table)
    for position in range(6):
        for k in range(4):
            angle = position * 100.0 ** (-2 * k / 8)
            a, b = x[0, position, 0, k].item(), x[0, position, 0, k + 4].item()
            assert rotated[0, position, 0, k].item() == pytest.approx(
                a * math.cos(angle) - b * math.sin(angle), abs=1e-5
            )
            assert rotated[0, position, 0, k + 4].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5
            )


def test_bfloat16_vectors_are_rotated_in_float32():
    table = rotary_table(6, 8, 100.0, torch.device("cpu"))
    x = random(1, 6, 1, 8).bfloat16()
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_grouped_query_attention_equals_repeated_heads():
    grouped = Attention(ModelConfig(layers=1, heads=6, kv_heads=2, width=48), causal=False, dropout=0.0)
    full = Attention(ModelConfig(layers=1, heads=6, width=48), causal=False, dropout=0.0)
    with torch.no_grad():
        for name, parameter in grouped.named_parameters():
            parameter.copy_(random(*parameter.shape, seed=len(name)) / 7)
        full.q.weight.copy_(grouped.q.weight)
        full.out.weight.copy_(grouped.out.weight)
        for ours, theirs in ((full.k, grouped.k), (full.v, grouped.v)):
            ours.weight.copy_(theirs.weight.view(2, 8, 48).repeat_interleave(3, dim=0).flatten(0, 1))
    x, table = random(2, 5, 48), rotary_table(5, 8, 10000.0, torch.device("cpu"))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None]
    for keys in (None, mask):
        torch.testing.assert_close(grouped(x, table, keys), full(x, table, keys))


def test_attention_equals_softmax_of_scaled_products():
    config = ModelConfig(layers=1, heads=2, width=16, qk_norm=True)
    attention = Attention(config, causal=True, dropout=0.0)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(1 + random(*parameter.shape, seed=len(name)) / 3)
    x, table = random(1, 5, 16), rotary_table(5, 8, 10000.0, torch.device("cpu"))
    assert attention.q_norm is not None and attention.k_norm is not None
    heads = []
    for h in range(2):
        rows = slice(8 * h, 8 * h + 8)
        q, k, v = (x[0] @ layer.weight[rows].T for layer in (attention.q, attention.k, attention.v))
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            for t, norm in ((q, attention.q_norm), (k, attention.k_norm))
        )
        q, k = (rotate(t[None, :, None], table)[0, :, 0] for t in (q, k))
        scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    expected = torch.cat(heads, dim=-1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, table, None)[0], expected, rtol=1e-4, atol=1e-4)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    norm = RMSNorm(64, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(random(64).bfloat16())
    x = (100 * random(4, 64, seed=1)).bfloat16()
    exact = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), exact, rtol=2**-7, atol=0)


def test_a_causal_mask_with_padding_hides_both_the_future_and_the_padding():
    mask = sdpa_mask(torch.tensor([[False, True, True]]), causal=True)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]

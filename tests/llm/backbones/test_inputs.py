"""The input layers against a loop over tokens and digits."""

import pytest
import torch

from llm.backbones.config import InputSpec, resolve_input_kind
from llm.backbones.inputs import InputLayer


def naive(layer: InputLayer, digits: list[int]) -> torch.Tensor:
    """Vector of one token, digit by digit."""
    spec, table = layer.spec, layer.weight
    if spec.kind == "cat-share":
        return torch.cat([table[d] for d in digits])
    own, table = table[spec.granularity * spec.num_symbols :], table[: spec.granularity * spec.num_symbols]
    tables = table.view(spec.granularity, spec.num_symbols, -1)
    rows = [tables[place, d] for place, d in enumerate(digits)]
    if spec.kind == "sum":
        return torch.stack(rows).sum(0)
    if spec.kind == "sum+token":
        mask_symbol = spec.num_symbols - 1
        code = sum(d * mask_symbol ** (spec.granularity - 1 - place) for place, d in enumerate(digits))
        return torch.stack(rows if mask_symbol in digits else [*rows, own[code]]).sum(0)
    vector = torch.cat(rows)
    return torch.cat([vector, torch.zeros(layer.width - len(vector))])


@pytest.mark.parametrize(
    ("kind", "width", "granularity"),
    [("cat-share", 12, 4), ("cat", 12, 4), ("cat", 14, 4), ("sum", 12, 4), ("sum", 14, 4), ("sum+token", 14, 4)],
)
def test_merged_digits_equal_a_loop_over_places(kind, width, granularity):
    layer = InputLayer(InputSpec(kind=kind, num_symbols=3, granularity=granularity), width)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(generator=draw)
    digits = torch.randint(0, 3, (2, 5, granularity), generator=draw)
    expected = torch.stack([torch.stack([naive(layer, token.tolist()) for token in row]) for row in digits])
    merged = layer(digits)
    torch.testing.assert_close(merged, expected)
    upstream = torch.randn(merged.shape, generator=draw)
    gradient, expected_gradient = (
        torch.autograd.grad((vectors * upstream).sum(), layer.weight)[0] for vectors in (merged, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("kind", "shape"), [("cat-share", (3, 48)), ("cat", (48, 48)), ("sum", (48, 768)), ("sum+token", (48 + 2**16, 768))]
)
def test_tables_have_the_published_shapes(kind, shape):
    assert tuple(InputLayer(InputSpec(kind=kind, num_symbols=3, granularity=16), 768).weight.shape) == shape


def test_token_ids_select_rows():
    layer = InputLayer(InputSpec(num_symbols=7), 4)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(torch.tensor([[6, 0]])), layer.weight[[6, 0]][None])


@pytest.mark.parametrize(
    ("embedding", "granularity", "kind"),
    [("auto", 16, "cat"), ("auto", 15, "sum"), ("cat-share", 16, "cat-share"), ("sum", 16, "sum"), ("sum", 1, "token")],
)
def test_auto_concatenates_where_the_digits_fill_the_width_and_else_sums(embedding, granularity, kind):
    assert resolve_input_kind(embedding, granularity=granularity, width=768) == kind

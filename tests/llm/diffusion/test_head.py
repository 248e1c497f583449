"""The chunked readout against the plain head."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llm.diffusion.head import chunked_readout

P, D, V = 13, 8, 29


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (leaves), targets, row weights [P, 2]."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((P, D), (V, D), (V,))]
    targets = torch.randint(V, (P,), generator=generator)
    return leaves[0], leaves[1], leaves[2], targets, torch.rand(P, 2, generator=generator)


def two_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[p, 2]: the cross-entropy and a smooth function of all logits."""
    return torch.stack([cross_entropy(logits, targets, reduction="none"), (0.1 * logits).tanh().sum(-1)], dim=-1)


def run(chunk_rows: int | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, weight, bias, targets, row_weights = case(dtype)
    loss, values = chunked_readout(
        hidden, weight, bias, lambda z, rows: two_losses(z, targets[rows]), row_weights, chunk_rows=chunk_rows
    )
    (loss / 3).backward()
    return loss.detach(), values, [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]


def run_plain(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    hidden, weight, bias, targets, row_weights = case(dtype)
    values = two_losses(hidden.float() @ weight.float().T + bias, targets)
    loss = (row_weights * values).sum()
    (loss / 3).backward()
    return loss.detach(), values.detach(), [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]


@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 100, None])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_plain_head(chunk_rows: int | None):
    for got, expected in zip(run(chunk_rows), run_plain(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_operands_give_float32_losses_and_gradients_in_their_own_type():
    loss, values, gradients = run(4, torch.bfloat16)
    plain_loss, plain_values, plain_gradients = run_plain(torch.bfloat16)
    assert loss.dtype == values.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, plain_values, atol=1e-5, rtol=1e-5)
    for got, expected in zip(gradients, plain_gradients, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected.float(), atol=1e-2, rtol=1e-2)


def test_many_small_chunks_do_not_lose_the_gradient_of_a_bfloat16_weight():
    # 4096 equal contributions of 1 / 4096: a sum in bfloat16 would stop growing at 256 of them
    hidden, weight = torch.ones(4096, 1, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    chunked_readout(hidden, weight, None, lambda z, rows: z, torch.full((4096, 1), 1 / 4096), chunk_rows=1)[
        0
    ].backward()
    assert weight.grad is not None and float(weight.grad) == 1.0


def test_an_autocast_region_does_not_change_the_types():
    hidden, weight, _, targets, _ = case()

    def read() -> Tensor:
        return chunked_readout(hidden, weight, None, lambda z, r: two_losses(z, targets[r])[:, :1], torch.ones(P, 1))[0]

    outside = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read(), outside)


def test_a_float32_weight_meets_bfloat16_hidden_states_and_keeps_its_type():
    hidden, weight, _, targets, _ = case()
    loss, _ = chunked_readout(
        hidden.bfloat16(), weight, None, lambda z, r: two_losses(z, targets[r])[:, :1], torch.ones(P, 1)
    )
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_evaluation_takes_no_gradient_and_gives_the_same_values():
    hidden, weight, bias, targets, row_weights = case()
    differentiated = []

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        differentiated.append(logits.requires_grad)
        return two_losses(logits, targets[rows])

    with torch.no_grad():
        loss, values = chunked_readout(hidden, weight, bias, row_loss, row_weights, chunk_rows=4)
    assert not any(differentiated) and not loss.requires_grad and hidden.grad is None
    torch.testing.assert_close(values, run(4)[1])


def test_no_positions_at_all_still_give_gradients_of_zero():
    hidden, weight, bias, _, _ = case()
    loss, values = chunked_readout(hidden[:0], weight, bias, lambda z, rows: z[:, :1], torch.ones(0, 1))
    loss.backward()
    assert float(loss.detach()) == 0.0 and values.shape == (0, 1)
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None and not leaf.grad.any()


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_still_do():
    hidden, weight, _, targets, _ = case()
    expected = run_plain()[2][0]
    weight.requires_grad_(False)
    _, _, bias, _, row_weights = case()
    loss, _ = chunked_readout(
        hidden, weight, bias.detach(), lambda z, rows: two_losses(z, targets[rows]), row_weights, chunk_rows=4
    )
    (loss / 3).backward()
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected, atol=1e-5, rtol=1e-5)


def test_one_chunk_of_logits_is_alive_at_a_time():
    rows, vocab, chunk = 512, 4096, 32
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    hidden, weight = torch.ones(rows, 4).requires_grad_(), torch.ones(vocab, 4).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long)
    with Sizes():
        loss, _ = chunked_readout(
            hidden, weight, None, lambda z, r: two_losses(z, targets[r])[:, :1], torch.ones(rows, 1), chunk_rows=chunk
        )
        loss.backward()
    assert max(largest) == chunk * vocab

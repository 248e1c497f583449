"""Losses of a large head without its logits: chunk by chunk, with the gradient taken on the way.

The logits of a micro-batch, [P, V] in float32, are the largest tensor of a language model. Here they live one chunk at
a time: a chunk's logits are computed, turned into losses and into the gradients of hidden states and weight, and
dropped. The backward pass only scales these gradients: no second product with the weight is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits [p, V] in float32 or better, the rows of the chunk) -> values [p, K], differentiable in the logits."""

CPU_CHUNK_BYTES = 36 * 2**20  # glibc gives memory above 32 MiB back at once; smaller pieces stay with the process
GPU_CHUNK_BYTES = 2**28  # a kernel launch costs the time in which a GPU moves about 10 MB


def chunked_readout(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_loss: RowLoss,
    row_weights: Tensor,
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of row_weights * values, values [P, K]) of the logits `hidden @ weight.T + bias`; the values are detached.

    hidden [P, D] and weight [V, D] may be bfloat16: products take hidden's type, sums are float32, and so is the
    gradient of the weight until it is handed over in weight's own type. row_weights [P, K] carries no gradient.
    chunk_rows: rows of logits alive at a time, chosen from V if None. Under no_grad the same code takes no gradient.
    With P = 0 the sum is 0 and its gradients are zeros, not None: every rank of a sharded model joins the reduction.
    """
    if chunk_rows is None:
        budget = GPU_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES
        chunk_rows = max(1, budget // (4 * len(weight)))
    return _ChunkedReadout.apply(hidden, weight, bias, row_loss, row_weights, chunk_rows, torch.is_grad_enabled())  # type: ignore[return-value]


class _ChunkedReadout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_loss: RowLoss,
        row_weights: Tensor,
        chunk_rows: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        compute = hidden.dtype if hidden.is_cuda else exact  # only CUDA has bfloat16 products with float32 results
        operand = weight.to(compute)
        wants = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if wants[1] else None
        grad_bias = torch.zeros(len(weight), dtype=exact, device=weight.device) if wants[2] else None

        loss_sum = torch.zeros((), dtype=exact, device=hidden.device)
        values = torch.empty(row_weights.shape, dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):  # types are decided here, not by the caller's region
            for start in range(0, len(hidden), chunk_rows):
                rows = slice(start, start + chunk_rows)
                states = hidden[rows].to(compute)
                logits = _product(states, operand.T)
                if bias is not None:
                    logits += bias
                grad = None
                if any(wants):
                    with torch.enable_grad():
                        chunk_values = row_loss(logits.requires_grad_(), rows)
                        (grad,) = torch.autograd.grad(chunk_values, logits, row_weights[rows].to(chunk_values.dtype))
                    chunk_values = chunk_values.detach()
                else:
                    chunk_values = row_loss(logits, rows)
                del logits
                values[rows] = chunk_values
                loss_sum += (row_weights[rows] * chunk_values).sum()
                if grad is None:
                    continue
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(compute)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ operand
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, states)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(values)
        return loss_sum, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The readout's gradients are handed over once. Call it again for a second backward.")
        # In place, and without keeping a reference: autograd then takes the memory over as .grad instead of copying it,
        # and the gradient of the weight, as large as many chunks of logits, exists once and not three times.
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in gradients), None, None, None, None)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 or better, never rounded to the operands' bfloat16."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)

"""What is alive when, on models whose memory can be counted by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.engine import EngineConfig
from launch.engine.base import prepare_blocks
from launch.recording import OUTSIDE, Boundary, Gradient, Held, Recording, record

N, D = 50, 40  # rows, width; a weight has 4 D^2 bytes, a hidden state 4 N D


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D, D))

    def forward(self, x):
        return torch.relu(x @ self.weight)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.empty(D, D))
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = x @ self.table
        for block in self.blocks:
            x = block(x)
        return x.sum()


def recorded(checkpointing="none", loss_of=lambda model, batch: model(batch), cuda=False) -> Recording:
    config = EngineConfig(activation_checkpointing=checkpointing)
    return record(
        Model,
        loss_of,
        lambda: torch.zeros(N, D),
        prepare=lambda model: prepare_blocks(model, config),
        fake=FakeTensorMode(),
        cuda=cuda,
    )


def live_at(recording, phase, unit, begins):
    """Bytes alive, without weights and finished gradients, at a boundary."""
    live = 0
    for event in recording.events:
        if event == Boundary(phase, unit, begins):
            return live
        live += event.size if isinstance(event, Held) else -event.size if isinstance(event, Gradient) else 0
    raise AssertionError("no such boundary")


def test_a_block_leaves_behind_what_its_backward_reads():
    recording = recorded()
    assert recording.batch_bytes == 4 * N * D
    # batch, the table's product, and of each block the result of relu alone: that of its product dies with it
    assert live_at(recording, "forward", 0, True) == 2 * 4 * N * D
    assert live_at(recording, "forward", 2, False) == 5 * 4 * N * D


def test_a_checkpointed_block_leaves_its_output_alone_and_runs_twice():
    plain, full = recorded(), recorded("full")
    assert live_at(full, "forward", 2, False) == live_at(plain, "forward", 2, False)  # outputs are inputs of the next
    product = 2 * N * D * D
    assert plain.flops == 4 * product + 4 * product + 3 * product  # no gradient of the batch
    assert full.flops == plain.flops + 3 * product


def test_every_weight_has_one_gradient_and_blocks_end_in_reverse_order():
    recording = recorded()
    gradients = [event for event in recording.events if isinstance(event, Gradient)]
    assert [gradient.unit for gradient in gradients] == [2, 1, 0, OUTSIDE]
    assert {gradient.size for gradient in gradients} == {4 * D * D}
    ends = [e.unit for e in recording.events if isinstance(e, Boundary) and e.phase == "backward" and not e.begins]
    assert ends == [2, 1, 0, OUTSIDE]


def test_what_depends_on_values_is_taken_at_its_largest():
    sizes = []

    def loss_of(model, batch):
        rows = batch[:, 0].nonzero().squeeze(-1)
        sizes.append((len(rows), len(batch[:, 0][batch[:, 1] > 0])))
        return model(batch[rows])

    recorded(loss_of=loss_of)
    assert sizes == [(N, N)]


def test_code_may_be_told_that_its_tensors_live_on_a_gpu():
    seen = []

    def loss_of(model, batch):
        heads = batch.view(1, 1, N, D).expand(1, 2, N, D)
        seen.append(batch.is_cuda)
        # with dropout the CPU would hold all scores [1, 2, N, N]
        return model(F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)[0, 0])

    assert not any(event.size == 4 * 2 * N * N for event in recorded(loss_of=loss_of, cuda=True).events if held(event))
    assert any(event.size == 4 * 2 * N * N for event in recorded(loss_of=loss_of, cuda=False).events if held(event))
    assert seen == [True, False]


def held(event):
    return isinstance(event, Held)


def test_nothing_but_the_batch_outlives_a_backward():
    recording = recorded()
    live = sum(e.size if isinstance(e, Held) else -e.size for e in recording.events if not isinstance(e, Boundary))
    assert live == recording.batch_bytes

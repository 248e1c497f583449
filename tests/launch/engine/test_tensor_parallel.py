"""Layers split over a tensor group compute what one process computes, and random numbers differ only where they may."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from launch import runtime as runtimes
from launch.engine import EngineConfig, OptimizerConfig, build_engine
from launch.engine.base import data_world_size, global_norm, load_weights
from launch.engine.tensor_parallel import split
from launch.errors import ConfigError
from launch.random import generator, stream_key
from tests.processes import spawn

# B batch, D width, H heads of size E
B, D, H, E, STEPS = 4, 8, 4, 3, 4


class Heads(nn.Module):
    """A region: D -> H heads, each scaled by one weight that all heads share, as a QK-norm is -> D."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(D, H * E, bias=False)
        self.scale = nn.Parameter(torch.empty(E))
        self.down = nn.Linear(H * E, D, bias=False)

    def forward(self, x):
        heads = self.up(x).unflatten(-1, (-1, E)).tanh() * self.scale
        self.seen = F.dropout(heads, self.dropout, self.training)
        return self.down(self.seen.flatten(-2))


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm = nn.Parameter(torch.empty(D))
        self.heads = Heads(dropout)

    def forward(self, x):
        return x + F.dropout(self.heads(x * self.norm), self.dropout, self.training)


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def init_parameter(self, name, tensor, generator):
        del name
        tensor.normal_(0.0, 0.5, generator=generator)

    def no_decay(self, name):
        return name.endswith(("norm", "scale"))

    def tensor_parallel_plan(self):
        plan = {"": "random-region", ".up": "column", ".down": "row"}
        return {f"blocks.{i}.heads{name}": how for i in range(2) for name, how in plan.items()}


def inputs_of(step):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(step))


def train(model, backward, step, rows=slice(None)):
    """[(loss of these rows, gradient norm)] of each step."""
    curve = []
    for number in range(STEPS):
        torch.manual_seed(number)
        loss = model(inputs_of(number)[rows]).square().sum() / B
        backward(loss)
        curve.append((loss.item(), step()))
    return curve


def start(folder):
    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    return runtimes.start(device="cpu", timeout_seconds=60)


def on_ranks(folder, config, dropout=0.0):
    """The curve, and the local part of every parameter that is whole on each rank of a group."""
    here = start(folder)
    engine = build_engine(lambda: Model(dropout), config, OptimizerConfig(clip=0.5), here, seed=3)
    rows = slice(engine.data_rank, None, engine.data_world_size)
    curve = train(
        engine.module,
        lambda loss: engine.backward(loss, last=True),
        lambda: engine.step(0.01, math.isfinite).grad_norm,
        rows,
    )
    whole = {n: p.to_local().clone() for n, p in engine.module.named_parameters() if engine.module.no_decay(n)}
    here.close()
    return (engine.data_rank, engine.data_world_size), curve, whole


def on_one_process():
    model = Model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_parameter(name, p, generator(stream_key(3, "init", name)))
    groups = [
        {"params": [p for n, p in model.named_parameters() if not model.no_decay(n)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if model.no_decay(n)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))

    def step():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return train(model, lambda loss: loss.backward(), step)


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (2, EngineConfig(strategy="fsdp2", tensor_parallel=2)),
        (4, EngineConfig(strategy="fsdp2", tensor_parallel=2)),
        (4, EngineConfig(strategy="fsdp2", tensor_parallel=4)),
        (4, EngineConfig(strategy="fsdp2", tensor_parallel=2, replicas=2)),
    ],
)
def test_a_parameter_that_sees_a_part_of_the_heads_gets_the_gradient_of_all_of_them(world, config, tmp_path):
    expected = on_one_process()
    ranks = spawn(on_ranks, world, tmp_path, config, group=False)
    group = config.tensor_parallel
    assert [place for place, _, _ in ranks] == [(rank // group, world // group) for rank in range(world)]
    assert all([norm for _, norm in curve] == [norm for _, norm in ranks[0][1]] for _, curve, _ in ranks)
    for number, (loss, norm) in enumerate(expected):
        assert sum(curve[number][0] for _, curve, _ in ranks) / group == pytest.approx(loss, rel=1e-6)
        assert ranks[0][1][number][1] == pytest.approx(norm, rel=1e-5)


def test_dropout_outside_of_regions_is_the_same_on_a_tensor_group_so_its_copies_stay_equal(tmp_path):
    config = EngineConfig(strategy="fsdp2", tensor_parallel=2, activation_checkpointing="full")
    left, right = spawn(on_ranks, 2, tmp_path, config, 0.5, group=False)
    assert left[1] == right[1] and left[1] != on_one_process()
    assert all(torch.equal(left[2][name], right[2][name]) for name in left[2])


@pytest.mark.slow
def test_compiled_blocks_keep_the_copies_of_a_tensor_group_equal_under_dropout(tmp_path):
    config = EngineConfig(strategy="fsdp2", tensor_parallel=2, activation_checkpointing="full", compile=True)
    left, right = spawn(on_ranks, 2, tmp_path, config, 0.5, group=False, timeout=280)
    assert left[1] == right[1]
    assert all(torch.equal(left[2][name], right[2][name]) for name in left[2])


def draws(folder):
    """Dropout masks inside of the two regions, in two forwards of one seed and one of another; then a common draw."""
    here = start(folder)
    model = Model(0.5)
    for p in model.parameters():
        nn.init.ones_(p)
    split(model, init_device_mesh("cpu", (2,)), own_draws=True)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model(torch.ones(B, D))
        seen.append([block.heads.seen.detach() == 0 for block in model.blocks])
    common = torch.rand(8, generator=torch.default_generator)
    here.close()
    return seen, common


def test_dropout_inside_a_random_region_differs_between_ranks_and_layers_and_repeats_with_the_seed(tmp_path):
    (left, after), (right, other_after) = spawn(draws, 2, tmp_path, group=False)
    assert torch.equal(after, other_after)
    for layer in range(2):
        assert torch.equal(left[0][layer], left[1][layer]) and not torch.equal(left[0][layer], left[2][layer])
        assert not torch.equal(left[0][layer], right[0][layer])
    assert not torch.equal(left[0][0], left[0][1])


def norms(folder):
    """Of gradients on two meshes and on none, beside that of the same numbers in one piece."""
    here = start(folder)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    pieces = [torch.arange(1.0, 1 + n).view(-1, 1) for n in (12, 5, 3)]
    places = [(mesh, [Shard(0), Shard(0)]), (mesh["shard"], [Shard(0)]), (mesh, [Replicate(), Shard(0)])]
    held = [
        distribute_tensor(piece, where, how, src_data_rank=None)
        for piece, (where, how) in zip(pieces, places, strict=True)
    ]
    found = global_norm([*held]).item()
    here.close()
    return found, torch.cat(pieces).norm().item()


def test_the_norm_over_two_meshes_counts_every_element_once_and_is_the_same_bit_for_bit_on_all_ranks(tmp_path):
    ranks = spawn(norms, 4, tmp_path, group=False)
    assert len(set(ranks)) == 1
    assert ranks[0][0] == pytest.approx(ranks[0][1], rel=1e-7)


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        (
            {"tensor_parallel": 2},
            3,
            r"engine\.tensor_parallel = 2 does not divide the world size 3; use one of \[1, 3\]",
        ),
        ({"tensor_parallel": 4}, 2, r"does not divide the world size 2; use one of \[1, 2\]"),
        (
            {"tensor_parallel": 2, "replicas": 4},
            4,
            r"engine\.replicas = 4 does not divide the world size 4 / engine\.tensor_parallel 2; use one of \[1, 2\]",
        ),
    ],
)
def test_ranks_that_cannot_be_grouped_are_refused_with_what_would_work(config, world, words):
    with pytest.raises(ConfigError, match=words):
        data_world_size(EngineConfig(strategy="fsdp2", **config), world)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_other_strategies_refuse_tensor_parallelism(strategy):
    with pytest.raises(ConfigError, match=r"tensor_parallel = 2 works with strategy fsdp2, not .*strategy=fsdp2"):
        EngineConfig(strategy=strategy, tensor_parallel=2).check("engine")


class Whole(nn.Module):
    """A model without a plan."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()

    init_parameter, no_decay = Model.init_parameter, Model.no_decay


def without_a_plan(folder):
    here = start(folder)
    try:
        build_engine(Whole, EngineConfig(strategy="fsdp2", tensor_parallel=2), OptimizerConfig(), here, seed=0)
    except ConfigError as error:
        return str(error)
    finally:
        here.close()


def test_a_model_without_a_plan_is_refused(tmp_path):
    for text in spawn(without_a_plan, 2, tmp_path, group=False):
        assert text == (
            "engine.tensor_parallel = 2, but Whole has no plan for splitting its layers; use engine.tensor_parallel=1"
        )


def copies(folder):
    """The evaluation module's parameters beside those that the engine holds, and whether it communicates."""
    here = start(folder)
    config = EngineConfig(strategy="fsdp2", tensor_parallel=2, ema_decay=0.5)
    engine = build_engine(Model, config, OptimizerConfig(), here, seed=3)
    train(
        engine.module, lambda loss: engine.backward(loss, last=True), lambda: engine.step(0.01, math.isfinite).grad_norm
    )
    averages = {n: t.full_tensor() for n, t in engine.state().items() if n.startswith("ema.")}
    with engine.evaluation() as model:
        equal = all(torch.equal(p, averages[f"ema.{n}"]) for n, p in model.named_parameters())
        plain = not any(isinstance(p, DTensor) for p in model.parameters()) and not model.training
        if here.rank == 0:
            model(inputs_of(0))  # on one rank alone
    trained = all(
        torch.equal(p.full_tensor(), engine.state()[f"model.{n}"].full_tensor())
        for n, p in engine.module.named_parameters()
    )
    here.close()
    return equal, plain, trained


def test_an_evaluation_gets_a_whole_copy_with_the_average_that_one_rank_may_call_alone(tmp_path):
    assert spawn(copies, 2, tmp_path, group=False) == [(True, True, True)] * 2


def started_from(folder, weights):
    """Whether weights and average are the given ones, bit for bit, and what the first loss on them is."""
    here = start(folder)
    config = EngineConfig(strategy="fsdp2", tensor_parallel=2, ema_decay=0.5)
    engine = build_engine(Model, config, OptimizerConfig(), here, seed=3)
    state = engine.state()
    load_weights(state, weights.items())
    engine.adopt(state)
    equal = all(
        torch.equal(engine.state()[f"{prefix}.{name}"].full_tensor(), full)
        for name, full in weights.items()
        for prefix in ("model", "ema")
    )
    loss = engine.module(inputs_of(0)).square().sum().item()
    here.close()
    return equal, loss


def test_weights_from_elsewhere_are_cut_as_the_layers_are(tmp_path):
    model = Model()
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.normal_(generator=torch.Generator().manual_seed(number))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for equal, loss in spawn(started_from, 4, tmp_path, weights, group=False):
        assert equal and loss == pytest.approx(model(inputs_of(0)).square().sum().item(), rel=1e-5)

"""Every strategy, at every world size, does what a plain loop on one process does."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from launch import runtime as runtimes
from launch.engine import EngineConfig, OptimizerConfig, build_engine
from launch.engine.zero import deepspeed_settings
from launch.errors import ConfigError
from tests.processes import spawn

# B batch, L positions, D width, V symbols
B, L, D, V, STEPS = 12, 6, 8, 17, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, 2 * D, bias=False)
        self.down = nn.Linear(2 * D, D, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens, readout):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return readout(x, self.head.weight)

    def init_parameter(self, name, tensor, generator):
        del name
        tensor.normal_(0, 0.3, generator=generator)

    def no_decay(self, name):
        return name.startswith("table")

    def tensor_parallel_plan(self):
        return {f"blocks.{i}.{name}": how for i in range(2) for name, how in (("up", "column"), ("down", "row"))}


def tokens_of(step):
    return torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(step))


def loss_of(model, rows, count):
    def readout(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    return model(rows[:, :-1], readout) / count


def run(config, micro_steps, tied, folder):
    """[(loss, gradient norm)] of each step, the final weights, and the logit sum of an evaluation."""
    import os

    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtimes.start(device="cpu", timeout_seconds=60)
    engine = build_engine(lambda: Model(tied), config, OptimizerConfig(clip=0.5), here, seed=3)
    curve = []
    for step in range(STEPS):
        mine = tokens_of(step)[engine.data_rank :: engine.data_world_size]
        total = torch.zeros(())
        for i, rows in enumerate(mine.chunk(micro_steps)):
            loss = loss_of(engine.module, rows, B * (L - 1))
            engine.backward(loss, last=i == micro_steps - 1)
            total += loss.detach()
        info = engine.step(0.01, lambda norm, step=step: step != 2)  # step 2 is refused
        copies = here.world_size // engine.data_world_size
        curve.append((float(here.all_reduce_sum(total)) / copies, info.grad_norm, info.applied))
    weights = {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in engine.state().items()}
    with engine.evaluation() as model:
        # a different number of forwards on each rank must neither hang nor change anything
        evaluated = [float(loss_of(model, tokens_of(0), 1.0)) for _ in range(1 + here.rank)]
    here.close()
    return curve, weights, evaluated[0], engine.scalars()


def plain_loop(tied=False):
    """The same six steps without any of our engine code."""
    from launch.random import generator, stream_key

    model = Model(tied)
    with torch.no_grad():
        for name, p in model.named_parameters():
            model.init_parameter(name, p, generator(stream_key(3, "init", name)))
    decay = [p for n, p in model.named_parameters() if not model.no_decay(n)]
    rest = [p for n, p in model.named_parameters() if model.no_decay(n)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    curve = []
    for step in range(STEPS):
        loss = loss_of(model, tokens_of(step), B * (L - 1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step != 2:
            optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item(), step != 2))
    return curve, {f"model.{n}": p.detach() for n, p in model.named_parameters()}


CASES = [
    (1, EngineConfig(strategy="ddp"), 1),
    (2, EngineConfig(strategy="ddp"), 1),
    (4, EngineConfig(strategy="ddp"), 3),
    (2, EngineConfig(strategy="ddp", activation_checkpointing="full"), 2),
    (1, EngineConfig(strategy="fsdp2"), 2),
    (2, EngineConfig(strategy="fsdp2"), 2),
    (3, EngineConfig(strategy="fsdp2"), 1),
    (4, EngineConfig(strategy="fsdp2"), 1),
    (4, EngineConfig(strategy="fsdp2", replicas=2), 3),
    (2, EngineConfig(strategy="fsdp2", reshard_after_forward=False), 2),
    (2, EngineConfig(strategy="fsdp2", cpu_offload=True), 1),
    (2, EngineConfig(strategy="fsdp2", activation_checkpointing="full"), 1),
    (2, EngineConfig(strategy="fsdp2", activation_checkpointing="selective"), 2),
    (2, EngineConfig(strategy="fsdp2", tensor_parallel=2), 1),
    (4, EngineConfig(strategy="fsdp2", tensor_parallel=2), 3),
    (4, EngineConfig(strategy="fsdp2", tensor_parallel=4), 2),
    (6, EngineConfig(strategy="fsdp2", tensor_parallel=2), 2),  # 8 rows of a rank over 3 ranks: uneven shards
    (4, EngineConfig(strategy="fsdp2", tensor_parallel=2, replicas=2, reshard_after_forward=False), 1),
    (4, EngineConfig(strategy="fsdp2", tensor_parallel=2, activation_checkpointing="full"), 2),
    (2, EngineConfig(strategy="fsdp2", tensor_parallel=2, cpu_offload=True), 2),
    (1, EngineConfig(strategy="zero1"), 2),
    (2, EngineConfig(strategy="zero1"), 2),
    (3, EngineConfig(strategy="zero1", cpu_offload=True), 1),
    (1, EngineConfig(strategy="zero2"), 2),
    (2, EngineConfig(strategy="zero2"), 3),
    (4, EngineConfig(strategy="zero2", cpu_offload=True), 1),
    (2, EngineConfig(strategy="zero2", activation_checkpointing="full"), 1),
    (1, EngineConfig(strategy="zero3"), 2),
    (2, EngineConfig(strategy="zero3"), 2),
    (3, EngineConfig(strategy="zero3"), 1),
    (4, EngineConfig(strategy="zero3", cpu_offload=True), 1),
    (2, EngineConfig(strategy="zero3", activation_checkpointing="full"), 1),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("world", "config", "micro_steps"), CASES)
def test_a_strategy_at_a_world_size_gives_the_curve_and_weights_of_a_plain_loop(
    world, config, micro_steps, tied, tmp_path
):
    expected_curve, expected_weights = plain_loop(tied)
    config = dataclasses.replace(config, ema_decay=0.5)
    for curve, weights, evaluated, scalars in spawn(run, world, config, micro_steps, tied, tmp_path, group=False):
        for got, want in zip(curve, expected_curve, strict=True):
            assert got[0] == pytest.approx(want[0], rel=1e-6) and got[1] == pytest.approx(want[1], rel=1e-5)
            assert got[2] == want[2]
        for name, want in expected_weights.items():
            torch.testing.assert_close(weights[name], want, rtol=1e-5, atol=1e-6)
        assert scalars == {"updates": STEPS - 1}
        model = Model(tied)
        model.load_state_dict(
            {n[len("ema.") :]: t for n, t in weights.items() if n.startswith("ema.")}, strict=not tied
        )
        assert evaluated == pytest.approx(loss_of(model, tokens_of(0), 1.0).item(), rel=1e-5)


def compiled(config, folder):
    """The curve, and how many graphs torch.compile made."""
    from torch._dynamo.utils import counters

    curve, *_ = run(config, 1, False, folder)
    return curve, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(strategy="ddp", compile=True),
        EngineConfig(strategy="fsdp2", compile=True, activation_checkpointing="full"),
        EngineConfig(strategy="fsdp2", compile=True, activation_checkpointing="selective", tensor_parallel=2),
    ],
    ids=["ddp", "fsdp2-full", "tp2-selective"],
)
def test_blocks_are_really_compiled_checkpointed_or_not(config, tmp_path):
    expected, _ = plain_loop()
    for curve, graphs in spawn(compiled, 2, config, tmp_path, group=False, timeout=280):
        assert graphs > 0
        assert [loss for loss, _, _ in curve] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_states(tmp_path):
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        folder = tmp_path / strategy
        folder.mkdir()
        config = EngineConfig(strategy=strategy, precision="bf16")
        curve, weights, _, _ = spawn(run, 2, config, 1, False, folder, group=False)[0]
        expected, _ = plain_loop()
        assert all(t.dtype == torch.float32 for t in weights.values())
        assert curve[-1][0] == pytest.approx(expected[-1][0], rel=2e-2) and curve[-1][0] != expected[-1][0]


@pytest.mark.parametrize("values", [{"replicas": 2}, {"cpu_offload": True}, {"ema_decay": 1.0}, {"timeout": 0.0}])
def test_settings_that_the_strategy_cannot_honour_are_refused(values):
    with pytest.raises(ConfigError, match="engine"):
        EngineConfig(strategy="ddp", **values).check("engine")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"train_batch_size": 8}, r"'train_batch_size', which is set by train\.global_batch"),
        ({"zero_optimization": {"stage": 2}}, r"'zero_optimization\.stage', which is set by engine\.strategy"),
        ({"gradient_clipping": 1.0}, r"optimizer\.clip"),
    ],
)
def test_raw_deepspeed_keys_that_the_engine_owns_are_refused_by_name(raw, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(strategy="zero2", deepspeed=raw).check("engine")


def test_raw_deepspeed_keys_reach_deepspeed(tmp_path):
    config = EngineConfig(strategy="zero2", deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    config.check("engine")
    assert deepspeed_settings(config, OptimizerConfig())["zero_optimization"] == {
        "reduce_bucket_size": 1000,
        "stage": 2,
    }
    curve, *_ = spawn(run, 2, config, 1, False, tmp_path, group=False)[0]
    assert curve[-1][0] == pytest.approx(plain_loop()[0][-1][0], rel=1e-6)


def one_nan(config, folder):
    """Whether each of three steps was applied, where rank 1 has no number in the second; the weights are finite."""
    import os

    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtimes.start(device="cpu", timeout_seconds=60)
    engine = build_engine(Model, config, OptimizerConfig(), here, seed=3)
    applied = []
    for step in range(3):
        rows = tokens_of(step)[engine.data_rank :: engine.data_world_size]
        broken = float("nan") if step == 1 and here.rank == 1 else 1.0
        engine.backward(loss_of(engine.module, rows, B * (L - 1)) * broken, last=True)
        info = engine.step(0.01, math.isfinite)
        applied.append((info.applied, math.isfinite(info.grad_norm)))
    finite = all(
        bool(torch.isfinite(t.full_tensor() if hasattr(t, "full_tensor") else t).all()) for t in engine.state().values()
    )
    here.close()
    return applied, finite


@pytest.mark.parametrize(
    "config",
    [
        *(EngineConfig(strategy=name) for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        EngineConfig(strategy="fsdp2", tensor_parallel=2),
    ],
    ids=lambda config: f"{config.strategy}-{config.tensor_parallel}",
)
def test_a_nan_on_one_rank_is_shown_to_all_and_skipped_by_all(config, tmp_path):
    for applied, finite in spawn(one_nan, 2, config, tmp_path, group=False):
        assert applied == [(True, True), (False, False), (True, True)] and finite


def test_zero1_in_bf16_is_refused_because_its_gradients_would_be_bf16():
    with pytest.raises(ConfigError, match="strategy=zero2"):
        EngineConfig(strategy="zero1", precision="bf16").check("engine")


def too_many_replicas(folder):
    import os

    os.environ[runtimes.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtimes.start(device="cpu", timeout_seconds=60)
    try:
        build_engine(Model, EngineConfig(strategy="fsdp2", replicas=3), OptimizerConfig(), here, seed=0)
    except ConfigError as error:
        return str(error)
    finally:
        here.close()


def test_replicas_that_do_not_divide_the_world_are_refused_with_those_that_do(tmp_path):
    assert all("use one of [1, 2]" in text for text in spawn(too_many_replicas, 2, tmp_path, group=False))

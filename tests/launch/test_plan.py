"""Options, formulas against numbers worked out by hand, and the recommendation."""

import argparse
import dataclasses

import pytest
import torch

from launch.engine import EngineConfig
from launch.engine.memory import ACCOUNTS, Ledger
from launch.engine.traffic import Transfer, transfers
from launch.errors import ConfigError
from launch.plan import Estimate, add_options, options_from, recommended, size_in_bytes, step_seconds, strategies

UNITS = [[torch.Size((8, 4)), torch.Size((8,))]] * 2 + [[torch.Size((10, 4))]]  # two blocks of 40 and a table of 40
N, BLOCKS = 120, 80


def options(*argv):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options_from(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("80GiB", 80 * 2**30), ("512MiB", 2**29), ("1.5TB", 1.5e12), ("900", 900.0), ("450GB/s", 450e9)],
)
def test_a_size_is_decimal_or_binary_as_it_is_written(text, size):
    assert size_in_bytes("--gpu-memory", text) == size


@pytest.mark.parametrize(
    "argv",
    [
        ("--gpus", "0"),
        ("--gpus", "two"),
        ("--gpus-per-node", "-8"),
        ("--gpu-memory", "80 bananas"),
        ("--gpu-memory", "0GB"),
        ("--head-room", "1"),
        ("--gpu", "H1000X"),
        ("--flops", "fast"),
        ("--mfu", "0"),
        ("--mfu", "1.5"),
        ("--bandwidth", ""),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(argv):
    with pytest.raises(ConfigError, match=argv[0]):
        options(*argv)


def at_rest(config, world_size):
    ledger = Ledger()
    ACCOUNTS[config.strategy](config, UNITS, ledger, world_size)
    return {part: size for part, size in ledger.now.items() if size}, dict(ledger.host)


def test_what_every_strategy_holds_between_steps():
    bucket = {"zero_optimization": {"reduce_bucket_size": 7, "stage3_param_persistence_threshold": 8}}
    assert at_rest(EngineConfig(strategy="ddp"), 1)[0] == {"parameters": 4 * N, "optimizer": 8 * N}
    assert at_rest(EngineConfig(strategy="ddp", ema_decay=0.9), 2)[0] == {
        "parameters": 4 * N,
        "optimizer": 12 * N,
        "gradients": 4 * N,
    }
    # four ranks: 2 of 8 rows, and 3 of 10 with padding
    rows = 2 * (2 * 4 + 2) + 3 * 4
    assert at_rest(EngineConfig(strategy="fsdp2"), 4)[0] == {"parameters": 4 * rows, "optimizer": 8 * rows}
    assert at_rest(EngineConfig(strategy="fsdp2", replicas=4), 4)[0] == {"parameters": 4 * N, "optimizer": 8 * N}
    assert at_rest(EngineConfig(strategy="zero2", precision="bf16", deepspeed=bucket), 4)[0] == {
        "parameters": 2 * N,
        "optimizer": 12 * N // 4,
    }
    # stage 3: a quarter in bf16, the two vectors of 8 gathered, gradients and the bucket in fp32
    assert at_rest(EngineConfig(strategy="zero3", precision="bf16", deepspeed=bucket), 4)[0] == {
        "parameters": 2 * N // 4 + 2 * 2 * 8,
        "optimizer": 12 * N // 4,
        "gradients": 4 * N // 4,
        "buffers": 4 * 7,
    }


def test_what_is_offloaded_is_held_in_host_memory():
    device, host = at_rest(EngineConfig(strategy="fsdp2", cpu_offload=True), 1)
    assert device == {} and host == {"parameters": 4 * N, "optimizer": 8 * N, "gradients": 4 * N}


def sent(config, world_size, **changes):
    arguments = {"per_node": 8, "micro_steps": 1, "all_reduced": 0} | changes
    return {t.what: t for t in transfers(config, UNITS, world_size=world_size, **arguments)}


def test_ddp_sends_each_gradient_twice_but_for_its_own_part():
    transfer = sent(EngineConfig(strategy="ddp"), 4, micro_steps=5)["all-reduce of gradients"]
    assert transfer == Transfer(what="all-reduce of gradients", within=2 * 3 / 4 * 4 * N)


def test_a_ring_over_machines_crosses_once_for_each_rank_on_a_machine():
    transfer = sent(EngineConfig(strategy="ddp"), 16)["all-reduce of gradients"]
    assert transfer.within == 2 * 15 / 16 * 4 * N and transfer.between == transfer.within / 8


def test_fsdp2_gathers_twice_a_micro_step_and_reduces_once_a_step():
    config = EngineConfig(strategy="fsdp2", precision="bf16")
    found = sent(config, 4, micro_steps=3)
    assert found["gather of weights"].within == 3 * 3 / 4 * 2 * (N + BLOCKS)
    assert found["reduce-scatter of gradients"].within == 3 / 4 * 4 * N
    kept = sent(dataclasses.replace(config, reshard_after_forward=False), 4, micro_steps=3)
    assert kept["gather of weights"].within == 3 * 3 / 4 * 2 * N


def test_hybrid_sharding_sends_shards_alone_between_machines():
    found = sent(EngineConfig(strategy="fsdp2", replicas=2), 16)
    assert found["gather of weights"].between == found["reduce-scatter of gradients"].between == 0
    assert found["all-reduce of shards"] == Transfer(what="all-reduce of shards", between=2 * 1 / 2 * 4 * N / 8)


def test_tensor_parallelism_adds_up_activations_and_cannot_hide_it():
    transfer = sent(EngineConfig(strategy="fsdp2", tensor_parallel=2), 2, all_reduced=1000, micro_steps=3)
    assert transfer == {"all-reduce of activations": Transfer(**_activations(3000))}


def _activations(size):
    return {"what": "all-reduce of activations", "within": 2 * 1 / 2 * size, "overlaps": False}


def test_the_longer_of_computation_and_hidden_traffic_counts_and_the_rest_comes_on_top():
    rates = options("--bandwidth", "100", "--node-bandwidth", "10", "--host-bandwidth", "1")
    hidden = Transfer(what="a", within=300.0, between=10.0)  # 3 s, limited by the links within
    exposed = Transfer(what="b", between=20.0, overlaps=False)  # 2 s
    assert step_seconds(1.0, [hidden, exposed], rates) == 3 + 2
    assert step_seconds(7.0, [hidden, exposed], rates) == 7 + 2


def row(strategy, peak, seconds):
    return Estimate(
        engine=EngineConfig(strategy=strategy),
        micro_batch=1,
        micro_steps=1,
        peak=peak,
        phase="forward",
        parts={},
        host=0,
        transfers=(),
        compute_seconds=1.0,
        step_seconds=seconds,
        tokens_per_second=1.0,
    )


def test_the_fastest_that_fits_is_recommended_and_among_equals_the_simplest():
    memory = options("--gpu-memory", "100", "--head-room", "0.1")
    rows = [row("ddp", 91, 1.0), row("fsdp2", 90, 2.01), row("zero2", 50, 2.0), row("zero3", 40, 3.0)]
    best = recommended(rows, memory)
    assert best is not None and best.label == "fsdp2"
    assert recommended(rows[:1], memory) is None


def test_there_is_a_row_for_every_strategy_and_for_that_of_the_configuration():
    chosen = EngineConfig(strategy="fsdp2", replicas=4, tensor_parallel=2)
    rows = strategies(chosen, options("--gpus", "16"), splits=True)
    assert {r.strategy for r in rows} == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    assert EngineConfig(strategy="fsdp2", replicas=2) in rows and rows[-1] == chosen
    assert {r.tensor_parallel for r in rows} == {1, 2, 4, 8}
    assert sum(r.cpu_offload for r in rows) == 4

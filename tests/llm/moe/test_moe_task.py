"""Training a mixture of experts: its loss, its weights, its figures, and equal runs under every strategy.

The load-balancing loss is a product of means over the tokens of ONE micro-batch, so it depends on `train.micro_batch`.
It does not depend on the number of ranks: the trainer cuts a step into the same micro-batches at every world size, as
long as ranks x micro_batch divides the global batch. Losses are then equal up to the order of sums in float32. Figures
of evaluation are sums over blocks, whoever judges them in whatever batches.
"""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from launch import config as configs
from launch import runtime as runtimes
from launch.errors import ConfigError
from launch.metrics import read_metrics
from launch.random import generator, stream_key
from launch.runtime import Runtime
from llm.moe.config import MoeExperiment
from llm.moe.task import Mixture, MoeTask, started_weights
from llm.moe.upcycle import UpcycleConfig, upcycle
from tests.llm.moe.conftest import TinyMixtures
from tests.processes import spawn
from tests.runs import VOCAB_SIZE, Ranks, assert_equal_states, curve, state

CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])


def made(path: Path, *overrides: str) -> MoeTask:
    return MoeTask(configs.load(MoeExperiment, path, overrides)[0], CPU)


def initialised(task: MoeTask, *, spread: float = 1.0) -> Mixture:
    """Weights as an engine draws them; `spread` widens them so that experts and routers matter."""
    model = task.build_model().eval()
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, generator(stream_key(0, "init", name)))
        if "norm" not in name:
            parameter.data.mul_(spread)
    return model


def alone() -> Runtime:
    return Runtime(runtimes.Place(), CPU, None, None)  # type: ignore[arg-type]


# --- the loss --------------------------------------------------------------------------------------------------------


@kinds
def test_the_loss_sum_is_that_of_transformers_with_the_load_balancing_loss_for_each_token(
    tiny_mixtures: TinyMixtures, kind: str
) -> None:
    task = made(getattr(tiny_mixtures, kind), "model.balance=0.3")
    model, batch = initialised(task, spread=10.0), task.batch(np.arange(4), 0)
    loss_sum, figures = task.loss(model, batch)
    stock = AutoModelForCausalLM.from_config(task.model_config)
    stock.load_state_dict(model.model.state_dict())
    stock.router_aux_loss_coef = 0.3
    found = stock(batch, labels=batch, output_router_logits=True)
    tokens = 4 * 15
    assert task.count(batch) == tokens
    torch.testing.assert_close(loss_sum, found.loss * tokens, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(figures["imbalance"][0] / tokens, found.aux_loss.double(), rtol=1e-6, atol=0.0)
    nats = functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(figures["nll_ar"][0], nats.double(), rtol=1e-6, atol=0.0)
    assert all(float(figure[1]) == tokens for figure in figures.values())


def test_the_load_balancing_loss_is_that_of_the_paper(tiny_mixtures: TinyMixtures) -> None:
    """Equation 4 of arXiv 2101.03961 with k selections a token: E sum_i f_i P_i over the tokens of all layers."""
    task = made(tiny_mixtures.mixtral)
    model, batch = initialised(task, spread=10.0), task.batch(np.arange(3), 0)
    _, imbalance, router_logits = model(batch)
    probabilities = torch.cat(router_logits).softmax(-1)  # [layers x B x L, E]
    assert probabilities.shape == (2 * 3 * 16, 4)
    selected = functional.one_hot(probabilities.topk(2).indices, 4).sum(1).float()
    torch.testing.assert_close(imbalance, 4 * (selected.mean(0) * probabilities.mean(0)).sum())


def test_the_gradient_of_the_balance_reaches_routers_alone_and_grows_with_its_factor(
    tiny_mixtures: TinyMixtures,
) -> None:
    gradients: dict[str, dict[str, Tensor]] = {}
    for balance in ("0", "0.1", "0.2"):
        task = made(tiny_mixtures.mixtral, f"model.balance={balance}")
        model = initialised(task, spread=10.0)
        task.loss(model, task.batch(np.arange(4), 0))[0].backward()
        gradients[balance] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    none, once, twice = gradients.values()
    difference = once["model.model.layers.1.mlp.gate.weight"] - none["model.model.layers.1.mlp.gate.weight"]
    assert difference.abs().max() > 1e-3
    torch.testing.assert_close(
        twice["model.model.layers.1.mlp.gate.weight"] - none["model.model.layers.1.mlp.gate.weight"],
        2 * difference,
        rtol=1e-3,
        atol=1e-4,
    )
    assert torch.equal(once["model.lm_head.weight"], none["model.lm_head.weight"])


def test_a_batch_is_a_function_of_its_positions(tiny_mixtures: TinyMixtures) -> None:
    task = made(tiny_mixtures.mixtral)
    whole, part = task.batch(np.arange(8, 16), 1), task.batch(np.array([13, 10]), 1)
    assert whole.shape == (8, 16) and whole.dtype == torch.int64
    assert torch.equal(part, whole[[5, 2]])
    assert task.example_batch(3).shape == (3, 16)


# --- weights ---------------------------------------------------------------------------------------------------------


@kinds
def test_a_model_from_the_meta_device_computes_what_transformers_does(tiny_mixtures: TinyMixtures, kind: str) -> None:
    """Buffers of the rotary embedding have no values on the meta device, and are in no state."""
    task = made(getattr(tiny_mixtures, kind))
    with torch.device("meta"):
        model = task.build_model()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"} and not list(model.buffers())
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        model.init_parameter(name, parameter.data, generator(stream_key(0, "init", name)))
    stock = AutoModelForCausalLM.from_config(task.model_config).eval()
    stock.load_state_dict(model.model.state_dict())
    batch = task.batch(np.arange(2), 0)
    with torch.no_grad():
        found, expected = model.eval().model(batch).logits, stock(batch).logits
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
        assert not torch.allclose(found[:, 5], model.model(batch[:, 1:]).logits[:, 4], atol=1e-4)  # places count


@kinds
def test_initial_weights_have_the_statistics_of_transformers(tiny_mixtures: TinyMixtures, kind: str) -> None:
    task = made(getattr(tiny_mixtures, kind), "model.width=64", "model.expert_width=48")
    model = initialised(task)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            deviations = math.sqrt(value.numel())
            assert abs(float(value.mean())) < 4 * 0.02 / deviations, name
            assert abs(float(value.std()) / 0.02 - 1) < 4 / deviations, name
    if kind == "qwen2_moe":
        assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    exempt = {name for name in names if model.no_decay(name)}
    assert exempt == {name for name in names if "norm" in name or "bias" in name or "embed_tokens" in name}


@kinds
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_flops_are_those_counted_by_hand(tiny_mixtures: TinyMixtures, kind: str, tied: bool) -> None:
    task = made(getattr(tiny_mixtures, kind), f"model.tied={str(tied).lower()}")
    attention = 16 * (2 * 8 + 8 + 8 + 2 * 8)  # two heads of 8 features, one for keys and values
    expert, router, norms, dense = 3 * 16 * 8, 4 * 16, 2 * 16, 3 * 16 * (2 * 8)
    if kind == "mixtral":
        layers = [(attention + norms + router, True)] * 2
    elif kind == "qwen2_moe":
        attention += 2 * 16  # biases of queries, of keys and values
        shared = 3 * 16 * 12 + 16
        layers = [(attention + norms + dense, False), (attention + norms + router + shared, True)]
    else:
        attention += 2 * 8  # norms of queries and keys
        layers = [(attention + norms + dense, False), (attention + norms + router, True)]
    table = VOCAB_SIZE * 16
    total = sum(size + 4 * expert * has for size, has in layers) + 16 + table * (1 if tied else 2)
    active = sum(size + 2 * expert * has for size, has in layers) + 16 + table * (1 if tied else 2)
    assert sum(p.numel() for p in task.build_model().parameters()) == total
    assert task.facts()["parameters"] == f"{total:,} in all; {active:,} work on a token"
    assert ("4 experts in 2 of 2" if kind == "mixtral" else "4 experts in 1 of 2") in task.facts()["model"]
    head_once = active if tied else active - table
    assert task.flops_per_token() == 6 * head_once + 6 * 2 * 16 * 16  # causal: half of 12 layers x length x width


def test_attention_is_charged_by_its_heads_where_they_are_wider_than_the_model(
    tiny_mixtures: TinyMixtures, tmp_path: Path
) -> None:
    """As in Qwen3-30B-A3B: 32 heads of 128 features on a width of 2048."""
    upcycle(dense(tmp_path / "dense", head_dim=16), tmp_path / "mixture", UpcycleConfig(experts=4))
    task = made(tiny_mixtures.mixtral, f"model.start={tmp_path / 'mixture'}")
    layer = 16 * (2 * 16 + 16 + 16 + 2 * 16) + 2 * 16 + 4 * 16 + 2 * 3 * 16 * 32
    assert task.flops_per_token() == 6 * (2 * layer + 16 + VOCAB_SIZE * 16) + 6 * 2 * 16 * (2 * 16)


# --- judging ---------------------------------------------------------------------------------------------------------


def by_hand(task: MoeTask, model: Mixture, count: int) -> dict[str, float]:
    """Figures of `count` evenly spaced validation blocks, one at a time."""
    dataset = task._validation[0]
    places = [i * len(dataset) // count for i in range(count)]
    means, entropies, loads = [], [], torch.zeros(2, 4, dtype=torch.float64)
    for place in places:
        tokens = dataset.blocks(np.array([place])).to(torch.int64)
        found = model.model(tokens, output_router_logits=True)
        nats = -found.logits[0, :-1].log_softmax(-1)[torch.arange(15), tokens[0, 1:]]
        means.append(float(nats.mean()))
        for layer, logits in enumerate(found.router_logits):
            for row in logits.softmax(-1).double():
                entropies.append(float(-(row * row.log()).sum()))
                loads[layer, row.topk(2).indices] += 1
    shares = loads / loads.sum(-1, keepdim=True)
    return {
        "nll_ar": float(np.mean(means)),
        "nll_ar_se": float(np.std(means, ddof=1) / math.sqrt(count)),
        "router_entropy": float(np.mean(entropies)) / math.log(4),
        "load_entropy": float(-(shares * shares.log()).sum(-1).mean()) / math.log(4),
    }


def evaluate_as_rank(path: str, sequences: str) -> dict[str, float]:
    runtime = runtimes.start(device="cpu", timeout_seconds=60)
    task = made(Path(path), f"evaluation.sequences={sequences}")
    with torch.no_grad():
        found = task.evaluate(initialised(task, spread=10.0), runtime)
    runtime.close()
    return found


def test_figures_of_evaluation_are_those_computed_by_hand_at_one_and_two_ranks(tiny_mixtures: TinyMixtures) -> None:
    task = made(tiny_mixtures.mixtral)
    with torch.no_grad():
        model = initialised(task, spread=10.0)
        expected = by_hand(task, model, 7)
        assert expected["load_entropy"] < 0.99 and expected["router_entropy"] < 0.99
        assert task.evaluate(model, alone()) == pytest.approx(expected, rel=1e-6)
    ranks = spawn(evaluate_as_rank, 2, str(tiny_mixtures.mixtral), "7", group=False)
    assert ranks[0] == ranks[1] == pytest.approx(expected, rel=1e-6)


def test_training_figures_are_those_of_its_tokens(tiny_mixtures: TinyMixtures) -> None:
    task = made(tiny_mixtures.mixtral)
    model, batch = initialised(task, spread=10.0), task.batch(np.arange(4), 0)
    _, figures = task.loss(model, batch)
    probabilities = torch.stack(model(batch)[2]).softmax(-1).double()  # [layers, T, E]
    entropy = float(-(probabilities * probabilities.log()).sum(-1).mean().detach()) / math.log(4)
    shares = functional.one_hot(probabilities.topk(2).indices, 4).sum((1, 2)) / (2 * 64)
    found = {name: float(above / below) for name, (above, below) in figures.items()}
    assert found["router_entropy"] == pytest.approx(entropy, rel=1e-6)
    assert found["load_entropy"] == pytest.approx(
        float(-(shares * shares.log()).sum(-1).mean()) / math.log(4), rel=1e-6
    )


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny_mixtures: TinyMixtures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, six steps, a checkpoint after the third."""
    return tiny_mixtures.train(
        "mixtral", 1, tmp_path_factory.mktemp("reference") / "run", "checkpoint.every_steps=3", "model.tied=true"
    )


def validation(run: Path) -> dict[str, float]:
    row = [row for row in read_metrics(run / "metrics.jsonl") if "val/nll_ar" in row][-1]
    return {name: value for name, value in row.items() if name.startswith("val/")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_does(
    tiny_mixtures: TinyMixtures, reference: Path, strategy: str, tmp_path: Path
) -> None:
    run = tiny_mixtures.train("mixtral", 2, tmp_path / "run", f"engine.strategy={strategy}", "model.tied=true")
    assert curve(run) == pytest.approx(curve(reference), abs=1e-5)
    assert curve(run, "imbalance") == pytest.approx(curve(reference, "imbalance"), abs=1e-5)
    assert validation(run) == pytest.approx(validation(reference), abs=1e-5)
    assert (run / "samples" / "step_00000006.md").read_text() == (reference / "samples/step_00000006.md").read_text()


def test_a_killed_run_goes_on_to_the_very_weights(tiny_mixtures: TinyMixtures, reference: Path, tmp_path: Path) -> None:
    options = ("checkpoint.every_steps=3", "checkpoint.asynchronous=false", "model.tied=true")
    fault: dict[str, Any] = {"schema": MoeExperiment, "task": MoeTask, "fault": "checkpoint.before_rename:kill:0:2"}
    ended = Ranks(tiny_mixtures.mixtral, 1, tmp_path, *options, **fault).wait()
    assert ended.codes == [-signal.SIGKILL], ended.output
    tiny_mixtures.train("mixtral", 1, tmp_path, *options)
    assert curve(tmp_path) == curve(reference)
    assert_equal_states(state(tmp_path, 6), state(reference, 6))
    assert validation(tmp_path) == validation(reference)


def test_recomputed_activations_leave_the_losses_as_they_are(
    tiny_mixtures: TinyMixtures, reference: Path, tmp_path: Path
) -> None:
    options = ("model.tied=true", "engine.activation_checkpointing=full", "train.steps=3")
    run = tiny_mixtures.train("mixtral", 1, tmp_path, *options)
    assert curve(run) == {step: loss for step, loss in curve(reference).items() if step <= 3}


# --- from weights on disk --------------------------------------------------------------------------------------------


def dense(folder: Path, **changes: Any) -> Path:
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**{**settings, **heads, "initializer_range": 0.1, **changes})
        )
    model.to(model.config.dtype or torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "tied"), [("mixtral", True), ("qwen2_moe", False)])
def test_training_starts_from_the_logits_of_the_dense_model(
    tiny_mixtures: TinyMixtures, kind: Any, tied: bool, tmp_path: Path
) -> None:
    folder = dense(tmp_path / "dense", tie_word_embeddings=tied)
    upcycle(folder, tmp_path / "mixture", UpcycleConfig(kind=kind, experts=4))
    task = made(tiny_mixtures.mixtral, f"model.start={tmp_path / 'mixture'}")
    weights = task.initial_weights()
    assert weights is not None
    with torch.device("meta"):
        model = task.build_model()
    found = dict(weights)
    assert found.keys() == dict(model.named_parameters()).keys()
    model = task.build_model().eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(found[name])
    batch = task.batch(np.arange(2), 0)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(batch).logits
        torch.testing.assert_close(model.model(batch).logits, expected, rtol=0.0, atol=1e-5)


def test_a_run_starts_from_the_weights_on_disk_and_half_precision_becomes_single(
    tiny_mixtures: TinyMixtures, tmp_path: Path
) -> None:
    folder = dense(tmp_path / "dense", dtype=torch.bfloat16)
    upcycle(folder, tmp_path / "mixture", UpcycleConfig(experts=4, noise=0.1))
    still = ("schedule.lr=1e-30", "schedule.final_lr=0", "optimizer.weight_decay=0", "train.steps=1")
    run = tiny_mixtures.train("mixtral", 1, tmp_path / "run", f"model.start={tmp_path / 'mixture'}", *still)
    trained = state(run, 1)
    for name, tensor in started_weights(tmp_path / "mixture", tied=False):
        assert trained[f"model.{name}"].dtype == tensor.dtype == torch.float32
        assert torch.equal(trained[f"model.{name}"], tensor), name


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 299}, r"has 299 tokens, the data 300; prepare the data with --tokenizer"),
        ({"max_position_embeddings": 15}, r"data.block_length = 16; .* takes 15 tokens at most"),
    ],
)
def test_weights_that_do_not_fit_the_data_are_refused(
    tiny_mixtures: TinyMixtures, changes: dict[str, int], words: str, tmp_path: Path
) -> None:
    upcycle(dense(tmp_path / "dense", **changes), tmp_path / "mixture", UpcycleConfig(experts=4))
    with pytest.raises(ConfigError, match=words):
        made(tiny_mixtures.mixtral, f"model.start={tmp_path / 'mixture'}")


def test_a_start_that_is_no_mixture_or_no_folder_is_refused(tiny_mixtures: TinyMixtures, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a 'llama' model; those of mixtral"):
        made(tiny_mixtures.mixtral, f"model.start={dense(tmp_path)}")
    with pytest.raises(ConfigError, match=r"has no config.json"):
        made(tiny_mixtures.mixtral, f"model.start={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.kind=mixtrall",), "did you mean 'mixtral'"),
        (("model.width=17",), r"model.heads = 2 must divide model.width = 17"),
        (("model.kv_heads=3",), r"multiple of model.kv_heads = 3"),
        (("model.top_k=5",), r"model.top_k = 5; a token selects 1 to model.experts = 4"),
        (("model.top_k=0",), r"model.top_k = 0"),
        (("model.balance=-1",), r"model.balance = -1"),
        (("model.dense_layers=[1]",), "every layer of a Mixtral has experts"),
        (("model.kind=qwen3_moe", "model.dense_layers=[2]"), r"model.dense_layers = \[2\]; layers are 0 to 1"),
        (("model.kind=qwen3_moe", "model.dense_layers=[0,1]"), "one of them at least has experts"),
        (("model.shared_width=8",), "model.shared_width = 8: only qwen2_moe has a shared expert"),
        (("model.experts=0", "model.top_k=0"), "model.experts = 0; the smallest is 1"),
        (("model.expert_width=0",), "model.expert_width = 0; the smallest is 1"),
        (("model.width=24", "model.heads=8"), r"model.width / model.heads = 3 must be even"),
        (("model.width=20",), r"model.width = 20; grouped matrix products take multiples of 8"),
        (("model.expert_width=12",), r"model.expert_width = 12; grouped matrix products take multiples of 8"),
        (("evaluation.batch=0",), "evaluation.batch = 0; the smallest is 1"),
        (("evaluation.sequences=0",), "evaluation.sequences = 0; the smallest is 1"),
        (("data.block_length=1",), r"data.block_length = 1; the first token of a block is given"),
    ],
)
def test_settings_without_meaning_are_refused(
    tiny_mixtures: TinyMixtures, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        made(tiny_mixtures.mixtral, *overrides)


def test_without_data_the_vocabulary_must_be_named_and_must_be_theirs_with_them(tiny_mixtures: TinyMixtures) -> None:
    config = configs.load(MoeExperiment, tiny_mixtures.mixtral)[0]
    with pytest.raises(ConfigError, match=r"data\.vocab_size is not set"):
        MoeTask(config, CPU, open_data=False)
    planned = MoeTask(replace(config, data=replace(config.data, vocab_size=VOCAB_SIZE)), CPU, open_data=False)
    assert planned.facts() == made(tiny_mixtures.mixtral).facts()
    with pytest.raises(ConfigError, match=f"data.vocab_size = 299, but .* {VOCAB_SIZE} tokens; set it to {VOCAB_SIZE}"):
        made(tiny_mixtures.mixtral, "data.vocab_size=299")


def test_runs_of_other_data_are_told_apart(tiny_mixtures: TinyMixtures) -> None:
    same = made(tiny_mixtures.mixtral).identity()
    assert made(tiny_mixtures.mixtral).identity() == same and json.dumps(same)
    assert made(tiny_mixtures.mixtral, "data.block_length=8").identity() != same

"""What both backbones promise: who sees whom, masks, initial weights, precision, construction without memory."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llm.backbones import InputSpec, ModelConfig, build
from tests.llm.backbones.small import initial, logits, shaken, small
from tests.processes import spawn

KINDS = ["llama", "dit"]
IDS = torch.randint(0, 12, (3, 10), generator=torch.Generator().manual_seed(0))


def positions_that_change(model, j: int) -> list[int]:
    changed = IDS.clone()
    changed[:, j] = (IDS[:, j] + 1) % 12
    difference = (model(IDS, logits) - model(changed, logits)).abs().amax(dim=(0, 2))
    return [i for i in range(IDS.shape[1]) if difference[i] > 1e-6]


@pytest.mark.parametrize("kind", KINDS)
def test_bidirectional_attention_carries_a_change_to_every_position(kind):
    assert positions_that_change(shaken(kind), j=6) == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_attention_carries_a_change_to_later_positions_only(kind):
    assert positions_that_change(shaken(kind, causal=True), j=6) == [6, 7, 8, 9]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padded_positions_do_not_influence_the_others(kind, causal, kv_heads):
    model = shaken(kind, causal=causal, kv_heads=kv_heads)
    lengths = torch.tensor([10, 7, 4])
    mask = torch.arange(10) < lengths[:, None]
    other_padding = torch.where(mask, IDS, (IDS + 5) % 12)
    a, b = (model(ids, logits, attention_mask=mask) for ids in (IDS, other_padding))
    torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=0)
    for row, length in enumerate(lengths):
        alone = model(IDS[row : row + 1, :length], logits)
        torch.testing.assert_close(a[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_at_the_front_leaves_outputs_and_gradients_finite(causal):
    model = shaken(causal=causal)
    mask = torch.arange(10) >= 4
    output = model(IDS, logits, attention_mask=mask.expand(3, 10))
    output[:, mask].square().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_a_full_mask_equals_no_mask(causal):
    model = shaken(causal=causal)
    masked = model(IDS, logits, attention_mask=torch.ones(3, 10, dtype=torch.bool))
    torch.testing.assert_close(masked, model(IDS, logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_initial_weights_do_not_depend_on_the_order_of_initialisation(kind, causal):
    model = small(kind, causal=causal)
    backwards = [(name, initial(model, name, p.shape)) for name, p in reversed(list(model.named_parameters()))]
    for name, tensor in backwards:
        assert tensor.isfinite().all() and torch.equal(tensor, model.get_parameter(name)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_model_has_no_buffers_and_is_built_on_the_meta_device(kind, causal):
    config = ModelConfig(kind=kind, layers=2, heads=4, width=32, init="mdlm" if kind == "dit" else "megatron")
    with torch.device("meta"):
        model = build(config, input_layer=InputSpec(num_symbols=12), num_classes=11, causal=causal)
    assert list(model.buffers()) == []
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.to_empty(device="cpu")(IDS, logits).shape == (3, 10, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_for_the_matrices_of_blocks_and_head(kind):
    model = small(kind, qk_norm=True)
    decayed = {name for name, _ in model.named_parameters() if not model.no_decay(name)}
    assert decayed == {n for n, p in model.named_parameters() if p.ndim == 2 and n != "input.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compiled_one_by_one_give_the_same_logits_and_gradients(kind):
    model = shaken(kind, qk_norm=True)
    plain = model(IDS, logits)
    plain.square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = model(IDS, logits)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_and_bfloat16_weights_stay_near_float32(kind):
    model = shaken(kind, qk_norm=True)
    exact = model(IDS, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(IDS, logits)
    halved = model.to(torch.bfloat16)(IDS, logits)
    scale = exact.abs().max().item()
    assert (autocast - exact).abs().max() < 0.03 * scale
    assert (halved - exact).abs().max() < 0.05 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_evaluation_and_random_in_training(kind):
    model = shaken(kind, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(model(IDS, logits), model(IDS, logits))
    model.eval()
    assert torch.equal(model(IDS, logits), model(IDS, logits))


@pytest.mark.parametrize("causal", [False, True])
def test_a_new_dit_predicts_uniformly(causal):
    z = small("dit", causal=causal)(IDS, logits)
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), IDS.flatten() % 11)
    assert loss.item() == pytest.approx(math.log(11), abs=1e-6)


def test_all_parameters_of_a_dit_receive_gradient_once_it_has_moved_off_its_initial_weights():
    model = shaken("dit")
    model(IDS, logits).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_readout_receives_the_head_and_its_answer_is_the_models():
    model = small()
    seen = []
    answer = model(IDS, lambda hidden, weight, bias: seen.append((hidden.shape, weight, bias)) or "answer")
    assert answer == "answer"
    assert seen == [((3, 10, 32), model.head.weight, None)]


def test_a_tied_head_is_the_token_table_itself():
    model = small(tied=True)
    weight = model(IDS, lambda hidden, weight, bias: weight)
    assert weight.shape == (11, 32)  # without the row of the mask symbol
    assert weight.data_ptr() == model.input.weight.data_ptr()
    assert "head.weight" not in model.state_dict()
    model(IDS, logits).square().sum().backward()
    assert model.input.weight.grad[:11].abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize(
    ("init", "name", "std"),
    [
        ("tinyllama", "input.weight", math.sqrt(2 / (5 * 128))),
        ("tinyllama", "blocks.1.attention.q.weight", math.sqrt(2 / (5 * 128))),
        ("tinyllama", "blocks.1.attention.out.weight", 1 / (math.sqrt(128) * 2)),
        ("tinyllama", "blocks.0.mlp.down.weight", 1 / (math.sqrt(128) * 2)),
        ("tinyllama", "head.weight", math.sqrt(2 / (5 * 128))),
        ("megatron", "blocks.0.mlp.gate.weight", 0.02),
        ("megatron", "blocks.0.mlp.down.weight", 0.02 / math.sqrt(4)),
    ],
)
def test_initial_weights_have_the_published_standard_deviation(init, name, std):
    model = small(width=128, init=init, spec=InputSpec(num_symbols=200))
    assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)


def test_a_dit_starts_from_torchs_uniform_defaults():
    model = small("dit", width=128, spec=InputSpec(num_symbols=200))
    fan_in = {"input.weight": 128, "blocks.0.mlp.up.bias": 128, "blocks.0.mlp.down.bias": 512}
    fan_in |= {"blocks.0.mlp.down.weight": 512, "conditioning.first.bias": 256, "conditioning.second.weight": 128}
    for name, size in fan_in.items():
        largest = model.get_parameter(name).abs().max().item()
        assert 0.9 * size**-0.5 < largest <= size**-0.5, name


def sharded_logits(kind: str, compiled: bool) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """Logits and input-table gradient of `shaken(kind)` under FSDP2 in bfloat16, and the dtype the angles arrive in."""
    model = shaken(kind, qk_norm=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    seen = []
    for block in model.blocks:
        # Hooks do not run inside a compiled module; what it computes says enough there.
        block.compile(backend="aot_eager") if compiled else block.attention.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[1].cos.dtype)
        )
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    z = model(IDS, logits)
    z.float().square().sum().backward()
    return z.detach().float(), model.input.weight.grad.full_tensor(), seen[-1] if seen else torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_in_bfloat16_stays_near_float32_and_leaves_the_angles_exact(kind, compiled):
    model = shaken(kind, qk_norm=True)
    exact = model(IDS, logits)
    exact.square().sum().backward()
    gradient = model.input.weight.grad
    for z, sharded_gradient, angles in spawn(sharded_logits, 2, kind, compiled, timeout=120):
        assert angles == torch.float32
        assert (z - exact).abs().max() < 0.05 * exact.abs().max()
        assert (sharded_gradient - gradient).norm() < 0.05 * gradient.norm()

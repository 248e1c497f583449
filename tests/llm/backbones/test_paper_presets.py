"""Every preset under configs/llm/paper, built on the meta device, has the parameters that its paper says.

Also the proof that llm.backbones.flops counts what `build` makes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.config import read_yaml
from llm.backbones import InputSpec, ModelConfig, build, count_parameters, resolve_input_kind, training_flops

PAPER = Path(__file__).parents[3] / "configs" / "llm" / "paper"
PRESETS = sorted(path for path in PAPER.glob("*/*.yaml") if not path.stem.startswith("recipe"))

# Published sizes in millions. scale: 12 layers width^2, the true count is 4/3 of it. slim: the true count. owt: the
# label of the compute-optimal set, and for the small model of MDLM its true count with adaLN (the 92M of its budget).
SCALE = [14, 25, 36, 49, 64, 79, 106, 154, 201, 252, 315, 354, 413, 571, 771, 1107, 1529, 2359, 3426]
SLIM = [6, 19, 34, 48, 66, 75, 85, 113, 142, 170, 180, 206, 231, 268, 302, 336, 472, 551, 571, 629, 666, 717, 761, 831]
SLIM += [944, 1028, 1233, 1476, 1678, 2121]
NOT_PUBLISHED = {"scale_14M_arm", "scale_36M_arm", "scale_64M_arm", "scale_315M_mdm", "scale_315M_primev2"}
OWT = {"opt_arm_owt": 860, "opt_mdm_owt": 352, "opt_prime_owt": 265, "opt_primev2_owt": 265}
OWT |= {"mdlm_small_owt": 85, "arm_small_owt": 85, "primev2_l16_owt": 85, "mdlm_tiny_owt": 25, "mdlm_medium_owt": 302}
OWT |= {f"prime_l{l}_owt": 85 for l in (2, 3, 4, 6, 8)}

BASES = {(50257, 2): 225, (50257, 3): 37, (50257, 4): 15, (50257, 6): 7, (50257, 8): 4, (50257, 16): 2, (32000, 15): 2}


def pieces(preset: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The model configuration of a preset and the remaining arguments of `build`."""
    config = ModelConfig(**preset["model"])
    diffusion, classes = preset["diffusion"], preset["data"]["vocab_size"]
    granularity = diffusion.get("granularity", 1)
    kind = resolve_input_kind(diffusion.get("embedding", "auto"), granularity=granularity, width=config.width)
    causal = diffusion["family"] == "ar"
    symbols = BASES[classes, granularity] + 1 if granularity > 1 else classes + (not causal)
    spec = InputSpec(kind=kind, num_symbols=symbols, granularity=granularity)
    return config, {"input_layer": spec, "num_classes": classes, "causal": causal}


def millions(count: int) -> int:
    return round(count / 1e6)


def test_there_is_a_preset_for_every_published_size():
    families = ("arm", "mdm", "primev2")
    expected = {f"scale_{size}M_{family}" for size in SCALE for family in families} - NOT_PUBLISHED
    expected |= {f"slim_{size}M_primev2" for size in SLIM} | {"slim_1028M_mdm"} | set(OWT)
    assert {path.stem for path in PRESETS} == expected


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_published_number_of_parameters(path):
    preset = read_yaml(path)
    config, arguments = pieces(preset)
    with torch.device("meta"):
        model = build(config, **arguments)
    count = count_parameters(config, **arguments)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    head = sum(size for name, size in sizes.items() if name.startswith("head."))
    assert count.input_table == sizes["input.weight"]
    assert count.head == head
    assert count.non_embedding == sum(sizes.values()) - head - sizes["input.weight"]
    assert count.total == sum(sizes.values())

    table, d, n = path.parent.name, config.width, config.layers
    if table == "scale":
        assert millions(count.label) == int(path.stem.split("_")[1].removesuffix("M"))
        assert count.non_embedding == 16 * n * d**2 + n * (2 * d + 2 * config.head_dim) + d
    elif table == "slim":
        assert millions(count.non_embedding) == int(path.stem.split("_")[1].removesuffix("M"))
        assert count.non_embedding == n * (4 * d**2 + 3 * d * config.ffn_width + 2 * d) + d
    else:
        assert millions(count.label) == OWT[path.stem]
        twin = n * (12 * d**2 + 5 * d + 2 * d) + d
        assert count.non_embedding - twin == (0 if arguments["causal"] else adaptive(config))


def adaptive(config: ModelConfig) -> int:
    """Parameters of adaLN: n linears 128 -> 6d, one 128 -> 2d, and the MLP 256 -> 128 -> 128, all with biases."""
    return config.layers * 129 * 6 * config.width + 129 * 2 * config.width + 257 * 128 + 129 * 128


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_names_itself_and_its_batch_divides(path):
    preset = read_yaml(path)
    assert preset["run"]["name"] == path.stem
    assert preset["run"]["dir"] == f"runs/{path.stem}"
    assert preset["train"]["global_batch"] % (8 * preset["train"]["micro_batch"]) == 0


def test_published_counts_to_the_last_digit():
    slim, arguments = pieces(read_yaml(PAPER / "slim" / "slim_1028M_primev2.yaml"))
    count = count_parameters(slim, **arguments)
    assert count.non_embedding == 1_027_677_952
    assert count.head == 57_344_000
    assert count.input_table == 80_640


def test_a_label_is_three_quarters_of_the_true_count_of_a_gated_model():
    config, arguments = pieces(read_yaml(PAPER / "scale" / "scale_106M_mdm.yaml"))
    count = count_parameters(config, **arguments)
    assert count.label == 106_168_320
    assert round(count.non_embedding / 1e6, 1) == 141.6


def test_the_small_model_of_mdlm_has_the_92_million_parameters_of_its_budget():
    config, arguments = pieces(read_yaml(PAPER / "owt" / "mdlm_small_owt.yaml"))
    assert millions(count_parameters(config, **arguments).non_embedding) == 92


def test_the_published_budget_of_the_1028m_model_follows_from_its_steps():
    preset = read_yaml(PAPER / "slim" / "slim_1028M_mdm.yaml")
    config, arguments = pieces(preset)
    mean_length = 0.99 * 2048 + 0.01 * (1 + 2048) / 2
    tokens = preset["train"]["steps"] * preset["train"]["global_batch"] * mean_length
    flops = training_flops(config, **arguments, length=2048, tokens=tokens)
    assert flops.six_nd == pytest.approx(3.3e21, rel=1e-5)


@pytest.mark.parametrize(("name", "budget"), [("arm", 2.90e20), ("mdm", 2.72e20), ("prime", 2.67e20)])
def test_published_budgets_of_the_compute_optimal_set_use_the_label(name, budget):
    preset = read_yaml(PAPER / "owt" / f"opt_{name}_owt.yaml")
    config, arguments = pieces(preset)
    tokens = preset["train"]["steps"] * preset["train"]["global_batch"] * 1024
    flops = training_flops(config, **arguments, length=1024, tokens=tokens)
    assert flops.six_nd_label == pytest.approx(budget, rel=5e-3)


@pytest.mark.parametrize(("causal", "visible"), [(False, 64), (True, 32)])
def test_the_full_rule_adds_head_and_visible_attention(causal, visible):
    config = ModelConfig(layers=3, heads=4, kv_heads=2, width=32, tied=True)
    arguments = {"input_layer": InputSpec(num_symbols=12), "num_classes": 11, "causal": causal}
    flops = training_flops(config, **arguments, length=64, tokens=1000)
    n = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 128 + 2 * 32) + 32
    assert flops.six_nd == 6 * n * 1000
    assert flops.full == 6 * 1000 * (n + 11 * 32) + 12 * 1000 * 3 * 32 * visible


@pytest.mark.parametrize("kind", ["llama", "dit"])
@pytest.mark.parametrize("causal", [False, True])
def test_counts_hold_for_grouped_heads_and_odd_hidden_sizes(kind, causal):
    config = ModelConfig(
        kind=kind,
        layers=2,
        heads=4,
        kv_heads=2,
        width=32,
        ffn=50,
        qk_norm=True,
        cond_dim=6,
        init="mdlm" if kind == "dit" else "megatron",
    )
    arguments = {
        "input_layer": InputSpec(kind="cat", num_symbols=3, granularity=5),
        "num_classes": 11,
        "causal": causal,
    }
    model = build(config, **arguments)
    assert count_parameters(config, **arguments).total == sum(p.numel() for p in model.parameters())

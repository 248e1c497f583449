"""A fresh process tells a folder that computes what it should from one that does not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.errors import CheckpointError
from llm.moe import modeling
from llm.moe.experts import MergedLayer
from llm.moe.formats import FinishedLayer, Format, plan, write
from llm.moe.source import open_source
from llm.moe.verify import TOLERANCE, Verification, compare, verify
from tests import mixtures
from tests.mixtures import blocks_of, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with random merges and a pruned router, in all formats; `source` is the original."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = mixtures.mixture("qwen3_moe")
    model.save_pretrained(folder / "source")
    source = open_source(folder / "source")
    for form in ("compact", "expanded", "shrunk"):
        finished = [
            FinishedLayer(
                index=i, merged=merged, router=blocks_of(model)[i].gate.weight[:5] if form == "shrunk" else None
            )
            for i, merged in layers().items()
        ]
        write(plan(source, form, {0: 5, 1: 5}), folder / form, finished, lambda _: {})
    return folder


def layers() -> dict[int, MergedLayer]:
    blocks = blocks_of(mixtures.mixture("qwen3_moe"))
    return {i: mixtures.merge_means(block, mixtures.groups(16, 5, seed=i)) for i, block in blocks.items()}


def expected() -> Tensor:
    """By the definition of a merged layer, expert by expert."""
    return logits(mixtures.with_loops(mixtures.mixture("qwen3_moe"), layers()))


@pytest.mark.parametrize("form", ["compact", "expanded"])
def test_an_exact_format_passes_in_a_fresh_process(folder: Path, form: Format) -> None:
    found = verify(folder / form, expected(), mixtures.tokens(), form=form)
    assert found.tokens == mixtures.tokens().numel() and found.top1_agreement == 1.0
    assert found.max_difference < 1e-5 and abs(found.kl_divergence) < 1e-6


def test_a_format_that_is_not_exact_reports_how_far_it_is(folder: Path) -> None:
    found = verify(folder / "shrunk", expected(), mixtures.tokens(), form="shrunk")
    assert found.max_difference > 0.01 and found.kl_divergence > 1e-4


def test_half_precision_stays_within_its_own_tolerance(folder: Path) -> None:
    modeling.register()
    half = transformers.AutoModelForCausalLM.from_pretrained(folder / "compact", dtype=torch.bfloat16)
    found = compare(half, expected(), mixtures.tokens())
    assert TOLERANCE["float32"] < found.max_difference / found.largest_logit < TOLERANCE["bfloat16"]


def lose(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def swap(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].flip(0)


@pytest.mark.parametrize(
    ("form", "damage", "name", "sentence"),
    [
        ("expanded", lose, "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight and 1 entries in all are"),
        (
            "compact",
            swap,
            "model.layers.1.mlp.gate.expert_map",
            r"gives logits that differ by 0\.\d+ from the merged model\'s, more than .* in float32",
        ),
    ],
)
def test_a_damaged_folder_fails(
    folder: Path,
    form: Format,
    damage: Callable[[dict[str, Tensor], str], None],
    name: str,
    sentence: str,
    tmp_path: Path,
) -> None:
    for file in (folder / form).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=sentence):
        verify(tmp_path, expected(), mixtures.tokens(), form=form)


def test_the_figures_of_a_comparison_are_those_of_plain_formulas() -> None:
    model, generator = mixtures.mixture("mixtral"), torch.Generator().manual_seed(3)
    found = logits(model).double()
    reference = (found + 0.3 * torch.randn(found.shape, generator=generator, dtype=torch.float64)).float()
    p, q = reference.double().softmax(-1), found.softmax(-1)
    result = compare(model, reference, mixtures.tokens())
    assert result.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert result.max_difference == pytest.approx(float((reference - found).abs().max()), rel=1e-4)
    assert result.top1_agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.largest_logit == float(reference.abs().max())


def test_a_logit_that_is_no_number_is_an_infinite_difference() -> None:
    model = mixtures.mixture("mixtral")
    reference = logits(model)
    model.lm_head.weight[3] = torch.nan
    result = compare(model, reference, mixtures.tokens())
    assert isinstance(result, Verification) and result.max_difference == float("inf")

"""Weights leave a run and come back unchanged, into our code and into transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch.checkpoint import read_safetensors
from launch.errors import CheckpointError, ConfigError
from launch.stop import EXIT_USER_ERROR
from llm.data.codes import make_code
from llm.pretrained import Pretrained, export, load_pretrained
from tests.runs import VOCAB_SIZE, Ranks, Tiny, checkpoint, state, train

CPU = torch.device("cpu")


def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


def logits(loaded: Pretrained) -> Tensor:
    """float32 [3, 12, V] of a fixed batch."""
    x, language = tokens(), loaded.language
    inputs = x if language.family == "ar" else language.inputs(language.codec.encode(x))
    return loaded.model(inputs, lambda hidden, weight, bias: torch.nn.functional.linear(hidden, weight, bias))


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for family, run in runs.items():
        export(run, folder / family)
    return {family: folder / family for family in runs}


@pytest.mark.parametrize("family", ["ar", "mdm", "prime"])
def test_an_export_read_back_gives_the_same_logits(
    runs: dict[str, Path], exports: dict[str, Path], family: str
) -> None:
    ours, again = load_pretrained(runs[family], CPU), load_pretrained(exports[family], CPU)
    assert torch.equal(logits(again), logits(ours))
    assert again.language.codec.sha256 == ours.language.codec.sha256
    assert again.tokenizer.sha256 == ours.tokenizer.sha256
    assert (ours.step, ours.weights) == (6, "ema" if family == "prime" else "model")


def test_a_run_and_its_export_carry_the_code_of_their_tokens(tiny: Tiny, tmp_path: Path) -> None:
    code, run = tmp_path / "codes.json", tmp_path / "run"
    make_code(tiny.data, "similarity", code)
    settings = ("diffusion.shuffle=false", "diffusion.order=layers", "diffusion.objective=nelbo_layered")
    settings = (*settings, "diffusion.p_group=0", f"diffusion.code={code}")
    run.mkdir()
    (run / "code.json").write_text("of an earlier start that came to no checkpoint")
    train(tiny.prime, 1, run, *settings)
    assert (run / "code.json").read_bytes() == code.read_bytes()
    export(run, tmp_path / "export")
    ours = load_pretrained(run, CPU)
    code.unlink()
    for again in (load_pretrained(tmp_path / "export", CPU), load_pretrained(run, CPU)):
        assert torch.equal(logits(again), logits(ours))
        assert again.language.codec.sha256 == ours.language.codec.sha256
    train(tiny.prime, 1, run, *settings, "train.steps=8")  # goes on; the configuration still names the original
    assert load_pretrained(run, CPU).step == 8
    make_code(tiny.data, "frequency", code)
    (run / "code.json").write_bytes(code.read_bytes())
    with pytest.raises(CheckpointError, match="was made with another codec"):
        load_pretrained(run, CPU)
    with pytest.raises(AssertionError, match="codec"):
        train(tiny.prime, 1, run, *settings, "train.steps=10")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("Qwen3ForCausalLM", ()),
        ("LlamaForCausalLM", ("model.qk_norm=false", "model.kv_heads=1")),
        ("LlamaForCausalLM", ("model.qk_norm=false", "model.tied=true")),
    ],
    ids=["qwen3", "llama-grouped", "llama-tied"],
)
def test_transformers_opens_an_autoregressive_export_with_the_same_logits(
    tiny: Tiny, tmp_path: Path, name: str, overrides: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM

    run = train(tiny.ar, 1, tmp_path / "run", "train.steps=3", *overrides)
    said = export(run, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert type(model).__name__ == name
    torch.testing.assert_close(model(tokens()).logits, logits(load_pretrained(run, CPU)), rtol=1e-5, atol=1e-5)
    assert "read back by unmask: logits differ by at most 0;" in said and "opened by transformers" in said


def test_average_and_trained_weights_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    saved = state(runs["prime"], 6)
    for weights in ("ema", "model"):
        export(runs["prime"], tmp_path / weights, weights=weights)
        for name, tensor in read_safetensors(tmp_path / weights):
            assert torch.equal(tensor, saved[f"{weights}.{name}"])
    assert not torch.equal(saved["ema.head.weight"], saved["model.head.weight"])


def test_a_bf16_export_holds_the_rounded_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["prime"], tmp_path / "half", dtype=torch.bfloat16)
    saved = state(runs["prime"], 6)
    for name, tensor in read_safetensors(tmp_path / "half"):
        assert torch.equal(tensor, saved[f"ema.{name}"].bfloat16())


def test_an_export_never_overwrites(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        export(runs["ar"], exports["ar"])


# --- a new run from exported weights ---------------------------------------------------------------------------------

FROZEN = ("train.steps=1", "schedule.lr=1e-30", "engine.ema_decay=0.5", "optimizer.weight_decay=0")


@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "fsdp2")])
@pytest.mark.parametrize("family", ["ar", "prime"])
def test_a_new_run_starts_from_exported_weights_and_so_does_its_average(
    tiny: Tiny, exports: dict[str, Path], tmp_path: Path, family: str, world: int, strategy: str
) -> None:
    """After one step with no learning rate to speak of, the checkpoint still holds them."""
    overrides = (*FROZEN, f"engine.strategy={strategy}", f"initial_weights={exports[family]}")
    run = train(getattr(tiny, family), world, tmp_path / "run", *overrides)
    expected = dict(load_pretrained(exports[family], CPU).model.named_parameters())
    saved = state(run, 1)
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[f"model.{name}"], tensor, rtol=0, atol=1e-12)
        torch.testing.assert_close(saved[f"ema.{name}"], tensor, rtol=0, atol=1e-7)


def test_a_run_that_has_a_checkpoint_goes_on_from_it_and_needs_its_initial_weights_no_more(
    tiny: Tiny, exports: dict[str, Path], tmp_path: Path
) -> None:
    given = tmp_path / "given"
    shutil.copytree(exports["prime"], given)
    run = train(tiny.prime, 1, tmp_path / "run", "train.steps=2", f"initial_weights={given}")
    shutil.rmtree(given)
    train(tiny.prime, 1, run, "train.steps=3", f"initial_weights={given}")
    assert checkpoint(run, 3).exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("initial_weights=/no/where",), "/no/where is not an exported folder (it has no config.json)"),
        (("model.heads=4",), "have model.heads = 2, this run 4; make them equal"),
        (("diffusion.shuffle_seed=3",), "was made with another codec"),
    ],
)
def test_weights_that_mean_something_else_are_refused_by_every_process(
    tiny: Tiny, exports: dict[str, Path], tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    given = f"initial_weights={exports['prime']}"
    ended = Ranks(tiny.prime, 2, tmp_path / "run", "engine.strategy=fsdp2", given, *overrides).wait()
    assert ended.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended.output
    assert words in ended.output and "Traceback" not in ended.output


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over(runs: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    run = train(tiny.ar, 1, tmp_path / "run", "checkpoint.every_steps=2", "train.steps=4")
    (checkpoint(run, 4) / "trainer.json").write_text("{}")
    assert load_pretrained(run, CPU).step == 2
    (checkpoint(run, 2) / "trainer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"holds no whole checkpoint; train first: unmask resume {run}"):
        load_pretrained(run, CPU)


def test_a_folder_that_is_no_run_and_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a run folder \(config.yaml\) nor an exported folder"):
        load_pretrained(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="only folders written by `unmask export` are read"):
        load_pretrained(tmp_path, CPU)


def test_a_checkpoint_of_another_permutation_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["prime"], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("shuffle_seed: 0", "shuffle_seed: 1"))
    with pytest.raises(CheckpointError, match=r"another codec: seed 0 \(here 1\)"):
        load_pretrained(run, CPU)

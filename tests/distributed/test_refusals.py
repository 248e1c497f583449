"""What cannot work ends before the first step with exit code 2 and a sentence: the value, the limit, the remedy."""

import shutil
from pathlib import Path

import pytest

from launch.stop import EXIT_USER_ERROR
from tests.runs import VOCAB_SIZE, Ranks, Tiny, curve, steps_saved, train

TP = ("engine.strategy=fsdp2", "engine.tensor_parallel=2")


def refusal(config: Path, world: int, run: Path, *overrides: str) -> str:
    """What a run says that must end with code 2 on every rank and leave nothing new behind."""
    ended = Ranks(config, world, run, *overrides).wait(60)
    assert ended.codes == [EXIT_USER_ERROR] * world, ended.output
    assert "Traceback" not in ended.output and "error: " in ended.output
    return ended.output


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("train.stepps=10",), ("train.stepps", "did you mean 'train.steps'?")),
        (("train.steps=many",), ("train.steps = 'many'", "expected a whole number such as 2000, 10k or 1.5M")),
        (("optimizer.clip=0",), ("optimizer: ", "clip = 0", "need eps > 0, weight_decay >= 0, clip > 0 or null")),
        (("engine.strategy=zero9",), ("engine.strategy = 'zero9'", "one of 'ddp', 'fsdp2'")),
        (("engine.device=cuda",), ("engine.device = cuda", "torch sees no CUDA device", "engine.device=cpu")),
        (("train",), ("override 'train' is not of the form section.key=value",)),
        ((*TP, "engine.tensor_parallel=4"), ("engine.tensor_parallel = 4", "model.heads = 2", "use one of 1, 2")),
        ((*TP, "model.heads=4", "model.kv_heads=1"), ("does not divide model.kv_heads = 1", "use one of 1,")),
        ((*TP, "model.ffn=33"), ("engine.tensor_parallel = 2 does not divide model.ffn = 33", "use one of 1,")),
        ((*TP, "model.kind=dit", "model.init=mdlm"), ("tensor_parallel = 2", "model.kind = 'dit'", "kind: llama")),
        (TP[1:], ("engine.tensor_parallel = 2 works with strategy fsdp2, not ddp", "engine.strategy=fsdp2")),
        (TP, ("engine.tensor_parallel = 2 does not divide the world size 1; use one of [1]",)),
    ],
)
def test_a_wrong_key_type_or_value_is_named_with_what_would_do(
    tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = refusal(tiny.prime, 1, tmp_path / "run", *overrides)
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.sources=[{path: /no/such/data}]",), ("/no/such/data", "unmask data prepare")),
        (("data.block_length=100000000",), ("less than one block of 100000000", "lower block_length")),
        (("diffusion.granularity=20",), ("diffusion.granularity = 20", f"{VOCAB_SIZE} tokens", "at most 9")),
        (("data.vocab_size=299",), ("data.vocab_size = 299", f"a tokenizer of {VOCAB_SIZE} tokens", "set it to 300")),
        (("train.micro_batch=3",), ("global batch of 8", "micro-batch of 3", "divide it: 1, 2, 4, 8")),
    ],
)
def test_data_codec_and_batch_that_do_not_fit_are_refused_by_every_process(
    tiny: Tiny, tmp_path: Path, world: int, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = refusal(tiny.prime, world, tmp_path / "run", *overrides)
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_world_size_that_does_not_divide_the_batch_is_refused_with_those_that_do(tiny: Tiny, tmp_path: Path) -> None:
    said = refusal(tiny.prime, 3, tmp_path / "run")
    assert "global batch of 8 samples is not divisible by micro-batch 2 x world size 3 = 6" in said
    assert "it runs on 1, 2, 4 ranks (or choose a global batch of 12)" in said


def test_the_batch_is_divided_among_tensor_groups_and_not_among_ranks(tiny: Tiny, tmp_path: Path) -> None:
    said = refusal(tiny.prime, 4, tmp_path / "run", *TP, "train.micro_batch=8")
    assert "is not divisible by micro-batch 8 x world size 4 / tensor-parallel size 2 = 16" in said
    assert "it runs on 2 ranks (or choose a global batch of 16)" in said


@pytest.fixture(scope="module")
def finished(tiny: Tiny, shared: Path) -> Path:
    return train(tiny.prime, 1, shared / "finished")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("diffusion.shuffle_seed=1",), "diffusion.shuffle_seed = 0, this command says 1"),
        (("run.seed=5",), "run.seed = 0, this command says 5"),
        (("model.width=32",), "model.width = 16, this command says 32"),
        (("schedule.lr=0.5",), "schedule.lr = 0.01, this command says 0.5"),
    ],
)
def test_another_experiment_in_the_folder_of_a_run_is_refused(
    tiny: Tiny, finished: Path, overrides: tuple[str, ...], words: str
) -> None:
    said = refusal(tiny.prime, 1, finished, *overrides, "train.steps=9")
    assert words in said and f"unmask resume {finished}" in said and "run.dir=ANOTHER_FOLDER" in said
    assert steps_saved(finished) == [6] and len(curve(finished)) == 6


def test_a_checkpoint_of_another_permutation_is_refused_even_where_its_configuration_is_gone(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.yaml").unlink()
    said = refusal(tiny.prime, 1, run, "diffusion.shuffle_seed=1", "train.steps=9")
    assert "the checkpoint of step 6 was made with codec = " in said and "'seed': 0" in said and "'seed': 1" in said
    assert "use the configuration that made it" in said
    assert steps_saved(run) == [6] and len(curve(run)) == 6


def test_a_checkpoint_of_another_data_set_is_refused(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    """Same path, other tokens: the configuration cannot tell, the fingerprint can."""
    run, config = tmp_path / "run", tmp_path / "prime.yaml"
    shutil.copytree(finished, run)
    manifest = tiny.data / "manifest.json"
    other = tmp_path / "data"
    shutil.copytree(tiny.data, other)
    (other / "manifest.json").write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    config.write_text(f"base: {tiny.prime}\ndata: {{sources: [{{path: {other}}}]}}\n")
    (run / "config.yaml").unlink()
    assert "was made with data = " in refusal(config, 1, run, "train.steps=9")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "the launcher set RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_half_set_environment_is_no_run_of_one_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refusal(tiny.prime, 1, tmp_path / "run")
    assert words in said and "unset" in said

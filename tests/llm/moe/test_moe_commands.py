"""`unmask moe VERB`: what verbs print and write, and what they answer to what they cannot do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch.errors import ConfigError, UserError
from launch.stop import EXIT_USER_ERROR
from llm.moe.calibrate import read_calibration
from llm.moe.command_line import VERBS, main
from llm.moe.formats import plan, predicted_bytes
from llm.moe.merge import load_map, read_merge
from llm.moe.source import open_source
from llm.moe.statistics import load_statistics
from tests.shape_true import write_shape

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERT = 3 * 32 * 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes 512 tokens, text, and what `calibrate` and `merge` make of them."""
    folder = tmp_path_factory.mktemp("commands")
    write_shape(folder / "model", "mixtral-8x7b", layers=2, max_position_embeddings=512, **SMALL)
    lines = (json.dumps({"text": f"{i} sheep " * 20}) for i in range(400))
    (folder / "text.jsonl").write_text("\n".join(lines))
    assert main(calibration(folder, folder / "statistics")) == 0
    merged = ["--statistics", str(folder / "statistics"), "--out", str(folder / "merged"), "experts=4"]
    assert main(["merge", str(folder / "model"), *merged]) == 0
    return folder


def calibration(folder: Path, out: Path, *more: str) -> list[str]:
    text = ["--data", str(folder / "text.jsonl"), "--blocks", "2", "--block-length", "64"]
    return ["calibrate", str(folder / "model"), *text, "--out", str(out), *more]


# --- what they do ----------------------------------------------------------------------------------------------------


def test_calibrate_and_merge_leave_what_later_verbs_read(folder: Path) -> None:
    source = open_source(folder / "model")
    assert read_calibration(folder / "statistics", source).blocks.shape == (2, 64)
    assert read_merge(folder / "merged")["recipe"]["experts"] == 4
    assert all(load_map(folder / "merged", layer).max() == 3 for layer in (0, 1))


def test_a_dry_calibration_counts_from_shapes_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(calibration(folder, tmp_path / "out", "--dry-run", "--nproc", "2")) == 0
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["text"] == "2 blocks x 64 = 128 tokens, 64 a rank"
    assert rows["layers"] == "2 of 2 with 8 experts"
    assert rows["work"].startswith(f"{2.0 * 128 * 2 * (8 + 2) * EXPERT:.3g} FLOPs")
    assert rows["memory"].startswith(f"{8 * EXPERT * 2:,} bytes of a layer's experts, {64 * 32 * 4:,} of text")
    assert not (tmp_path / "out").exists()


def test_a_dry_merge_foretells_the_size_that_an_export_has(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--statistics", str(folder / "statistics"), "--out", str(tmp_path / "out"), "experts=3"]
    assert main(["merge", str(folder / "model"), *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{2 * 5 * EXPERT:,} fewer" in shown and "8 -> 3 in 2 layers" in shown and "is not read again" in shown
    before, after = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) -> ([\d,]+) bytes", shown)[0])
    source = open_source(folder / "model")
    assert after == predicted_bytes(plan(source, "compact", {0: 3, 1: 3}))
    assert before - after == 2 * (5 * EXPERT * 2 - 8 * 8)  # bfloat16 weights, and two maps of int64
    assert main(["merge", str(folder / "model"), *words, "fit=mixture", "--dry-run"]) == 0
    assert "goes through the layers again" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_explain_names_every_key_with_its_meaning_and_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("linkage: single\n")
    assert main(["merge", "--explain", "--recipe", str(tmp_path / "recipe.yaml"), "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "experts = 1   [required]\n    r that each layer keeps" in shown
    assert f"linkage = 'single'   [{tmp_path / 'recipe.yaml'}]\n    hierarchical: the distance" in shown
    assert "seed = 3   [override]" in shown and "group = 'hierarchical'   [default]" in shown
    assert main(["merge", "--explain", "experts=4"]) == 0
    assert "experts = 4   [override]" in capsys.readouterr().out


def test_inspect_draws_a_layer_and_lists_its_clusters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "picture.png"
    words = ["inspect", str(folder / "statistics"), "--layer", "1", "--experts", "4", "--out", str(picture)]
    assert main(words) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == str(picture)
    listed = {int(row.split("|")[1]): row.split("|")[2:4] for row in rows[2:]}
    expert_map = load_map(folder / "merged", 1).tolist()  # by the same representation and linkage
    statistics, _ = load_statistics(folder / "statistics" / "layer_001.safetensors")
    for cluster, (members, share) in listed.items():
        experts = [int(expert) for expert in members.split(",")]
        assert experts == [j for j, c in enumerate(expert_map) if c == cluster]
        expected = float(statistics.selections[experts].sum() / statistics.selections.sum())
        assert share.strip() == f"{expected:.1%}"
    assert sorted(listed) == [0, 1, 2, 3]
    words = ["inspect", str(folder / "statistics"), "--layer", "0", "--representation", "0.5*output+weights"]
    assert main(words) == 0 and (folder / "statistics" / "layer_000.png").exists()


def test_report_shows_sizes_and_what_each_layer_loses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "merged", tmp_path / "merged")
    words = ["--data", str(folder / "text.jsonl"), "--blocks", "2", "--block-length", "32"]
    assert main(["report", str(tmp_path / "merged"), *words]) == 0
    page = (tmp_path / "merged" / "report.md").read_text()
    assert page in capsys.readouterr().out
    tree = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert tree["parameters_dropped"] == 2 * 4 * EXPERT
    assert tree["bytes_before"] - tree["bytes_compact"] == 2 * (4 * EXPERT * 2 - 8 * 8)
    assert tree["expert_flops_of_a_token"] == tree["expert_flops_of_a_token_after"] == 2 * 2 * 2 * EXPERT
    assert [layer["experts"] for layer in tree["layers"]] == [4, 4]
    for layer in tree["layers"]:
        expert_map = load_map(folder / "merged", layer["layer"])
        assert layer["largest_cluster"] == int(expert_map.bincount().max())
        assert layer["dropped_mass"] == 0.0 and 0 < layer["relative_error"] < 2
        assert layer["distinct_experts"] == pytest.approx(2 - layer["collisions"])  # of two selected experts
    assert f"| 0 | 4 | {tree['layers'][0]['largest_cluster']} |" in page


def test_upcycle_and_compare_run_from_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    llama = LlamaConfig(vocab_size=256, num_hidden_layers=2, max_position_embeddings=64, **SMALL)
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "dense")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "dense" / file.name)
    to = tmp_path / "mixture"
    assert main(["upcycle", str(tmp_path / "dense"), "--to", str(to), "--experts", "4", "--noise", "0.5"]) == 0
    assert capsys.readouterr().out == f"{to}: mixtral of 4 experts, 2 a token\n"
    comparison = {
        "models": {"small": [str(to)]},
        "experts": [2],
        "recipes": {"hc": {}},
        "calibration": {"data": [str(folder / "text.jsonl")], "blocks": 2, "block_length": 64},
        "judging": {"blocks": 3, "block_length": 32, "continuations": 2, "beginning": 8, "length": 6},
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    words = [str(tmp_path / "comparison.yaml"), "recipes.reap={group: prune}", "--out", str(tmp_path / "out")]
    assert main(["compare", *words]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["original", "hc", "reap"]


# --- what they refuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("inpsect", "there is no verb 'inpsect'; did you mean 'inspect'?"),
        ("calibrate {model} --data {text} --out {out} --blocks 0", "blocks = 0; the smallest is 1"),
        ("calibrate {model} --data {text} --out {out} --block-length 513", "--block-length 513; .* takes 512 tokens"),
        ("calibrate {model} --data {text} --out {out} --block-length 64 --dry-run --nproc 0", "--nproc 0"),
        ("calibrate {model} --data {text}=0 --out {out} --block-length 64", "is a positive number"),
        ("calibrate {model} --data nowhere.jsonl --out {out} --block-length 64", "no file or folder nowhere.jsonl"),
        ("calibrate {out} --data {text} --out {out}/s", "has no config.json"),
        ("merge {model} --statistics {statistics} --out {out} experts=9", "9 clusters of a layer's 8 experts"),
        ("merge {model} --statistics {statistics} --out {out} experts=9 --dry-run", "9 clusters of a layer's 8"),
        ("merge {model} --statistics {statistics} --out {out} experts=0", "experts = 0"),
        ("merge {model} --statistics {statistics} --out {out}", "the key experts is required"),
        ("merge {model} --statistics {statistics} --out {out} experts=4 group=hirarchical", "mean 'hierarchical'?"),
        ("merge {model} --statistics {statistics} --out {out} experts=4 linkige=single", "did you mean 'linkage'?"),
        ("merge {model} --statistics {statistics} --out {out} experts=4 --nproc 0", "--nproc 0; the smallest is 1"),
        ("merge {model} --statistics {model} --out {out} experts=4", "is no folder of `unmask moe calibrate`"),
        ("merge --statistics {statistics} --out {out} experts=4", "needs one MODEL, --statistics and --out"),
        ("merge {model} experts=4", "needs one MODEL, --statistics and --out"),
        ("merge --explain experst=4", "did you mean 'experts'?"),
        ("inspect {statistics} --layer 7", r"has statistics of layers \[0, 1\]"),
        ("inspect {model} --layer 0", "holds no statistics; calibrate first"),
        ("inspect {statistics} --layer 1 --experts 9 --out {out}/a.png", "9 clusters of a layer's 8 experts"),
        ("inspect {statistics} --layer 1 --representation router-logits", "did you mean 'router_logits'?"),
        ("report {merged} --data {text} --blocks 0", "blocks = 0; the smallest is 1"),
        ("report {merged} --data {text} --block-length 513", "--block-length 513; .* takes 512 tokens"),
        ("report {model} --data {text}", "is no folder of `unmask moe merge`"),
        ("export {model} --to {out}", "is no folder of `unmask moe merge`"),
        ("upcycle {model} --to {out}", "only a Llama with silu"),
        ("compare nowhere.yaml --out {out}", "there is no configuration file nowhere.yaml"),
    ],
)
def test_what_cannot_be_done_is_answered_in_one_sentence_before_anything_is_written(
    folder: Path, line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: folder / name for name in ("model", "statistics", "merged")}
    filled = line.format(**places, text=folder / "text.jsonl", out=tmp_path / "out")
    with pytest.raises(UserError) as refusal:
        main(filled.split())
    assert re.search(words, str(refusal.value)) and "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""


def test_through_unmask_an_error_is_a_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = cli.metadata.EntryPoint("moe", "llm.moe.command_line:main", "unmask.verbs")
    monkeypatch.setattr(cli.metadata, "entry_points", lambda **_: [entry])
    assert cli.main(["moe", "merge", "experts=4", "group=hirarchical"]) == EXIT_USER_ERROR
    answer = capsys.readouterr().err
    assert answer.startswith("error: unmask moe merge needs one MODEL") and answer.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], *([verb, "--help"] for verb in VERBS)])
def test_every_verb_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 0
    assert f"usage: unmask moe {arguments[0] if len(arguments) == 2 else '[-h] VERB'}" in shown.out + shown.err
    if arguments in ([], ["--help"]):  # as `unmask` alone
        assert all(verb in shown.out for verb in VERBS)


def test_a_choice_that_does_not_exist_is_refused_by_the_parser(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["upcycle", "x", "--to", "y", "--kind", "gpt"], ["export", "x", "--to", "y", "--format", "compat"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2 and "invalid choice" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        main(["inspect", str(folder / "statistics"), "--layer", "-1"])

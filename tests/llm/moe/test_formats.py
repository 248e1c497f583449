"""Merged models on disk: exact where they promise it, as large as predicted, opened by whom they are made for."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.checkpoint import read_safetensors
from launch.errors import CheckpointError, ConfigError
from llm.moe import modeling
from llm.moe.experts import DROPPED, Experts, MergedLayer
from llm.moe.formats import Export, FinishedLayer, Format, plan, predicted_bytes, write
from llm.moe.source import open_source
from tests import mixtures
from tests.disk import Disk
from tests.mixtures import ARCHITECTURES, blocks_of, logits

FORMATS = ("compact", "expanded", "shrunk")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
formats = pytest.mark.parametrize("form", FORMATS)
DENSE = {"mixtral": {}, "qwen2_moe": {"mlp_only_layers": [1]}, "qwen3_moe": {"decoder_sparse_step": 2}}


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """A model on disk whose experts are equal within groups, and its lossless merge."""

    folder: Path
    model: transformers.PreTrainedModel
    layers: dict[int, MergedLayer]

    def finished(self, form: str) -> list[FinishedLayer]:
        """For shrunk with the rows of each group's first member."""
        return [
            FinishedLayer(index=i, merged=merged, router=self._first_rows(i) if form == "shrunk" else None)
            for i, merged in self.layers.items()
        ]

    def _first_rows(self, layer: int) -> Tensor:
        groups = self.layers[layer].expert_map.tolist()
        first = [groups.index(group) for group in range(max(groups) + 1)]
        return blocks_of(self.model)[layer].gate.weight[first]


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """In several files, with a tokenizer."""
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder, max_shard_size="60KB")
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(mixtures.VOCAB_SIZE)}, unk_token="word0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Merged]:
    """By architecture: five groups in each of two or three layers with experts."""
    found = {}
    for architecture in ARCHITECTURES:
        model = mixtures.mixture(architecture, num_hidden_layers=4, **DENSE[architecture])
        layers = mixtures.plant_duplicates(model, 5)
        folder = save(model, tmp_path_factory.mktemp(architecture) / "source")
        found[architecture] = Merged(folder=folder, model=model, layers=layers)
    return found


@pytest.fixture(scope="module")
def exports(merged: dict[str, Merged]) -> dict[tuple[str, str], Path]:
    """The folder of each architecture and format."""
    folders = {}
    for architecture, one in merged.items():
        before = hashes(one.folder)
        for form in FORMATS:
            to = one.folder.with_name(form)
            written = write(planned(one, form), to, one.finished(form), lambda _: {"method": "made up"})
            assert written > 0
            folders[architecture, form] = to
        assert hashes(one.folder) == before
    return folders


def planned(one: Merged, form: Format, **settings: Any) -> Export:
    counts = {i: len(layer.experts) for i, layer in one.layers.items()}
    return plan(open_source(one.folder), form, counts, **settings)


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def opened(folder: Path) -> transformers.PreTrainedModel:
    modeling.register()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def nothing(_: Path) -> Mapping[str, Any]:
    return {}


# --- what the formats compute -----------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("form", ["compact", "expanded"])
def test_a_lossless_merge_on_disk_gives_the_logits_and_the_text_of_the_original(
    merged: dict[str, Merged], exports: dict[tuple[str, str], Path], architecture: str, form: str
) -> None:
    model, found = merged[architecture].model, opened(exports[architecture, form])
    assert (logits(found) - logits(model)).abs().max() < 1e-6
    settings = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(mixtures.tokens(), **settings), model.generate(mixtures.tokens(), **settings))


@architectures
def test_compact_takes_layers_of_different_numbers_of_experts(
    merged: dict[str, Merged], architecture: str, tmp_path: Path
) -> None:
    one = merged[architecture]
    counts = {layer: 2 + i for i, layer in enumerate(one.layers)}
    layers = {
        i: mixtures.merge_means(blocks_of(one.model)[i], mixtures.groups(one.model.config.num_experts, count))
        for i, count in counts.items()
    }
    export = plan(open_source(one.folder), "compact", counts)
    write(export, tmp_path / "compact", [FinishedLayer(index=i, merged=m) for i, m in layers.items()], nothing)
    found = opened(tmp_path / "compact")
    assert {i: block.experts.num_experts for i, block in blocks_of(found).items()} == counts
    assert torch.equal(logits(found), logits(mixtures.compact(one.model, layers)))
    with pytest.raises(ConfigError, match=f"2 to {1 + len(counts)} experts.*one number for all layers; write compact"):
        plan(open_source(one.folder), "shrunk", counts)


@architectures
def test_a_pruning_is_the_same_in_compact_and_shrunk(
    merged: dict[str, Merged], architecture: str, tmp_path: Path
) -> None:
    one, layers = merged[architecture], []
    for index, block in blocks_of(one.model).items():
        kept = torch.tensor([6, 1, 3, 4, 7])  # the row of a merged expert is found wherever its expert was
        expert_map = torch.full((block.experts.num_experts,), DROPPED).index_put((kept,), torch.arange(5))
        experts = mixtures.experts_of(block).take(kept)
        layers.append(FinishedLayer(index=index, merged=MergedLayer(expert_map=expert_map, experts=experts)))
    for form in ("compact", "shrunk"):
        write(planned(one, form, prunes=True), tmp_path / form, layers, nothing)
    compact, shrunk = opened(tmp_path / "compact"), opened(tmp_path / "shrunk")
    assert (logits(compact) - logits(shrunk)).abs().max() < 1e-6
    loops = mixtures.with_loops(opened(one.folder), {layer.index: layer.merged for layer in layers})
    assert (logits(compact) - logits(loops)).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="a pruned expert has none; write shrunk, or compact"):
        planned(one, "expanded", prunes=True)
    with pytest.raises(ConfigError, match="has pruned experts, which expanded cannot hold"):
        write(planned(one, "expanded"), tmp_path / "expanded", layers, nothing)
    assert not (tmp_path / "expanded").exists()


@architectures
def test_shrunk_is_exact_if_one_member_of_each_cluster_is_all_that_is_ever_selected(
    architecture: str, tmp_path: Path
) -> None:
    model = mixtures.mixture(architecture)
    model.model.embed_tokens.weight[:, 0] = 30.0  # so that a router can shut out experts whatever the token
    layers = {
        i: mixtures.merge_means(b, mixtures.groups(b.experts.num_experts, 5)) for i, b in blocks_of(model).items()
    }
    finished = []
    for index, block in blocks_of(model).items():
        groups = layers[index].expert_map.tolist()
        first = torch.tensor([groups.index(group) for group in range(5)])
        others = torch.ones(len(groups), dtype=torch.bool).index_fill(0, first, False)
        block.gate.weight[others, 0] = -1e3
        finished.append(FinishedLayer(index=index, merged=layers[index], router=block.gate.weight[first]))
    one = Merged(folder=save(model, tmp_path / "source"), model=model, layers=layers)
    write(planned(one, "shrunk"), tmp_path / "shrunk", finished, nothing)
    assert (logits(opened(tmp_path / "shrunk")) - logits(mixtures.compact(model, layers))).abs().max() < 1e-5


@architectures
def test_shrunk_is_exact_for_equal_rows_in_clusters_of_equal_size_that_divides_the_top_k(
    architecture: str, tmp_path: Path
) -> None:
    model = mixtures.mixture(architecture)
    half = model.config.num_experts // 2
    layers = mixtures.plant_duplicates(model, half)
    for index, block in blocks_of(model).items():
        rows = block.gate.weight[:half].clone()
        block.gate.weight.copy_(rows[layers[index].expert_map])
    one = Merged(folder=save(model, tmp_path / "source"), model=model, layers=layers)
    top_k = model.config.num_experts_per_tok // 2
    write(planned(one, "shrunk", top_k=top_k), tmp_path / "shrunk", one.finished("shrunk"), nothing)
    assert (logits(opened(tmp_path / "shrunk")) - logits(model)).abs().max() < 1e-6
    write(planned(one, "shrunk"), tmp_path / "as-before", one.finished("shrunk"), nothing)
    if architecture != "mixtral" or half > 2:
        assert (logits(opened(tmp_path / "as-before")) - logits(model)).abs().max() > 1e-2


@architectures
@formats
def test_no_merge_at_all_is_the_original(
    merged: dict[str, Merged], architecture: str, form: Format, tmp_path: Path
) -> None:
    one = merged[architecture]
    layers = [
        FinishedLayer(
            index=i, merged=MergedLayer(expert_map=torch.arange(b.experts.num_experts), experts=mixtures.experts_of(b))
        )
        for i, b in blocks_of(one.model).items()
    ]
    counts = {layer.index: len(layer.merged.experts) for layer in layers}
    write(plan(open_source(one.folder), form, counts), tmp_path / form, layers, nothing)
    assert (logits(opened(tmp_path / form)) - logits(one.model)).abs().max() < 1e-6
    if form != "compact":
        original = dict(read_safetensors(one.folder))
        assert all(torch.equal(original[name], tensor) for name, tensor in read_safetensors(tmp_path / form))


# --- what lies on disk ------------------------------------------------------------------------------------------------


@architectures
@formats
def test_all_but_routed_experts_and_routers_is_copied_bit_by_bit(
    merged: dict[str, Merged], exports: dict[tuple[str, str], Path], architecture: str, form: str
) -> None:
    original = dict(read_safetensors(merged[architecture].folder))
    found = dict(read_safetensors(exports[architecture, form]))
    kept = [name for name in original if ".experts." not in name and ".gate.weight" not in name]
    assert all(torch.equal(original[name], found[name]) for name in kept)
    if architecture == "qwen2_moe":
        assert any("shared_expert_gate" in name for name in kept) and any(".1.mlp.up_proj" in name for name in kept)
    others = {name for name in found if ".experts." not in name and "gate.weight" not in name and "_map" not in name}
    assert others == set(kept) - {name for name in kept if "gate.weight" in name}


@architectures
@formats
def test_the_size_is_the_predicted_one(
    merged: dict[str, Merged], exports: dict[tuple[str, str], Path], architecture: str, form: Format
) -> None:
    one, folder = merged[architecture], exports[architecture, form]
    entries = dict(read_safetensors(folder))
    predicted = predicted_bytes(planned(one, form))
    assert sum(tensor.numel() * tensor.element_size() for tensor in entries.values()) == predicted
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < files - predicted < 150 * len(entries)
    original = sum(tensor.numel() * 4 for _, tensor in read_safetensors(one.folder))
    experts, width = one.model.config.num_experts, 32
    saved = len(one.layers) * (experts - 5) * 4 * 3 * width * (48 if architecture == "mixtral" else 24)
    router = len(one.layers) * (experts - 5) * 4 * width
    maps = len(one.layers) * experts * 8
    assert original - predicted == {"compact": saved - maps, "expanded": 0, "shrunk": saved + router}[form]


def test_the_prediction_for_mixtral_with_four_experts_is_the_known_number_of_parameters(tmp_path: Path) -> None:
    config = transformers.MixtralConfig()  # those of Mixtral-8x7B
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: t.shape for name, t in model.state_dict().items() if ".mlp." not in name}
    for layer in range(32):
        block = f"model.layers.{layer}.block_sparse_moe."
        shapes[f"{block}gate.weight"] = (8, 4096)
        for expert in range(8):
            matrices = {"w1": (14336, 4096), "w2": (4096, 14336), "w3": (14336, 4096)}
            shapes |= {f"{block}experts.{expert}.{name}.weight": shape for name, shape in matrices.items()}
    files: dict[str, dict[str, Any]] = {}  # table of contents of each: one a layer
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "none"
        table = files.setdefault(f"layer-{layer}.safetensors", {})
        start = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        end = start + 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    for file, table in files.items():
        header = json.dumps(table).encode()
        with (tmp_path / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            size = max(entry["data_offsets"][1] for entry in table.values())
            stream.truncate(8 + len(header) + size)  # a hole: it takes no space
    index = {"weight_map": {name: file for file, table in files.items() for name in table}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    counts = dict.fromkeys(range(32), 4)
    assert predicted_bytes(plan(source, "expanded", counts)) == 2 * 46_702_792_704
    assert predicted_bytes(plan(source, "shrunk", counts)) == 2 * 24_153_690_112
    rows, maps = 32 * 4 * 4096, 32 * 8 * 8  # compact keeps the router's other rows
    assert predicted_bytes(plan(source, "compact", counts)) == 2 * (24_153_690_112 + rows) + maps


@architectures
@formats
def test_a_folder_has_its_settings_tokenizer_and_report(
    merged: dict[str, Merged], exports: dict[tuple[str, str], Path], architecture: str, form: str
) -> None:
    folder, model = exports[architecture, form], merged[architecture].model
    config = json.loads((folder / "config.json").read_text())
    keys = {
        "mixtral": ["num_local_experts"],
        "qwen2_moe": ["num_experts"],
        "qwen3_moe": ["num_experts", "num_local_experts"],
    }
    count = 5 if form == "shrunk" else model.config.num_experts
    assert [config[key] for key in keys[architecture]] == [count] * len(keys[architecture])
    assert config["model_type"] == ("hcsmoe_" if form == "compact" else "") + architecture
    assert json.loads((folder / "merge_report.json").read_text()) == {"method": "made up"}
    assert (folder / "generation_config.json").exists()
    modeling.register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("word3")["input_ids"] == [3]
    assert (folder / "modeling.py").exists() == (form == "compact")


@formats
def test_files_are_no_larger_than_asked_and_layers_are_drawn_one_at_a_time(
    merged: dict[str, Merged], form: Format, tmp_path: Path
) -> None:
    one, alive = merged["qwen3_moe"], []

    def layers() -> Iterator[FinishedLayer]:
        for index, layer in enumerate(one.finished(form)):
            assert all(ref() is None for ref in alive)
            copy = Experts(gate_up=layer.merged.experts.gate_up.clone(), down=layer.merged.experts.down.clone())
            new = MergedLayer(expert_map=layer.merged.expert_map, experts=copy)
            alive.append(weakref.ref(new))
            yield FinishedLayer(index=layer.index, merged=new, router=layer.router)
            del new, copy
            assert index < 2

    write(planned(one, form), tmp_path / form, layers(), nothing, max_file_bytes=60_000)
    files = list((tmp_path / form).glob("*.safetensors"))
    assert len(files) > 2 and len(alive) == 2
    assert max(path.stat().st_size for path in files) < 65_000
    assert (tmp_path / form / "model.safetensors.index.json").exists()
    assert torch.equal(logits(opened(tmp_path / form)), logits(opened(tmp_path / form)))


def test_experts_are_stored_in_the_type_of_the_source(tmp_path: Path) -> None:
    model = mixtures.mixture("qwen3_moe")
    one = Merged(folder=tmp_path / "source", model=model, layers=mixtures.plant_duplicates(model, 5))
    save(model.to(torch.bfloat16), one.folder)
    for form in FORMATS:
        write(planned(one, form), tmp_path / form, one.finished(form), nothing)
        found = dict(read_safetensors(tmp_path / form))
        assert {t.dtype for name, t in found.items() if not name.endswith("_map")} == {torch.bfloat16}


# --- who opens it -----------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folders, tokens, answer = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
found = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=name.startswith("compact"))
    with torch.no_grad():
        found[name] = model(tokens).logits
    print(name, type(model).__module__)
assert not any(name == "llm" or name.startswith("llm.") for name in sys.modules)
save_file(found, answer)
"""


def test_processes_that_do_not_know_us_open_stock_formats_and_compact_by_its_own_code(
    merged: dict[str, Merged], exports: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folders = {f"{form}-{architecture}": str(folder) for (architecture, form), folder in exports.items()}
    answer = tmp_path / "answer.safetensors"
    command = [sys.executable, "-c", STRANGER, json.dumps(folders), json.dumps(mixtures.tokens().tolist()), str(answer)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment.pop("HF_MODULES_CACHE", None)
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    classes = dict(line.split() for line in process.stdout.splitlines())
    found = load_file(answer)
    for architecture, one in merged.items():
        assert classes[f"compact-{architecture}"].startswith("transformers_modules.")
        for form in ("expanded", "shrunk"):
            assert classes[f"{form}-{architecture}"].startswith("transformers.models.")
        for form in ("compact", "expanded"):
            assert (found[f"{form}-{architecture}"] - logits(one.model)).abs().max() < 1e-6
        again = logits(opened(exports[architecture, "shrunk"]))
        assert (found[f"shrunk-{architecture}"] - again).abs().max() < 1e-6


@architectures
def test_an_expert_that_is_missing_from_a_stock_format_is_not_made_up(
    merged: dict[str, Merged], architecture: str, tmp_path: Path
) -> None:
    one = merged[architecture]
    for form in ("expanded", "shrunk"):
        write(planned(one, form), tmp_path / form, one.finished(form), nothing)
        file = tmp_path / form / "model.safetensors"
        tensors = load_file(file)
        del tensors[open_source(one.folder).shape.architecture.expert(max(one.layers), 4, "up")]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises((RuntimeError, ValueError)):
            opened(tmp_path / form)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_before_anything_is(merged: dict[str, Merged], tmp_path: Path) -> None:
    one = merged["mixtral"]
    before = hashes(one.folder.parent)

    def attempt(form: Format, to: Path, layers: list[FinishedLayer], **settings: Any) -> None:
        write(planned(one, form, **settings), to, layers, nothing)

    with pytest.raises(ConfigError, match=r"format = 'compct' is unknown.*did you mean 'compact'"):
        attempt("compct", tmp_path / "new", [])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot select 6 of the 5 experts"):
        attempt("shrunk", tmp_path / "new", [], top_k=6)
    with pytest.raises(ConfigError, match="top_k = 1 has no meaning for compact"):
        attempt("compact", tmp_path / "new", [], top_k=1)
    with pytest.raises(ConfigError, match="shrunk needs a router of 5 rows; choose a router policy"):
        attempt("shrunk", tmp_path / "new", one.finished("compact"))
    with pytest.raises(ConfigError, match="lies in the source"):
        attempt("compact", one.folder / "new", one.finished("compact"))
    (tmp_path / "old").mkdir()
    with pytest.raises(CheckpointError, match="old exists already"):
        attempt("compact", tmp_path / "old", one.finished("compact"))
    with pytest.raises(ValueError, match="were never given"):
        attempt("compact", tmp_path / "new", one.finished("compact")[:1])
    with pytest.raises(ValueError, match="came twice"):
        attempt("compact", tmp_path / "new", one.finished("compact")[:1] * 2)
    few = dict.fromkeys(one.layers, 1)
    with pytest.raises(ConfigError, match="cannot select 2 of the 1 experts that shrunk keeps; allow a lower top k"):
        plan(open_source(one.folder), "shrunk", few)
    assert plan(open_source(one.folder), "shrunk", few, top_k=1).top_k == 1
    assert hashes(one.folder.parent) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_failure_on_the_way_leaves_no_folder(merged: dict[str, Merged], tmp_path: Path) -> None:
    one = merged["qwen2_moe"]

    def layers() -> Iterator[FinishedLayer]:
        yield one.finished("compact")[0]
        raise KeyboardInterrupt

    def report(folder: Path) -> Mapping[str, Any]:
        assert (folder / "config.json").exists() and opened(folder) is not None
        raise CheckpointError("not as it should be")

    with pytest.raises(KeyboardInterrupt):
        write(planned(one, "compact"), tmp_path / "new", layers(), nothing, max_file_bytes=60_000)
    with pytest.raises(CheckpointError, match="not as it should be"):
        write(planned(one, "compact"), tmp_path / "new", one.finished("compact"), report)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_left_as_it_was(merged: dict[str, Merged], tmp_path: Path) -> None:
    one = merged["qwen2_moe"]
    disk = Disk(tmp_path / "disk", "size=4m")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disk)
        except subprocess.CalledProcessError:
            pytest.skip("mounting a small tmpfs needs root")
        disk.fill(left=100_000)
        with pytest.raises(CheckpointError, match=r"new needs 0\.\d\d MB, and 0\.\d\d MB are free there; free space"):
            write(planned(one, "expanded"), disk.folder / "new", one.finished("expanded"), nothing)
        disk.empty()

        def layers() -> Iterator[FinishedLayer]:
            for layer in one.finished("expanded"):
                disk.fill(left=20_000)  # while it is being written
                yield layer

        with pytest.raises(CheckpointError, match=r"new was not written \(.*No space left on device.*free space there"):
            write(planned(one, "expanded"), disk.folder / "new", layers(), nothing, max_file_bytes=60_000)
        disk.empty()
        assert list(disk.folder.iterdir()) == []

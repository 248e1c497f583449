from dataclasses import dataclass, field
from typing import Literal

import pytest

from launch import config
from launch.config import Count, Seconds
from launch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: Count = 10  # optimizer steps
    lr: float = 1e-3
    every: Seconds = 60.0
    kind: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    ema: float | None = None

    def check(self, path: str) -> None:
        if self.steps < 1:
            raise ConfigError(f"{path}.steps = {self.steps}; the smallest is 1")


@dataclass(frozen=True, kw_only=True)
class Root:
    name: str
    train: Train = field(default_factory=Train)


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


def test_later_bases_win_and_lists_are_replaced_whole(tmp_path):
    write(tmp_path, "a.yaml", "name: a\ntrain: {steps: 5, betas: [0.1, 0.2], lr: 1e-4}")
    write(tmp_path, "b.yaml", "train: {steps: 6}")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\ntrain: {betas: [0.5, 0.6]}")
    loaded, sources = config.load(Root, path, ["train.ema=0.999"])
    assert loaded == Root(name="a", train=Train(steps=6, betas=(0.5, 0.6), lr=1e-4, ema=0.999))
    assert sources["train.steps"].endswith("b.yaml") and sources["train.ema"] == "override"


def test_the_resolved_config_reads_back_equal(tmp_path):
    path = write(tmp_path, "a.yaml", "name: a\ntrain: {steps: 10k, every: 2h}")
    loaded, _ = config.load(Root, path)
    assert loaded.train.steps == 10_000 and loaded.train.every == 7200.0
    again, _ = config.load(Root, write(tmp_path, "b.yaml", config.dump(loaded)))
    assert again == loaded


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\ntrian: {}", ["trian", "did you mean 'train'", "bad.yaml"]),
        ("name: a\ntrain: {step: 3}", ["train.step", "did you mean 'train.steps'"]),
        ("name: a\ntrain: {steps: many}", ["train.steps", "'many'", "whole number"]),
        ("name: a\ntrain: {steps: 1.5}", ["train.steps", "1.5"]),
        ("name: a\ntrain: {kind: cosin}", ["train.kind", "did you mean 'cosine'"]),
        ("name: a\ntrain: {betas: [1]}", ["train.betas", "2 values"]),
        ("name: a\ntrain: {ema: yes}", ["train.ema", "True"]),
        ("name: a\ntrain: 3", ["train = 3"]),
        ("train: {}", ["name", "required"]),
        ("name: a\ntrain: {steps: 0}", ["train.steps = 0", "smallest is 1"]),
        ("- a", ["mapping"]),
        ("name: [", ["YAML"]),
        ("name: a\nbase: bad.yaml", ["circle"]),
        ("name: a\nbase: missing.yaml", ["missing.yaml", "base"]),
    ],
)
def test_a_bad_file_is_refused_with_the_key_the_value_and_the_remedy(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        config.load(Root, write(tmp_path, "bad.yaml", text))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("override", ["steps", "train.steps:3", "name.first=3", "train.nothing=1"])
def test_a_bad_override_is_refused(tmp_path, override):
    with pytest.raises(ConfigError):
        config.load(Root, write(tmp_path, "a.yaml", "name: a"), [override])


def test_a_misspelt_file_name_is_answered_with_the_nearest_one(tmp_path):
    write(tmp_path, "primev2.yaml", "name: a")
    with pytest.raises(ConfigError, match=r"did you mean .*primev2\.yaml"):
        config.load(Root, tmp_path / "primev.yaml")


def test_explain_shows_value_source_and_comment(tmp_path):
    loaded, sources = config.load(Root, write(tmp_path, "a.yaml", "name: a"), ["train.steps=3"])
    assert config.explain(loaded, sources, "train.steps") == "train.steps = 3   [override]\n    optimizer steps"
    with pytest.raises(ConfigError, match="no key"):
        config.explain(loaded, sources, "train.stps")


def test_difference_names_the_leaves_that_differ():
    assert config.difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == {
        "a.c": (2, 3),
        "d": (None, 4),
    }

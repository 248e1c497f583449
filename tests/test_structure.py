"""The arrows of the architecture and the house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for room in ("launch", "llm") for p in (ROOT / room).rglob("*.py"))


def imports(path):
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def within(path, *folders):
    return any((ROOT / folder) in path.parents for folder in folders)


def imports_of_tree(folder, *prefixes):
    found = {}
    for path in SOURCES:
        if within(path, folder):
            bad = [name for name in imports(path) if name.startswith(prefixes)]
            if bad:
                found[str(path.relative_to(ROOT))] = bad
    return found


def test_the_ground_floor_imports_no_room():
    assert imports_of_tree("launch", "llm", "vision", "rl") == {}


def test_the_diffusion_library_imports_nothing_but_itself_torch_and_numpy():
    for path in SOURCES:
        if within(path, "llm/diffusion"):
            for name in imports(path):
                assert name.split(".")[0] not in ("launch", "yaml", "transformers"), (path, name)
                assert not name.startswith("llm") or name.startswith("llm.diffusion"), (path, name)


@pytest.mark.parametrize(
    ("folder", "others"),
    [("llm/data", ("llm.backbones", "llm.diffusion")), ("llm/backbones", ("llm.data", "llm.diffusion"))],
)
def test_data_and_backbones_do_not_know_each_other_nor_diffusion(folder, others):
    assert imports_of_tree(folder, *others) == {}


def test_importing_the_command_line_does_not_import_torch():
    import subprocess
    import sys

    code = "import launch.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_file_is_a_drawer_for_odds_and_ends():
    assert [p for p in SOURCES if p.stem in ("utils", "common", "helpers", "misc")] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_library_code_draws_from_a_global_generator_or_unpickles(path):
    text = path.read_text()
    draws = re.findall(r"torch\.(?:rand|randn|randint|randperm|bernoulli|multinomial)\([^)]*\)", text)
    assert [d for d in draws if "generator=" not in d] == []
    assert re.findall(r"np\.random\.(?:rand|randn|randint|seed|shuffle|permutation)\b|\brandom\.seed\(", text) == []
    assert re.findall(r"\bpickle\.load|torch\.load\(", text) == []
    assert re.findall(r"shell\s*=\s*True|os\.system\(", text) == []

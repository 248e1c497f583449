import importlib.machinery
import json
import resource
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import doctor
from launch.doctor import (
    Finding,
    check_cache,
    check_devices,
    check_disk,
    check_import_names,
    check_limits,
    check_packages,
    check_slurm,
    main,
)


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def pyproject(folder: Path, *dependencies: str, extra: str = "") -> Path:
    lines = ["[project]", f"dependencies = {list(dependencies)}"]
    if extra:
        lines += ["[project.optional-dependencies]", f"more = {[extra]}"]
    (folder / "pyproject.toml").write_text("\n".join(lines))
    return folder / "pyproject.toml"


def test_the_doctor_measures_two_processes_and_prints_a_line_for_each_thing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main([])
    lines = capsys.readouterr().out.splitlines()
    # A line of the remedy is indented; every other line starts with its level.
    findings = [line.split()[:2] for line in lines if not line.startswith(" ")]
    assert {level for level, _ in findings} <= {"OK", "WARN", "FAIL"}
    assert {what for _, what in findings} == {
        *("python", "packages", "names", "devices", "cores", "gloo", "disk", "limits", "data")
    } | {what for what in ("nccl", "slurm") if any(f" {what} " in line for line in lines)}
    assert code == int(any(level == "FAIL" for level, _ in findings))
    (gloo,) = [line for line in lines if " gloo " in line]
    assert gloo.startswith("OK") and gloo.endswith("GiB/s")


def test_one_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("check_packages", "check_import_names", "check_devices", "check_communication"):
        monkeypatch.setattr(doctor, name, lambda: [])
    monkeypatch.setattr(doctor, "check_disk", lambda _: [Finding(level="WARN", what="disk", text="t", remedy="r")])
    assert main([]) == 0
    monkeypatch.setattr(doctor, "check_cores", lambda: [Finding(level="FAIL", what="cores", text="none", remedy="buy")])
    assert main([]) == 1
    assert "FAIL cores        none\n                  -> buy\n" in capsys.readouterr().out


def test_processes_that_cannot_talk_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_local", lambda *_, **__: 134)
    (finding,) = [f for f in doctor.check_communication() if f.what == "gloo"]
    assert finding.level == "FAIL" and "exit code 134" in finding.text and "GLOO_SOCKET_IFNAME" in finding.remedy


def test_packages_are_compared_with_what_the_project_needs(tmp_path: Path) -> None:
    torch = metadata.version("torch").partition("+")[0]
    assert levels(check_packages(pyproject(tmp_path, f"torch=={torch}", "numpy>=1"))) == ["OK"]
    good, bad = check_packages(pyproject(tmp_path, f"torch=={torch}", "numpy<1", "no-such-package>=3"))
    assert good.level == "OK" and bad.level == "FAIL"
    assert f"numpy<1 (found {metadata.version('numpy')}); no-such-package>=3 (found none)" == bad.text
    assert bad.remedy == "pip install -e ."


def test_a_missing_extra_is_no_fault_but_a_wrong_one_is_a_warning(tmp_path: Path) -> None:
    assert levels(check_packages(pyproject(tmp_path, extra="no-such-package>=3"))) == ["OK"]
    _, warning = check_packages(pyproject(tmp_path, extra="numpy<1"))
    assert warning.level == "WARN" and warning.remedy == "pip install -e '.[more]'"


def test_another_owner_of_an_import_name_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"launch": ["unmask"], "rl": ["unmask", "rl-kit"]})
    (finding,) = check_import_names()
    assert finding.level == "WARN"
    assert "`import rl` belongs to rl-kit too" in finding.text and "pip uninstall rl-kit" in finding.remedy


def test_an_import_name_that_resolves_elsewhere_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/__init__.py").touch()
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    assert levels(check_import_names()) == ["OK"]
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    (finding,) = check_import_names()
    assert finding.level == "WARN" and f"`import vision` finds {tmp_path / 'vision'}" in finding.text


def test_a_missing_torch_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert levels(check_devices()) == ["FAIL"]


@pytest.mark.parametrize(("gib", "level"), [(0.5, "FAIL"), (5.0, "WARN"), (50.0, "OK")])
def test_little_disk_is_a_warning_and_almost_none_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, level: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(gib * 2**30)))
    (finding,) = check_disk(tmp_path)
    assert (finding.level, bool(finding.remedy)) == (level, level != "OK")
    assert f"{gib:.1f} GiB free in {tmp_path}" in finding.text


@pytest.mark.parametrize(("files", "level"), [(256, "WARN"), (1024, "OK"), (resource.RLIM_INFINITY, "OK")])
def test_too_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch, files: int, level: str) -> None:
    def limit(which: int) -> tuple[int, int]:
        value = files if which == resource.RLIMIT_NOFILE else resource.RLIM_INFINITY
        return value, value

    monkeypatch.setattr(resource, "getrlimit", limit)
    assert levels(check_limits()) == [level]


def test_the_cache_is_found_by_the_same_rule_as_by_the_fetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm.data.fetch import cache_folder

    rules = (
        {"UNMASK_CACHE": str(tmp_path / "mine"), "XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)},
        {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)},
        {"HOME": str(tmp_path)},
    )
    for environ in rules:
        for name in ("UNMASK_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        (finding,) = check_cache(environ)
        assert (finding.level, finding.text) == ("WARN", f"nothing fetched in {cache_folder()}")
        (cache_folder() / "corpora/prose").mkdir(parents=True)
        (cache_folder() / "tokenizers/gpt2").mkdir(parents=True)
        (finding,) = check_cache(environ)
        assert (finding.level, finding.text) == ("OK", f"corpora/prose, tokenizers/gpt2 in {cache_folder()}")


@pytest.mark.parametrize(("kill_wait", "level"), [(30, "WARN"), (60, "OK")])
def test_a_checkpoint_that_takes_longer_than_slurm_waits_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_wait: int, level: str
) -> None:
    fake_slurm(tmp_path, monkeypatch, f"echo 'KillWait                = {kill_wait} sec'")
    run = tmp_path / "runs" / "big"
    run.mkdir(parents=True)
    row = {"step": 5, "time": 1.0, "checkpoint/stage_seconds": 2.0, "checkpoint/write_seconds": 40.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (finding,) = check_slurm(tmp_path / "runs")
    assert finding.level == level and "took 42.0 s" in finding.text and f"KillWait {kill_wait} s" in finding.text


def test_a_slurm_that_does_not_answer_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path, monkeypatch, "echo no controller >&2; exit 1")
    (finding,) = check_slurm(tmp_path)
    assert finding.level == "WARN" and "scontrol says: no controller" in finding.text


def test_where_there_is_no_slurm_nothing_is_said_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_slurm(tmp_path) == []


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, scontrol: str) -> None:
    for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
        (folder / name).write_text(f"#!/bin/sh\n{scontrol if name == 'scontrol' else 'exit 1'}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

"""`unmask scaling run` with real processes: what it trains, what it leaves alone, and what survives a kill.

Most tests put a stand-in for the training process, which needs milliseconds; those that train say so.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from launch import slurm
from launch.errors import ClusterError, ConfigError, DataError
from launch.metrics import read_metrics
from launch.stop import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED
from llm.scaling import cluster, run
from llm.scaling import study as studies
from llm.scaling.config import load_ladder
from llm.scaling.plan import plan_ladder
from llm.scaling.point import read_result, read_results
from llm.scaling.train import PointTask
from tests import runs

LADDER = """
experiment: {experiment}
budgets: [{{flops: 1e8, seeds: [0, 1]}}, {{flops: 3e8}}]
sizes: {{s: {{}}}}
families:
  mdm: {{diffusion: {{family: mdm, objective: mdm}}}}
  prime: {{diffusion: {{family: prime, granularity: 3, objective: nelbo_subtoken+nelbo_token, p_group: 0.5}}}}
evaluation: {{bounds: [nelbo_token, nelbo_subtoken, nll_chain], sequences: 6, batch: 4, draws: 2}}
costly_sequences: 2
"""
NAMES = [f"{family}/s-{point}" for point in ("1e08-s0", "1e08-s1", "3e08-s0") for family in ("mdm", "prime")]

# Writes the result that its point.json announces, unless its name is among those that STAND_IN says something about.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
facts = json.loads((folder / "point.json").read_text())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (folder.parent.parent / "started").open("a") as file:
    file.write(facts["point"]["name"] + chr(10))
fate = json.loads(os.environ.get("STAND_IN", "{}")).get(facts["point"]["name"])
if fate == "diverge":
    sys.exit(77)
if fate == "user":
    sys.exit("error: the data are gone")
if fate == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "wait":
    time.sleep(60)
estimated = dict(nats_per_token=3.0, standard_error=0.1, estimator="E2", draws=2)
result = dict(config_hash=facts["config_hash"], point=facts["point"], estimates=dict(nelbo_token=estimated), joint=None,
              bytes_per_token=1.5, seconds=1.0)
(folder / "result.tmp").write_text(json.dumps(result))
(folder / "result.tmp").replace(folder / "result.json")
"""


@pytest.fixture
def ladder(tiny: runs.Tiny, tmp_path: Path) -> Path:
    path = tmp_path / "ladder.yaml"
    path.write_text(LADDER.format(experiment=tiny.data.parent / "base.yaml"))
    return path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(run, "command", lambda folder: [sys.executable, str(script), str(folder)])
    return monkeypatch


def started(study: Path) -> list[str]:
    path = study / "started"
    return path.read_text().split() if path.exists() else []


def fates(stand_in: pytest.MonkeyPatch, **of: str) -> None:
    stand_in.setenv("STAND_IN", json.dumps({NAMES[int(key[1:])]: fate for key, fate in of.items()}))


def test_points_are_started_cheapest_first_and_never_again(ladder: Path, stand_in, tmp_path: Path, capsys) -> None:
    study = tmp_path / "study"
    assert run.main([str(ladder), "--out", str(study), "--jobs", "1"]) == EXIT_OK
    assert started(study) == NAMES
    assert [result.point.name for result in read_results(study)] == sorted(NAMES)
    assert "6/6 points, 100.0% of the FLOPs" in capsys.readouterr().out
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_OK
    assert started(study) == NAMES
    assert "6 points, 6 done, 0 to do" in capsys.readouterr().out


def test_only_the_points_that_fit_the_pattern_are_trained(ladder: Path, stand_in, tmp_path: Path) -> None:
    study = tmp_path / "study"
    assert run.main([str(ladder), "--out", str(study), "--only", "mdm/*-s0"]) == EXIT_OK
    assert sorted(started(study)) == ["mdm/s-1e08-s0", "mdm/s-3e08-s0"]
    with pytest.raises(ConfigError, match=r"fits none of the 6 points, such as mdm/s-1e08-s0"):
        run.main([str(ladder), "--out", str(study), "--only", "mdn/*"])


def test_a_failed_point_is_recorded_with_its_reason_and_stops_no_other(
    ladder: Path, stand_in, tmp_path: Path, capsys
) -> None:
    study = tmp_path / "study"
    fates(stand_in, _0="diverge", _1="user", _2="kill")
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_DIVERGED
    assert sorted(result.point.name for result in read_results(study)) == sorted(NAMES[3:])
    reasons = {name: json.loads((study / name / "failure.json").read_text())["reason"] for name in NAMES[:3]}
    assert reasons == {
        NAMES[0]: "the loss diverged",
        NAMES[1]: "error: the data are gone",
        NAMES[2]: "ended by SIGKILL",
    }
    assert f"failed: {NAMES[1]}: error: the data are gone" in capsys.readouterr().out

    # Whatever was mended is tried again; what diverged would diverge again.
    stand_in.delenv("STAND_IN")
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_DIVERGED
    assert sorted(started(study)[6:]) == sorted(NAMES[1:3])
    assert not (study / NAMES[1] / "failure.json").exists()
    (study / NAMES[0] / "failure.json").unlink()
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_OK


def test_a_changed_ladder_is_refused_point_by_point_and_restarted_on_request(
    ladder: Path, stand_in, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_OK
    changed = ["families.prime.rate_factor=2", "--out", str(study)]
    with pytest.raises(ConfigError, match=r"3 of 6 points .* other settings") as caught:
        run.main([str(ladder), *changed])
    for name in NAMES:
        assert (f"{study / name}: schedule." in str(caught.value)) == name.startswith("prime/")
    assert "schedule.lr = 0.01, now 0.02" in str(caught.value)
    assert len(started(study)) == 6
    assert run.main([str(ladder), *changed, "--restart-changed"]) == EXIT_OK
    assert sorted(started(study)[6:]) == sorted(name for name in NAMES if name.startswith("prime/"))


def test_more_points_and_another_way_of_running_them_change_no_point(ladder: Path, stand_in, tmp_path: Path) -> None:
    study = tmp_path / "study"
    assert run.main([str(ladder), "--out", str(study), "--only", "mdm/*"]) == EXIT_OK
    more = ["seeds=[0, 2]", "settings.checkpoint.every=60", "keep_checkpoints=none", "--jobs", "3"]
    assert run.main([str(ladder), *more, "--out", str(study)]) == EXIT_OK
    assert sorted(started(study)[3:]) == sorted([*NAMES[1::2], "mdm/s-3e08-s2", "prime/s-3e08-s2"])


def test_a_missing_table_of_codes_is_refused_before_the_first_point(ladder: Path, stand_in, tmp_path: Path) -> None:
    table = tmp_path / "codes.json"
    with pytest.raises(DataError, match="unmask data code"):
        run.main([str(ladder), "--out", str(tmp_path / "study"), f"families.prime.diffusion.code={table}"])
    assert not (tmp_path / "started").exists()


def test_two_calls_at_a_time_are_refused(ladder: Path, stand_in, tmp_path: Path) -> None:
    study = tmp_path / "study"
    with studies.one_at_a_time(study), pytest.raises(ConfigError, match="another `unmask scaling run` is at work"):
        run.main([str(ladder), "--out", str(study)])
    assert started(study) == []


def test_ctrl_c_lets_the_points_save_and_starts_no_more(ladder: Path, tmp_path: Path, stand_in) -> None:
    study = tmp_path / "study"
    fates(stand_in, _0="wait")

    def press_ctrl_c() -> None:
        wait_for(lambda: started(study) == NAMES[:1])
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    assert run.main([str(ladder), "--out", str(study), "--jobs", "1"]) == EXIT_STOPPED
    thread.join()
    assert started(study) == NAMES[:1]
    assert not any((study / NAMES[0] / name).exists() for name in ("failure.json", "result.json"))
    stand_in.delenv("STAND_IN")
    assert run.main([str(ladder), "--out", str(study)]) == EXIT_OK


def test_a_cluster_gets_what_is_to_do_as_one_array(ladder: Path, tmp_path: Path, stand_in, capsys) -> None:
    study = tmp_path / "study"
    profile = tmp_path / "cluster.yaml"
    profile.write_text("{time: 1h, python: python3, nodes: 1, processes_per_node: 1}")
    (tmp_path / "bin").mkdir()
    for name, body in {"sbatch": f"cp $2 {tmp_path}/submitted; echo 17", "squeue": "exit 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    stand_in.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    stand_in.setattr(cluster, "check_configurations", lambda *_: "")
    assert run.main([str(ladder), "--out", str(study), "--only", "*/s-1e08-s0"]) == EXIT_OK
    capsys.readouterr()

    call = [str(ladder), "--out", str(study), "--cluster", str(profile), "--at-once", "2"]
    assert run.main([*call, "--dry-run"]) == EXIT_OK
    assert "#SBATCH --array=0-3%2" in capsys.readouterr().out
    assert not (tmp_path / "submitted").exists()

    assert run.main(call) == EXIT_OK
    script = (tmp_path / "submitted").read_text()
    assert "module=llm.scaling.train" in script
    assert f"#SBATCH --output={study}/jobs/%A_%a.log" in script
    assert started(study) == ["mdm/s-1e08-s0", "prime/s-1e08-s0"]
    assert slurm.points_of(study) == [study / name for name in NAMES[2:]]
    for i, name in enumerate(NAMES[2:]):
        assert (record := slurm.read_record(study / name)) is not None and record.job_id == f"17_{i}"
        assert yaml.safe_load((study / name / "job.yaml").read_text())["run"]["dir"] == str(study / name)
        assert os.readlink(study / name / "job.log") == f"../../jobs/17_{i}.log"

    (tmp_path / "bin" / "squeue").write_text(f"#!{shutil.which('bash')}\necho '17_2|RUNNING|0:00|1:00|n1|None'\n")
    with pytest.raises(ClusterError, match="job 17_2 already"):  # here or there, but not twice
        run.main([str(ladder), "--out", str(study)])


def test_a_point_has_every_estimate_under_its_own_name(ladder: Path, tmp_path: Path, tiny: runs.Tiny) -> None:
    """Trains."""
    study = tmp_path / "study"
    planned = {one.point.name: one for one in plan_ladder(load_ladder(ladder))}
    for name in ("mdm/s-1e08-s0", "prime/s-1e08-s0"):
        studies.prepare(planned[name], study / name, keep_checkpoints="last")
        runs.train(study / name / "experiment.yaml", 1, study / name, task=PointTask)
    mdm, prime = (read_result(study / name / "result.json") for name in ("mdm/s-1e08-s0", "prime/s-1e08-s0"))
    assert mdm.estimates.keys() == {"nelbo_token", "nll_chain"}
    assert prime.estimates.keys() == {"nelbo_token", "nelbo_subtoken", "nll_chain"}
    assert mdm.joint is None
    assert prime.joint is not None
    assert prime.point == planned["prime/s-1e08-s0"].point
    assert prime.estimates["nelbo_token"].draws == 2 and prime.estimates["nll_chain"].draws == 1
    assert not (study / "mdm/s-1e08-s0" / "samples").exists()
    assert runs.steps_saved(study / "mdm/s-1e08-s0") == [planned["mdm/s-1e08-s0"].steps]
    last = {}
    for row in read_metrics(study / "prime/s-1e08-s0" / "metrics.jsonl"):
        last |= row
    assert last["tokens"] == prime.point.tokens
    assert last["val/loss_ce_joint"] == prime.joint.nats_per_token
    for name, estimated in prime.estimates.items():
        assert last[f"val/{name}"] == estimated.nats_per_token


@pytest.mark.timeout(600)
def test_a_kill_in_the_middle_loses_no_finished_point_and_repeats_none(ladder: Path, tmp_path: Path) -> None:
    """Trains, in the processes of the command line."""
    study = tmp_path / "study"
    settings = [str(ladder), "seeds=[0]", "keep_checkpoints=none", "settings.checkpoint.every_steps=2"]
    call = ("python", "-m", "llm.scaling.cli", "run", *settings, "--out", str(study), "--only", "mdm/*")
    first = runs.start(*call)
    wait_for(lambda: any(study.glob("*/*/result.json")), process=first)
    wait_for(lambda: len([*study.glob("*/*/config.yaml")]) == 3, process=first)
    first.kill()
    first.communicate()
    wait_for(lambda: not [*processes_of(study)])  # they die with their parent
    finished = {path: path.stat().st_mtime_ns for path in study.glob("*/*/result.json")}
    assert 1 <= len(finished) < 3
    ended = runs.command(*call)
    assert ended.codes == [EXIT_OK], ended.output
    assert f"3 points, {len(finished)} done" in ended.output
    assert len(read_results(study)) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert not [path for name in ("checkpoints", "report", "tb") for path in study.glob(f"*/*/{name}")]


def wait_for(condition, process=None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def processes_of(study: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(study).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found

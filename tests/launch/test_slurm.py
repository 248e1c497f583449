"""The job script that a profile makes, what SLURM's commands print, and what is refused before anything is submitted.

What the script does on a real SLURM is told by tests/slurm.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import slurm
from launch.cluster import Cluster, ContainerConfig, load_cluster
from launch.errors import ClusterError, ConfigError
from launch.slurm import (
    TEMPLATE,
    JobRecord,
    QueuedJob,
    grid,
    job_name,
    job_of,
    parse_scontrol,
    parse_squeue,
    read_record,
    refuse_if_active,
    render,
    submit,
    time_limit,
)

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "a b",
    "it's",
    'q"q',
    "$(touch gone)",
    ";touch gone;",
    "`touch gone`",
    "%j",
    "#x",
    "-n",
    "a&b|c>d",
    "é",
    "\n",
]


def rendered(runs: list[str], **profile) -> str:
    cluster = Cluster(**{"time": 3600.0, "python": "python3", **profile})
    paths = [Path(run) for run in runs]
    return render(TEMPLATE.read_text(), cluster, name="run", module="llm.train", runs=paths, log=paths[0] / "job.log")


def settings(script: str) -> list[str]:
    """The lines that a profile decides."""
    lines = script.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# --- settings"))
    last = next(i for i, line in enumerate(lines) if line.startswith("# --- end of settings"))
    return lines[first + 1 : last]


def evaluate(script: str, expression: str) -> list[str]:
    """What bash makes of an array or variable of the settings, NUL-separated."""
    lines = "\n".join(line for line in settings(script) if not line.startswith("#SBATCH"))
    program = f"set -u\n{lines}\nprintf '%s\\0' {expression}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


# --- the script ------------------------------------------------------------------------------------------------------


def test_a_full_profile_becomes_these_settings():
    script = rendered(
        ["/runs/a b"],
        partition="gpu",
        account="lab",
        qos="high",
        time=12 * 3600.0,
        nodes=4,
        gres="gpu:h100:8",
        processes_per_node=8,
        cores_per_process=12,
        memory="0",
        exclusive=True,
        constraint="ib&h100",
        directives=("--reservation=course week",),
        modules=("cuda/12.8", "apptainer"),
        setup=("source env/bin/activate",),
        environment={"NCCL_DEBUG": "WARN", "NOTE": "it's $HOME"},
        interface="ib0",
        launcher="torchrun",
        signal_lead=600.0,
        max_requeues=7,
        crash_limit=2,
    )
    assert settings(script) == [
        "#SBATCH --job-name=run",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --qos=high",
        "#SBATCH --time=0-12:00:00",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=1",  # an agent on each node
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --gres=gpu:h100:8",
        "#SBATCH --mem=0",
        "#SBATCH --constraint='ib&h100'",
        "#SBATCH --output='/runs/a b/job.log'",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR1@600",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH '--reservation=course week'",
        "",
        "module=llm.train",
        "launcher=torchrun",
        "processes=8",
        "cores=12",
        "interface=ib0",
        "python=python3",
        "max_requeues=7",
        "crash_limit=2",
        "runs=('/runs/a b')",
        "container=()",
        "step_options=()",
        "set_up() {",
        "  :",
        "  export NCCL_DEBUG=WARN",
        "  export NOTE='it'\"'\"'s $HOME'",
        "  # Where the login shell that brings `module` has not come along:",
        '  type module >/dev/null 2>&1 || . "${MODULESHOME:?there is no module command here}/init/bash"',
        "  module load cuda/12.8 apptainer || end 1 crashed 'module load failed'",
        "  source env/bin/activate",
        "}",
    ]


def test_nothing_but_the_settings_differs_from_the_template_that_is_used_by_hand():
    def others(text: str) -> list[str]:
        lines = text.splitlines()
        inside = settings(text)
        start = next(i for i, line in enumerate(lines) if line.startswith("# --- settings"))
        return lines[:start] + lines[start + 1 + len(inside) :]

    template = TEMPLATE.read_text()
    assert others(rendered(["/run"])) == others(template)
    names = {line.partition("=")[0] for line in settings(template) if "=" in line and not line.startswith("#")}
    assert names == {
        line.partition("=")[0] for line in settings(rendered(["/run"])) if line[:1].isalpha() and "=" in line
    }


@pytest.mark.parametrize("profile", [{}, {"launcher": "accelerate"}, {"modules": ("a",)}])
def test_the_script_is_bash(profile):
    for text in (TEMPLATE.read_text(), rendered(["/run's", "/b"], **profile)):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_evaluated_nor_lost(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    container = ContainerConfig(kind="apptainer", image=f"/images/{name}.sif")
    run = f"/runs/{name}" if name != "\n" else "/runs/line"
    script = rendered([run, "/other"], environment={"NAME": name}, container=container, python=f"/opt/{name}/python")
    assert evaluate(script, '"${runs[@]}"') == [run, "/other"]
    assert evaluate(script, '"${container[@]}"')[-1] == f"/images/{name}.sif"
    assert evaluate(script, '"$python"') == [f"/opt/{name}/python"]
    assert evaluate(script + "\n", "$(set_up; printf '%s' \"$NAME\" | od -An -tx1 -v | tr -d ' \\n')") == [
        name.encode().hex()
    ]
    assert not (tmp_path / "gone").exists()


def test_a_percent_sign_of_the_run_folder_is_no_pattern_of_sbatch(tmp_path, monkeypatch, capsys):
    config = experiment(tmp_path, run={"name": "x", "dir": str(tmp_path / "100%j")})
    monkeypatch.setattr(slurm, "check_configurations", lambda *_: "")
    assert submit([str(config), "--cluster", str(profile(tmp_path)), "--dry-run"]) == 0
    assert f"#SBATCH --output={tmp_path}/100%%j/job.log" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/runs/line\nend", "/runs/back\\slash"])
def test_a_run_folder_that_a_directive_cannot_hold_is_refused(folder):
    with pytest.raises(ConfigError, match=r"choose another with run\.dir"):
        rendered([folder])


@pytest.mark.parametrize(
    ("name", "plain"),
    [("prime-v2", "prime-v2"), ("a b;$(c)", "a_b_c_"), ("--wrap=x", "wrap=x"), ("", "unmask"), ("é\n", "_")],
)
def test_a_job_name_keeps_only_what_nothing_interprets(name, plain):
    assert job_name(name) == plain


def test_a_time_limit_names_its_units():
    assert [time_limit(s) for s in (90, 3600, 86400 + 3661)] == ["0-00:01:30", "0-01:00:00", "1-01:01:01"]


def test_pyxis_gets_image_and_mounts_as_options_of_the_step(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    container = ContainerConfig(kind="pyxis", image="registry#team/unmask:1", mounts=("/data", "/a:/b:ro"))
    script = rendered(["/runs/x"], container=container, python=None)
    mounts = f"{tmp_path}:{tmp_path},/runs/x:/runs/x,/data:/data,/a:/b:ro"
    assert evaluate(script, '"${step_options[@]}"') == [
        "--container-image=registry#team/unmask:1",
        f"--container-mounts={mounts}",
        f"--container-workdir={tmp_path}",
    ]
    assert evaluate(script, '"$python"') == ["python3"]


def test_apptainer_goes_before_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    container = ContainerConfig(kind="apptainer", image="unmask.sif", mounts=("/data:/data:ro",))
    assert evaluate(rendered(["/runs/x"], container=container), '"${container[@]}"') == [
        *("apptainer", "exec", "--nv", "--pwd", str(tmp_path), "--bind", str(tmp_path), "--bind", "/runs/x"),
        *("--bind", "/data:/data:ro", "unmask.sif"),
    ]


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_sample_profiles_load(path):
    assert load_cluster(path).nodes == 2
    assert load_cluster(path, ["nodes=4", "time=4:00:00"]).time == 4 * 3600


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"time": "2min", "signal_lead": "5min"}, "raise time or lower signal_lead"),
        ({"time": "30s"}, "SLURM counts in minutes"),
        ({"partition": "gpu --wrap=x"}, "partition = 'gpu --wrap=x'"),
        ({"gres": "gpu:8\n#SBATCH --uid=0"}, "gres = "),
        ({"directives": ["--a\nrm -rf /"]}, "directives[0]"),
        ({"directives": ["rm"]}, "expected an option of sbatch"),
        ({"environment": {"A B": "1"}}, "no name of a variable"),
        ({"container": {"kind": "apptainer"}}, "set both, or neither"),
        ({"container": {"kind": "pyxis", "image": "x", "mounts": ["/a,/b"]}}, "comma"),
        ({"nodes": 0}, "the smallest is 1"),
        ({"launcher": "mpirun"}, "launcher"),
        ({"partitoin": "gpu"}, "did you mean 'partition'"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_with_its_value(fields, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_cluster(profile(tmp_path, **fields))
    assert words in str(caught.value)


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_every_combination_of_its_values():
    assert grid([]) == [()]
    assert grid(["schedule.lr=1e-3,2e-3", "run.seed=0,1"]) == [
        ("schedule.lr=1e-3", "run.seed=0"),
        ("schedule.lr=1e-3", "run.seed=1"),
        ("schedule.lr=2e-3", "run.seed=0"),
        ("schedule.lr=2e-3", "run.seed=1"),
    ]
    assert grid(["optimizer.betas=[0.9,0.95],[0.9,0.98]"])[1] == ("optimizer.betas=[0.9, 0.98]",)
    assert grid(["a='x: y',it's"])[0] == ('a="x: y"',)


@pytest.mark.parametrize("text", ["schedule.lr", "schedule.lr=", "a=[1,"])
def test_a_sweep_without_values_is_refused(text):
    with pytest.raises(ConfigError, match="--array"):
        grid([text])


def test_a_sweep_has_a_folder_and_a_configuration_for_each_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "check_configurations", lambda *_: "")
    fake(tmp_path, monkeypatch, sbatch="echo 17", squeue="exit 0")
    config = experiment(tmp_path, run={"dir": str(tmp_path / "sweep")})
    arguments = ["--array", "schedule.lr=1e-3,2e-3", "--at-once", "1", "--nodes", "3"]
    assert submit([str(config), "train.steps=7", "--cluster", str(profile(tmp_path)), *arguments]) == 0
    record = read_record(tmp_path / "sweep")
    assert record is not None and record.points == ("schedule.lr=1e-3", "schedule.lr=2e-3")
    script = (tmp_path / "sweep" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1%1" in script and "#SBATCH --nodes=3" in script
    assert f"#SBATCH --output={tmp_path}/sweep/point-%a/job.log" in script
    for i, lr in enumerate(("1e-3", "2e-3")):
        run = tmp_path / "sweep" / f"point-{i}"
        tree = yaml.safe_load((run / "job.yaml").read_text())
        assert tree["schedule"]["lr"] == lr and tree["train"]["steps"] == 7 and tree["run"]["dir"] == str(run)
        assert (found := read_record(run)) is not None and found.job_id == f"17_{i}"
    assert "job 17: 2 runs in" in capsys.readouterr().out


# --- what SLURM says -------------------------------------------------------------------------------------------------


def test_the_lines_of_squeue_are_read():
    text = "17|RUNNING|1-02:03:04|2-00:00:00|node[1-2]|None\n18_3|PENDING|0:00|1:00|| Resources \n"
    assert parse_squeue(text) == [
        QueuedJob(job_id="17", state="RUNNING", elapsed="1-02:03:04", limit="2-00:00:00", nodes="node[1-2]", reason=""),
        QueuedJob(job_id="18_3", state="PENDING", elapsed="0:00", limit="1:00", nodes="", reason=" Resources"),
    ]
    assert parse_squeue("") == []


def test_the_first_record_of_scontrol_is_read():
    text = "JobId=30 JobName=x y JobState=FAKE\n   JobState=COMPLETED Reason=None\n\nJobId=31\n   JobState=FAILED\n"
    assert parse_scontrol("JobId=30 JobName=job\n   JobState=TIMEOUT Reason=TimeLimit\n   CPUs/Task=1")["JobState"] == (
        "TIMEOUT"
    )
    assert parse_scontrol(text)["JobId"] == "30"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_run_that_is_in_the_queue_is_refused_by_the_id_of_its_job(state, tmp_path, monkeypatch):
    remember(tmp_path / "run", "17")
    fake(tmp_path, monkeypatch, squeue=f"echo '17|{state}|0:00|1:00||None'")
    with pytest.raises(ClusterError, match=rf"is job 17 already \({state}\)"):
        refuse_if_active(tmp_path / "run")


def test_a_sweep_is_refused_while_a_point_of_it_runs(tmp_path, monkeypatch):
    remember(tmp_path / "sweep" / "point-2", "19")
    fake(tmp_path, monkeypatch, squeue="echo \"$@\" >asked; echo '19|RUNNING|0:00|1:00|n1|None'")
    with pytest.raises(ClusterError, match="job 19"):
        refuse_if_active(tmp_path / "sweep")


def test_a_job_that_slurm_has_forgotten_does_not_stand_in_the_way(tmp_path, monkeypatch):
    remember(tmp_path / "run", "17")
    fake(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    refuse_if_active(tmp_path / "run")


def test_a_queue_that_does_not_answer_is_no_leave_to_submit_twice(tmp_path, monkeypatch):
    remember(tmp_path / "run", "17")
    fake(tmp_path, monkeypatch, squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ClusterError, match="squeue says: Unable to contact slurm controller"):
        refuse_if_active(tmp_path / "run")


def test_the_last_job_of_a_run_may_have_been_submitted_by_hand(tmp_path):
    assert job_of(tmp_path) is None
    run = tmp_path / "run"
    remember(run, "17")
    start = {"event": "start", "attempt": 1, "job": "16", "time": -1.0}
    (run / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    assert job_of(run) == "17"  # submitted since, and it waits
    by_hand = start | {"attempt": 2, "job": "18", "time": 5.0}
    (run / "attempts.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(by_hand)}\n")
    assert job_of(run) == "18"


def test_cancel_says_what_it_did(tmp_path, monkeypatch, capsys):
    remember(tmp_path / "run", "17")
    fake(tmp_path, monkeypatch, squeue="echo '17|RUNNING|0:00|1:00|n1|None'", scancel='echo "$@" >cancelled')
    assert slurm.cancel([str(tmp_path / "run")]) == 0
    assert (tmp_path / "cancelled").read_text() == "17\n"
    assert capsys.readouterr().out.startswith("cancelled job 17 (RUNNING): its ranks have KillWait seconds")


def test_a_folder_that_was_never_submitted_cannot_be_cancelled(tmp_path):
    with pytest.raises(ConfigError, match="was not submitted to SLURM"):
        slurm.cancel([str(tmp_path)])


def test_without_slurm_submit_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "check_configurations", lambda *_: "")
    monkeypatch.setenv("PATH", str(tmp_path))
    config = experiment(tmp_path, run={"dir": str(tmp_path / "run")})
    with pytest.raises(ClusterError, match="there is no sbatch here; run this on a login node"):
        submit([str(config), "--cluster", str(profile(tmp_path))])


def test_the_new_job_is_told_nothing_of_the_job_around_us(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "check_configurations", lambda *_: "")
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "conf")
    fake(tmp_path, monkeypatch, sbatch="env >environment; echo 17")
    config = experiment(tmp_path, run={"dir": str(tmp_path / "run")})
    assert submit([str(config), "--cluster", str(profile(tmp_path))]) == 0
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert "SLURM_CONF" in names and not names & {"SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "MASTER_ADDR"}


def test_submitting_needs_no_torch():
    code = "import launch.slurm, launch.status, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- helpers ---------------------------------------------------------------------------------------------------------


def profile(folder: Path, **fields) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"time": "1h", "python": "python3", **fields}))
    return path


def experiment(folder: Path, **sections) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(json.dumps({"entry": "llm.train", "train": {"steps": 3}, **sections}))
    return path


def remember(run: Path, job_id: str) -> None:
    run.mkdir(parents=True)
    record = JobRecord(job_id=job_id, submitted=0.0, cluster="c.yaml", nodes=1, launcher="srun", processes_per_node=1)
    (run / "job.json").write_text(json.dumps(record.__dict__))


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs of these names first in PATH; they run in `folder`."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!{shutil.which('bash')}\ncd {folder}\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

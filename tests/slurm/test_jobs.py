"""Jobs on a real SLURM: two nodes to the end, and everything that may come between."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.runs import ROOT, Tiny, assert_equal_states, curve, state, steps_saved, train
from tests.slurm.conftest import ENDLESS, Submitted, Workplace

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 120  # seconds of training: time enough to strike, and to be repeated by a reference
LAUNCHERS = ("srun", "torchrun", "accelerate")
LONG = (f"train.steps={STEPS}", "train.log_every=1")


@pytest.fixture(scope="session")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks on this machine, without SLURM and without a break."""
    return train(tiny.prime, 2, tmp_path_factory.mktemp("unbroken") / "run", *LONG)


def assert_same_run(run: Path, unbroken: Path) -> None:
    assert curve(run) == curve(unbroken)
    assert_equal_states(state(run, STEPS), state(unbroken, STEPS))


# --- to the end ------------------------------------------------------------------------------------------------------


def test_a_job_on_two_nodes_is_the_run_that_two_processes_of_one_machine_make(
    workplace: Workplace, tiny: Tiny, unbroken: Path, tmp_path: Path
) -> None:
    job = workplace.submit(tiny.prime, tmp_path / "run", *LONG)
    assert job.wait_until_over() == "COMPLETED", job.log
    assert_same_run(job.run, unbroken)
    assert job.outcomes == ["finished"]
    assert "on node[1-2]" in job.log and "on node2\n" in job.log
    shown = workplace.unmask("status", str(job.run))
    assert f"{job.job_id} COMPLETED" in shown and f"{STEPS} of {STEPS}" in shown and "last error" not in shown
    assert f"step {STEPS}/{STEPS}" in workplace.unmask("logs", str(job.run))
    assert "attempt 1 (restart 0) on node2" in workplace.unmask("logs", str(job.run), "--rank", "1")
    assert "nothing to do" in workplace.unmask("cancel", str(job.run))


def test_the_template_runs_by_hand(workplace: Workplace, tiny: Tiny, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "by hand"
    environment = workplace.environment | {"GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["sbatch", "--wait", f"--output={tmp_path}/log", "slurm/train.sbatch", str(tiny.prime), f"run.dir={run}"]
    done = subprocess.run([*command, *LONG], cwd=ROOT, env=environment, timeout=200, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert_same_run(run, unbroken)


def test_hostile_names_are_names(workplace: Workplace, tiny: Tiny, tmp_path: Path) -> None:
    apptainer = tmp_path / "bin" / "apptainer"  # runs what comes after the image, as the real one does
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/bash\nuntil [[ $1 == *.sif ]]; do shift; done\necho "image: $1"; shift; exec "$@"\n')
    apptainer.chmod(0o755)
    jobs = []
    for name in ("a b; touch gone & it's $(touch gone) `id`", '-n "q" %j %a #x {} $HOME\nend'):
        run = tmp_path / name.replace(
            "\n", " "
        )  # an #SBATCH line cannot hold it: refused in tests/launch/test_slurm.py
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"base: {tiny.prime}\nrun: {json.dumps({'name': name, 'dir': str(run)})}\n")
        profile = workplace.profile(
            nodes=1,
            environment={"NAME": name},
            setup=['echo "name: $NAME"', f"PATH={apptainer.parent}:$PATH"],
            container={"kind": "apptainer", "image": f"{name}.sif", "mounts": [f"/{name.splitlines()[0]}"]},
            python=sys.executable,
        )
        workplace.unmask("submit", str(config), "--cluster", str(profile))
        jobs.append((name, Submitted(workplace.cluster, run)))
    for name, job in jobs:
        assert job.wait_until_over() == "COMPLETED", job.log
        log = (job.run / "job.log").read_text()
        assert f"name: {name}\n" in log and f"image: {name}.sif\n" in log
        assert steps_saved(job.run) == [6]
        assert not (ROOT / "gone").exists() and not (job.run / "gone").exists()


# --- stopped and started again ---------------------------------------------------------------------------------------


def test_after_the_warning_a_job_requeues_itself_and_ends_with_the_weights_of_the_unbroken_run(
    workplace: Workplace, tiny: Tiny, unbroken: Path, tmp_path: Path
) -> None:
    jobs, markers = [], []
    for launcher in LAUNCHERS:
        job = workplace.submit(tiny.prime, tmp_path / launcher, *LONG, launcher=launcher)
        job.wait_for_step(5)
        workplace.cluster.run("scancel", "--signal=USR1", job.job_id)  # as --signal=USR1@... does: to every process
        job.wait_for(lambda job=job: job.outcomes == ["warned"])
        markers.append(json.loads((job.run / "REQUEUE").read_text()))
        jobs.append(job)  # it is requeued while the others are submitted
    for job, marker in zip(jobs, markers, strict=True):
        assert job.wait_until_over(240) == "COMPLETED", job.log
        assert job.outcomes == ["warned", "finished"], job.log
        assert marker["reason"] in ("SIGUSR1", "another rank's signal") and 5 <= marker["step"] < STEPS
        assert re.search(rf"starts at +step {marker['step']}, from its checkpoint", job.log)
        assert_same_run(job.run, unbroken)
    assert "2, requeued 1 time: warned, finished" in workplace.unmask("status", str(jobs[0].run))


def test_the_warning_before_the_time_limit_comes_and_is_heeded(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    job = workplace.submit(
        tiny.prime, tmp_path / "run", f"train.steps={ENDLESS}", time="2min", signal_lead="70s", nodes=1
    )
    job.wait_for(lambda: job.outcomes[:1] == ["warned"])
    job.wait_for(lambda: len(job.attempts) == 2 and job.log.count("starts at") == 2)
    assert job.attempts[1].job == job.job_id
    workplace.unmask("cancel", str(job.run))
    assert job.wait_until_over() == "CANCELLED"


def test_a_preempted_job_saves_and_comes_back_with_and_without_a_grace_time(
    workplace: Workplace, tiny: Tiny, unbroken: Path, tmp_path: Path
) -> None:
    jobs = []
    for partition, node in (("main", "node1"), ("spot", "node2")):  # without, with a grace time
        place = {"nodes": 1, "processes_per_node": 2, "directives": [f"--nodelist={node}"]}
        job = workplace.submit(tiny.prime, tmp_path / partition, *LONG, partition=partition, **place)
        job.wait_for_step(5)
        urgent = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        workplace.cluster.run("sbatch", *urgent)
        jobs.append(job)
    for job, outcome in zip(jobs, ("requeued", "preempted"), strict=True):  # by SLURM, by itself
        assert job.wait_until_over(240) == "COMPLETED", job.log
        assert job.outcomes == [outcome, "finished"], job.log
        assert_same_run(job.run, unbroken)


def test_a_run_goes_on_elsewhere_when_its_node_dies(workplace: Workplace, tiny: Tiny, tmp_path: Path) -> None:
    job = workplace.submit(tiny.prime, tmp_path / "run", f"train.steps={ENDLESS}", "checkpoint.every_steps=20")
    job.wait_for(lambda: bool(steps_saved(job.run)))
    try:
        workplace.cluster.kill_node("node1")  # where the batch script and rank 0 are
        job.wait_for(lambda: len(job.attempts) == 2 and "on node2" in job.log and job.state == "RUNNING", 200)
        assert job.outcomes == [None, None]
        saved = steps_saved(job.run)[-1]
        job.wait_for(lambda: steps_saved(job.run)[-1] > saved + 20)
        assert "node[2-3]" in (job.run / "attempts.jsonl").read_text().splitlines()[-1]
        assert "lost, running" in workplace.unmask("status", str(job.run))
    finally:
        workplace.cluster.up()


def test_a_run_whose_slurmd_alone_died_does_not_go_on_beside_the_one_that_replaces_it(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    names = ("reached", "cut off")  # both on the first node, which has room for them
    jobs = [workplace.submit(tiny.prime, tmp_path / name, f"train.steps={ENDLESS}", nodes=1) for name in names]
    first = [rank_0(job) for job in jobs]
    for process in psutil.process_iter():  # as if cut off; the other srun hears that its node is taken for dead
        if process.name() == "srun" and f"{jobs[1].run}/job.yaml" in process.cmdline():
            process.suspend()
    try:
        workplace.cluster.kill_daemon("node1")  # the ranks live on
        for job, pid in zip(jobs, first, strict=True):
            job.wait_for(lambda job=job: len(job.attempts) == 2, 200)
            job.wait_for(lambda pid=pid: not psutil.pid_exists(pid), 60)
            assert '"node2"' in (job.run / "attempts.jsonl").read_text().splitlines()[-1]
        assert jobs[0].outcomes == ["requeued", None]
        jobs[1].wait_for(lambda: "attempt 2 has taken over" in jobs[1].log)
        assert jobs[1].outcomes == [None, None]
    finally:
        workplace.cluster.up()


def rank_0(job: Submitted) -> int:
    """Its process id, once it trains."""
    job.wait_for_step(5)
    return json.loads((job.run / "health" / "rank-00000.json").read_text())["pid"]


# --- ended -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_saves_and_stays_away_and_one_that_runs_is_not_submitted_twice(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    overrides = (f"train.steps={ENDLESS}", "checkpoint.every_steps=null")
    job = workplace.submit(tiny.prime, tmp_path / "run", *overrides)
    profile = str(workplace.profile())
    again = ("submit", str(tiny.prime), f"run.dir={job.run}", *overrides, "--cluster", profile)
    assert f"is job {job.job_id} already" in workplace.unmask(*again, code=2)
    job.wait_for_step(5)
    assert f"is job {job.job_id} already (RUNNING)" in workplace.unmask(*again, code=2)
    shown = workplace.unmask("status", str(job.run))
    assert f"{job.job_id} RUNNING on node[1-2]" in shown and "ETA" in shown
    assert f"cancelled job {job.job_id} (RUNNING)" in workplace.unmask("cancel", str(job.run))
    assert job.wait_until_over() == "CANCELLED"
    job.wait_for(lambda: job.outcomes == ["terminated"], 40)
    (saved,) = steps_saved(job.run)
    assert not (job.run / "REQUEUE").exists()
    assert f"checkpoint  step {saved}" in workplace.unmask("status", str(job.run))


def test_a_step_that_was_cancelled_counts_as_a_crash_and_is_run_again(
    workplace: Workplace, tiny: Tiny, unbroken: Path, tmp_path: Path
) -> None:
    job = workplace.submit(tiny.prime, tmp_path / "run", *LONG)
    job.wait_for_step(5)
    workplace.cluster.run("scancel", f"{job.job_id}.0")
    assert job.wait_until_over() == "COMPLETED", job.log
    assert job.outcomes == ["crashed", "finished"]
    assert_same_run(job.run, unbroken)


def test_a_crash_loop_ends_with_its_reason(workplace: Workplace, tiny: Tiny, tmp_path: Path) -> None:
    dies = {"UNMASK_FAULT": "checkpoint.begin:kill:1"}  # rank 1, at every first checkpoint
    job = workplace.submit(tiny.prime, tmp_path / "run", environment=dies, crash_limit=2)
    assert job.wait_until_over(240) == "FAILED", job.log
    assert job.outcomes == ["crashed", "crashed"]
    assert "2 failures in a row without a new checkpoint" in workplace.unmask("status", str(job.run))


def test_an_error_of_the_user_is_not_tried_again(workplace: Workplace, tiny: Tiny, tmp_path: Path) -> None:
    for launcher in ("srun", "torchrun"):
        run = tmp_path / launcher
        job = workplace.submit(tiny.prime, run, launcher=launcher, directives=["--hold"])
        config = run / "job.yaml"  # what was right when it was submitted is wrong when it starts
        config.write_text(config.read_text().replace(str(tiny.data), str(tmp_path / "gone")))
        workplace.cluster.run("scontrol", "release", job.job_id)
        assert job.wait_until_over() == "FAILED", job.log
        assert job.outcomes == ["refused"], job.log
        shown = workplace.unmask("status", str(run))
        assert "error: " in shown and "gone" in shown


def test_a_run_that_diverged_is_not_tried_again(workplace: Workplace, tiny: Tiny, tmp_path: Path) -> None:
    overrides = ("schedule.lr=1.0e+30", "guard.max_consecutive_skips=0", "guard.max_rollbacks=0")
    job = workplace.submit(tiny.prime, tmp_path / "run", *overrides, launcher="torchrun")
    assert job.wait_until_over() == "FAILED", job.log
    assert job.outcomes == ["diverged"], job.log


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_an_array_of_four_is_a_sweep_whose_finished_points_exit_at_once(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    options = ("--array", "schedule.lr=1e-3,2e-3", "--array", "run.seed=0,1", "--at-once", "2")
    sweep = workplace.submit(tiny.prime, tmp_path / "sweep", nodes=1, options=options)
    points = [Submitted(workplace.cluster, sweep.run / f"point-{i}") for i in range(4)]
    for point in points:
        assert point.wait_until_over(240) == "COMPLETED", point.log
        assert point.outcomes == ["finished"] and steps_saved(point.run) == [6]
    assert len({tuple(curve(point.run).values()) for point in points}) == 4
    shown = workplace.unmask("status", str(sweep.run))
    assert "schedule.lr=2e-3 run.seed=1" in shown and shown.count("COMPLETED") == 4
    again = workplace.submit(tiny.prime, tmp_path / "sweep", nodes=1, options=options)
    for i in range(4):
        point = Submitted(workplace.cluster, again.run / f"point-{i}")
        assert point.wait_until_over() == "COMPLETED"
        assert point.outcomes == ["finished"] and "is finished" in point.log


def test_the_login_node_refuses_what_cannot_work_before_it_is_submitted(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    common = ("submit", str(tiny.prime), f"run.dir={tmp_path}/run", "--cluster", str(workplace.profile()))
    assert "did you mean 'train.steps'" in workplace.unmask(*common, "train.step=3", code=2)
    assert "world size 3" in workplace.unmask(*common, "--nodes", "3", code=2)
    assert "to start at" in workplace.unmask(*common, "--check")
    assert "--nodes=2" in workplace.unmask(*common, "--dry-run")
    assert not (tmp_path / "run").exists()

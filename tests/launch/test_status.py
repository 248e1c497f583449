"""What `unmask status` reads out of a run folder, with SLURM and without."""

import json
import os
import time
from pathlib import Path

import pytest

from launch import status
from launch.cli import main
from launch.slurm import JobRecord, QueuedJob
from launch.stop import EXIT_USER_ERROR
from launch.watch import RankHealth

RUNNING = QueuedJob(job_id="17", state="RUNNING", elapsed="12:31", limit="4:00:00", nodes="node[1-2]", reason="")
WAITING = QueuedJob(job_id="17", state="PENDING", elapsed="0:00", limit="4:00:00", nodes="", reason="Resources")
NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Step 120 of 1000 after two attempts, the first of which crashed; a checkpoint 90 s old."""
    run = tmp_path / "runs" / "it's $(a)\tb"
    (run / "logs").mkdir(parents=True)
    (run / "health").mkdir()
    (run / "config.yaml").write_text("train: {steps: 1000}\n")
    record = JobRecord(job_id="17", submitted=NOW, cluster="c.yaml", nodes=2, launcher="srun", processes_per_node=2)
    (run / "job.json").write_text(json.dumps(record.__dict__))
    row = {"step": 120, "time": NOW, "loss": 3.25, "grad_norm": 1.0, "tokens_per_second": 51234.0, "step_seconds": 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"step": 120, "val/x": 1.0}) + '\n{"st')
    for step in ("00000060", "00000100", "00000140.tmp-1-2"):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    os.utime(run / "checkpoints" / "step_00000100", (NOW - 90, NOW - 90))
    attempts(run, (1, "crashed", "requeue"), (2, None, None))
    (run / "job.log").write_text(
        "2026 job 17: attempt 1 (restart 0) on node[1-2], newest checkpoint: null\n"
        "RuntimeError: [1] is setting up NCCL, Connection reset by peer\n"
        "srun: error: node2: task 1: Exited with exit code 1\n"
        "2026 job 17: attempt 2 (restart 1) on node[1-2], newest checkpoint: 100\n"
    )
    (run / "logs" / "rank-1.log").write_text(
        "attempt 1 (restart 0) on node2\nTraceback (most recent call last):\nmodule.OddError: the shard is odd\n"
        "attempt 2 (restart 1) on node2\n"
    )
    return run


def attempts(run: Path, *ends: tuple[int, str | None, str | None], job: str = "17") -> None:
    with (run / "attempts.jsonl").open("w") as file:
        for number, outcome, action in ends:
            common = {"attempt": number, "job": job, "time": 1, "nodes": "node1", "checkpoint": None}
            file.write(json.dumps({"event": "start", **common}) + "\n")
            if outcome is not None:
                end = {"event": "end", **common, "outcome": outcome, "action": action, "reason": f"it {outcome}"}
                file.write(json.dumps(end) + "\n")
        file.write('{"event": "e')  # a node that dies writes half a line


def health(run: Path, rank: int, *, step: int, silent: float, straggler: str = "") -> None:
    """As a host writes it whose clock stands at NOW; how old it is, the file system says."""
    written = RankHealth(
        rank=rank,
        world_size=2,
        host=f"node{rank + 1}",
        pid=4711,
        step=step,
        phase="train",
        progress_time=NOW - silent,
        written_time=NOW,
        straggler=straggler,
    )
    path = run / "health" / f"rank-{rank:05d}.json"
    path.write_text(json.dumps(written.__dict__))
    os.utime(path, (time.time() - silent, time.time() - silent))


def test_a_running_run_is_told_in_five_lines(run: Path):
    health(run, 0, step=120, silent=1)
    health(run, 1, step=120, silent=2)
    assert dict(status.describe(run, RUNNING, now=NOW)) == {
        "job": "17 RUNNING on node[1-2] for 12:31 of 4:00:00",
        "step": "120 of 1,000, loss 3.2500, 51,234 tok/s, ETA 00:29:20 of training",
        "checkpoint": "step 100, 00:01:30 old",
        "attempts": "2, requeued 1 time: crashed, running",
        "last error": "attempt 1: it crashed; rank-1.log: module.OddError: the shard is odd",
    }


def test_a_rank_of_a_running_job_that_is_silent_is_named(run: Path):
    health(run, 0, step=120, silent=1)
    health(run, 1, step=118, silent=95)
    rows = [text for title, text in status.describe(run, RUNNING, now=NOW) if title == "lagging"]
    assert len(rows) == 1 and rows[0].startswith("rank 1 (node2, pid 4711): step 118 of 120, phase train, no progress")
    assert "lagging" not in dict(status.describe(run, "COMPLETED", now=NOW))


def test_a_rank_that_holds_the_others_up_is_named(run: Path):
    health(run, 0, step=120, silent=1, straggler="rank 1 on node2 holds the others up")
    assert dict(status.describe(run, RUNNING, now=NOW))["slow"] == "rank 1 on node2 holds the others up"
    assert "slow" not in dict(status.describe(run, "COMPLETED", now=NOW))


def test_a_waiting_job_says_why(run: Path):
    assert dict(status.describe(run, WAITING, now=NOW))["job"] == "17 PENDING (Resources)"


def test_an_attempt_without_an_end_is_lost_once_its_job_does_not_run(run: Path):
    attempts(run, (1, None, None), (2, None, None))
    assert dict(status.describe(run, RUNNING, now=NOW))["attempts"].endswith("lost, running")
    assert dict(status.describe(run, "NODE_FAIL", now=NOW))["attempts"].endswith("lost, lost")


def test_a_finished_run_has_no_last_error(run: Path):
    attempts(run, (1, "crashed", "requeue"), (2, "finished", "end"))
    assert "last error" not in dict(status.describe(run, "COMPLETED", now=NOW))


def test_a_run_that_never_met_slurm_has_step_and_checkpoint(run: Path):
    for name in ("job.json", "attempts.jsonl"):
        (run / name).unlink()
    assert list(dict(status.describe(run, None, now=NOW))) == ["step", "checkpoint"]
    (run / "metrics.jsonl").unlink()
    assert dict(status.describe(run, None, now=NOW))["step"] == "0 of 1,000: no step recorded yet"


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"job.log": "error: there is no data set x\nsrun: error: n1: task 0: Exited"},
            "error: there is no data set x",
        ),
        ({"job.log": "ValueError: first\nKeyError: last"}, "KeyError: last"),
        (
            {"job.log": "RuntimeError: Connection closed by peer", "rank-1.log": "MemoryError: 1 GB"},
            "MemoryError: 1 GB",
        ),
        ({"job.log": "torch.distributed.DistNetworkError: gloo timed out"}, "torch.distributed.DistNetworkError"),
        (
            {"job.log": "slurmstepd: error: *** JOB 3 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***\nsrun: error: x"},
            "DUE TO TIME LIMIT",
        ),
        ({"job.log": "srun: error: node2: task 1: Killed"}, "task 1: Killed"),
    ],
)
def test_of_many_lines_the_one_that_explains_is_shown(logs, line):
    told = status.telling_line(logs)
    assert told is not None and line in told


def test_lines_that_explain_nothing_are_not_shown():
    assert status.telling_line({"job.log": "step 3/6 | loss 1.0\nINFO saved step 3\n"}) is None


def test_of_an_agent_the_ranks_of_a_node_share_a_log():
    fields = {"job_id": "1", "submitted": 0.0, "cluster": "c", "nodes": 2, "processes_per_node": 4}
    srun, torchrun = (JobRecord(launcher=launcher, **fields) for launcher in ("srun", "torchrun"))
    assert [status.log_of(Path("r"), srun, rank).name for rank in (0, 3, 5)] == ["job.log", "rank-3.log", "rank-5.log"]
    assert [status.log_of(Path("r"), torchrun, rank).name for rank in (0, 3, 5)] == ["job.log", "job.log", "node-1.log"]


def test_without_slurm_the_files_tell_what_they_can(run: Path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.chdir(run.parent.parent)
    assert main(["status", str(run.relative_to(run.parent.parent))]) == 0
    shown = capsys.readouterr().out
    assert "17 unknown: no squeue here" in shown and "120 of 1,000" in shown
    assert main(["status"]) == 0
    assert "17 unknown: no squeue here | 120 of 1,000" in capsys.readouterr().out


def test_a_queue_that_does_not_answer_hides_nothing(run: Path, monkeypatch, capsys):
    squeue = run.parent / "squeue"
    squeue.write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{run.parent}:{os.environ['PATH']}")
    assert main(["status", str(run)]) == 0
    assert "unknown: squeue says: no controller" in capsys.readouterr().out


def test_the_log_of_each_rank_is_printed(run: Path, capsys):
    assert main(["logs", str(run)]) == 0
    assert "attempt 2 (restart 1)" in capsys.readouterr().out
    assert main(["logs", str(run), "--rank", "1"]) == 0
    assert "OddError" in capsys.readouterr().out
    assert main(["logs", str(run), "--rank", "7"]) == EXIT_USER_ERROR
    assert "logs of" in (said := capsys.readouterr().err) and "job.log, rank-1.log" in said


def test_a_folder_that_is_not_there_is_an_error(capsys):
    assert main(["status", "nowhere"]) == EXIT_USER_ERROR
    assert "there is no run folder nowhere" in capsys.readouterr().err


def test_the_age_of_a_checkpoint_is_that_of_its_rename(run: Path):
    now = time.time()
    os.utime(run / "checkpoints" / "step_00000100", (now - 3700, now - 3700))
    assert dict(status.describe(run, None, now=now))["checkpoint"] == "step 100, 01:01:40 old"

"""A study of a ladder as an array of jobs of a real SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm.scaling.point import read_results
from tests.runs import ROOT, Tiny
from tests.slurm.conftest import Submitted, Workplace

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

LADDER = """
experiment: {experiment}
budgets: [{{flops: 1e8}}, {{flops: 2e8}}, {{flops: 3e8}}]
sizes: {{s: {{}}}}
families: {{mdm: {{diffusion: {{family: mdm, objective: mdm}}}}}}
evaluation: {{sequences: 6, batch: 4, draws: 2}}
"""


def test_the_points_of_a_ladder_are_an_array_and_finished_ones_are_not_submitted_again(
    workplace: Workplace, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "ladder.yaml").write_text(LADDER.format(experiment=tiny.data.parent / "base.yaml"))
    study = tmp_path / "study"
    profile = workplace.profile(nodes=1)

    def submit(*more: str) -> str:
        call = ["run", str(tmp_path / "ladder.yaml"), "--out", str(study), "--cluster", str(profile), *more]
        command = [sys.executable, "-m", "llm.scaling.cli", *call]
        done = subprocess.run(command, cwd=ROOT, env=workplace.environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "2 points in" in submit("--only", "*[12]e08*", "--at-once", "1")
    names = ["mdm/s-1e08-s0", "mdm/s-2e08-s0"]
    for point in [Submitted(workplace.cluster, study / name) for name in names]:
        assert point.wait_until_over(240) == "COMPLETED", point.log
        assert point.outcomes == ["finished"]
    assert [result.point.name for result in read_results(study)] == names
    shown = workplace.unmask("status", str(study))
    assert all(name in shown for name in names) and shown.count("COMPLETED") == 2

    assert "3 points, 2 done or diverged, 1 to do" in submit()
    last = Submitted(workplace.cluster, study / "mdm/s-3e08-s0")
    assert last.wait_until_over(240) == "COMPLETED", last.log
    assert len(read_results(study)) == 3

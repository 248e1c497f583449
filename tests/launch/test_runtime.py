import socket
from pathlib import Path

import pytest
import torch

from launch import runtime
from launch.errors import ClusterError, DataError
from launch.runtime import Place, place_from_environment, ranks_of_srun
from tests.processes import spawn

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


def test_no_launcher_means_one_process():
    assert place_from_environment({}) == Place(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_a_launchers_variables_are_read():
    assert place_from_environment(TORCHRUN) == Place(rank=3, world_size=4, local_rank=1, local_world_size=2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_half_set_environment_is_an_error_that_names_what_is_missing(missing):
    environment = {k: v for k, v in TORCHRUN.items() if k != missing}
    with pytest.raises(ClusterError, match=missing):
        place_from_environment(environment)


def test_a_rank_beyond_its_world_is_an_error():
    with pytest.raises(ClusterError, match="RANK=4"):
        place_from_environment(TORCHRUN | {"RANK": "4"})


SRUN = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "20001",
}


def test_a_task_of_srun_is_a_rank():
    found = ranks_of_srun(SRUN)
    assert found == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    assert place_from_environment(SRUN | found) == Place(rank=5, world_size=7, local_rank=1, local_world_size=3)
    assert ranks_of_srun(SRUN | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("missing", [name for name in SRUN if name != "SLURM_STEP_NUM_TASKS"])
def test_tasks_of_srun_that_could_not_meet_do_not_train_alone(missing):
    with pytest.raises(ClusterError, match=f"srun started 7 tasks, but {missing} is not set"):
        ranks_of_srun({k: v for k, v in SRUN.items() if k != missing})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"},  # a shell of salloc
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        SRUN | TORCHRUN,  # an agent in a task has set its own
    ],
)
def test_what_is_no_rank_of_srun_is_left_alone(environment):
    assert ranks_of_srun(environment) == {}


def agreements(folder):
    import os

    os.environ[runtime.RENDEZVOUS_FILE] = f"{folder}/rendezvous"
    here = runtime.start(device="cpu", timeout_seconds=30)
    rank = here.rank
    outcome = {
        "sum_and_max": here.sum_and_max([1.5, rank], [rank, 7]),
        "sum": here.all_reduce_sum(torch.tensor([rank, 1.0])).tolist(),
        "decide": here.decide(lambda: f"rank {rank} decided"),
        "gather": here.gather(rank * 10),
    }
    for name, method in (("decide_error", here.decide), ("together_error", here.together)):
        try:
            method(lambda: _fail_on(rank, 0))
        except DataError as error:
            outcome[name] = str(error)
    here.barrier()
    here.close()
    return outcome


def _fail_on(rank, failing):
    if rank == failing:
        raise DataError("shard 3 is gone")


def test_all_ranks_hear_the_same_sums_decisions_and_errors(tmp_path):
    results = spawn(agreements, 3, tmp_path, group=False)
    for result in results:
        assert result["sum_and_max"] == ([4.5, 3.0], [2, 7])
        assert result["sum"] == [3.0, 3.0]
        assert result["decide"] == "rank 0 decided"
        assert result["gather"] == [0, 10, 20]
        assert result["decide_error"] == "shard 3 is gone"
        assert result["together_error"].endswith("shard 3 is gone")


def listeners_of_ranks_without_an_agent(port):
    import os

    del os.environ[runtime.RENDEZVOUS_FILE]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    here = runtime.start(device="cpu", timeout_seconds=30)
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    found = [line.split()[1] for line in lines if line.split()[3] == "0A" and f":{port:04X} " in line]
    here.barrier()
    here.close()
    return found


def test_on_a_cluster_of_one_machine_rank_0_listens_on_loopback_alone():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for found in spawn(listeners_of_ranks_without_an_agent, 2, port, group=False):
        assert found == [f"0100007F:{port:04X}"]


def test_asking_for_cuda_without_one_names_the_remedy():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ClusterError, match=r"engine\.device=cpu"):
        runtime.start(device="cuda")

"""What SLURM says in environment variables, read: who this rank is, and where the ranks meet. No
cluster."""

from __future__ import annotations

import pytest
import torch

from distaccum.launch.ranks import Place, detect_launcher, ranks_here, warn_without_srun
from distaccum.launch.slurm_names import first_host, port, tasks_per_node

# Task 4 of 5 on three unequal nodes, as srun tells it. MASTER_ADDR and RANK are left over from
# another time.
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "5",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "login",
}


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("n1", "n1"),
        ("n1,login", "n1"),
        ("n[1-3]", "n1"),
        ("n[08-11]", "n08"),
        ("n[3,1]", "n3"),
        ("gpu[07-08,11],cpu-[a,b]-ib,x", "gpu07"),
        ("cpu-[a,b]-ib,gpu[07-08,11]", "cpu-a-ib"),
        ("rack[1-2]node[01-02]", "rack1node01"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("node-1-[099-101].example.org", "node-1-099.example.org"),
    ],
)
def test_first_host(nodelist: str, expected: str) -> None:
    assert first_host(nodelist) == expected


def test_tasks_per_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3)") == [2, 2, 2]
    assert tasks_per_node("2(x2),1,8(x1)") == [2, 2, 1, 8]


def test_ports_of_neighbours_differ_and_are_not_the_kernels() -> None:
    ports = [port(job, step) for job in range(100_000, 102_000) for step in (0, 1)]
    assert all(10_000 <= number < 30_000 for number in ports)
    assert len({port(job, 0) for job in range(20_000)}) == 20_000
    assert len({port(123_456, step) for step in range(50)}) == 50
    assert port(123, 0) == 10_123  # train.sbatch computes the same for torchrun


def test_a_task_of_srun_is_a_rank() -> None:
    place = detect_launcher(TASK)
    assert place == Place("srun", 3, 5, 1, 2, store_at=("gpu07", 10_007))
    assert place.rendezvous() == {
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "10007",
        "RANK": "3",
        "WORLD_SIZE": "5",
    }
    assert (
        detect_launcher(
            TASK | {"SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}
        ).local_world_size
        == 1
    )


def test_what_is_no_task() -> None:
    """The shell of a batch job or of salloc, and one task alone, which may start ranks of its
    own."""
    shell = {name: value for name, value in TASK.items() if not name.startswith("SLURM_STEP")}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        del shell[name]
    assert detect_launcher(shell) == Place("alone", 0, 1, 0, 1)
    assert (
        detect_launcher(shell | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}).started_by
        == "alone"
    )


def test_torchrun_inside_a_task_counts() -> None:
    place = detect_launcher(
        TASK | {"TORCHELASTIC_RUN_ID": "x", "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
    )
    assert (place.started_by, place.rank, place.world_size, place.local_rank) == (
        "torchrun",
        6,
        8,
        2,
    )
    assert place.rendezvous() == {}


def test_the_gpu_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --gpus-per-task each task sees its own GPU only, which is number 0 there; else all GPUs
    of the node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for bound, count, sees_one in [
        ({}, 2, False),
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, True),
        ({}, 1, False),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        place = detect_launcher(TASK | bound)
        assert place.sees_one_gpu() is sees_one
        if count == 2 or sees_one:
            assert ranks_here({"device": "cuda"}, place) == 2
    with pytest.raises(ValueError, match="2 ranks on this machine, but it has 1 GPU"):
        ranks_here({"device": "cuda"}, detect_launcher(TASK))


def test_a_start_without_srun_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    warn_without_srun(shell, 1)
    assert (
        "warning: the allocation has 4 tasks, but this start without srun has 1 rank"
        in capsys.readouterr().err
    )
    for quiet in (TASK, {"SLURM_NTASKS": "4"}, {"SLURM_JOB_ID": "7"}, {}):
        warn_without_srun(quiet, 1)
    warn_without_srun(shell, 4)  # it starts as many ranks itself
    assert capsys.readouterr().err == ""

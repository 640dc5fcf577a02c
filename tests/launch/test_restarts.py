"""Starting again after a failure, by torchrun or by ourselves: in the same folder, with as many
ranks as are there."""

import os
import signal
from pathlib import Path

import pytest

from .programs import free_port, seen, starts, wait_for_ranks, wait_until, wait_until_gone


def test_restart_continues_in_the_same_folder(start, tmp_path):
    """The first start fails in one rank; torchrun's is started cold, as its ranks are new
    interpreters each time."""
    programs = {}
    for name in ("it's torchrun", "own", "given"):
        (tmp_path / name).mkdir()
    fault = ("fault.kind=raise", "fault.rank=1", "fault.times=1")
    torchrun = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    programs["torchrun"] = start(
        *fault, torchrun=torchrun, folder=tmp_path / "it's torchrun", cold=True
    )
    programs["own"] = start(
        *fault, "launch.nproc_per_node=2", "launch.max_restarts=2", folder=tmp_path / "own"
    )
    programs["given"] = start(*fault, "run_dir=mine", torchrun=torchrun, folder=tmp_path / "given")
    for name, program in programs.items():
        assert program.wait().code == 0, program.output
        assert program.output.count("[rank 1] ArithmeticError: the culprit's own error") == 1
        first, second = starts(program.folder)
        assert first == second
        assert len(list(program.folder.rglob(".hydra"))) == 1
        assert program.output.count(f"restart 1: continues in {first['run_dir']}\n") == (
            name != "given"
        )


def test_restart_of_a_sweep_and_of_what_cannot_be_put_right(start, tmp_path):
    """The whole sweep loses a rank under torchrun; our own ranks are not started again for a user's
    mistake."""
    for name in ("sweep", "refused", "hopeless"):
        (tmp_path / name).mkdir()
    sweep = start(
        "--multirun",
        "value=1",
        "fault.kind=sleep",
        "fault.times=1",
        torchrun=["--standalone", "--nproc-per-node=2", "--max-restarts=1"],
        folder=tmp_path / "sweep",
    )
    own = ("launch.nproc_per_node=2", "launch.max_restarts=2")
    refused = start("fault.kind=config", *own, folder=tmp_path / "refused")
    hopeless = start("fault.kind=raise", "fault.rank=1", *own, folder=tmp_path / "hopeless")
    ranks = wait_for_ranks(sweep.folder, 2)
    os.kill(next(rank["parent"] for rank in ranks if rank["rank"] == 1), signal.SIGKILL)
    (folder,) = sweep.folder.glob("sweeps/*/*")
    assert sweep.wait().code == 0, sweep.output
    assert f"restart 1: continues in {folder}\n" in sweep.output
    assert [one["run_dir"] for one in starts(sweep.folder)] == [str(folder / "0")] * 2
    assert list(sweep.folder.glob("sweeps/*/*")) == [folder]

    assert refused.wait().code == 2
    assert len(starts(refused.folder)) == 1
    assert refused.output == "error: the task refuses this configuration\n"
    assert hopeless.wait().code == 1
    assert len(starts(hopeless.folder)) == 3
    # in the traceback and as its last line
    assert hopeless.output.count("the culprit's own error") == 6
    assert "restart 2: continues in" in hopeless.output
    assert "restart 3" not in hopeless.output


@pytest.fixture
def agent(start, tmp_path):
    """Starts an agent of torchrun with two ranks; the first one hosts the rendezvous, for one agent
    or two."""
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"

    def begin(*args, is_host, nodes="1:2", **kwargs):
        conf = "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,"
        conf += f"is_host={is_host:d}"
        words = [
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            "--rdzv-id=elastic",
            "--nproc-per-node=2",
        ]
        return start(
            "fault.kind=loop",
            *args,
            torchrun=[f"--nnodes={nodes}", *words, endpoint, conf],
            **kwargs,
        )

    return begin


def world_sizes(folder):
    return [one["world_size"] for one in starts(folder)]


def lose(agent, folder):
    ranks = [rank for rank in seen(folder) if rank["parent"] == agent.pid]
    assert len(ranks) == 2
    agent.kill()
    wait_until_gone([rank["pid"] for rank in ranks], 5)


def test_world_shrinks(agent, tmp_path):
    """An agent is killed; the other one's ranks go on in the folder of the four."""
    agents = [agent(is_host=True), agent(is_host=False)]
    wait_for_ranks(tmp_path, 4)
    (folder,) = {rank["run_dir"] for rank in seen(tmp_path)}
    lose(agents[1], tmp_path)
    wait_until(lambda: world_sizes(tmp_path) == [4, 2], 60, "two ranks")
    Path(folder, "stop").touch()
    assert agents[0].wait(30).code == 0, agents[0].output
    assert {one["run_dir"] for one in starts(tmp_path)} == {folder}
    assert f"restart 1: continues in {folder}\n" in agents[0].output


def test_world_grows(agent, tmp_path):
    """A second agent joins. torch 2.13 has it wait for ever unless each start has a store of its
    own.

    Such a store remembers nothing, so that the run folder is the user's to write.
    """
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [agent("run_dir=mine", is_host=True, environment=own_store)]
    wait_for_ranks(tmp_path, 2)
    agents.append(agent("run_dir=mine", is_host=False, environment=own_store))
    wait_until(lambda: world_sizes(tmp_path) == [2, 4], 60, "four ranks")
    (tmp_path / "mine" / "stop").touch()
    assert [one.wait(30).code for one in agents] == [0, 0], agents[0].output + agents[1].output

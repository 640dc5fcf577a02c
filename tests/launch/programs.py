"""program.py as a real program, and what its ranks have left behind."""

import fnmatch
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from commands import OF_A_LAUNCHER
from processes import Surroundings, program

HERE = Path(__file__).parent
PROGRAM = HERE / "program.py"


class Program:
    """One start of program.py; its output goes to a file.

    Args:
        folder: where it runs.
        args: Hydra's.
        torchrun: ranks of torchrun, or torchrun's arguments; 0: no torchrun.
        environment: added to the environment.
        cold: with a new interpreter, as a user does; otherwise see processes.py.
        host: where it runs; None: on this host. Not for a cold one.
    """

    def __init__(self, folder, *args, torchrun=0, environment=None, cold=False, host=None):
        starter = (
            ["--standalone", f"--nproc-per-node={torchrun}"]
            if isinstance(torchrun, int)
            else list(torchrun)
        )
        starter = starter if torchrun else []
        clean = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        if torchrun:
            clean["OMP_NUM_THREADS"] = "1"  # or torchrun prints its advice
        clean |= environment or {}
        self.folder = folder
        self.output_file = folder / f"output{time.monotonic_ns()}"
        self.output_file.touch()
        self._forked = not cold
        if not cold:
            surroundings = Surroundings(folder, clean, self.output_file, self.output_file, host)
            self.process = program(PROGRAM, args, surroundings, starter)
            return
        if torchrun:
            starter = ["-m", "torch.distributed.run", *starter]
        with self.output_file.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, *starter, str(PROGRAM), *args],
                cwd=folder,
                env=clean,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a signal to pytest's group does not reach it
            )

    def wait(self, timeout_s=90):
        end = time.monotonic() + timeout_s
        while self.code is None:
            assert time.monotonic() < end, f"still at work after {timeout_s} s:\n{self.output}"
            time.sleep(0.02)
        return self

    def signal(self, number):
        if self.code is None:
            os.kill(self.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        return self.wait(10)

    @property
    def pid(self):
        return self.process.pid

    @property
    def code(self):
        return self.process.exitcode if self._forked else self.process.poll()

    @property
    def output(self):
        return self.output_file.read_text()

    def own_output(self):
        """The output up to torchrun's summary, without its warnings."""
        own = self.output.split("Traceback (most recent call last):\n  File")[0]
        return [line for line in own.splitlines() if line and line[0] not in "WE"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_hand(start, num_ranks, *args, ranks=None, **kwargs):
    """Ranks without an agent (all, or only some): RANK and so on in the environment; rank 0 hosts
    the store."""
    place = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        start(*args, environment=place | {"RANK": str(rank)}, **kwargs)
        for rank in ranks or range(num_ranks)
    ]


def found(folder, pattern):
    """The files below a folder whose name matches, sorted; a job may make and remove folders
    meanwhile."""
    # unlike Path.rglob it passes over a folder that is gone before it is read
    walk = os.walk(folder)
    return sorted(
        Path(top, name) for top, _, names in walk for name in fnmatch.filter(names, pattern)
    )


def seen(folder):
    """What the ranks of all jobs wrote."""
    return [json.loads(file.read_text()) for file in found(folder, "rank*.json")]


def starts(folder):
    """What the ranks of all starts wrote, first to last."""
    return [
        json.loads(line)
        for file in found(folder, "starts.jsonl")
        for line in file.read_text().splitlines()
    ]


def wait_until(done, timeout_s=30, what=""):
    end = time.monotonic() + timeout_s
    while not (value := done()):
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


def wait_for_ranks(folder, count, timeout_s=30):
    return wait_until(
        lambda: len(ranks := seen(folder)) >= count and ranks, timeout_s, f"{count} ranks at work"
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, timeout_s=10):
    wait_until(lambda: not any(alive(pid) for pid in pids), timeout_s, "all processes gone")


def stacks(folder):
    """The stack files of one job, by rank."""
    files = found(folder, "rank-*.txt")
    assert len({file.parent for file in files}) == 1, files
    return {int(file.stem.removeprefix("rank-")): file.read_text() for file in files}


def assert_one_job(ranks, world_size):
    assert sorted(rank["rank"] for rank in ranks) == list(range(world_size))
    assert {rank["world_size"] for rank in ranks} == {world_size}
    first = ranks[0]
    for rank in ranks:
        assert rank["local"] == [rank["rank"], world_size]
        for key in ("config", "run_dir", "overrides", "number"):
            assert rank[key] == first[key]
        value = first["config"]["value"]
        assert rank.get("total") == (
            None if world_size == 1 else sum(value + other for other in range(world_size))
        )

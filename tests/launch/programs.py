"""program.py as a real program, and what its ranks have left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = str(HERE / "program.py")
OF_A_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)


class Program:
    """One start of program.py; its output goes to a file."""

    def __init__(self, folder, *args, torchrun=0, environment=None):
        starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
        clean = {key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER}
        if torchrun:
            clean["OMP_NUM_THREADS"] = "1"  # or torchrun prints its advice
        self.folder = folder
        self.output_file = folder / f"output{time.monotonic_ns()}"
        with self.output_file.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *starter, PROGRAM, *args],
                cwd=folder,
                env=clean | (environment or {}),
                stdout=output,
                stderr=output,
                start_new_session=True,  # a signal to pytest's group does not reach it
            )

    def wait(self, timeout_s=90):
        self.process.wait(timeout_s)
        return self

    @property
    def code(self):
        return self.process.returncode

    @property
    def output(self):
        return self.output_file.read_text()

    def own_output(self):
        """The output up to torchrun's summary, without its warnings."""
        own = self.output.split("Traceback (most recent call last):\n  File")[0]
        return [line for line in own.splitlines() if line and line[0] not in "WE"]


def seen(folder):
    """What the ranks of all jobs wrote."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*/*/*/**/rank*.json"))]


def wait_for_ranks(folder, count, timeout_s=30):
    end = time.monotonic() + timeout_s
    while len(ranks := seen(folder)) < count:
        assert time.monotonic() < end, f"{len(ranks)} of {count} ranks wrote something"
        time.sleep(0.05)
    return ranks


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, timeout_s=10):
    end = time.monotonic() + timeout_s
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < end, f"orphans: {left}"
        time.sleep(0.05)


def assert_one_job(ranks, world_size):
    assert sorted(rank["rank"] for rank in ranks) == list(range(world_size))
    assert {rank["world_size"] for rank in ranks} == {world_size}
    first = ranks[0]
    for rank in ranks:
        assert rank["local"] == [rank["rank"], world_size]
        for key in ("config", "run_dir", "overrides", "number"):
            assert rank[key] == first[key]
        value = first["config"]["value"]
        assert rank.get("total") == (None if world_size == 1 else sum(value + other for other in range(world_size)))

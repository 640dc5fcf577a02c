"""The same with real command lines, a few times: as torchrun's ranks, and as ranks that we
start."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from commands import command_line
from faults import Fault
from processes import Surroundings, program
from runs import Run, Undisturbed, wait_for

PROGRAM = Path(__file__).with_name("program.py")


def test_torchrun_starts_again_and_goes_on(
    run: Callable[..., Run], undisturbed: Undisturbed
) -> None:
    found = run()
    fault = Fault(1, 5, "backward", "kill")
    ended = command_line(
        [
            "train", *found.overrides, "parallel=ddp",
            "+faults=[{rank: 1, step: 5, at: backward, kind: kill}]",
        ],
        found.folder, PROGRAM,
        torchrun=["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found.run_dir.rmdir()
    # The second start has made no folder of its own.
    (found.run_dir,) = found.folder.glob("runs/*/*")
    assert found.acted(fault)
    assert [record["step"] for record in found.records("resume")] == [4]
    expected = undisturbed.of(2, "parallel=ddp")
    assert found.sha256() == expected.sha256()
    assert found.trajectory() == expected.trajectory()


def test_ctrl_c_twice_in_a_terminal_with_our_own_ranks(
    run: Callable[..., Run], undisturbed: Undisturbed
) -> None:
    found = run()
    slow = Fault(0, 3, "forward", "slow")
    arguments = [
        "train", *found.overrides, "parallel=ddp", "launch.nproc_per_node=2",
        f"run_dir={found.run_dir}", "+faults=[{rank: 0, step: 3, at: forward, kind: slow}]",
    ]  # fmt: skip
    output = found.folder / "output"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = program(PROGRAM, arguments, Surroundings(found.folder, environment, output, output))
    try:
        wait_for(slow.record(found.run_dir), 60)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(found.run_dir / "PREEMPTED")  # rank 1 is done, rank 0 is at its last lines
        os.killpg(process.pid, signal.SIGINT)
        process.join(20)
    finally:
        process.kill()
    assert process.exitcode == 0, output.read_text()
    marker = json.loads((found.run_dir / "PREEMPTED").read_text())
    assert marker == {"step": found.step, "reason": "SIGINT"}
    found.finish(2, "parallel=ddp")
    assert not (found.run_dir / "PREEMPTED").exists()
    assert found.sha256() == undisturbed.of(2, "parallel=ddp").sha256()

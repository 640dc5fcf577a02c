"""Our command line and other programs in a process of their own, without 3 s of imports, see
processes.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from processes import Surroundings
from processes import program as start

MAIN = "from distaccum.cli import main\nmain()\n"
# `distaccum` with a profile that repeats nothing more often than it must.
QUICK_PROFILE = """
from distaccum.cli import main
from distaccum.app.commands import profile
profile.COMPUTE_BUDGET_S, profile.MESSAGE_BUDGET_S, profile.LARGEST_BYTES = 0.0, 0.0, 2**18
main()
"""
OF_A_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "OMP_NUM_THREADS",
)  # fmt: skip


def command_line(
    arguments: Sequence[str],
    folder: Path,
    program: str | Path = MAIN,
    *,
    torchrun: Sequence[str] = (),
    strict: bool = False,
    timeout_s: float = 90,
) -> subprocess.CompletedProcess[str]:
    """Run `distaccum ARGUMENTS` in `folder`, or another program with these arguments.

    Args:
        arguments: those of the program.
        folder: where it runs; its output is kept beside it.
        program: what stands in `__main__`, or its file.
        torchrun: the arguments of torchrun.
        strict: whether warnings are errors.
        timeout_s: how long it may take.
    """
    out, err = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
    for file in (out, err):
        file.write_text("")
    if torchrun and isinstance(program, str):  # which starts files only
        file = folder.parent / f"{folder.name}.py"
        file.write_text(program)
        program = file
    environment = {name: text for name, text in os.environ.items() if name not in OF_A_LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    surroundings = Surroundings(folder, environment, out, err, strict=strict)
    process = start(program, arguments, surroundings, torchrun)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout_s, out.read_text(), err.read_text())
    return subprocess.CompletedProcess(
        arguments, process.exitcode, out.read_text(), err.read_text()
    )

"""Our command line in a process of its own: with its own exit code, output and folder, but without
3 s of imports.

It is forked from the server of the worlds, which has imported everything, and so are the processes
that it spawns. Starts from nothing are tests of their own: `python -m distaccum`, the script
`distaccum`, torchrun, and the ranks that the command line starts itself.
"""

from __future__ import annotations

import logging
import multiprocessing.context
import multiprocessing.popen_fork
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from worlds import forked

MAIN = "from distaccum.cli import main\nmain()\n"


def command_line(
    arguments: list[str], folder: Path, program: str = MAIN, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """`distaccum ARGUMENTS` in `folder`. `program`: what stands in `__main__`, in place of the
    package's own."""
    out, err = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    process = forked(
        _become, program, arguments, str(folder), str(out), str(err), environment, daemon=False
    )
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(arguments, timeout_s, out.read_text(), err.read_text())
    return subprocess.CompletedProcess(
        arguments, process.exitcode, out.read_text(), err.read_text()
    )


class _Spawned(multiprocessing.popen_fork.Popen):
    """A process of the start method "spawn" that has the imports of its parent, and else what a new
    one has."""

    def _launch(self, process: Any) -> None:
        bootstrap = process._bootstrap

        def fresh(parent_sentinel: int) -> Any:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logging.disable(logging.NOTSET)
            return bootstrap(parent_sentinel=parent_sentinel)

        process._bootstrap = fresh
        try:
            super()._launch(process)  # type: ignore[misc]
        finally:
            del process._bootstrap


def _become(
    program: str, arguments: list[str], folder: str, out: str, err: str, environment: dict[str, str]
) -> None:
    """What such a process does: it puts on the surroundings of a process that was started by a
    shell."""
    import torch

    for name, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.context.SpawnProcess._Popen = staticmethod(_Spawned)  # type: ignore[method-assign,assignment]
    sys.argv = ["distaccum", *arguments]
    try:
        exec(compile(program, "__main__.py", "exec"), {"__name__": "__main__"})
    except Exception:  # as the interpreter does it
        traceback.print_exc()
        sys.exit(1)

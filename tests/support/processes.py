"""Processes of tests that are at work within a tenth of a second: forked from a server that has
imported everything.

They have their own exit code, output, folder and environment, get real signals, and so do the
processes that they start themselves: those of the start method "spawn", and the ranks of torchrun's
agent. Only `exec` and 3 s of imports are left out. What must be seen with a new interpreter is
started cold, in tests of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import multiprocessing.context
import multiprocessing.popen_fork
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

# What every process is forked with, imported once: torch and ourselves, and what torch imports when
# it is first used. Nothing here has ever computed anything.
PRELOADED = [
    "torch", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp",
    "torch.distributed.run", "torch.distributed.tensor", "torch.profiler", "torch.testing",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "numpy", "hydra", "distaccum",
    "distaccum.launch", "distaccum.app.commands.plan", "distaccum.app.commands.profile",
    "distaccum.app.commands.train", "distaccum.app.commands.verify", "distaccum.metrics.sweep",
]  # fmt: skip
AGENT_HAS_FORKED_S = 0.3


def forked(function: Callable[..., None], *args: Any, daemon: bool = True) -> Any:
    """Start a process that is forked from the server with all of `PRELOADED` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_begin, args=(function, *args), daemon=daemon)
    process.start()
    return process


def _begin(function: Callable[..., None], *args: Any) -> None:
    # A million objects came with the imports. Not to look at them again and again saves a third of
    # a second for each full collection, and the copy of their pages.
    gc.freeze()
    function(*args)


@dataclass(frozen=True)
class Host:
    """Another host to be on: a network namespace, its /etc/hosts and its name. Needs root."""

    network: str
    hosts_file: str
    name: str

    def enter(self) -> None:
        """Be on it from here on."""
        libc = ctypes.CDLL(None, use_errno=True)

        def must(code: int) -> None:
            if code:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        new_mounts, new_names, private_below, bind = 0x20000, 0x4000000, 0x44000, 0x1000
        with open(f"/run/netns/{self.network}") as file:
            must(libc.setns(file.fileno(), 0))
        must(libc.unshare(new_mounts | new_names))
        must(libc.mount(b"none", b"/", None, private_below, None))
        must(libc.mount(self.hosts_file.encode(), b"/etc/hosts", None, bind, None))
        socket.sethostname(self.name)


@dataclass(frozen=True)
class Surroundings:
    """What a program is started in.

    Args:
        folder: the working directory.
        environment: all of it.
        out: the file that standard output is appended to.
        err: the same for standard error.
        host: None is this host.
        strict: whether warnings are errors, as with `python -W error`.
    """

    folder: Path
    environment: Mapping[str, str]
    out: Path
    err: Path
    host: Host | None = None
    strict: bool = False

    def put_on(self) -> None:
        """Make this process stand in them, as if a shell had started it."""
        if self.host is not None:
            self.host.enter()
        append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        opened = [
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(file, append) for file in (self.out, self.err)),
        ]
        for target, source in enumerate(opened):
            os.dup2(source, target)
        os.closerange(3, 256)
        tracker = resource_tracker._resource_tracker  # the server's, whose pipe is closed now
        tracker._fd = tracker._pid = None
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
        os.chdir(self.folder)
        _set_environment(self.environment)
        if self.strict:
            warnings.simplefilter("error")


def program(
    source: str | Path,
    arguments: Sequence[str],
    surroundings: Surroundings,
    torchrun: Sequence[str] = (),
) -> Any:
    """Start a program.

    Args:
        source: a file, or what would stand in one; torchrun needs a file.
        arguments: those of the program.
        surroundings: what it stands in.
        torchrun: the arguments of torchrun; without any there is no agent.

    Returns:
        The `multiprocessing.Process`, which leads a session of its own.
    """
    return forked(_run, source, list(arguments), surroundings, list(torchrun), daemon=False)


def _run(
    source: str | Path, arguments: list[str], surroundings: Surroundings, torchrun: list[str]
) -> None:
    def body() -> None:
        from torch.distributed.elastic.multiprocessing import subprocess_handler

        surroundings.put_on()
        # The two places in which launchers start an interpreter.
        subprocess_handler.SubprocessHandler._popen = lambda self, args, env: _Rank(args, env)  # type: ignore[method-assign,assignment]
        multiprocessing.context.SpawnProcess._Popen = staticmethod(_Spawned)  # type: ignore[method-assign,assignment]
        if torchrun:
            import torch.distributed.run

            sys.argv = [torch.distributed.run.__file__]
            torch.distributed.run.main([*torchrun, str(source), *arguments])
        else:
            _main(source, arguments)

    os.setsid()
    _exit_with(body)


def _main(source: str | Path, arguments: list[str]) -> None:
    sys.argv = [str(source) if isinstance(source, Path) else "distaccum", *arguments]
    if isinstance(source, Path):
        sys.path[0:0] = [str(source.parent)]
        runpy.run_path(str(source), run_name="__main__")
    else:
        exec(compile(source, "__main__.py", "exec"), {"__name__": "__main__"})


def _exit_with(body: Callable[[], object]) -> None:
    """Run it and end as the interpreter ends."""
    code = 1
    try:
        _as_after_exec()
        body()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _as_after_exec() -> None:
    import torch

    faulthandler.disable()
    logging.disable(logging.NOTSET)
    for number in (
        signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
        signal.SIGCHLD,
    ):  # fmt: skip
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class _Rank:
    """A rank of torchrun, as far as its agent asks."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None

        def body() -> None:
            gc.freeze()  # what the agent holds is not for this process to close
            # The agent's store resolves names while ranks connect to it. A rank that is forked in
            # that moment finds the resolver locked for ever, so that none connects before all are
            # forked.
            time.sleep(AGENT_HAS_FORKED_S)
            _set_environment(env)
            start = next(i for i, word in enumerate(args) if word.endswith(".py"))
            _main(Path(args[start]), list(args[start + 1 :]))

        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _exit_with(body)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.01)
        return code


class _Spawned(multiprocessing.popen_fork.Popen):
    """A process of the start method "spawn" that has the imports of its parent, and else what a new
    one has."""

    def _launch(self, process: Any) -> None:
        bootstrap = process._bootstrap

        def fresh(parent_sentinel: int) -> Any:
            _as_after_exec()
            return bootstrap(parent_sentinel=parent_sentinel)

        process._bootstrap = fresh
        try:
            super()._launch(process)  # type: ignore[misc]
        finally:
            del process._bootstrap

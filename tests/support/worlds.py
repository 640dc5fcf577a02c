"""Worlds of ranks for tests: processes that are started once and run many functions, judged by what
they send back."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import forked

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

START_TIMEOUT_S = 60.0
MOST_SUBGROUPS = 40


class RankFailed(AssertionError):
    """A rank raised, died or was late; the message holds what every rank said."""


class World:
    """`size` processes that share a gloo process group. After a failure the next run starts new
    ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._start()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="world")
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = multiprocessing.Pipe()
            process = forked(_serve, rank, self.size, self._folder.name, theirs)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_TIMEOUT_S)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call a module-level function on every rank and return what each one returned, in rank
        order."""
        self._send(function, args)
        return self._collect(timeout_s)

    def try_to_run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float, grace_s: float
    ) -> list[Any]:
        """Call a function that may leave ranks waiting for each other; the answer of a rank that
        does not end is None.

        Args:
            function: a module-level function that ends on all ranks at about the same time, or not
                at all.
            args: its arguments.
            timeout_s: how long all ranks have.
            grace_s: how much longer the others have when one has ended.
        """
        self._send(function, args)
        answers = self._answers(timeout_s, lambda kind: True, grace_s)
        if any(kind != "ok" for kind, _ in answers.values()):
            self.close()
        return [answers[rank][1] if answers[rank][0] == "ok" else None for rank in range(self.size)]

    def _send(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))

    def tidy(self) -> None:
        """Replace ranks in which tests have left many subgroups, each of which has its threads.

        They cannot be destroyed one by one, because torch keeps what belongs to a mesh and would
        give a later mesh of the same shape what knows the destroyed group.
        """
        if self._processes and self.run(_subgroups)[0] > MOST_SUBGROUPS:
            self.close()

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join(10)
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _collect(self, timeout_s: float) -> list[Any]:
        answers = self._answers(timeout_s, lambda kind: kind != "ok", 2.0)
        if any(kind != "ok" for kind, _ in answers.values()):
            self.close()
            raise RankFailed(
                "\n".join(f"rank {r}: {kind} {text}" for r, (kind, text) in sorted(answers.items()))
            )
        return [answers[rank][1] for rank in range(self.size)]

    def _answers(
        self, timeout_s: float, hurries: Callable[[str], bool], grace_s: float
    ) -> dict[int, tuple[str, Any]]:
        """What each rank answered, by rank; an answer of a kind that hurries leaves the others
        `grace_s`."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in answers}
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting[pipe]
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = ("died", f"exit code {self._processes[rank].exitcode}")
            if any(hurries(kind) for kind, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + grace_s)
            if time.monotonic() >= deadline and len(answers) < self.size:
                for rank in set(range(self.size)) - set(answers):
                    answers[rank] = ("late", f"no answer within {timeout_s:g} s")
        return answers


@contextmanager
def world(size: int) -> Iterator[World]:
    """A world that is closed at the end."""
    made = World(size)
    try:
        yield made
    finally:
        made.close()


@cache
def mesh_of(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """Make, on a rank, the mesh of a shape, once: each new one has groups and their threads."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _subgroups() -> int:
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_map) - 1


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        pipe.send(("ok", None))
        while True:
            function, args = pipe.recv()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # as in the tests' own process
                result = function(*args)
            pipe.send(("ok", result))
    except EOFError:
        pass
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
    finally:
        os._exit(0)

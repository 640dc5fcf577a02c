"""Starts the ranks of benchmarks/links.py, one per host, and sends them requests over pipes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from subprocess import Popen
from typing import Any, Self

from hosts import Hosts
from links_names import Settings

PORT = 29500  # of the TCPStore on host 0; nothing else runs on a new host


class Ranks:
    """Holds one process per host, which runs inside the `with` block and is ended after it."""

    def __init__(self, made: Hosts, settings: Settings) -> None:
        """Keep hosts and settings; entering the block starts the ranks."""
        self._hosts, self._settings = made, settings
        self._pipes: list[Connection] = []
        self._processes: list[Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="links")

    def __enter__(self) -> Self:
        try:
            for rank in range(len(self._hosts)):
                self._start(rank)
            self._answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        for process in self._processes:
            process.kill()  # a rank that waits for another one would not react to anything else
        for process in self._processes:
            process.wait()
        self._folder.cleanup()

    def ask(self, what: str, *arguments: object) -> list[Any]:
        """Call a method of links_rank.Rank on all ranks, and return their answers by rank."""
        return self.ask_each(what, [arguments] * len(self._pipes))

    def ask_each(self, what: str, arguments: Sequence[Sequence[object]]) -> list[Any]:
        """Call a method of links_rank.Rank with own arguments on each rank; return the answers."""
        for pipe, own in zip(self._pipes, arguments, strict=True):
            pipe.send((what, *own))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for ready in wait(list(waiting)):
                rank = waiting[ready]  # type: ignore[index]
                try:
                    answers[rank] = ready.recv()  # type: ignore[union-attr]
                except EOFError:
                    output = self._log(rank).read_text()[-4000:]
                    code = self._processes[rank].wait()
                    raise RuntimeError(
                        f"rank {rank} ended with exit code {code}. Its output ends with:\n{output}"
                    ) from None
        return [answers[rank] for rank in range(len(self._pipes))]

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        command = [
            sys.executable, str(Path(__file__).with_name("links_rank.py")), f"--rank={rank}",
            f"--ranks={len(self._hosts)}", f"--store={self._hosts[0].address}:{PORT}",
            f"--parent={os.getpid()}", f"--pipe={theirs.fileno()}",
            f"--settings={json.dumps(asdict(self._settings))}",
        ]  # fmt: skip
        with self._log(rank).open("wb") as log:
            process = self._hosts.start(
                rank, command, pass_fds=[theirs.fileno()], stdout=log, stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches the parent only
            )  # fmt: skip
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

"""Programs that do not outlive their test."""

import os
import signal

import pytest

from .programs import Program, alive, seen


@pytest.fixture
def start(tmp_path):
    programs = []

    def begin(*args, folder=tmp_path, **kwargs):
        programs.append(Program(folder, *args, **kwargs))
        return programs[-1]

    yield begin
    for program in programs:
        if program.code is None:
            program.kill()
    for rank in [rank for program in programs for rank in seen(program.folder)]:
        if alive(rank["pid"]) and rank["pid"] != os.getpid():
            os.kill(rank["pid"], signal.SIGKILL)

"""How deep a training is: the frames of the package between the command line and the optimizer."""

from __future__ import annotations

from pathlib import Path

from commands import command_line
from test_house import ROOT, SMALL

# `main` in the place of the package's own, with a hook that prints the package's frames at each
# update.
SHOWS_FRAMES = """
import traceback

from torch.optim.optimizer import register_optimizer_step_pre_hook

from distaccum.cli import main


def show(*_):
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
    print("frames:", *(frame.name for frame in frames))


register_optimizer_step_pre_hook(show)
main()
"""


def test_few_frames_from_the_command_line_to_the_optimizer(tmp_path: Path) -> None:
    program = f"ROOT = {str(ROOT / 'distaccum')!r}\n{SHOWS_FRAMES}"
    done = command_line(["train", *SMALL, "device=cpu"], tmp_path, program=program)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("frames:")]
    # `build` makes the optimizer's state.
    steps = [frames for frames in found if "build" not in frames]
    assert len(steps) == 2
    for frames in steps:
        assert frames[0] == "main"
        assert frames[-1] == "step"
        assert len(frames) <= 7, frames

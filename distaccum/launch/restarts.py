"""Continues in the same run folder when torchrun restarts the ranks.

torchrun restarts them with `--max-restarts`, and when nodes come or go.
"""

from pathlib import Path

from .board import Board
from .failure import say
from .job import Order
from .overrides import override

_FOLDER = "folder"


class Restarts:
    """Keeps the run folder in the store of torchelastic's agent, which outlives a start.

    For rank 0.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._number = board.count_start()

    def begin(self, argv: list[str]) -> list[str]:
        """Return Hydra's arguments for this start, with the folder of an earlier start added.

        They are returned unchanged if there was no earlier start or if the user has given a folder.
        """
        remembered = self._board.recall(_FOLDER)
        if remembered is None:
            return argv
        key, folder = remembered.split("=", 1)
        if any(word.startswith(("run_dir=", "hydra.run.dir=", "hydra.sweep.dir=")) for word in argv):
            return argv
        say(f"restart {self._number}: continues in {folder}")
        return [*argv, override(key, folder)]

    def remember(self, order: Order) -> None:
        """Keep the folder of this job, or of its sweep, for later starts."""
        if order.sweep is None:
            key, folder = "run_dir", order.run_dir
        else:
            key = "hydra.sweep.dir"
            folder = str(next(parent for parent in Path(order.run_dir).parents if parent.name == order.sweep))
        self._board.remember(_FOLDER, f"{key}={folder}")

"""Records what became of the jobs of a sweep, on the rank that runs Hydra."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from distaccum.metrics.sweep import JobOutcome, Sweep

from .failure import exit_code, first_line, one_line, report
from .job import RESULT, Ended, read_result
from .processes import SIGNALS

Summarise = Callable[[Sweep], None]


class Outcomes:
    """Runs the jobs of a sweep one after the other and records what became of each.

    Args:
        objective: The name of the number in a job's result that the sweeper gets.
    """

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.folder = Path()  # the sweep's, from its first job on
        self.jobs: list[JobOutcome] = []

    def run(
        self,
        number: int,
        overrides: list[str],
        folder: Path,
        run_dir: Path,
        do: Callable[[], Ended],
    ) -> None:
        """Run one job and record what became of it.

        What `do` raises is shown and recorded. Only what ends the whole sweep (a signal) is raised
        again.
        """
        self.folder = folder
        (run_dir / RESULT).unlink(missing_ok=True)  # an earlier job's
        print(f"sweep job {number}: {' '.join(overrides) or 'no overrides'}", flush=True)
        status: Literal["done", "failed", "interrupted"] = "interrupted"
        ended = Ended(1, None)
        try:
            ended = do()
            status = "failed" if ended.code else "done"
        except Exception as error:
            ended, status = Ended(report(error), first_line(error)), "failed"
        except BaseException as error:
            ended = Ended(exit_code(error), None)
            raise
        finally:
            result = read_result(run_dir) or {}
            line = None if ended.error is None else one_line(ended.error)
            self.jobs.append(
                JobOutcome(number, tuple(overrides), run_dir, status, ended.code, line, result)
            )

    def last_objective(self) -> float | None:
        """Return the number of the last job for the sweeper; None if it failed or is not finite.

        None makes Optuna mark the trial as failed and continue. A number, however bad, would count
        as a measurement.
        """
        last = self.jobs[-1]
        value = last.result.get(self.objective)
        if last.status != "done" or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def exit_code(self, code: int) -> int:
        """Return the exit code of the sweep if Hydra itself ended with `code`."""
        if self.jobs[-1].status == "interrupted":
            return self.jobs[-1].exit_code
        return (
            code if code > 128 else int(code != 0 or any(job.status != "done" for job in self.jobs))
        )


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Raise SystemExit(128 + signal) in the main thread at the first signal, and ignore later ones.

    Later ones do come: a terminal signals all processes, and then torchrun signals its ranks again.
    While a job runs, signals go to the job (see `signals_forwarded`).
    """

    def leave_sweep(number: int, _: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave_sweep) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Submits a job, or all jobs of a sweep as one array, with sbatch (`launch=slurm`).

Nothing is trained in this process.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .failure import say
from .hydra_once import composed_with, flags, sweeper_needs_results
from .job import Check, Ended, Order
from .overrides import override
from .ranks import Place
from .settings import Launcher, SlurmLaunch
from .slurm_script import Element, render
from .sweep import Sweep

_OUR_OWN = re.compile(r"[+~]*(launch|run_dir)([.=@]|$)")  # overrides that the script replaces


@dataclass(frozen=True)
class Program:
    """Describes what a batch job starts: `python -m distaccum COMMAND overrides`."""

    command: str
    sweep_key: str  # gets the sweep's name, unless the user has given it a value


class Submission:
    """Collects the jobs of this start that SLURM is to run, and submits them.

    Args:
        program: What the jobs run.
        check: Raises ConfigError for a configuration that is not valid.
        place: The rank of this process.
        environment: The environment variables of this process.
    """

    def __init__(self, program: Program, check: Check, place: Place, environment: Mapping[str, str]) -> None:
        self._program, self._check = program, check
        self._place, self._environment = place, environment
        self._elements: list[Element] = []
        self._settings: list[dict[str, Any]] = []
        self._in_sweep = False

    def wants(self, order: Order) -> bool:
        """Return whether SLURM is to run this order.

        Raises:
            ConfigError: A sweep mixes jobs for SLURM with other jobs.
        """
        is_ours = (order.config.get("launch") or {}).get("name") == "slurm"
        if self._elements and not is_ours:
            raise ConfigError("either all jobs of a sweep have launch=slurm or none has. Do not sweep over launch.")
        return is_ours

    def add(self, order: Order) -> Ended:
        """Add a job whose configuration has been checked, and return how it ended here.

        A single job is submitted at once; the jobs of a sweep are submitted by `submit_sweep`.
        """
        self._refuse_place()
        if order.sweep is not None and sweeper_needs_results():
            say(
                "error: launch=slurm submits all jobs of a sweep at once, but this sweeper chooses each by the results "
                "of those before it. Leave hydra/sweeper out and list the values: key=0.1,0.2,0.3. Or run the whole "
                "sweep inside one allocation: salloc ..., then train --multirun hydra/sweeper=... launch=local."
            )
            raise SystemExit(2)
        _refuse_folder(order.run_dir)
        self._in_sweep = order.sweep is not None
        self._settings.append(order.config["launch"])
        self._elements.append(Element(order.number, Path(order.run_dir), self._arguments(order)))
        return Ended(0, None) if self._in_sweep else Ended(self._submit(None), None)

    def submit_sweep(self, sweep: Sweep) -> None:
        """Submit the jobs of a sweep to SLURM as one array.

        Raises:
            ConfigError: A job was refused, is not for SLURM, or asks for other resources than the
                others. No job is submitted then.
            SystemExit: The exit code of sbatch, if that failed.
        """
        refused = sum(job.status != "done" for job in sweep.jobs)
        if refused:
            raise ConfigError(
                f"nothing was submitted, because {refused} of {len(sweep.jobs)} jobs cannot run (see above)."
            )
        if len(self._elements) < len(sweep.jobs):
            raise ConfigError("nothing was submitted: not all jobs of the sweep have launch=slurm.")
        differing = sorted(key for key in self._settings[0] if len({str(each[key]) for each in self._settings}) > 1)
        if differing:
            raise ConfigError(
                f"nothing was submitted: the jobs differ in {', '.join(f'launch.{key}' for key in differing)}, but all "
                "jobs of an array get the same resources. Start one sweep for each value."
            )
        code = self._submit(sweep.folder)
        if code:
            raise SystemExit(code)

    @property
    def has_sweep(self) -> bool:
        """Return whether jobs of a sweep are waiting to be submitted."""
        return self._in_sweep

    def _refuse_place(self) -> None:
        job = self._environment.get("SLURM_JOB_ID")
        if job is not None:
            raise ConfigError(
                f"launch=slurm inside SLURM job {job} would submit another job. Use launch=local here, as in "
                "srun python -m distaccum train ..., or submit from a shell outside the job."
            )
        if self._place.started_by != "alone":
            raise ConfigError(
                f"launch=slurm submits a job, but {self._place.started_by} has already started ranks. Use only one "
                "of them. launch.launcher=torchrun starts torchrun on each node inside the job."
            )

    def _arguments(self, order: Order) -> tuple[str, ...]:
        """Return the user's overrides without those that the script sets.

        They are checked once more, as the job will read them.
        """
        overrides = [given for given in order.overrides if not _OUR_OWN.match(given)]
        if order.sweep is not None and _value(order.config, self._program.sweep_key) is None:
            overrides.append(override(self._program.sweep_key, order.sweep))
        try:
            self._check(composed_with([*overrides, "launch=local"]))
        except ConfigError as error:
            raise ConfigError(
                f"Inside the job, where launch=local replaces launch=slurm: {error} Move what an experiment sets in "
                "launch into a file of conf/launch/ with name: slurm."
            ) from None
        return (*flags(), *overrides)

    def _submit(self, folder: Path | None) -> int:
        values = self._settings[0]
        settings = SlurmLaunch(**{**values, "launcher": Launcher(values["launcher"])})
        python = settings.python or sys.executable
        script = (folder or self._elements[0].run_dir) / "job.sbatch"
        script.write_text(render(settings, python, self._program.command, self._elements, folder))
        if settings.dry_run:
            print(script.read_text(), end="")
            print(f"# launch.dry_run: nothing was submitted; the script is {script}", flush=True)
            return 0
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launch=slurm needs sbatch, which is not on PATH: this machine is not part of a SLURM cluster, or the "
                f"cluster's module is not loaded. The script is {script}; launch.dry_run=true shows it."
            )
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
        if done.stderr:
            say(done.stderr)
        if done.returncode == 0:
            job_id = done.stdout.strip().partition(";")[0]
            print(_how_to_follow(job_id, script, self._elements, folder), flush=True)
        return done.returncode


def _refuse_folder(run_dir: str) -> None:
    # sbatch reads a log's name line by line and gives a backslash in it a special meaning.
    if "\\" in run_dir or "\n" in run_dir:
        raise ConfigError(
            f"launch=slurm cannot pass the run folder {run_dir!r} to sbatch: it contains a backslash or a line break. "
            "Set another run_dir, or start from another folder."
        )


def _how_to_follow(job_id: str, script: Path, elements: list[Element], folder: Path | None) -> str:
    one = folder is None
    run = elements[0].run_dir if folder is None else folder / "N"
    lines = [
        f"submitted job {job_id}"
        if one
        else f"submitted {job_id}, an array of {len(elements)} jobs; N below is a job's number",
        f"  script    {script}",
        f"  log       tail -F {run}/job.log",
        f"  numbers   {run}/metrics.jsonl",
        f"  state     squeue -j {job_id}",
        f"  pause     scancel --signal=USR1 {job_id if one else f'{job_id}_N'}   (saves, and is queued again)",
        f"  end       scancel {job_id}",
    ]
    return "\n".join(lines)


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config

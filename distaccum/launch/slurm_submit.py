"""Submits a job, or all jobs of a sweep as one array, with sbatch (`launch=slurm`).

Nothing is trained in this process.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from distaccum.metrics.sweep import Sweep

from ..errors import ConfigError
from .failure import say
from .job import Check, Ended, Job, value_of
from .overrides import override
from .ranks import Place
from .runner import composed_with, flags, sweeper_needs_results
from .settings import Launcher, SlurmLaunch
from .slurm_script import render

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
    """

    def __init__(self, program: Program, check: Check, place: Place) -> None:
        self._program, self._check, self._place = program, check, place
        self._jobs: list[Job] = []
        self.in_sweep = False  # whether jobs of a sweep are waiting to be submitted

    def wants(self, job: Job) -> bool:
        """Return whether SLURM is to run this job.

        Raises:
            ConfigError: A sweep mixes jobs for SLURM with other jobs.
        """
        is_ours = bool(value_of(job.config, "launch.name") == "slurm")
        if self._jobs and not is_ours:
            raise ConfigError(
                "either all jobs of a sweep have launch=slurm or none has. Do not sweep over "
                "launch."
            )
        return is_ours

    def add(self, job: Job) -> Ended:
        """Add a job whose configuration has been checked, and return how it ended here.

        A single job is submitted at once; the jobs of a sweep are submitted by `submit_sweep`.
        """
        self._refuse_place()
        if job.sweep is not None and sweeper_needs_results():
            say(
                "error: launch=slurm submits all jobs of a sweep at once, but this sweeper chooses "
                "each by the results of those before it. Leave hydra/sweeper out and list the "
                "values: key=0.1,0.2,0.3. Or run the whole sweep inside one allocation: salloc "
                "..., then train --multirun hydra/sweeper=... launch=local."
            )
            raise SystemExit(2)
        # sbatch reads a log's name line by line and gives a backslash in it a special meaning.
        if "\\" in str(job.run_dir) or "\n" in str(job.run_dir):
            raise ConfigError(
                f"launch=slurm cannot pass the run folder {str(job.run_dir)!r} to sbatch: it "
                "contains a backslash or a line break. Set another run_dir, or start from another "
                "folder."
            )
        self.in_sweep = job.sweep is not None
        self._jobs.append(replace(job, overrides=self._arguments(job)))
        return Ended(0, None) if self.in_sweep else Ended(self._submit(None), None)

    def submit_sweep(self, sweep: Sweep) -> int:
        """Submit the jobs of a sweep to SLURM as one array, and return the exit code of sbatch.

        Raises:
            ConfigError: A job was refused, is not for SLURM, or asks for other resources than the
                others. No job is submitted then.
        """
        refused = sum(job.status != "done" for job in sweep.jobs)
        if refused:
            raise ConfigError(
                f"nothing was submitted, because {refused} of {len(sweep.jobs)} jobs cannot run "
                "(see above)."
            )
        if len(self._jobs) < len(sweep.jobs):
            raise ConfigError("nothing was submitted: not all jobs of the sweep have launch=slurm.")
        settings = [job.config["launch"] for job in self._jobs]
        differing = sorted(
            key for key in settings[0] if len({str(each[key]) for each in settings}) > 1
        )
        if differing:
            raise ConfigError(
                "nothing was submitted: the jobs differ in "
                f"{', '.join(f'launch.{key}' for key in differing)}, but all jobs of an array get "
                "the same resources. Start one sweep for each value."
            )
        return self._submit(sweep.folder)

    def _refuse_place(self) -> None:
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is not None:
            raise ConfigError(
                f"launch=slurm inside SLURM job {job_id} would submit another job. Use "
                "launch=local here, as in srun python -m distaccum train ..., or submit from a "
                "shell outside the job."
            )
        if self._place.started_by != "alone":
            raise ConfigError(
                f"launch=slurm submits a job, but {self._place.started_by} has already started "
                "ranks. Use only one of them. launch.launcher=torchrun starts torchrun on each "
                "node inside the job."
            )

    def _arguments(self, job: Job) -> list[str]:
        """Return the user's overrides without those that the script sets.

        They are checked once more, as the job will read them.
        """
        overrides = [given for given in job.overrides if not _OUR_OWN.match(given)]
        if job.sweep is not None and value_of(job.config, self._program.sweep_key) is None:
            overrides.append(override(self._program.sweep_key, job.sweep))
        try:
            self._check(composed_with([*overrides, "launch=local"]))
        except ConfigError as error:
            raise ConfigError(
                f"Inside the job, where launch=local replaces launch=slurm: {error} Move what an "
                "experiment sets in launch into a file of conf/launch/ with name: slurm."
            ) from None
        return [*flags(), *overrides]

    def _submit(self, folder: Path | None) -> int:
        values = self._jobs[0].config["launch"]
        settings = SlurmLaunch(**{**values, "launcher": Launcher(values["launcher"])})
        python = settings.python or sys.executable
        script = (folder or self._jobs[0].run_dir) / "job.sbatch"
        script.write_text(render(settings, python, self._program.command, self._jobs, folder))
        if settings.dry_run:
            print(script.read_text(), end="")
            print(f"# launch.dry_run: nothing was submitted; the script is {script}", flush=True)
            return 0
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launch=slurm needs sbatch, which is not on PATH: this machine is not part of a "
                f"SLURM cluster, or the cluster's module is not loaded. The script is {script}; "
                "launch.dry_run=true shows it."
            )
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
        if done.stderr:
            say(done.stderr)
        if done.returncode == 0:
            job_id = done.stdout.strip().partition(";")[0]
            print(_how_to_follow(job_id, script, self._jobs, folder), flush=True)
        return done.returncode


def _how_to_follow(job_id: str, script: Path, jobs: list[Job], folder: Path | None) -> str:
    run, one = jobs[0].run_dir, job_id
    title = f"submitted job {job_id}"
    if folder is not None:
        run, one = folder / "N", f"{job_id}_N"
        title = f"submitted {job_id}, an array of {len(jobs)} jobs; N below is a job's number"
    return f"""{title}
  script    {script}
  log       tail -F {run}/job.log
  numbers   {run}/metrics.jsonl
  state     squeue -j {job_id}
  pause     scancel --signal=USR1 {one}   (saves, and is queued again)
  end       scancel {job_id}"""

"""Starts jobs, with one run of Hydra and one configuration per job, and leaves no process behind.

This package knows nothing of training. Reading order: start, job, runner, sweep, run_lock, ranks,
own_ranks, rank, peers, grace, processes, failure, overrides. For SLURM: settings, slurm_names,
slurm_script, slurm_submit.
"""

from distaccum.metrics.sweep import JobOutcome as JobOutcome
from distaccum.metrics.sweep import Sweep as Sweep

from .job import Job as Job
from .job import read_result as read_result
from .job import write_result as write_result
from .settings import LocalLaunch as LocalLaunch
from .settings import SlurmLaunch as SlurmLaunch
from .slurm_submit import Program as Program
from .start import launch as launch

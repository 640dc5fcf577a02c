"""How a job is started: Hydra once for each job, the same configuration on every rank, nothing left behind.

It knows nothing of training. Reading order: start, hydra_once, sweep, ranks, own_ranks, board, job_child, failure.
"""

from .job import Job as Job
from .job import LaunchSettings as LaunchSettings
from .result import read_result as read_result
from .result import write_result as write_result
from .start import launch as launch
from .sweep import JobOutcome as JobOutcome
from .sweep import Sweep as Sweep

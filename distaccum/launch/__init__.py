"""How a job is started: Hydra once for each job, the same configuration on every rank, nothing left behind.

It knows nothing of training. Reading order: start, hydra_once, ranks, own_ranks, board, failure.
"""

from .job import Job as Job
from .job import LaunchSettings as LaunchSettings
from .start import launch as launch

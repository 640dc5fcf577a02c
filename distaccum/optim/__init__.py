"""Builds optimizers, and sets learning rate and beta2 before each step by position."""

from distaccum.core.batch_schedule import ScheduleUnit as ScheduleUnit
from distaccum.optim.optimizer import OptimConfig as OptimConfig
from distaccum.optim.optimizer import OptimImplementation as OptimImplementation
from distaccum.optim.optimizer import OptimName as OptimName
from distaccum.optim.optimizer import decay_groups as decay_groups
from distaccum.optim.optimizer import make_optimizer as make_optimizer
from distaccum.optim.schedule import AUTO as AUTO
from distaccum.optim.schedule import MOST_WARMUP_STEPS as MOST_WARMUP_STEPS
from distaccum.optim.schedule import LRRule as LRRule
from distaccum.optim.schedule import LRSchedule as LRSchedule
from distaccum.optim.schedule import ScaleConfig as ScaleConfig
from distaccum.optim.schedule import ScheduleConfig as ScheduleConfig
from distaccum.optim.schedule import ScheduleName as ScheduleName
from distaccum.optim.schedule import lr_factor as lr_factor
from distaccum.optim.schedule import lr_scale as lr_scale
from distaccum.optim.schedule import scaled_beta2 as scaled_beta2
from distaccum.optim.schedule import with_warmup as with_warmup

"""Predicts the memory of a rank and the traffic of a step from shapes, before anything is trained.

Micro-batches and optimizer updates that must run for a prediction run on fake tensors.
"""

from distaccum.planner.memory import Memory as Memory
from distaccum.planner.memory import OptimizerStates as OptimizerStates
from distaccum.planner.memory import memory as memory
from distaccum.planner.memory import states_of as states_of
from distaccum.planner.peak import peak as peak
from distaccum.planner.shapes import ModelShape as ModelShape
from distaccum.planner.shapes import ParameterShape as ParameterShape
from distaccum.planner.shapes import Setup as Setup
from distaccum.planner.shapes import describe as describe
from distaccum.planner.timeline import Peak as Peak
from distaccum.planner.trace import MicroBatchTrace as MicroBatchTrace
from distaccum.planner.trace import trace as trace
from distaccum.planner.traffic import CollectiveCost as CollectiveCost
from distaccum.planner.traffic import by_kind as by_kind
from distaccum.planner.traffic import control_sends as control_sends
from distaccum.planner.traffic import gradient_sends as gradient_sends
from distaccum.planner.update import Update as Update
from distaccum.planner.update import update as update

"""What a training will need, computed from shapes alone: memory of a rank and traffic of a step. Nothing runs."""

from distaccum.predict.holdings import Peak as Peak
from distaccum.predict.memory import Memory as Memory
from distaccum.predict.memory import OptimizerStates as OptimizerStates
from distaccum.predict.memory import memory as memory
from distaccum.predict.memory import states_of as states_of
from distaccum.predict.peak import peak as peak
from distaccum.predict.shapes import ModelShape as ModelShape
from distaccum.predict.shapes import ParameterShape as ParameterShape
from distaccum.predict.shapes import Setup as Setup
from distaccum.predict.shapes import describe as describe
from distaccum.predict.trace import MicroTrace as MicroTrace
from distaccum.predict.trace import trace as trace
from distaccum.predict.traffic import Sends as Sends
from distaccum.predict.traffic import by_kind as by_kind
from distaccum.predict.traffic import control_sends as control_sends
from distaccum.predict.traffic import gradient_sends as gradient_sends
from distaccum.predict.update import Update as Update
from distaccum.predict.update import update as update

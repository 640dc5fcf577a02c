"""Distributed training with gradient accumulation: K micro-batches on R ranks make exactly one big batch."""

from .agreement import Request as Request
from .arguments import CarriedOver as CarriedOver
from .arguments import from_training_arguments as from_training_arguments
from .data.window import MicroBatches as MicroBatches
from .data.window import windows as windows
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DistaccumError as DistaccumError
from .errors import DivergenceError as DivergenceError
from .errors import LedgerError as LedgerError
from .errors import ProofError as ProofError
from .grads.scale import LossScale as LossScale
from .huggingface import HuggingFace as HuggingFace
from .huggingface import HuggingFaceCausalLM as HuggingFaceCausalLM
from .loss import Objective as Objective
from .nn.batchnorm import BatchNormMode as BatchNormMode
from .nn.batchnorm import convert_batchnorm as convert_batchnorm
from .objectives import CausalLM as CausalLM
from .objectives import Classification as Classification
from .objectives import Regression as Regression
from .objectives import autocast as autocast
from .parallel.base import Sync as Sync
from .plan import Micro as Micro
from .plan import Plan as Plan
from .plan import Window as Window
from .proof.prove import verify as verify
from .proof.result import Proof as Proof
from .record import StepRecord as StepRecord
from .step import Accumulator as Accumulator

__version__ = "0.1.0"

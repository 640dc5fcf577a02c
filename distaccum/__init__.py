"""Provides gradient accumulation that makes distributed training equal to one big batch.

K micro-batches on R ranks give the loss, the gradient and the update of one batch of all their
samples. The public names are those that are imported here.
"""

from .core.loss import Objective as Objective
from .core.objectives import CausalLM as CausalLM
from .core.objectives import Classification as Classification
from .core.objectives import Regression as Regression
from .core.objectives import autocast as autocast
from .core.plan import MicroBatch as MicroBatch
from .core.plan import Plan as Plan
from .core.plan import Window as Window
from .core.strategies import Sync as Sync
from .core.window import MicroBatches as MicroBatches
from .data.windows import windows as windows
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DistaccumError as DistaccumError
from .errors import DivergenceError as DivergenceError
from .errors import LedgerError as LedgerError
from .errors import OutOfMemoryError as OutOfMemoryError
from .errors import ProofError as ProofError
from .errors import StateWarning as StateWarning
from .grads.scale import LossScale as LossScale
from .huggingface import HuggingFace as HuggingFace
from .huggingface import HuggingFaceCausalLM as HuggingFaceCausalLM
from .huggingface.training_arguments import ConvertedArguments as ConvertedArguments
from .huggingface.training_arguments import from_training_arguments as from_training_arguments
from .nn.batchnorm import convert_batchnorm as convert_batchnorm
from .nn.batchnorm_layers import BatchNormMode as BatchNormMode
from .step.accumulator import Accumulator as Accumulator
from .step.exchange import Request as Request
from .step.record import StepRecord as StepRecord
from .verify.prove import verify as verify
from .verify.result import Proof as Proof
from .version import __version__ as __version__

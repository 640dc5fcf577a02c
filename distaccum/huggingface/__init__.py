"""Defines objectives for Hugging Face models that return a mean loss, and for causal LMs."""

from .heads import MeanOver as MeanOver
from .objective import HuggingFace as HuggingFace
from .objective import HuggingFaceCausalLM as HuggingFaceCausalLM

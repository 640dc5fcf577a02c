"""Defines objectives for Hugging Face models that return a mean loss, and for causal LMs."""

from .causal_lm import HuggingFaceCausalLM as HuggingFaceCausalLM
from .counting import MeanOver as MeanOver
from .objective import HuggingFace as HuggingFace

"""Hugging Face models: objectives for heads whose output carries a mean loss, and for causal language models."""

from .causal_lm import HuggingFaceCausalLM as HuggingFaceCausalLM
from .counting import DenominatorName as DenominatorName
from .objective import HuggingFace as HuggingFace

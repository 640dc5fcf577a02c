"""Causal language models of transformers on labels that are shifted already, as the data sets of this package have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.core.loss import widened
from distaccum.errors import ConfigError
from distaccum.huggingface.counting import IGNORED
from distaccum.huggingface.heads import config_of, configured_aux_coef


@dataclass(frozen=True)
class HuggingFaceCausalLM:
    """Cross entropy of the next token from `.logits`, in nats; the head's own loss, which would shift, is not used.

    The micro has `input_ids` int64 [B, T] and `labels` int64 [B, T], where labels[b, t] is the token that follows
    input_ids[b, t], or -100. Padding belongs at the end.

    Attributes:
        aux_coef: above 0, the model's `.aux_loss` (Mixture of Experts with output_router_logits) times this is a term
            "aux": the mean over the micro-batches of the window, see `HuggingFace`. 0 leaves it out: for evaluation.
    """

    aux_coef: float = 0.0

    @classmethod
    def of(cls, model: Any) -> HuggingFaceCausalLM:
        """The objective to train this model with: with its auxiliary term, where its configuration asks for one.

        Args:
            model: a model of transformers, wrapped or not, or the configuration of one.

        Raises:
            ConfigError: for a model that returns router logits and names no factor for them.
        """
        config = config_of(model) if isinstance(model, nn.Module) else model
        if not getattr(config, "output_router_logits", False):
            return cls()
        aux_coef = configured_aux_coef(config)
        if aux_coef is None:
            raise ConfigError(
                f"{type(config).__name__} has output_router_logits=True and no router_aux_loss_coef. Set it, "
                "or output_router_logits=False."
            )
        return cls(aux_coef)

    def loss_sum(self, model: nn.Module, micro: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """The sum [] of the tokens' cross entropies, float32 or wider, and the auxiliary term."""
        output = model(input_ids=micro["input_ids"])
        logits = output.logits.flatten(0, 1)
        loss = F.cross_entropy(widened(logits), micro["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
        if not self.aux_coef:
            return loss
        aux = getattr(output, "aux_loss", None)
        if not isinstance(aux, Tensor):
            raise ConfigError(
                f"HuggingFaceCausalLM(aux_coef={self.aux_coef}): the model returned no .aux_loss. Set "
                "output_router_logits=True in its configuration (model.options on the command line), or aux_coef=0."
            )
        return {"loss": loss, "aux": self.aux_coef * aux * (micro["labels"] != IGNORED).any()}

    def weight(self, micro: Mapping[str, Any]) -> int | dict[str, int]:
        """The number of labels that count; 1 for the auxiliary term of a micro in which anything counts."""
        return self.weighed(int((micro["labels"] != IGNORED).sum()))

    def weighed(self, count: int) -> int | dict[str, int]:
        """The weight of a micro-batch with so many labels that count, where a data set knows them without reading."""
        return {"loss": count, "aux": int(count > 0)} if self.aux_coef else count

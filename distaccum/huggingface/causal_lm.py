"""Defines the objective for causal language models of transformers with shifted labels.

The data sets of this package return labels that are shifted already.
"""

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
    """Computes the cross entropy of the next token from `.logits`, in nats.

    The head's own loss is not used, because it would shift the labels once more. A micro-batch has
    `input_ids` int64 [B, T] and `labels` int64 [B, T], where labels[b, t] is the token that follows
    input_ids[b, t], or -100, which is not counted. Padding belongs at the end.

    Attributes:
        aux_coef: if above 0, the model's `.aux_loss` (mixture of experts with output_router_logits)
            times this factor is a second term, "aux": its mean over the micro-batches of the
            window, see `HuggingFace`. 0 leaves it out, as in an evaluation.
    """

    aux_coef: float = 0.0

    @classmethod
    def of(cls, model: Any) -> HuggingFaceCausalLM:
        """Build the objective for training a model, with its auxiliary term if it has one.

        The model has one if its configuration sets output_router_logits.

        Args:
            model: a model of transformers, wrapped or not, or the configuration of one.

        Raises:
            ConfigError: if the model returns router logits, but its configuration has no factor for
                them.
        """
        config = config_of(model) if isinstance(model, nn.Module) else model
        if not getattr(config, "output_router_logits", False):
            return cls()
        aux_coef = configured_aux_coef(config)
        if aux_coef is None:
            raise ConfigError(
                f"{type(config).__name__} has output_router_logits=True, but no router_aux_loss_coef. Set that factor, "
                "or output_router_logits=False."
            )
        return cls(aux_coef)

    def loss_sum(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """Return the sum of the tokens' cross entropies [], and the auxiliary term if there is one.

        Both are float32 or wider.
        """
        output = model(input_ids=micro_batch["input_ids"])
        logits = output.logits.flatten(0, 1)
        loss = F.cross_entropy(widened(logits), micro_batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
        if not self.aux_coef:
            return loss
        aux = getattr(output, "aux_loss", None)
        if not isinstance(aux, Tensor):
            raise ConfigError(
                f"HuggingFaceCausalLM(aux_coef={self.aux_coef}): the model returned no .aux_loss. Set "
                "output_router_logits=True in its configuration (model.options on the command line), or aux_coef=0."
            )
        return {"loss": loss, "aux": self.aux_coef * aux * (micro_batch["labels"] != IGNORED).any()}

    def denominator(self, micro_batch: Mapping[str, Any]) -> int | dict[str, int]:
        """Return the number of labels that are not -100, and the auxiliary term's denominator.

        The latter, if there is an auxiliary term, is 1 if any label counts, otherwise 0.
        """
        return self.weighed(int((micro_batch["labels"] != IGNORED).sum()))

    def weighed(self, count: int) -> int | dict[str, int]:
        """Return the denominator of a micro-batch in which `count` labels count.

        It serves data sets that know this number without reading the samples.
        """
        return {"loss": count, "aux": int(count > 0)} if self.aux_coef else count

"""The objective for models that return a mean loss, as the heads of transformers do.

A mean over a micro-batch times what it was taken over is a sum, which is all that a window needs: the sums of all
micros and ranks are divided once by the count of all. The head never gets `num_items_in_batch`: heads that take it
without using it return their mean all the same, and those that use it expect other factors than these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError
from distaccum.huggingface.counting import DenominatorName, check_micro, counted, countless
from distaccum.huggingface.heads import mean_and_aux
from distaccum.huggingface.probe import probe


@dataclass(frozen=True)
class HuggingFace:
    """The window's loss is the sum of (head's mean x its denominator) over all micros, divided by all denominators.

    The micro is a mapping of model inputs with `labels` (question answering: `start_positions` and `end_positions`);
    the model is called as `model(**micro)` and returns an object with the mean loss [] as `.loss`, or a tuple that
    begins with it.

    Mixture of experts: a load-balancing loss that the head has added to `.loss` (and returns as `.aux_loss`) becomes a
    term of its own. It is a product of means over the tokens of one forward, so there is no sum over samples behind it:
    its term is the mean over the micro-batches of the window, on all ranks, in which at least one label counts. One
    big batch therefore means: the token part equals the one forward over all samples; the auxiliary part is the
    arithmetic mean of the micros' own values, whatever their sizes, and depends on how samples are grouped in micros.

    Attributes:
        denominator: what the head's mean is taken over, see `DenominatorName`; `find` measures it.
        aux_coef: the factor with which `.aux_loss` is contained in `.loss`; 0: the model returns none.
        reason: why this denominator; for people.
    """

    denominator: DenominatorName | str
    aux_coef: float = 0.0
    reason: str = "given by the caller"

    def __post_init__(self) -> None:
        known = [name.value for name in DenominatorName]
        if self.denominator not in known and not isinstance(self.denominator, DenominatorName):
            raise ConfigError(
                f"HuggingFace(denominator={self.denominator!r}) is unknown. Use one of {known}, or "
                "HuggingFace.find(model, micro), which measures it."
            )
        object.__setattr__(self, "denominator", DenominatorName(self.denominator))

    @classmethod
    def find(cls, model: nn.Module, micro: Mapping[str, Any]) -> HuggingFace:
        """Measure what the head of this model averages over: see `distaccum.huggingface.probe.probe`."""
        return cls(*probe(model, micro))

    def loss_sum(self, model: nn.Module, micro: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """The head's mean times its denominator [], float32 or wider; with `aux_coef` the auxiliary term beside it.

        A micro-batch in which no label counts is computed with labels 0 and adds exactly 0, with a graph.
        """
        name = DenominatorName(self.denominator)
        count = counted(name, micro)
        mean, aux = mean_and_aux(model(**countless(name, micro)))
        if (aux is None) == (self.aux_coef != 0):
            raise ConfigError(
                f"HuggingFace(aux_coef={self.aux_coef}): the model returned {'no' if aux is None else 'an'} .aux_loss. "
                "With output_router_logits=True it is part of .loss, with a denominator of its own: use "
                "HuggingFace.find(model, micro) after that is set, or aux_coef=config.router_aux_loss_coef; without it "
                "aux_coef=0."
            )
        share = 0.0 if aux is None else self.aux_coef * aux
        # Where nothing counts, not even labels 0 (sequences of one token that predict nothing), the mean is no number.
        loss = torch.where(count > 0, (mean - share) * count, 0.0)
        return loss if aux is None else {"loss": loss, "aux": torch.where(count > 0, share, 0.0)}

    def weight(self, micro: Mapping[str, Any]) -> int | dict[str, int]:
        """The denominator of the head's mean; 1 for the auxiliary term of a micro in which anything counts."""
        name = DenominatorName(self.denominator)
        check_micro(name, micro)
        count = int(counted(name, micro))
        return {"loss": count, "aux": int(count > 0)} if self.aux_coef else count

"""Defines the objective for models that return a mean loss, as the heads of transformers do.

A mean over a micro-batch times its denominator is a sum, which is all that a window needs: the sums
of all micro-batches and ranks are divided once by the sum of all denominators. The head never gets
`num_items_in_batch`: heads that accept it without using it still return their mean, and those that
use it expect other factors than these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.errors import ConfigError
from distaccum.huggingface.counting import MeanOver, check_micro_batch, counted, countless
from distaccum.huggingface.heads import mean_and_aux
from distaccum.huggingface.probe import probe


@dataclass(frozen=True)
class HuggingFace:
    """Turns the mean loss of a head into a loss sum and a denominator.

    The window's loss is the sum of (head's mean x its denominator) over all micro-batches of all
    ranks, divided by the sum of these denominators. A micro-batch is a mapping of model inputs with
    `labels` (question answering: `start_positions` and `end_positions`). The model is called as
    `model(**micro_batch)` and returns an object with the mean loss [] as `.loss`, or a tuple that
    begins with it.

    Mixture of experts: a load-balancing loss that the head has added to `.loss` (and also returns
    as `.aux_loss`) becomes a term of its own. It is a product of means over the tokens of one
    forward, so it is not a sum over samples. Its term is the mean over those micro-batches of the
    window, on all ranks, in which at least one label counts. Compared with one big batch, the token
    part equals that of one forward over all samples. The auxiliary part is the arithmetic mean of
    the micro-batches' own values, whatever their sizes, so it depends on how samples are grouped
    into micro-batches.

    Attributes:
        mean_over: what the head's mean is taken over, see `MeanOver`; `find` measures it.
        aux_coef: the factor with which `.aux_loss` is contained in `.loss`; 0: the model returns
            none.
        reason: why `mean_over` was chosen, for display.
    """

    mean_over: MeanOver | str
    aux_coef: float = 0.0
    reason: str = "given by the caller"

    def __post_init__(self) -> None:
        known = [name.value for name in MeanOver]
        if self.mean_over not in known and not isinstance(self.mean_over, MeanOver):
            raise ConfigError(
                f"HuggingFace(mean_over={self.mean_over!r}) is unknown. Use one of {known}, or "
                "HuggingFace.find(model, micro_batch), which measures it."
            )
        object.__setattr__(self, "mean_over", MeanOver(self.mean_over))

    @classmethod
    def find(cls, model: nn.Module, micro_batch: Mapping[str, Any]) -> HuggingFace:
        """Measure what the head of a model averages over, and return the objective for it.

        See `distaccum.huggingface.probe.probe` for the arguments and errors.
        """
        return cls(*probe(model, micro_batch))

    def loss_sum(self, model: nn.Module, micro_batch: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
        """Return the head's mean times its denominator [], and the auxiliary term if there is one.

        Both are float32 or wider. A micro-batch in which no label counts is computed with labels 0
        and adds exactly 0, with an autograd graph.
        """
        name = MeanOver(self.mean_over)
        count = counted(name, micro_batch)
        mean, aux = mean_and_aux(model(**countless(name, micro_batch)))
        if (aux is None) == (self.aux_coef != 0):
            raise ConfigError(
                f"HuggingFace(aux_coef={self.aux_coef}): the model returned {'no' if aux is None else 'an'} .aux_loss. "
                "With output_router_logits=True it is part of .loss and has its own denominator: set that option "
                "before HuggingFace.find(model, micro_batch), or use aux_coef=config.router_aux_loss_coef. Without "
                "that option, use aux_coef=0."
            )
        share = 0.0 if aux is None else self.aux_coef * aux
        # If nothing counts even with labels 0 (as in sequences of one token), the mean is NaN.
        loss = torch.where(count > 0, (mean - share) * count, 0.0)
        return loss if aux is None else {"loss": loss, "aux": torch.where(count > 0, share, 0.0)}

    def denominator(self, micro_batch: Mapping[str, Any]) -> int | dict[str, int]:
        """Return the denominator of the head's mean, and the auxiliary term's if there is one.

        The auxiliary term's denominator is 1 if any label of the micro-batch counts, otherwise 0.
        """
        name = MeanOver(self.mean_over)
        check_micro_batch(name, micro_batch)
        count = int(counted(name, micro_batch))
        return {"loss": count, "aux": int(count > 0)} if self.aux_coef else count

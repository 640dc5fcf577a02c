"""Defines objectives for models of transformers.

`HuggingFace` serves models that return a mean loss, as their heads do. `HuggingFaceCausalLM` serves
the data sets of this package, whose labels are shifted already.

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
import torch.nn.functional as F
from torch import Tensor, nn

from distaccum.core.loss import widened
from distaccum.errors import ConfigError
from distaccum.huggingface.heads import (
    IGNORED,
    MeanOver,
    check_micro_batch,
    config_of,
    configured_aux_coef,
    counted,
    countless,
    mean_and_aux,
)
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

    def loss_sum(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> Tensor | dict[str, Tensor]:
        """Return the head's mean times its denominator [], and the auxiliary term if there is one.

        Both are float32 or wider. A micro-batch in which no label counts is computed with labels 0
        and adds exactly 0, with an autograd graph.
        """
        name = MeanOver(self.mean_over)
        count = counted(name, micro_batch)
        mean, aux = mean_and_aux(model(**countless(name, micro_batch)))
        if (aux is None) == (self.aux_coef != 0):
            raise ConfigError(
                f"HuggingFace(aux_coef={self.aux_coef}): the model returned "
                f"{'no' if aux is None else 'an'} .aux_loss. With output_router_logits=True it is "
                "part of .loss and has its own denominator: set that option before "
                "HuggingFace.find(model, micro_batch), or use "
                "aux_coef=config.router_aux_loss_coef. Without that option, use aux_coef=0."
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
                f"{type(config).__name__} has output_router_logits=True, but no "
                "router_aux_loss_coef. Set that factor, or output_router_logits=False."
            )
        return cls(aux_coef)

    def loss_sum(
        self, model: nn.Module, micro_batch: Mapping[str, Any]
    ) -> Tensor | dict[str, Tensor]:
        """Return the sum of the tokens' cross entropies [], and the auxiliary term if there is one.

        Both are float32 or wider.
        """
        output = model(input_ids=micro_batch["input_ids"])
        logits = output.logits.flatten(0, 1)
        loss = F.cross_entropy(
            widened(logits), micro_batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        if not self.aux_coef:
            return loss
        aux = getattr(output, "aux_loss", None)
        if not isinstance(aux, Tensor):
            raise ConfigError(
                f"HuggingFaceCausalLM(aux_coef={self.aux_coef}): the model returned no .aux_loss. "
                "Set output_router_logits=True in its configuration (model.options on the command "
                "line), or aux_coef=0."
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

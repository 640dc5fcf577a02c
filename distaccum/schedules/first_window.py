"""What is looked at once, in the first window: whether the loss is a sum, and what else a forward moves."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from distaccum.data.device import halves, to_device
from distaccum.errors import ConfigError, StateWarning
from distaccum.loss import SupportsObjective, sums_of, weights_of
from distaccum.parallel.base import Strategy
from distaccum.schedules.randomness import kept

# A sum in 16 bits depends on the cut by less than this share of itself, and a mean by one half.
CUT_TOLERANCE = 0.02


class FirstLook:
    """Looks at the first window of an accumulator, and never again."""

    def __init__(self, strategy: Strategy, *, check_cut: bool) -> None:
        """Keep a copy of each buffer of the model."""
        self._strategy = strategy
        self._check_cut = check_cut
        self._before: dict[str, Tensor] | None = {
            name: buffer.detach().clone() for name, buffer in strategy.model.named_buffers()
        }

    def at_the_loss(self, objective: SupportsObjective, micro: Any) -> None:
        """Compute a micro-batch whole and in two halves: a sum over its samples is the sum of theirs.

        Forwards only, in evaluation mode. A micro-batch that cannot be cut, a loss that is random or that evaluation
        mode does not have, and terms that do not count samples (a mean over micro-batches) are passed over. Call it on
        all ranks.

        Args:
            objective: what is summed and counted.
            micro: a micro-batch, this rank's own or lent; None where no rank has any.

        Raises:
            ConfigError: on all ranks, when on any a term depends on the cut; with the factor.
        """
        if not self._check_cut or micro is None:
            return
        strategy = self._strategy
        own = _dependence(strategy, objective, to_device(micro, strategy.world.device))
        found = [(rank, text) for rank, text in enumerate(strategy.world.gather_objects(own)) if text]
        if found:
            rank, text = found[0]
            raise ConfigError(
                f"The objective's loss depends on how samples are cut into micro-batches: on rank {rank} {text}. A "
                "mean is divided twice, by its own count and by the window's; return the sum, for example with "
                "reduction='sum'. If samples are meant to meet in the loss (contrastive losses), give check_cut=False: "
                "each micro-batch is a batch of its own then."
            )
        self._check_cut = False

    def at_the_buffers(self) -> None:
        """Warn on rank 0 of buffers that the forwards of the window have moved: K micro-batches move them K times.

        Call it after the last backward, before BatchNorm's statistics are written.
        """
        before, self._before = self._before, None
        if before is None or self._strategy.world.rank != 0:
            return
        model = self._strategy.model
        moved = [name for name, buffer in model.named_buffers() if not _equal(before.get(name), buffer)]
        moved = [name for name in moved if not _left_alone(model, name)]
        if moved:
            warnings.warn(
                f"{len(moved)} buffer(s) of the model ({', '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}) are "
                "moved by each forward: K times in a window, by each rank's micro-batches on their own, and not once "
                "as by one big batch. BatchNorm: da.convert_batchnorm(model, 'pooled') before it is wrapped. Others: "
                "move them once per update, after Accumulator.step.",
                StateWarning,
                stacklevel=3,
            )


def _dependence(strategy: Strategy, objective: SupportsObjective, micro: Any) -> str | None:
    parts = halves(micro)
    several = parts is not None
    first, second = parts or (micro, micro)  # all ranks run as many forwards, since they may communicate
    try:
        with kept(strategy.world.device), strategy.evaluating() as model:
            weights = [weights_of(objective, batch) for batch in (micro, first, second)]
            terms = list(weights[0])
            whole, again, a, b = (
                [float(value) for value in sums_of(objective, model, batch, terms)]
                for batch in (micro, micro, first, second)
            )
    except Exception:  # such as a model that has no loss in evaluation mode: then nothing is known
        if strategy.sharded:  # its forward has not ended
            strategy.abort()
        return None
    if not several or whole != again:
        return None
    for i, name in enumerate(terms):
        together, apart = whole[i], a[i] + b[i]
        counts = [weight[name] for weight in weights]
        additive = counts[0] == counts[1] + counts[2]
        if additive and abs(together - apart) > CUT_TOLERANCE * (abs(a[i]) + abs(b[i])):
            factor = together / apart if apart else float("inf")
            return f"'{name}' of one micro-batch is {factor:.4g} times the sum of its two halves'"
    return None


def _equal(before: Tensor | None, after: Tensor) -> bool:
    """Whether a buffer was left alone; one that was made or resized meanwhile is a cache."""
    return before is None or before.shape != after.shape or torch.equal(before, after)


def _left_alone(model: nn.Module, name: str) -> bool:
    owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "left_alone", False))

"""What is looked at once, in the first window: whether the loss is a sum, and what else a forward moves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distaccum.core.loss import SupportsObjective, sums_of, weights_of
from distaccum.data.device import halves, to_device
from distaccum.errors import ConfigError, StateWarning
from distaccum.nn.buffers import same
from distaccum.parallel.base import Strategy
from distaccum.step.randomness import kept

# A sum in 16 bits depends on the cut by less than this share of itself, and a mean by one half.
CUT_TOLERANCE = 0.02


class FirstLook:
    """Looks at the first window of an accumulator, and never again."""

    def __init__(self, strategy: Strategy, *, check_cut: bool) -> None:
        """Look at nothing yet: weights and buffers may still be loaded."""
        self._strategy = strategy
        self._check_cut = check_cut
        self._looked = False
        self._before: dict[str, Tensor] = {}

    def at_the_loss(self, objective: SupportsObjective, micro: Any) -> None:
        """Compute a micro-batch whole and in two halves: a sum over its samples is the sum of theirs.

        Four forwards without backward, in evaluation mode. Passed over are a micro-batch that cannot be cut, a loss
        that is random or that evaluation mode does not have, an objective that calls other modules with state of their
        own, and terms that do not count samples. Call it on all ranks, before the first window.

        Args:
            objective: what is summed and counted.
            micro: a micro-batch, this rank's own or lent; None where no rank has any.

        Raises:
            ConfigError: on all ranks, when on any a term is a mean; with the factor.
        """
        strategy = self._strategy
        if not self._looked and strategy.world.rank == 0:
            self._before = {name: buffer.detach().clone() for name, buffer in strategy.model.named_buffers()}
        if not self._check_cut or micro is None:
            return
        found = strategy.world.gather_objects(_dependence(strategy, objective, micro))
        means = [(rank, text) for rank, (text, is_mean) in enumerate(found) if is_mean]
        others = [(rank, text) for rank, (text, is_mean) in enumerate(found) if text]
        if means:
            rank, text = means[0]
            raise ConfigError(
                f"The objective must return a sum over samples, but on rank {rank} {text}, as a mean is: it would be "
                "divided twice, by its own count and by the window's. Return the sum, for example with "
                "reduction='sum'. If it is meant, pass check_cut=False."
            )
        if others and strategy.world.rank == 0:
            rank, text = others[0]
            warnings.warn(
                f"On rank {rank} {text}: samples interact in the loss, so that it depends on how they are cut, and "
                "each micro-batch counts as a batch of its own. If that is meant (contrastive losses), pass "
                "check_cut=False.",
                StateWarning,
                stacklevel=3,
            )
        self._check_cut = False

    def at_the_buffers(self) -> None:
        """Warn on rank 0 of buffers that the forwards of the window have moved: K micro-batches move them K times.

        Call it after the last backward, before BatchNorm's statistics are written.
        """
        if self._looked:
            return
        before, self._before, self._looked = self._before, {}, True
        model = self._strategy.model
        moved = [name for name, buffer in model.named_buffers() if not _is_still(before.get(name), buffer)]
        moved = [name for name in moved if not _left_alone(model, name)]
        if moved:
            warnings.warn(
                f"Each forward changes {len(moved)} buffer(s) of the model ({', '.join(moved[:3])}"
                f"{', ...' if len(moved) > 3 else ''}), so a window of K micro-batches changes them K times, where one "
                "big batch would do so once. For BatchNorm call da.convert_batchnorm(model, 'pooled') before wrapping. "
                "Update others once per step, after Accumulator.step.",
                StateWarning,
                stacklevel=3,
            )


def _dependence(strategy: Strategy, objective: SupportsObjective, micro: Any) -> tuple[str, bool]:
    """Say how one micro-batch's loss differs from the sum of its halves', if it does, and whether as a mean does."""
    try:
        moved = to_device(micro, strategy.world.device)
        parts = halves(moved)
        first, second = parts or (moved, moved)  # all ranks run as many forwards, since they may communicate
        with kept(strategy.world.device), strategy.evaluating() as model, _only(model):
            weights = [weights_of(objective, batch) for batch in (moved, first, second)]
            terms = list(weights[0])
            whole, again, a, b = (
                [float(value) for value in sums_of(objective, model, batch, terms)]
                for batch in (moved, moved, first, second)
            )
    except Exception:  # such as a model that has no loss in evaluation mode: then nothing is known
        if strategy.sharded:  # its forward has not ended
            strategy.abort()
        return "", False
    if parts is None or whole != again:
        return "", False
    for i, name in enumerate(terms):
        counts = [weight[name] for weight in weights]
        allowed = CUT_TOLERANCE * (abs(a[i]) + abs(b[i]))
        if counts[0] == counts[1] + counts[2] and abs(whole[i] - a[i] - b[i]) > allowed:
            factor = whole[i] / (a[i] + b[i]) if a[i] + b[i] else float("inf")
            mean = (a[i] * counts[1] + b[i] * counts[2]) / counts[0] if counts[0] else float("inf")
            text = f"'{name}' of one micro-batch is {factor:.4g} times the sum of its two halves'"
            return text, min(abs(whole[i] - mean), abs(whole[i] - (a[i] + b[i]) / 2)) <= allowed
    return "", False


@contextmanager
def _only(model: nn.Module) -> Iterator[None]:
    """Refuse calls of modules that are no part of the model, train and have buffers: they would move."""
    own = set(model.modules())

    def refuse(module: nn.Module, args: Any) -> None:
        if module.training and module not in own and any(True for _ in module.buffers(recurse=False)):
            raise RuntimeError("a module outside of the model would be moved")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _is_still(before: Tensor | None, after: Tensor) -> bool:
    """Whether a buffer was left alone; one that was made or resized meanwhile is a cache."""
    return before is None or before.shape != after.shape or same(before, after)


def _left_alone(model: nn.Module, name: str) -> bool:
    owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "left_alone", False))

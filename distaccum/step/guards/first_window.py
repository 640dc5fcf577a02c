"""Checks in the first window that the loss is a sum and that forwards change no buffers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distaccum.core.loss import SupportsObjective, denominators_of, sums_of
from distaccum.data.device import halves, to_device
from distaccum.errors import ConfigError, StateWarning
from distaccum.nn.buffers import same
from distaccum.parallel.base import Strategy
from distaccum.step.randomness import kept

# Cutting a micro-batch changes a 16-bit sum by less than this fraction, and a mean by one half.
CUT_TOLERANCE = 0.02


class FirstLook:
    """Checks the first window of an accumulator, and no later one."""

    def __init__(self, strategy: Strategy, *, check_cut: bool) -> None:
        """Check nothing yet, since parameters and buffers may still be loaded."""
        self._strategy = strategy
        self._check_cut = check_cut
        self._looked = False
        self._before: dict[str, Tensor] = {}

    def at_the_loss(self, objective: SupportsObjective, micro_batch: Any) -> None:
        """Raise ConfigError if the loss is a mean, and warn if samples interact in it.

        A micro-batch is computed whole (twice) and in two halves: a sum over its samples equals the
        sum of its halves. These are four forwards without backward, in evaluation mode. Nothing is
        checked for a micro-batch that cannot be cut, a loss that is random or does not exist in
        evaluation mode, an objective that calls other modules with state of their own, and terms
        whose denominator is not the sum of the halves' denominators. Call it on all ranks, before
        the first window.

        Args:
            objective: computes the loss sums and denominators.
            micro_batch: a micro-batch of this rank or received from another; None if no rank has
                any.

        Raises:
            ConfigError: on all ranks, if a term is a mean on any rank.
        """
        strategy = self._strategy
        if not self._looked and strategy.world.rank == 0:
            self._before = {
                name: buffer.detach().clone() for name, buffer in strategy.model.named_buffers()
            }
        if not self._check_cut or micro_batch is None:
            return
        found = strategy.world.gather_objects(_dependence(strategy, objective, micro_batch))
        means = [(rank, text) for rank, (text, is_mean) in enumerate(found) if is_mean]
        others = [(rank, text) for rank, (text, is_mean) in enumerate(found) if text]
        if means:
            rank, text = means[0]
            raise ConfigError(
                f"The objective must return a sum over samples, but on rank {rank} {text}, as for "
                "a mean. A mean would be divided twice, by its own count and by the window's. "
                "Return the sum, for example with reduction='sum'. If this is intended, pass "
                "check_cut=False."
            )
        if others and strategy.world.rank == 0:
            rank, text = others[0]
            warnings.warn(
                f"On rank {rank} {text}. So the result depends on how samples are cut into "
                "micro-batches, and each micro-batch is treated as a batch of its own. If this is "
                "intended (contrastive losses, a constant denominator), pass check_cut=False.",
                StateWarning,
                stacklevel=3,
            )
        self._check_cut = False

    def at_the_buffers(self) -> None:
        """Warn on rank 0 of buffers that the forwards of the first window have changed.

        K micro-batches change them K times, one big batch once. Call it after the last backward,
        before BatchNorm's statistics are written.
        """
        if self._looked:
            return
        before, self._before, self._looked = self._before, {}, True
        model = self._strategy.model
        moved = [
            name
            for name, buffer in model.named_buffers()
            if not _is_still(before.get(name), buffer)
        ]
        moved = [name for name in moved if not _left_alone(model, name)]
        if moved:
            warnings.warn(
                f"Each forward changes {len(moved)} buffer(s) of the model "
                f"({', '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}), so a window of K "
                "micro-batches changes them K times, where one big batch would do so once. For "
                "BatchNorm call da.convert_batchnorm(model, 'pooled') before wrapping. Update "
                "others once per step, after Accumulator.step.",
                StateWarning,
                stacklevel=3,
            )


def _dependence(
    strategy: Strategy, objective: SupportsObjective, micro_batch: Any
) -> tuple[str, bool]:
    """Compare the loss of one micro-batch with the sum of its halves' losses.

    Returns:
        A text that says how they differ, empty if they do not or if this cannot be known, and
        whether the loss behaves like a mean.
    """
    try:
        moved = to_device(micro_batch, strategy.world.device)
        parts = halves(moved)
        # All ranks run four forwards, which may communicate.
        first, second = parts or (moved, moved)
        with kept(strategy.world.device), strategy.evaluating() as model, _only(model):
            denominators = [denominators_of(objective, batch) for batch in (moved, first, second)]
            terms = list(denominators[0])
            whole, again, a, b = (
                [float(value) for value in sums_of(objective, model, batch, terms)]
                for batch in (moved, moved, first, second)
            )
    except Exception:  # such as a model without a loss in evaluation mode
        if strategy.sharded:  # its forward did not end
            strategy.abort()
        return "", False
    if parts is None or whole != again:
        return "", False
    counted = [next(iter(denominator.values())) for denominator in denominators]
    if len(terms) == 1 and counted[0] != counted[1] + counted[2]:
        return (
            (
                f"the denominator of one micro-batch is {counted[0]:g}, and those of its halves "
                f"are {counted[1]:g} and {counted[2]:g} (len() of a pair is 2, not the number of "
                "samples)"
            ),
            False,
        )
    for i, name in enumerate(terms):
        counts = [denominator[name] for denominator in denominators]
        allowed = CUT_TOLERANCE * (abs(a[i]) + abs(b[i]))
        if counts[0] == counts[1] + counts[2] and abs(whole[i] - a[i] - b[i]) > allowed:
            factor = whole[i] / (a[i] + b[i]) if a[i] + b[i] else float("inf")
            mean = (a[i] * counts[1] + b[i] * counts[2]) / counts[0] if counts[0] else float("inf")
            text = f"'{name}' of one micro-batch is {factor:.4g} times the sum of its two halves'"
            is_mean = min(abs(whole[i] - mean), abs(whole[i] - (a[i] + b[i]) / 2)) <= allowed
            return text if is_mean else f"{text}, so samples interact in the loss", is_mean
    return "", False


@contextmanager
def _only(model: nn.Module) -> Iterator[None]:
    """Raise when a module outside the model is called that would change its own buffers.

    Such a module is in training mode and has buffers.
    """
    own = set(model.modules())

    def refuse(module: nn.Module, args: Any) -> None:
        if (
            module.training
            and module not in own
            and any(True for _ in module.buffers(recurse=False))
        ):
            raise RuntimeError("a module outside the model would change its buffers")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _is_still(before: Tensor | None, after: Tensor) -> bool:
    """Return whether a buffer is unchanged, or was made or resized meanwhile and so is a cache."""
    return before is None or before.shape != after.shape or same(before, after)


def _left_alone(model: nn.Module, name: str) -> bool:
    """Return whether the user chose that the module of this buffer updates it in every forward."""
    owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return bool(getattr(owner, "left_alone", False))

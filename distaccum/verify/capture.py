"""Captures one window as the accumulator computes it, and restores all state afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.core.window import MicroBatches
from distaccum.errors import ConfigError, LedgerError, StateWarning
from distaccum.parallel.ledger import Audit
from distaccum.step.accumulator import Accumulator
from distaccum.step.guards.first_window import FirstLook
from distaccum.step.record import StepRecord
from distaccum.verify.state import Kept

# The attributes of an accumulator that are others while a window leaves no trace.
_REPLACED = ("steps", "num_windows", "verdict", "audit", "scheduler", "loss_scale", "_first_look")


@dataclass(frozen=True)
class Captured:
    """Holds the inputs and results of a window that the accumulator computed as configured."""

    record: StepRecord
    network: str  # the traffic that the ledger counted
    network_agrees: bool  # whether it equals the forecast
    before: Mapping[str, Tensor]  # whole parameters before the update
    gradients: Mapping[str, Tensor]  # whole, as the optimizer got them
    after: Mapping[str, Tensor]  # whole parameters after the update
    buffers: Mapping[str, Tensor]  # whole buffers after the window
    optimizer_state: Mapping[str, Mapping[str, Any]]  # before the update, by parameter
    loss_scale: float


def capture(accumulator: Accumulator, micro_batches: Sequence[Any], window: Any) -> Captured:
    """Compute the window on all ranks, and keep its inputs and results unsharded.

    A window that overflows in float16 is computed again with the smaller loss scale that follows.

    Args:
        accumulator: the accumulator, as it trains.
        micro_batches: this rank's micro-batches.
        window: the object that held them; a `MicroBatches` also gives its step and denominators.

    Raises:
        ConfigError: if the window is skipped.
    """
    strategy, optimizer = accumulator.strategy, accumulator.optimizer
    named = dict(strategy.evaluation_model.named_parameters())
    gradients: dict[str, Tensor] = {}

    def keep(*unused: Any) -> None:
        for name, parameter in named.items():
            if parameter.requires_grad:
                gradients[name] = whole(
                    torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                )

    before = {name: whole(parameter) for name, parameter in named.items()}
    state = {
        name: {
            key: whole(value) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[p].items()
        }
        for name, p in named.items()
        if p in optimizer.state
    }
    handle = optimizer.register_step_pre_hook(keep)
    denominators = window.denominators if isinstance(window, MicroBatches) else None
    mismatch = ""
    try:
        while not gradients:
            held = MicroBatches(
                micro_batches,
                len(micro_batches),
                step=getattr(window, "step", None),
                denominators=denominators,
            )
            try:
                record = accumulator.step(held)
            except LedgerError as error:
                mismatch = str(error)
                accumulator.audit = Audit.never
                continue
            overflowed = accumulator.loss_scale is not None and "gradient norm" in (
                record.skipped or ""
            )
            if record.skipped is not None and not overflowed:
                raise ConfigError(
                    f"verify() cannot compare a window that is skipped ({record.skipped}). Give it "
                    "a window that makes an update."
                )
    finally:
        handle.remove()
    network = mismatch if record.verdict is None else str(record.verdict.counted)
    after = {name: whole(parameter) for name, parameter in named.items()}
    buffers = {name: whole(buffer) for name, buffer in strategy.evaluation_model.named_buffers()}
    scale = accumulator.loss_scale.value if accumulator.loss_scale is not None else 1.0
    return Captured(record, network, not mismatch, before, gradients, after, buffers, state, scale)


@contextmanager
def state_preserved(accumulator: Accumulator, *others: Any) -> Iterator[None]:
    """Enter for a window that leaves no trace: afterwards all state is restored.

    Meanwhile dropout is off and every window is audited.

    Args:
        accumulator: its model, optimizer, objective, counters and schedule are restored.
        others: further objectives that are called meanwhile, restored too.
    """
    strategy = accumulator.strategy
    model = strategy.evaluation_model
    kept = Kept(model, accumulator.optimizer, accumulator.objective, *others)
    own = {name: getattr(accumulator, name) for name in _REPLACED}
    accumulator.scheduler, accumulator.audit = None, Audit.always
    accumulator.loss_scale = copy.copy(accumulator.loss_scale)
    # The checks of the training's own first window are still to come. The cut of the loss is not
    # checked here, because the proof judges the loss.
    accumulator._first_look = FirstLook(strategy, check_cut=False)
    batchnorms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    model.eval()
    for module in batchnorms:
        module.training = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StateWarning)  # the proof reports it
            yield
    finally:
        try:
            accumulator.abort()
        finally:
            vars(accumulator).update(own)
            kept.put_back()


def whole(tensor: Tensor) -> Tensor:
    """Return a plain copy of a tensor that may be sharded; all ranks must call it."""
    full = getattr(tensor, "full_tensor", None)
    plain: Tensor = tensor if full is None else full()
    return plain.detach().clone()

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

    A window that overflows in float16 is computed again with the next smaller loss scale.

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
                gradients[name] = whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    before = {name: whole(parameter) for name, parameter in named.items()}
    state = {
        name: {key: whole(value) if isinstance(value, Tensor) else value for key, value in optimizer.state[p].items()}
        for name, p in named.items()
        if p in optimizer.state
    }
    handle = optimizer.register_step_pre_hook(keep)
    denominators = window.denominators if isinstance(window, MicroBatches) else None
    network_agrees, network = True, ""
    try:
        while not gradients:
            held = MicroBatches(
                micro_batches, len(micro_batches), step=getattr(window, "step", None), denominators=denominators
            )
            try:
                record = accumulator.step(held)
            except LedgerError as error:
                network_agrees, network = False, str(error)
                accumulator.audit = Audit.never
                continue
            overflowed = accumulator.loss_scale is not None and "gradient norm" in (record.skipped or "")
            if record.skipped is not None and not overflowed:
                raise ConfigError(
                    f"verify() cannot compare a window that is skipped ({record.skipped}). Give it a window that makes "
                    "an update."
                )
    finally:
        handle.remove()
    if record.verdict is not None:
        network = str(record.verdict.counted)
    after = {name: whole(parameter) for name, parameter in named.items()}
    buffers = {name: whole(buffer) for name, buffer in strategy.evaluation_model.named_buffers()}
    scale = accumulator.loss_scale.value if accumulator.loss_scale is not None else 1.0
    return Captured(record, network, network_agrees, before, gradients, after, buffers, state, scale)


@contextmanager
def state_preserved(accumulator: Accumulator, *others: Any) -> Iterator[None]:
    """Return a context that restores all state on exit, so that windows inside leave no trace.

    Inside, dropout is off and every window is audited.

    Args:
        accumulator: its model, optimizer, objective, counters and schedule are restored.
        others: further objectives that are called inside, whose state is restored too.
    """
    strategy = accumulator.strategy
    model = strategy.model
    kept = Kept(strategy.evaluation_model, accumulator.optimizer, accumulator.objective, *others)
    modes = [(module, module.training) for module in model.modules()]
    counters = (accumulator.steps, accumulator.num_windows, accumulator.verdict, accumulator.audit)
    scheduler, loss_scale = accumulator.scheduler, accumulator.loss_scale
    accumulator.scheduler, accumulator.audit = None, Audit.always
    accumulator.loss_scale = copy.copy(loss_scale)
    first_look = accumulator._first_look
    # A new object, because the checks of the training's own first window are still to come. Whether
    # the loss is a sum is not checked here, because the proof judges the loss.
    accumulator._first_look = FirstLook(strategy, check_cut=False)
    model.eval()
    for module, training in modes:
        if isinstance(module, _BatchNorm):
            module.training = training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StateWarning)  # the proof reports it
            yield
    finally:
        try:
            accumulator.abort()
        finally:
            accumulator.steps, accumulator.num_windows, accumulator.verdict, accumulator.audit = counters
            accumulator.scheduler, accumulator.loss_scale = scheduler, loss_scale
            accumulator._first_look = first_look
            for module, training in modes:
                module.training = training
            kept.put_back()


def whole(tensor: Tensor) -> Tensor:
    """Return a plain copy of a tensor that may be sharded; all ranks must call it."""
    full = getattr(tensor, "full_tensor", None)
    plain: Tensor = tensor if full is None else full()
    return plain.detach().clone()

"""One window as the accumulator computes it, with what went in and came out, whole; nothing of it remains."""

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
from distaccum.step.first_window import FirstLook
from distaccum.step.record import StepRecord
from distaccum.verify.state import Kept


@dataclass(frozen=True)
class Observed:
    """A window as configured."""

    record: StepRecord
    network: str
    network_agrees: bool
    before: Mapping[str, Tensor]  # whole parameters
    gradients: Mapping[str, Tensor]  # whole, as the optimizer got them
    after: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]  # after the window
    optimizer_state: Mapping[str, Mapping[str, Any]]  # before, by parameter
    loss_scale: float


def observe(accumulator: Accumulator, micros: Sequence[Any], window: Any) -> Observed:
    """Compute the window on all ranks and keep what went in and came out, whole.

    A window that overflows in float16 is computed again with the smaller scale that follows.
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
    weights = window.weights if isinstance(window, MicroBatches) else None
    network_agrees, network = True, ""
    try:
        while not gradients:
            held = MicroBatches(micros, len(micros), step=getattr(window, "step", None), weights=weights)
            try:
                record = accumulator.step(held)
            except LedgerError as error:
                network_agrees, network = False, str(error)
                accumulator.audit = Audit.never
                continue
            overflowed = accumulator.loss_scale is not None and "gradient norm" in (record.skipped or "")
            if record.skipped is not None and not overflowed:
                raise ConfigError(f"verify() cannot compare a window that is skipped ({record.skipped}).")
    finally:
        handle.remove()
    if record.verdict is not None:
        network = str(record.verdict.counted)
    after = {name: whole(parameter) for name, parameter in named.items()}
    buffers = {name: whole(buffer) for name, buffer in strategy.evaluation_model.named_buffers()}
    scale = accumulator.loss_scale.value if accumulator.loss_scale is not None else 1.0
    return Observed(record, network, network_agrees, before, gradients, after, buffers, state, scale)


@contextmanager
def restored(accumulator: Accumulator, *others: Any) -> Iterator[None]:
    """Enter for a window that leaves no trace: dropout is off, every window audited; afterwards all is as before.

    Args:
        accumulator: whose model, optimizer, objective, counters and schedule stay as they are.
        others: further objectives that are called meanwhile.
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
    # The first window of the training is still to come, and what a loss is worth the proof says.
    accumulator._first_look = FirstLook(strategy, check_cut=False)
    model.eval()
    for module, training in modes:
        if isinstance(module, _BatchNorm):
            module.training = training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StateWarning)  # the proof says it
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
    """A plain copy of a tensor that may be sharded. All ranks call it alike."""
    full = getattr(tensor, "full_tensor", None)
    plain: Tensor = tensor if full is None else full()
    return plain.detach().clone()

"""`verify`: proves a configuration. One window as configured against one big batch on one process in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from distaccum.errors import ConfigError
from distaccum.loss import SupportsObjective
from distaccum.nn.batchnorm import BatchNormMode, mode_of, unconverted
from distaccum.proof import reference
from distaccum.proof.judge import Judge
from distaccum.proof.observed import observe, restored, whole
from distaccum.proof.result import Proof
from distaccum.step import Accumulator


def verify(
    accumulator: Accumulator,
    window: Iterable[Any],
    *,
    plain: nn.Module | None = None,
    objective: SupportsObjective | None = None,
    combine: Callable[[Sequence[Any]], Any] = reference.combined,
) -> Proof:
    """Compute one window as configured, and the same samples as one big batch on one process in float64.

    Call it on every rank, with this rank's micro-batches, between two steps. Dropout is off meanwhile, since one big
    batch draws other numbers. Afterwards parameters, buffers, optimizer, scheduler and counters are as before. Every
    rank holds the whole model in float64, rank 0 twice more for a while, and the whole window.

    Args:
        accumulator: as it trains.
        window: this rank's micro-batches.
        plain: a model of the same architecture that is not wrapped, with any weights. Needed for FSDP2; otherwise a
            copy of what is wrapped.
        objective: for the plain model in float64, where the accumulator's casts its inputs to something else.
        combine: makes one micro-batch of a list of them; by default tensors are joined along their first dimension.

    Raises:
        ConfigError: for micro-batches that cannot be combined, or a missing plain model.
    """
    strategy = accumulator.strategy
    world = strategy.world
    micros = list(window)
    told = world.gather_objects(micros)
    rounds = [[micros[i] for micros in told if i < len(micros)] for i in range(max(len(micros) for micros in told))]
    if not rounds:
        raise ConfigError("verify() got a window without any micro-batch. Give it the micro-batches of one step.")
    model = _plain(accumulator, plain)
    mode = mode_of(strategy.model)
    with restored(accumulator):
        _match(strategy.evaluation_model, model, frozen=mode is BatchNormMode.frozen)
        observed = observe(accumulator, micros, window)
    outcome: Proof | Exception | None = None
    if world.rank == 0:
        try:
            judge = Judge(accumulator, model, objective or accumulator.objective, combine, mode)
            outcome = judge.proof(observed, rounds)
        except Exception as error:  # the others wait for a word
            outcome = error
    lent = world.lend(outcome, 0)
    if isinstance(lent, Exception):
        raise lent
    assert isinstance(lent, Proof)
    return lent


def _plain(accumulator: Accumulator, given: nn.Module | None) -> nn.Module:
    strategy = accumulator.strategy
    if given is None and strategy.sharded:
        raise ConfigError(
            "verify() needs a plain model beside one that FSDP2 has sharded: verify(accumulator, window, "
            "plain=make_model()), made by the same code, with any weights."
        )
    model = unconverted(copy.deepcopy(strategy.evaluation_model) if given is None else given)
    names, plain_names = dict(strategy.evaluation_model.named_parameters()), dict(model.named_parameters())
    if names.keys() != plain_names.keys():
        other = sorted(names.keys() ^ plain_names.keys())
        raise ConfigError(f"The plain model has other parameters than the accumulator's: {other[:3]} ... differ.")
    return model


def _match(source: nn.Module, target: nn.Module, frozen: bool) -> None:
    """Give a plain model the whole parameters, buffers and modes of one that may be sharded, in float64."""
    target.to(torch.float64)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            target.get_parameter(name).copy_(whole(parameter))
        for name, buffer in source.named_buffers():
            target.get_buffer(name).copy_(whole(buffer))
    for name, module in source.named_modules():
        target.get_submodule(name).training = module.training and not frozen

"""Proves a configuration: compares one window with one big batch on one process in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distaccum.core.loss import SupportsObjective
from distaccum.errors import ConfigError
from distaccum.nn.batchnorm import mode_of, unconverted
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.step.accumulator import Accumulator
from distaccum.verify import reference
from distaccum.verify.capture import capture, state_preserved, whole
from distaccum.verify.compare import compare, in_own_precision
from distaccum.verify.moved import line_of, moved_by_forwards
from distaccum.verify.result import Proof
from distaccum.verify.state import copied


def verify(
    accumulator: Accumulator,
    window: Iterable[Any],
    *,
    plain: nn.Module | None = None,
    objective: SupportsObjective | None = None,
    combine: Callable[[Sequence[Any]], Any] = reference.combined,
) -> Proof:
    """Compare one window, computed as configured, with its samples as one big batch in float64.

    The big batch is computed on one process. Call this on every rank, with this rank's
    micro-batches, between two steps. Dropout is off during the comparison, because one big batch
    draws other random numbers. At the end parameters, buffers, optimizer, scheduler and counters
    are restored.
    Every rank holds the whole model in float64 and the micro-batches of all ranks; for a while rank
    0 holds two more copies of the model.

    Args:
        accumulator: the accumulator, as it trains.
        window: this rank's micro-batches.
        plain: an unwrapped model of the same architecture, with any weights. FSDP2 needs it;
            otherwise it is a copy of the wrapped module.
        objective: an objective for the plain model in float64. It is needed if the accumulator's
            own objective casts its inputs to another dtype.
        combine: makes one micro-batch of a list of them; by default tensors are joined along their
            first dimension.

    Returns:
        The outcome, the same on every rank.

    Raises:
        ConfigError: for micro-batches that cannot be combined, a missing plain model, layers that
            cannot compute on one process, and an optimizer with parameters that are not the
            model's.
    """
    strategy = accumulator.strategy
    world = strategy.world
    _check(accumulator)
    micro_batches = list(window)
    gathered = world.gather_objects(micro_batches)
    rounds = [
        [micro_batches[i] for micro_batches in gathered if i < len(micro_batches)]
        for i in range(max(len(micro_batches) for micro_batches in gathered))
    ]
    if not rounds:
        raise ConfigError(
            "verify() got a window without any micro-batch. Give it the micro-batches of one step."
        )
    source, objective = strategy.evaluation_model, objective or accumulator.objective
    modes = {name: module.training for name, module in source.named_modules()}
    with state_preserved(accumulator, objective):
        model = _plain(accumulator, plain)
        mode = mode_of(strategy.model)
        _match(source, model, frozen=mode is BatchNormMode.frozen)
        observed = capture(accumulator, micro_batches, window)
        everywhere = [micro_batch for row in rounds for micro_batch in row]
        own, two = in_own_precision(
            accumulator, model, [(micro_batches or everywhere)[0], everywhere[-1]]
        )
        state = line_of(_moved(accumulator, own, modes, two), source, len(everywhere))
        outcome: Proof | Exception | None = None
        if world.rank == 0:
            try:
                outcome = compare(
                    accumulator,
                    model,
                    objective,
                    rounds,
                    combine,
                    mode,
                    observed,
                    state,
                )
            except Exception as error:  # the other ranks wait for an outcome
                outcome = error
        shared = world.broadcast_object(outcome, 0)
    if isinstance(shared, Exception):
        raise shared
    assert isinstance(shared, Proof)
    return shared


def _check(accumulator: Accumulator) -> None:
    """Refuse what one process cannot compute or compare, before anything is touched."""
    source = accumulator.strategy.evaluation_model
    known = {id(parameter) for parameter in accumulator.strategy.model.parameters()}
    known |= {id(parameter) for parameter in source.parameters()}
    strangers = [
        p
        for group in accumulator.optimizer.param_groups
        for p in group["params"]
        if id(p) not in known
    ]
    if strangers:
        raise ConfigError(
            "verify() compares the parameters of the model, but the optimizer holds "
            f"{len(strangers)} parameter(s) that are not the model's (the first has the shape "
            f"{list(strangers[0].shape)}) and would not be compared. Make them part of the model "
            "that the accumulator is given: register them, or the module that holds them, in it."
        )
    synced = [
        name for name, m in source.named_modules() if isinstance(m, nn.SyncBatchNorm) and m.training
    ]
    if synced:
        raise ConfigError(
            f"verify() compares with one process, but {synced[0]} is a torch.nn.SyncBatchNorm, "
            "which communicates with the other ranks in each forward. Build the model with "
            "nn.BatchNorm and call da.convert_batchnorm(model, 'sync')."
        )


def _moved(
    accumulator: Accumulator,
    model: nn.Module,
    modes: Mapping[str, bool],
    micro_batches: Sequence[Any],
) -> set[str]:
    """Return the names of the state that forwards change on any rank.

    An error of one rank is raised on all ranks.
    """
    found: set[str] | Exception
    try:
        found = moved_by_forwards(model, modes, accumulator.objective, *micro_batches)
    except Exception as error:
        found = error
    names: set[str] = set()
    for rank in accumulator.strategy.world.gather_objects(found):
        if isinstance(rank, Exception):
            raise rank
        names |= rank
    return names


def _plain(accumulator: Accumulator, given: nn.Module | None) -> nn.Module:
    strategy = accumulator.strategy
    if given is None and strategy.sharded:
        raise ConfigError(
            "verify() needs a plain model to compare with, because FSDP2 has sharded this one. "
            "Call verify(accumulator, window, plain=make_model()), where make_model() builds the "
            "same model, with any weights."
        )
    own = {
        id(tensor)
        for tensor in (
            *strategy.evaluation_model.parameters(),
            *strategy.evaluation_model.buffers(),
        )
    }
    if given is None or any(
        id(tensor) in own for tensor in (*given.parameters(), *given.buffers())
    ):
        given = copied(strategy.evaluation_model if given is None else given)
    model = unconverted(given)
    theirs = dict(strategy.evaluation_model.named_parameters())
    if other := sorted(theirs.keys() ^ dict(model.named_parameters()).keys()):
        raise ConfigError(
            f"The plain model must have the same parameters as the accumulator's, but {len(other)} "
            f"name(s) are in only one of them, such as {other[:3]}. Build both with the same code."
        )
    return model


def _match(source: nn.Module, target: nn.Module, frozen: bool) -> None:
    """Copy parameters, buffers and modes of a possibly sharded model into a plain float64 one.

    With `frozen`, all modules of the target are put into evaluation mode.
    """
    target.to(torch.float64)
    filled = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*source.named_parameters(), *source.named_buffers()):
            filled[name].copy_(whole(tensor))
    for name, module in source.named_modules():
        target.get_submodule(name).training = module.training and not frozen

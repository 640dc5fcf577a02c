"""`verify`: proves a configuration. One window as configured against one big batch on one process in float64."""

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
from distaccum.verify.capture import observe, restored, whole
from distaccum.verify.compare import Judge, in_own_precision
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
        ConfigError: for micro-batches that cannot be combined, a missing plain model, layers that cannot compute on one
            process, and an optimizer of other parameters than the model's.
    """
    strategy = accumulator.strategy
    world = strategy.world
    _check(accumulator)
    micros = list(window)
    told = world.gather_objects(micros)
    rounds = [[micros[i] for micros in told if i < len(micros)] for i in range(max(len(micros) for micros in told))]
    if not rounds:
        raise ConfigError("verify() got a window without any micro-batch. Give it the micro-batches of one step.")
    source, objective = strategy.evaluation_model, objective or accumulator.objective
    modes = {name: module.training for name, module in source.named_modules()}
    with restored(accumulator, objective):
        model = _plain(accumulator, plain)
        mode = mode_of(strategy.model)
        _match(source, model, frozen=mode is BatchNormMode.frozen)
        observed = observe(accumulator, micros, window)
        everywhere = [micro for row in rounds for micro in row]
        own, two = in_own_precision(accumulator, model, [(micros or everywhere)[0], everywhere[-1]])
        state = line_of(_moved(accumulator, own, modes, two), source, len(everywhere))
        outcome: Proof | Exception | None = None
        if world.rank == 0:
            try:
                outcome = Judge(accumulator, model, objective, combine, mode).proof(observed, rounds, state)
            except Exception as error:  # the others wait for a word
                outcome = error
        lent = world.lend(outcome, 0)
    if isinstance(lent, Exception):
        raise lent
    assert isinstance(lent, Proof)
    return lent


def _check(accumulator: Accumulator) -> None:
    """Refuse what one process cannot compute, before anything is touched."""
    source = accumulator.strategy.evaluation_model
    known = {id(parameter) for parameter in accumulator.strategy.model.parameters()}
    known |= {id(parameter) for parameter in source.parameters()}
    strangers = [p for group in accumulator.optimizer.param_groups for p in group["params"] if id(p) not in known]
    if strangers:
        raise ConfigError(
            f"verify() compares the parameters of the model, and the optimizer holds {len(strangers)} that are none of "
            f"its own (of shape {list(strangers[0].shape)}), so that nothing would be said about them. Make them part "
            "of the model that is given to the accumulator: register them, or the module that holds them, in it."
        )
    synced = [name for name, m in source.named_modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    if synced:
        raise ConfigError(
            f"verify() compares with one process, and {synced[0]} is a torch.nn.SyncBatchNorm, which meets the other "
            "ranks in each forward. Build the model with nn.BatchNorm and write da.convert_batchnorm(model, 'sync')."
        )


def _moved(accumulator: Accumulator, model: nn.Module, modes: Mapping[str, bool], micros: Sequence[Any]) -> set[str]:
    """What the forwards of any rank move. What one rank raises, all raise."""
    found: set[str] | Exception
    try:
        found = moved_by_forwards(model, modes, accumulator.objective, *micros)
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
            "verify() needs a plain model beside one that FSDP2 has sharded: verify(accumulator, window, "
            "plain=make_model()), made by the same code, with any weights."
        )
    own = {id(tensor) for tensor in (*strategy.evaluation_model.parameters(), *strategy.evaluation_model.buffers())}
    if given is None or any(id(tensor) in own for tensor in (*given.parameters(), *given.buffers())):
        given = copied(strategy.evaluation_model if given is None else given)
    model = unconverted(given)
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

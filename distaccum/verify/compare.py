"""Compares a window with its computation on one process, in float64 and in its own precision.

All of this runs on rank 0, except `in_own_precision`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distaccum import _torch
from distaccum.core.loss import SupportsObjective, denominators_of, wide
from distaccum.data.device import to_device
from distaccum.errors import ConfigError
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.step.accumulator import Accumulator
from distaccum.verify import reference
from distaccum.verify.capture import Captured
from distaccum.verify.result import Check, Proof

# The tolerance of a result is the sum of three parts. The first is this multiple of the error that
# the same batch has on one process in the same precision, compared with float64.
TIMES_ROUNDING = 8.0
# The second is this many unit roundoffs of the dtype in which gradients are summed, because the
# order of the sums differs.
ROUNDOFFS = 64.0
# The third is this many unit roundoffs of the parameters' dtype, in which the optimizer gets them.
PARAMETER_ROUNDOFFS = 2.0
# A gradient whose norm is below this fraction of the whole gradient's norm is judged relative to
# that fraction: gradients that are zero in exact arithmetic (biases before a softmax or a norm)
# consist of rounding errors only.
SMALL = 1e-2
# The largest tolerance of a gradient. If rounding alone changes it by more, as in BatchNorm over
# two values, a comparison proves nothing.
LARGEST_TOLERANCE = 0.5
TINY = 1e-300  # avoids a division by zero
# The modes in which BatchNorm normalizes with the samples of one micro-batch.
_ONE_BY_ONE = (BatchNormMode.pooled, BatchNormMode.micro_batch)


def compare(
    accumulator: Accumulator,
    model: nn.Module,
    objective: SupportsObjective,
    rounds: Sequence[Sequence[Any]],
    combine: Callable[[Sequence[Any]], Any],
    mode: BatchNormMode | None,
    done: Captured,
    state: Check | None,
) -> Proof:
    """Compute a captured window again on one process, compare the results, and return the outcome.

    The window is computed in float64, in the accumulator's precision and, if it must equal several
    batches, also as one big batch in float64.

    Args:
        accumulator: the accumulator that computed the window.
        model: a plain float64 model with the weights before the window.
        objective: the objective for this model.
        rounds: the micro-batches of all ranks, one list per round.
        combine: makes one micro-batch of a list of them.
        mode: the mode of the model's BatchNorm layers, or None without such layers.
        done: the window, as the accumulator computed it.
        state: the check of state that each forward changes, or None.
    """
    micro_batches = [micro_batch for row in rounds for micro_batch in row]
    big = combine(micro_batches)
    denominators = reference.combined_denominators(objective, micro_batches)
    # The window must equal several batches and not one if BatchNorm takes its statistics over a
    # part of the samples, or if a term is averaged over micro-batches.
    if mode is BatchNormMode.sync:
        groups = [combine(row) for row in rounds]
    elif mode in _ONE_BY_ONE or denominators_of(objective, big) != denominators:
        groups = micro_batches
    else:
        groups = [big]
    exact = _in_float64(accumulator, model, objective, groups, denominators)
    # The error of this computation is that of rounding alone.
    own_model, own_groups = in_own_precision(accumulator, model, groups)
    rounded = reference.compute(
        own_model,
        accumulator.objective,
        own_groups,
        denominators,
        done.loss_scale,
    )
    order = _order_tolerance(accumulator)
    clipped = _clipped(exact.gradients, accumulator.clip_norm)
    rounded_clipped = _clipped(rounded.gradients, accumulator.clip_norm)
    floor = SMALL * _norm(clipped)
    judged = _judged(done.gradients, clipped, rounded_clipped, order, floor)
    parameters = {n: (error, min(LARGEST_TOLERANCE, most)) for n, (error, most) in judged.items()}
    # A single number may be right by chance, so its own rounding error says little. Use the
    # rounding error of the whole gradient instead.
    tolerance = TIMES_ROUNDING * _distance(rounded.gradients, exact.gradients) + order
    loss, norm, exact_norm = done.record.loss, done.record.grad_norm, _norm(exact.gradients)
    lines = [
        _worst("gradient", parameters, "parameters"),
        Check("loss", _off(loss, exact.loss), tolerance, f"{loss:.6f}"),
        Check("gradient norm", _off(norm, exact_norm), tolerance, f"{norm:.6g} before clipping"),
        _update(accumulator, done, order),
    ]
    if exact.running and (mode is BatchNormMode.pooled or len(groups) == 1):
        running = _judged(done.buffers, exact.running, rounded.running, order)
        lines.append(_worst("running statistics", running, "buffers"))
    if state is not None:
        lines.append(state)
    if len(groups) > 1:
        whole = _in_float64(accumulator, model, objective, [big], denominators)
        one = _clipped(whole.gradients, accumulator.clip_norm)
        floor = SMALL * _norm(one)
        distance = max(_relative(done.gradients[name], one[name], floor) for name in one)
        why = (
            "a term is averaged over micro-batches" if mode is None else f"BatchNorm: {mode.value}"
        )
        lines.append(Check("from one big batch", distance, None, f"what differs by design ({why})"))
    what = "one big batch" if len(groups) == 1 else f"{len(groups)} batches"
    ranks = accumulator.strategy.world.size
    return Proof(
        tuple(lines),
        parameters,
        done.network,
        done.network_agrees,
        f"{len(micro_batches)} micro-batch(es) on {ranks} rank(s) against {what} on one process in "
        "float64",
        f"{TIMES_ROUNDING:g} x the error of the same samples on one process in the same precision, "
        f"and {order:.1e} for sums in another order",
    )


def _in_float64(
    accumulator: Accumulator,
    model: nn.Module,
    objective: SupportsObjective,
    groups: Sequence[Any],
    denominators: Mapping[str, float],
) -> reference.Computed:
    device = accumulator.strategy.world.device
    cast = [reference.cast(group, device, torch.float64) for group in groups]
    try:
        return reference.compute(copy.deepcopy(model), objective, cast, denominators, 1.0)
    except RuntimeError as error:
        raise ConfigError(
            f"verify() compares with float64, but this model cannot compute in it: {error}. Pass "
            "plain=, a model with layers that can (for experts of transformers: "
            "model.set_experts_implementation('eager'))."
        ) from error


def _order_tolerance(accumulator: Accumulator) -> float:
    """Return the tolerance for sums in another order, whatever the precision of the forward."""
    dtype = next(accumulator.strategy.model.parameters()).dtype
    summed = accumulator.strategy.dtypes.accumulate or wide(dtype)
    return ROUNDOFFS * _roundoff(summed) + PARAMETER_ROUNDOFFS * _roundoff(dtype)


def _clipped(gradients: Mapping[str, Tensor], clip_norm: float | None) -> dict[str, Tensor]:
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (_norm(gradients) + 1e-6))
    return {name: gradient.double() * factor for name, gradient in gradients.items()}


def _judged(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    order: float,
    floor: float = 0.0,
) -> dict[str, tuple[float, float]]:
    """Return the relative error of each tensor and its tolerance, by name."""
    return {
        name: (
            _relative(found[name], value, floor),
            TIMES_ROUNDING * _relative(rounded[name], value, floor) + order,
        )
        for name, value in exact.items()
    }


def _update(accumulator: Accumulator, done: Captured, order: float) -> Check:
    """Check the update against the optimizer on one process in float64.

    The optimizer is given the same gradient.
    """
    names = {id(p): name for name, p in accumulator.strategy.evaluation_model.named_parameters()}
    parameters = {name: nn.Parameter(value.double().clone()) for name, value in done.before.items()}
    groups = [
        {
            **group,
            "params": [parameters[names[id(p)]] for p in group["params"]],
            "foreach": False,
            "fused": False,
        }
        for group in accumulator.optimizer.param_groups
    ]
    kind, defaults = type(accumulator.optimizer), accumulator.optimizer.defaults
    known = inspect.signature(kind).parameters
    try:
        optimizer = kind(
            groups, **{name: value for name, value in defaults.items() if name in known}
        )
    except Exception as reason:  # a custom optimizer with other arguments
        return Check(
            "update", float("nan"), None, f"not compared: {type(reason).__name__}: {reason}"
        )
    for name, parameter in parameters.items():
        if name in done.gradients:
            parameter.grad = done.gradients[name].double()
        if name in done.optimizer_state:
            optimizer.state[parameter] = reference.cast(
                dict(done.optimizer_state[name]), parameter.device, torch.float64
            )
    optimizer.step()
    moved = {
        name: parameters[name].detach() - done.before[name].double() for name in done.gradients
    }
    found = {
        name: done.after[name].double() - done.before[name].double() for name in done.gradients
    }
    # New parameters are rounded once, whatever the update's size.
    weights = {name: done.before[name] for name in moved}
    roundoff = _roundoff(next(iter(weights.values())).dtype)
    stored = _norm(weights) * roundoff / max(_norm(moved), TINY)
    note = "optimizer on one process, same gradient"
    return Check("update", _distance(found, moved), 2 * stored + order, note)


def in_own_precision(
    accumulator: Accumulator, model: nn.Module, micro_batches: Sequence[Any]
) -> tuple[nn.Module, list[Any]]:
    """Return copies of a plain model and of micro-batches in the accumulator's own precision.

    The micro-batches are moved to the accumulator's device.
    """
    strategy = accumulator.strategy
    stored, device = next(strategy.model.parameters()).dtype, strategy.world.device
    sharded = next(_torch.sharded_groups(strategy.model), None)
    # FSDP2 casts parameters and inputs itself.
    computed = stored if sharded is None else sharded.compute_dtype
    moved = [to_device(micro_batch, device) for micro_batch in micro_batches]
    cast = (
        moved
        if computed is stored
        else [reference.cast(micro_batch, device, computed) for micro_batch in moved]
    )
    return copy.deepcopy(model).to(computed), cast


def _worst(name: str, judged: Mapping[str, tuple[float, float]], what: str) -> Check:
    """Report the tensor whose error is the largest fraction of its tolerance.

    Here nan is the largest error.
    """
    shares = {key: error / tolerance for key, (error, tolerance) in judged.items()}
    worst = max(shares, key=lambda key: math.inf if math.isnan(shares[key]) else shares[key])
    return Check(name, *judged[worst], f"{worst}, the worst of {len(judged)} {what}")


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    difference = {name: found[name].double() - exact[name].double() for name in exact}
    return _norm(difference) / max(_norm(exact), TINY)


def _off(found: float, exact: float) -> float:
    return abs(found - exact) / max(abs(exact), TINY)


def _relative(found: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    return float(
        (found.double() - exact.double()).norm() / max(float(exact.double().norm()), floor, TINY)
    )

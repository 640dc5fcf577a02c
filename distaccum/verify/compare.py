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


class Comparison:
    """Computes a window again on one process and compares the results; used on rank 0 only.

    The window is computed in float64 and in the accumulator's precision. If it must equal several
    batches instead of one, it is also computed as one big batch in float64.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        model: nn.Module,
        objective: SupportsObjective,
        combine: Callable[[Sequence[Any]], Any],
        mode: BatchNormMode | None,
    ) -> None:
        self.accumulator = accumulator
        self.model = model
        self.objective = objective
        self.combine = combine
        self.mode = mode
        self.device = accumulator.strategy.world.device

    def proof(self, done: Captured, rounds: list[list[Any]], state: Check | None) -> Proof:
        """Compare the captured window with one process, and return the outcome.

        Args:
            done: the window, as the accumulator computed it.
            rounds: the micro-batches of all ranks, one list per round.
            state: the check of state that each forward changes, or None.
        """
        micro_batches = [micro_batch for row in rounds for micro_batch in row]
        big = self.combine(micro_batches)
        denominators = reference.combined_denominators(self.objective, micro_batches)
        additive = denominators_of(self.objective, big) == denominators
        # The window must equal several batches instead of one if BatchNorm takes its statistics
        # over a part of the samples, or if a term is averaged over micro-batches.
        if self.mode is BatchNormMode.sync:
            groups = [self.combine(row) for row in rounds]
        elif self.mode in (BatchNormMode.pooled, BatchNormMode.micro_batch) or not additive:
            groups = micro_batches
        else:
            groups = [big]
        exact = self._exact(groups, denominators)
        rounded = self._rounded(groups, denominators, done.loss_scale)
        clipped = self._clipped(exact.gradients)
        parameters = self._parameters(done.gradients, clipped, self._clipped(rounded.gradients))
        worst = _worst(parameters)
        # A single number may be right by chance, so its own rounding error says little. Use the
        # rounding error of the whole gradient instead.
        rounding = _distance(rounded.gradients, exact.gradients)
        norm = done.record.grad_norm
        what = "one big batch" if len(groups) == 1 else f"{len(groups)} batches"
        lines = [
            Check("gradient", *parameters[worst], f"{worst}, the worst of {len(parameters)} parameters"),
            self._number("loss", done.record.loss, exact.loss, rounding, f"{done.record.loss:.6f}"),
            self._number("gradient norm", norm, _norm(exact.gradients), rounding, f"{norm:.6g} before clipping"),
            self._update(done),
        ]
        if exact.running and (self.mode is BatchNormMode.pooled or len(groups) == 1):
            lines.append(self._running(done, exact, rounded))
        if state is not None:
            lines.append(state)
        if len(groups) > 1:
            one = self._clipped(self._exact([big], denominators).gradients)
            distance = max(_relative(done.gradients[name], one[name], SMALL * _norm(one)) for name in one)
            why = f"BatchNorm: {self.mode.value}" if self.mode is not None else "a term is averaged over micro-batches"
            lines.append(Check("from one big batch", distance, None, f"what differs by design ({why})"))
        ranks = self.accumulator.strategy.world.size
        samples = f"{len(micro_batches)} micro-batch(es) on {ranks} rank(s) against {what} on one process in float64"
        tolerance = (
            f"{TIMES_ROUNDING:g} x the error of the same samples on one process in the same precision, "
            f"and {self._order:.1e} for sums in another order"
        )
        return Proof(tuple(lines), parameters, done.network, done.network_agrees, samples, tolerance)

    @property
    def _order(self) -> float:
        """Return the tolerance for sums in another order, whatever the precision of the forward."""
        dtype = next(self.accumulator.strategy.model.parameters()).dtype
        summed = self.accumulator.strategy.dtypes.accumulate or wide(dtype)
        return ROUNDOFFS * _roundoff(summed) + PARAMETER_ROUNDOFFS * _roundoff(dtype)

    def _exact(self, groups: Sequence[Any], denominators: Mapping[str, float]) -> reference.Computed:
        cast = [reference.cast(group, self.device, torch.float64) for group in groups]
        try:
            return reference.compute(copy.deepcopy(self.model), self.objective, cast, denominators, 1.0)
        except RuntimeError as error:
            raise ConfigError(
                f"verify() compares with float64, but this model cannot compute in it: {error}. Pass plain=, a model "
                "with layers that can (for experts of transformers: model.set_experts_implementation('eager'))."
            ) from error

    def _rounded(self, groups: Sequence[Any], denominators: Mapping[str, float], scale: float) -> reference.Computed:
        """Compute the window in the accumulator's precision, to measure rounding alone."""
        model, cast = in_own_precision(self.accumulator, self.model, groups)
        return reference.compute(model, self.accumulator.objective, cast, denominators, scale)

    def _clipped(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clip_norm = self.accumulator.clip_norm
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (_norm(gradients) + 1e-6))
        return {name: gradient.double() * factor for name, gradient in gradients.items()}

    def _parameters(
        self, found: Mapping[str, Tensor], exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor]
    ) -> dict[str, tuple[float, float]]:
        floor = SMALL * _norm(exact)
        return {
            name: (
                _relative(found[name], gradient, floor),
                min(LARGEST_TOLERANCE, TIMES_ROUNDING * _relative(rounded[name], gradient, floor) + self._order),
            )
            for name, gradient in exact.items()
        }

    def _number(self, name: str, found: float, exact: float, rounding: float, note: str) -> Check:
        error = abs(found - exact) / max(abs(exact), TINY)
        return Check(name, error, TIMES_ROUNDING * rounding + self._order, note)

    def _running(self, done: Captured, exact: reference.Computed, rounded: reference.Computed) -> Check:
        """Check BatchNorm's running statistics against those of all samples of the window."""
        judged = {
            name: (
                _relative(done.buffers[name], value),
                TIMES_ROUNDING * _relative(rounded.running[name], value) + self._order,
            )
            for name, value in exact.running.items()
        }
        worst = _worst(judged)
        return Check("running statistics", *judged[worst], f"{worst}, the worst of {len(judged)} buffers")

    def _update(self, done: Captured) -> Check:
        """Check the update against the optimizer on one process in float64.

        This optimizer is given the gradient that the accumulator's optimizer got.
        """
        names = {id(p): name for name, p in self.accumulator.strategy.evaluation_model.named_parameters()}
        parameters = {name: nn.Parameter(value.double().clone()) for name, value in done.before.items()}
        groups = [
            {**group, "params": [parameters[names[id(p)]] for p in group["params"]], "foreach": False, "fused": False}
            for group in self.accumulator.optimizer.param_groups
        ]
        kind, defaults = type(self.accumulator.optimizer), self.accumulator.optimizer.defaults
        known = inspect.signature(kind).parameters
        try:
            optimizer = kind(groups, **{name: value for name, value in defaults.items() if name in known})
        except Exception as reason:  # a custom optimizer with other arguments
            return Check("update", float("nan"), None, f"not compared: {type(reason).__name__}: {reason}")
        for name, parameter in parameters.items():
            if name in done.gradients:
                parameter.grad = done.gradients[name].double()
            if name in done.optimizer_state:
                optimizer.state[parameter] = reference.cast(
                    dict(done.optimizer_state[name]), parameter.device, torch.float64
                )
        optimizer.step()
        moved = {name: parameters[name].detach() - done.before[name].double() for name in done.gradients}
        found = {name: done.after[name].double() - done.before[name].double() for name in done.gradients}
        size = max(_norm(moved), TINY)
        error = _norm({name: found[name] - moved[name] for name in moved}) / size
        # New parameters are rounded once, whatever the update's size.
        weights = {name: done.before[name] for name in moved}
        stored = _norm(weights) * _roundoff(next(iter(weights.values())).dtype) / size
        return Check("update", error, 2 * stored + self._order, "optimizer on one process, same gradient")


def in_own_precision(
    accumulator: Accumulator, model: nn.Module, micro_batches: Sequence[Any]
) -> tuple[nn.Module, list[Any]]:  # fmt: skip
    """Return copies of a plain model and of micro-batches in the accumulator's own precision.

    The micro-batches are moved to the accumulator's device.
    """
    strategy = accumulator.strategy
    stored, device = next(strategy.model.parameters()).dtype, strategy.world.device
    sharded = next(_torch.sharded_groups(strategy.model), None)
    # FSDP2 casts parameters and inputs itself.
    computed = stored if sharded is None else sharded.compute_dtype
    moved = [to_device(micro_batch, device) for micro_batch in micro_batches]
    cast = moved if computed is stored else [reference.cast(micro_batch, device, computed) for micro_batch in moved]
    return copy.deepcopy(model).to(computed), cast


def _worst(judged: Mapping[str, tuple[float, float]]) -> str:
    """Return the name whose error is the largest fraction of its tolerance; nan is the largest."""
    shares = {name: error / tolerance for name, (error, tolerance) in judged.items()}
    return max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def _distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    difference = {name: found[name].double() - exact[name].double() for name in exact}
    return _norm(difference) / max(_norm(exact), TINY)


def _relative(found: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    return float((found.double() - exact.double()).norm() / max(float(exact.double().norm()), floor, TINY))

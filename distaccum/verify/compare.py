"""Rank 0: the window on one process, in float64 and in its own precision, and what comes of the comparison."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distaccum import _torch
from distaccum.core.loss import SupportsObjective, weights_of, wide
from distaccum.data.device import to_device
from distaccum.errors import ConfigError
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.step.accumulator import Accumulator
from distaccum.verify import reference
from distaccum.verify.capture import Observed
from distaccum.verify.result import Line, Proof

# A result may be so many times as far from float64 as the same batch on one process in the same precision is, ...
TIMES_ROUNDING = 8.0
# ... and so many unit roundoffs of the dtype in which gradients are summed further, as the order of a sum is another,
ROUNDOFFS = 64.0
# ... and so many of the parameters' dtype, in which gradients are handed to the optimizer.
PARAMETER_ROUNDOFFS = 2.0
# A parameter whose gradient is smaller than this part of the whole gradient is judged by the whole: gradients that are
# zero in exact arithmetic (biases before a softmax or a norm) are nothing but rounding.
SMALL = 1e-2
# A gradient that rounding alone moves by more proves nothing (BatchNorm over two values does that) and is not accepted.
LARGEST_TOLERANCE = 0.5
TINY = 1e-300  # in place of a division by zero


class Judge:
    """Rank 0: the window on one process, three times, and what comes of it."""

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

    def proof(self, done: Observed, rounds: list[list[Any]], state: Line | None) -> Proof:
        """Compare; `rounds` are the micro-batches of all ranks, those of one round together; `state`: what moves."""
        micros = [micro for row in rounds for micro in row]
        big = self.combine(micros)
        weights = reference.combined_weights(self.objective, micros)
        additive = weights_of(self.objective, big) == weights
        # What meets inside the model, or is averaged over micro-batches, makes several batches of the window.
        if self.mode is BatchNormMode.sync:
            groups = [self.combine(row) for row in rounds]
        elif self.mode in (BatchNormMode.pooled, BatchNormMode.micro) or not additive:
            groups = micros
        else:
            groups = [big]
        exact = self._exact(groups, weights)
        rounded = self._rounded(groups, weights, done.loss_scale)
        clipped = self._clipped(exact.gradients)
        parameters = self._parameters(done.gradients, clipped, self._clipped(rounded.gradients))
        worst = _worst(parameters)
        # One number may be right by chance, so that its own error says little: the whole gradient's stands for it.
        rounding = _distance(rounded.gradients, exact.gradients)
        norm = done.record.grad_norm
        what = "one big batch" if len(groups) == 1 else f"{len(groups)} batches"
        lines = [
            Line("gradient", *parameters[worst], f"{worst}, the worst of {len(parameters)} parameters"),
            self._number("loss", done.record.loss, exact.loss, rounding, f"{done.record.loss:.6f}"),
            self._number("gradient norm", norm, _norm(exact.gradients), rounding, f"{norm:.6g} before clipping"),
            self._update(done),
        ]
        if exact.running and (self.mode is BatchNormMode.pooled or len(groups) == 1):
            lines.append(self._running(done, exact, rounded))
        if state is not None:
            lines.append(state)
        if len(groups) > 1:
            one = self._clipped(self._exact([big], weights).gradients)
            distance = max(_relative(done.gradients[name], one[name], SMALL * _norm(one)) for name in one)
            why = f"BatchNorm: {self.mode.value}" if self.mode is not None else "a term is averaged over micro-batches"
            lines.append(Line("from one big batch", distance, None, f"what differs by design ({why})"))
        ranks = self.accumulator.strategy.world.size
        samples = f"{len(micros)} micro-batch(es) on {ranks} rank(s) against {what} on one process in float64"
        tolerance = (
            f"{TIMES_ROUNDING:g} x the error of the same samples on one process in the same precision, "
            f"and {self._order:.1e} for sums in another order"
        )
        return Proof(tuple(lines), parameters, done.network, done.network_agrees, samples, tolerance)

    @property
    def _order(self) -> float:
        """What a sum in another order may differ by, whatever the precision of the forward."""
        dtype = next(self.accumulator.strategy.model.parameters()).dtype
        summed = self.accumulator.strategy.dtypes.accumulate or wide(dtype)
        return ROUNDOFFS * _roundoff(summed) + PARAMETER_ROUNDOFFS * _roundoff(dtype)

    def _exact(self, groups: Sequence[Any], weights: Mapping[str, float]) -> reference.Computed:
        cast = [reference.cast(group, self.device, torch.float64) for group in groups]
        try:
            return reference.compute(copy.deepcopy(self.model), self.objective, cast, weights, 1.0)
        except RuntimeError as error:
            raise ConfigError(
                f"verify() compares with float64, and this model cannot compute in it: {error}. Give plain= with "
                "layers that can (experts of transformers: model.set_experts_implementation('eager'))."
            ) from error

    def _rounded(self, groups: Sequence[Any], weights: Mapping[str, float], scale: float) -> reference.Computed:
        """The same in the precision of the accumulator: how far rounding alone leads away."""
        model, cast = in_own_precision(self.accumulator, self.model, groups)
        return reference.compute(model, self.accumulator.objective, cast, weights, scale)

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

    def _number(self, name: str, found: float, exact: float, rounding: float, note: str) -> Line:
        error = abs(found - exact) / max(abs(exact), TINY)
        return Line(name, error, TIMES_ROUNDING * rounding + self._order, note)

    def _running(self, done: Observed, exact: reference.Computed, rounded: reference.Computed) -> Line:
        """BatchNorm's running statistics: those that all samples of the window would have written."""
        judged = {
            name: (
                _relative(done.buffers[name], value),
                TIMES_ROUNDING * _relative(rounded.running[name], value) + self._order,
            )
            for name, value in exact.running.items()
        }
        worst = _worst(judged)
        return Line("running statistics", *judged[worst], f"{worst}, the worst of {len(judged)} buffers")

    def _update(self, done: Observed) -> Line:
        """The optimizer on one process in float64, given the window's gradient."""
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
        except Exception as reason:  # an optimizer of the user's own, which wants other arguments
            return Line("update", float("nan"), None, f"not compared: {type(reason).__name__}: {reason}")
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
        return Line("update", error, 2 * stored + self._order, "optimizer on one process, same gradient")


def in_own_precision(
    accumulator: Accumulator, model: nn.Module, micros: Sequence[Any]
) -> tuple[nn.Module, list[Any]]:  # fmt: skip
    """Copy a plain model, and micro-batches to its device, in the precision in which the accumulator computes."""
    strategy = accumulator.strategy
    stored, device = next(strategy.model.parameters()).dtype, strategy.world.device
    sharded = next(_torch.sharded_groups(strategy.model), None)
    computed = stored if sharded is None else sharded.compute_dtype  # FSDP2 casts parameters and inputs itself
    moved = [to_device(micro, device) for micro in micros]
    cast = moved if computed is stored else [reference.cast(micro, device, computed) for micro in moved]
    return copy.deepcopy(model).to(computed), cast


def _worst(judged: Mapping[str, tuple[float, float]]) -> str:
    """The name whose error is the largest part of its tolerance; one that is no number before all others."""
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

"""The right result of a composed loop: every window as one batch on one process, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from fuzz_cases import Case
from fuzz_data import (
    Net,
    change,
    make_loader,
    make_net,
    make_optimizer,
    make_scheduler,
    replace_extra,
    unpack,
)
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class WindowResult:
    """What a window must have done, the same on every rank."""

    step: int
    skipped: bool
    loss: float
    losses: dict[str, float]
    denominators: dict[str, float]
    grad_norm: float
    lr: float
    num_micro_batches: int
    parameters: list[Tensor]  # whole, after the window


@dataclass(frozen=True)
class Reference:
    """What a loop must have done, without its mistake."""

    start: list[Tensor]  # the parameters before the first window
    windows: list[WindowResult]


class Reader:
    """One rank's loop over its loader, which reads a window's micro-batches when the window
    begins."""

    def __init__(self, case: Case, rank: int) -> None:
        self._case = case
        with torch.random.fork_rng():
            torch.manual_seed(case.seed + rank)
            self._loader = make_loader(case, rank)
            self._state = torch.get_rng_state()

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        with torch.random.fork_rng():
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()

    def begin(self) -> None:
        """Begin a pass over the loader."""
        with self._own_generator():
            self._micro_batches = iter(self._loader)

    def read(self, size: int) -> list[Any]:
        """Read at most `size` micro-batches."""
        with self._own_generator():
            return list(islice(self._micro_batches, size))

    def evaluate(self) -> None:
        """Draw what an evaluation draws."""
        with self._own_generator():
            torch.randn(3, 4, dtype=torch.float64)


def read(case: Case) -> list[list[list[Any]]]:
    """The micro-batches of each window by rank."""
    readers = [Reader(case, rank) for rank in range(case.ranks)]
    found: list[list[list[Any]]] = []
    for last in (case.break_after or case.num_windows, case.num_windows):
        for reader in readers:
            reader.begin()
        while len(found) < last:
            window = [reader.read(case.sizes[len(found)]) for reader in readers]
            if not any(window):
                return found
            found.append(window)
            if case.has("evaluation"):
                for reader in readers:
                    reader.evaluate()
    return found


def reference(case: Case) -> Reference:
    """Compute the loop on one process, without its mistake."""
    net = make_net(case)
    criterion = (
        nn.Parameter(torch.tensor(0.3).double()) if case.mistake == "criterion_parameter" else None
    )
    net.extra.requires_grad_(
        not case.has("frozen") and case.mistake not in ("thawed_later", "frozen_after_wrapping")
    )
    if case.mistake == "layer_replaced":
        replace_extra(case, net)
    optimizer = make_optimizer(case, net, criterion)
    scheduler = make_scheduler(case, optimizer)
    parameters = [*net.parameters(), *([] if criterion is None else [criterion])]
    start = _copied(parameters)
    results: list[WindowResult] = []
    updates = 0
    for window in read(case):
        micro_batches = [unpack(case, micro_batch) for dealt in window for micro_batch in dealt]
        batch = [torch.cat(columns) for columns in zip(*micro_batches, strict=True)]
        sums, denominators = _sums(case, net, batch, criterion)
        losses = {name: sums[name] / max(count, 1) for name, count in denominators.items()}
        lr, norm, loss = optimizer.param_groups[0]["lr"], math.nan, sum(losses.values())
        skipped = not any(denominators.values())
        if not skipped:
            norm = _update(case, loss, optimizer)
            updates += 1
            _move(case, scheduler, float(loss.detach()))
        results.append(
            WindowResult(
                step=updates,
                skipped=skipped,
                loss=math.nan if skipped else float(loss.detach()),
                losses={
                    name: math.nan if skipped else float(value.detach())
                    for name, value in losses.items()
                },
                denominators=denominators,
                grad_norm=norm,
                lr=lr,
                num_micro_batches=len(micro_batches),
                parameters=_copied(parameters),
            )
        )
        if len(results) == 1:
            change(case, net, optimizer)
    return Reference(start, results)


def _copied(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _sums(
    case: Case, net: Net, batch: list[Tensor], criterion: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loss sums of the whole batch, and what they are divided by."""
    x, y, mask, extra = batch
    hidden = torch.tanh(F.linear(x, net.inlet.weight, net.inlet.bias))
    for block in net.blocks:
        hidden = torch.tanh(F.linear(hidden, block.weight, block.bias))
    output = F.linear(hidden, net.head.weight, net.head.bias)
    output = output + extra * F.linear(hidden, net.extra.weight, net.extra.bias)
    error = ((output - y).square() * mask).sum()
    error = error if criterion is None else error * torch.exp(criterion)
    if case.terms == 1:
        return {"loss": error}, {"loss": float(mask.sum())}
    return {"fit": error, "size": output.square().sum() / 10}, {
        "fit": float(mask.sum()),
        "size": float(len(mask)),
    }


def _update(case: Case, loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Update once, and return the norm before clipping. A trained parameter that nothing used has a
    gradient of 0."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.5 if case.has("clip_norm") else math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def _move(case: Case, scheduler: Any, loss: float) -> None:
    """Move the learning rate; a schedule that is at its end stays there."""
    if case.mistake == "plateau_scheduler":
        scheduler.step(loss)
    elif scheduler is not None and not (
        case.mistake == "one_cycle_past_its_end" and scheduler.last_epoch >= 2
    ):
        scheduler.step()

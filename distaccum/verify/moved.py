"""Finds state that each forward changes: K micro-batches change it K times, one big batch once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.core.loss import SupportsObjective, denominators_of, sums_of
from distaccum.nn.batchnorm import with_mode
from distaccum.verify.result import Check
from distaccum.verify.state import differing, saved_names, state_of

NAMED = 3  # names that a note lists


def moved_by_forwards(
    model: nn.Module, modes: Mapping[str, bool], objective: SupportsObjective, one: Any, other: Any
) -> set[str]:
    """Return the names of the state that forwards change while the model trains.

    Three forwards are run: two of one micro-batch, then one of another. What is saved with a model
    (parameters, persistent buffers) must not change at all. Other buffers and attributes, including
    the objective's, may hold what depends only on the newest micro-batch, such as a cache or a
    router's loss. These must be equal after the first and the second forward. All ranks must call
    this, because forwards may communicate.

    Args:
        model: a plain model in the precision of the training, on the micro-batches' device. Its
            state changes.
        modes: whether each module is in training mode, by its name.
        objective: the objective of the training. Its own state changes.
        one: a micro-batch.
        other: another micro-batch, if the window has two.
    """
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
    terms = list(denominators_of(objective, one))
    states, objectives = [state_of(model)], [state_of(objective)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for micro_batch in (one, one, other):
        with torch.random.fork_rng(devices):
            sums_of(objective, model, micro_batch, terms)
        states.append(state_of(model))
        objectives.append(state_of(objective))
    found = set().union(*(differing(*pair) for pair in pairwise(states))) & saved_names(model)
    found |= differing(states[1], states[2])
    return found | {f"objective.{name}" for name in differing(objectives[1], objectives[2])}


def line_of(moved: set[str], model: nn.Module, num_micro_batches: int) -> Check | None:
    """Return a failed check if each forward changes state, with advice; otherwise None.

    BatchNorm layers for which a mode was chosen are not reported.

    Args:
        moved: the names of parameters, buffers and attributes of the model, and of the objective.
        model: the model as it trains, converted layers included.
        num_micro_batches: micro-batches of the window, over all ranks. A single one changes
            everything once, like a big batch.
    """
    chosen = set(with_mode(model))
    names = sorted(name for name in moved if name.rpartition(".")[0] not in chosen)
    if not names or num_micro_batches < 2:
        return None
    layers = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    plain = [name for name in names if name.rpartition(".")[0] in layers]
    others = [name for name in names if name not in plain]
    advice = [
        f"Each forward changes {_listed(names)}: {num_micro_batches} times in this window, but "
        "once with one big batch."
    ]
    if plain:
        advice.append(
            f"For BatchNorm ({_listed(plain)}), call da.convert_batchnorm(model, 'pooled') before "
            "the model is wrapped, or choose mode 'sync' or 'frozen'; mode 'micro_batch' says that "
            "each micro-batch is meant to change them."
        )
    if others:
        advice.append(
            f"Change {_listed(others)} once per window, after accumulator.step(window), or freeze "
            "it (put its module into evaluation mode with .eval(), and keep it there when the rest "
            "of the model trains)."
        )
    return Check(
        "state",
        float(len(names)),
        0.0,
        f"changed by each forward: {_listed(names)}",
        " ".join(advice),
    )


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest

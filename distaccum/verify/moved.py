"""State that each forward of a training moves: K micro-batches move it K times, where one big batch moves it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distaccum.core.loss import SupportsObjective, sums_of, weights_of
from distaccum.nn.batchnorm import with_mode
from distaccum.verify.result import Line
from distaccum.verify.state import differing, saved_names, state_of

NAMED = 3  # in a note


def moved_by_forwards(
    model: nn.Module, modes: Mapping[str, bool], objective: SupportsObjective, one: Any, other: Any
) -> set[str]:
    """Name what three forwards move, in the modes in which the model trains: two of one micro-batch, one of another.

    What is saved with a model (parameters, persistent buffers) must not move at all. Other buffers and attributes, also
    the objective's, may hold what depends on the newest micro-batch alone, such as a cache or the loss of a router, and
    must be the same after the equal forwards. All ranks call it alike: forwards may communicate.

    Args:
        model: plain, in the precision of the training, on the micro-batches' device. Its state moves.
        modes: whether a module trains, by name.
        objective: of the training. Its own state moves.
        one: a micro-batch.
        other: another one, if the window has two.
    """
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)
    terms = list(weights_of(objective, one))
    states, objectives = [state_of(model)], [state_of(objective)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for micro in (one, one, other):
        with torch.random.fork_rng(devices):
            sums_of(objective, model, micro, terms)
        states.append(state_of(model))
        objectives.append(state_of(objective))
    found = set().union(*(differing(*pair) for pair in pairwise(states))) & saved_names(model)
    found |= differing(states[1], states[2])
    return found | {f"objective.{name}" for name in differing(objectives[1], objectives[2])}


def line_of(moved: set[str], model: nn.Module, num_micros: int) -> Line | None:
    """Say what is moved beside layers with a mode for BatchNorm, and what to write; None where nothing is.

    Args:
        moved: names of parameters, buffers and attributes of the model, and of the objective.
        model: as it trains, converted layers included.
        num_micros: of the window, on all ranks. One moves everything once.
    """
    chosen = set(with_mode(model))
    names = sorted(name for name in moved if name.rpartition(".")[0] not in chosen)
    if not names or num_micros < 2:
        return None
    layers = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    plain = [name for name in names if name.rpartition(".")[0] in layers]
    others = [name for name in names if name not in plain]
    advice = [f"{_listed(names)} moved by each forward: {num_micros} times in this window, once by one big batch."]
    if plain:
        advice.append(
            f"BatchNorm ({_listed(plain)}): write da.convert_batchnorm(model, 'pooled') before the model is wrapped, "
            "or 'sync', or 'frozen'; 'micro' says that each micro-batch shall move them."
        )
    if others:
        advice.append(
            f"{_listed(others)}: move it once a window, after accumulator.step(window), or freeze it (.eval() on its "
            "module, in a model that keeps it so)."
        )
    return Line("state", float(len(names)), 0.0, f"moved by each forward: {_listed(names)}", " ".join(advice))


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest

"""What the micros of a configured run keep in memory, before it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distaccum.config import Config
from distaccum.nn.blocks import checkpoint_blocks
from distaccum.predict.activations import saved_bytes
from distaccum.problem import Problem, in_precision, meta_model
from distaccum.schedules.overlap import AUTO
from distaccum.wrap import StrategyName


def activations(config: Config, problem: Problem, samples: int) -> int:
    """Bytes that one forward keeps for its backward; numbers of samples beyond the data are its samples again."""
    objective = in_precision(config, problem.objective)
    return _saved(config, problem, samples, objective.loss_sum)


def overlap_limit(config: Config, problem: Problem, micro_size: int) -> int | None:
    """The largest T that accum.overlap_micros=auto may choose within accum.overlap_memory_mb; None: no limit.

    Each further micro keeps what the backward of its blocks needs, and the head's gradients of parameters that the
    blocks or the embeddings use too. Which those are shows only in the graph: all that are outside of blocks count.
    """
    memory_mb = config.accum.overlap_memory_mb
    if config.accum.overlap_micros != AUTO or memory_mb is None:
        return None
    model = meta_model(config, problem)
    blocks = problem.blocks_of(model)
    if not blocks:
        return None
    objective = in_precision(config, problem.objective)

    def to_the_head(model: nn.Module, micro: Any) -> Any:
        """What the last block returns: only what leads to it is kept."""
        handed_on: list[Any] = []
        hook = problem.blocks_of(model)[-1].register_forward_hook(lambda *call: handed_on.append(call[2]))
        objective.loss_sum(model, micro)
        hook.remove()
        return handed_on[-1]

    inside = {id(p) for block in blocks for p in block.parameters()}
    shared = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    one = _saved(config, problem, micro_size, to_the_head) + shared
    return 1 + memory_mb * 2**20 // one


def _saved(config: Config, problem: Problem, samples: int, forward: Any) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() and config.device.value != "cpu" else "cpu")
    model = meta_model(config, problem)
    if config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp):
        model = model.to(config.precision.name.compute_dtype)
    if config.nn.checkpoint:
        checkpoint_blocks(problem.blocks_of(model))
    indices = [index % len(problem.train) for index in range(samples)]
    micro = problem.train.batch(indices, torch.Generator().manual_seed(0))
    return saved_bytes(model, forward, micro, device)

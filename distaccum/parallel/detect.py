"""Detects what kind of model the user has, and returns the strategy for it.

No other module asks what kind of model it serves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import _torch
from distaccum.core.strategies import Sync
from distaccum.errors import ConfigError, choice
from distaccum.grads.accumulate import GradientDtypes
from distaccum.parallel.base import Strategy
from distaccum.parallel.ddp import DDP
from distaccum.parallel.single import Single
from distaccum.parallel.world import World


def strategy_for(
    model: nn.Module,
    sync: Sync | str = Sync.auto,
    dtypes: GradientDtypes | None = None,
    *,
    apart: bool = False,
    others: Sequence[nn.Parameter] = (),
) -> Strategy:
    """Return the strategy for a plain module, a DDP module or an FSDP2 module.

    The wrappers of `torch.compile` and Lightning Fabric are looked through.

    Args:
        model: the module that objectives will call.
        sync: the sync policy, or its name.
        dtypes: the dtypes in which gradients are summed; None: the defaults of `GradientDtypes`.
        apart: whether a DDP module sends nothing before all micro-batches of a window are computed.
        others: trained parameters outside of the model, which only a single process supports.

    Raises:
        ConfigError: if the strategy does not support the policy, and for models whose gradients
            would be wrong.
    """
    policy = choice(Sync, sync, "sync")
    dtypes = dtypes or GradientDtypes()
    strategy = _strategy(_torch.seen_through(model), policy, dtypes, apart, others)
    strategy.called = model
    return strategy


def in_shards(model: nn.Module) -> nn.Module:
    """Return the model with its FSDP2 modules sharded, so that its parameters are the optimizer's.

    After a forward without backward, FSDP2 may still hold gathered copies in place of the shards.

    Raises:
        ConfigError: for parameters that were frozen or unfrozen on the gathered copies.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        from distaccum.parallel.fsdp import shard_again

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            shard_again(model)
    return model


def _strategy(
    model: nn.Module,
    policy: Sync,
    dtypes: GradientDtypes,
    apart: bool,
    others: Sequence[nn.Parameter],
) -> Strategy:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(model, DistributedDataParallel):
        return DDP(model, World.of(device, model.process_group), policy, dtypes, apart)
    world = World.of(device)
    wrapped_part = False
    # A user with an FSDP2 module has imported FSDP2. All others need not wait for that import.
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        from distaccum.parallel.fsdp import FSDP

        if isinstance(model, FSDPModule):
            return FSDP(model, world, policy, dtypes)
        wrapped_part = any(isinstance(module, FSDPModule) for module in model.modules())
    if "replicate" in _torch.composed(model):
        raise ConfigError(
            "replicate() was applied to this model. It reduces gradients in its own hooks, which "
            "cannot be postponed to the boundary from outside. Use DistributedDataParallel(model), "
            "or fully_shard(model)."
        )
    if wrapped_part or any(
        isinstance(module, DistributedDataParallel) for module in model.modules()
    ):
        raise ConfigError(
            "Only a part of this model is wrapped. Pass the wrapped module itself, or call "
            "fully_shard() on the whole model after its parts."
        )
    if world.size > 1:
        raise ConfigError(
            f"This is a plain module on {world.size} ranks, so each rank would train alone. Wrap "
            "it in DistributedDataParallel(model), or call fully_shard(model), before you make the "
            "accumulator."
        )
    return Single(model, world, policy, dtypes, others)

"""From a model as the user has it to the strategy that serves it: the only place that asks what it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distaccum import _torch
from distaccum.errors import ConfigError, choice
from distaccum.grads.accumulate import GradientDtypes
from distaccum.parallel.base import Strategy, Sync
from distaccum.parallel.ddp import DDP
from distaccum.parallel.single import Single
from distaccum.parallel.world import World


def recognise(
    model: nn.Module,
    sync: Sync | str = Sync.auto,
    dtypes: GradientDtypes | None = None,
    *,
    apart: bool = False,
    others: Sequence[nn.Parameter] = (),
) -> Strategy:
    """Find the strategy for a plain module, a DDP or an FSDP2 module; a compiled one or Fabric's is looked through.

    Args:
        model: what objectives will call.
        sync: when gradients travel.
        dtypes: in which gradients are summed.
        apart: whether a DDP sends nothing before all of a window is computed.
        others: trained parameters outside of the model, which only one process on its own can serve.

    Raises:
        ConfigError: for a policy that the strategy cannot keep, and for models whose gradients would be wrong.
    """
    policy = choice(Sync, sync, "sync")
    dtypes = dtypes or GradientDtypes()
    strategy = _strategy(_torch.seen_through(model), policy, dtypes, apart, others)
    strategy.called = model
    return strategy


def in_shards(model: nn.Module) -> nn.Module:
    """Return the model, whose parameters are those that an optimizer has: FSDP2 modules are sharded again.

    Raises:
        ConfigError: for parameters that were frozen or thawed on gathered copies.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        from distaccum.parallel.fsdp import shard_again

        if any(isinstance(module, FSDPModule) for module in model.modules()):
            shard_again(model)
    return model


def _strategy(
    model: nn.Module, policy: Sync, dtypes: GradientDtypes, apart: bool, others: Sequence[nn.Parameter]
) -> Strategy:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(model, DistributedDataParallel):
        return DDP(model, World.of(device, model.process_group), policy, dtypes, apart)
    world = World.of(device)
    wrapped_part = False
    # Who has an FSDP2 module has imported FSDP2; everybody else need not wait for that import.
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        from distaccum.parallel.fsdp import recognise_sharded

        if isinstance(model, FSDPModule):
            return recognise_sharded(model, world, policy, dtypes)
        wrapped_part = any(isinstance(module, FSDPModule) for module in model.modules())
    if "replicate" in _torch.composed(model):
        raise ConfigError(
            "replicate() was applied to this model. It reduces gradients in hooks of its own, which cannot be "
            "postponed to the boundary from outside. Use DistributedDataParallel(model), or fully_shard(model)."
        )
    if wrapped_part or any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            "Only a part of this model is wrapped. Pass the wrapped module itself, or call fully_shard() on the whole "
            "model after its parts."
        )
    if world.size > 1:
        raise ConfigError(
            f"This is a plain module on {world.size} ranks: each would train on its own. Wrap it in "
            "DistributedDataParallel(model), or call fully_shard(model), before you make the accumulator."
        )
    return Single(model, world, policy, dtypes, others)

"""Names the parallel strategies and the sync policies, and which strategy has which policy."""

from __future__ import annotations

from enum import StrEnum


class StrategyName(StrEnum):
    """Names a parallel strategy; `auto` means single on one rank and ddp on several."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Sync(StrEnum):
    """Names a sync policy: when gradients (and FSDP2 parameters) are sent."""

    every = "every"  # with each micro-batch; for measurements, and for the least memory under FSDP2
    reduce_scatter = "reduce_scatter"  # HSDP: reduce-scatter in each micro-batch, all-reduce once
    boundary = "boundary"  # once per window, with the last micro-batch
    # FSDP2 and HSDP: parameters gathered once and gradients reduced once per window
    gather_once = "gather_once"
    auto = "auto"  # chosen by the strategy


POLICIES: dict[StrategyName, tuple[Sync, ...]] = {
    StrategyName.single: (Sync.boundary,),  # it accepts all others too, because it sends nothing
    StrategyName.ddp: (Sync.boundary, Sync.every),
    StrategyName.fsdp: (Sync.boundary, Sync.gather_once, Sync.every),
    StrategyName.hsdp: (Sync.boundary, Sync.gather_once, Sync.reduce_scatter, Sync.every),
}

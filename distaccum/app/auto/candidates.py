"""The ways in which a configuration could be run on so many ranks, what each needs, and which of them to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distaccum.app.assembly import batch_arithmetic, effective_batches
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.limits import batches_for_auto
from distaccum.app.auto.setups import POLICIES, setup_of, spread
from distaccum.app.config import Config
from distaccum.app.task import Problem
from distaccum.core.batch_size import Ragged, solve
from distaccum.metrics import size as human
from distaccum.parallel.apply import StrategyName
from distaccum.parallel.base import Sync
from distaccum.planner import Peak, Setup, gradient_sends
from distaccum.planner.hardware import Machine
from distaccum.planner.shapes import Policy, Strategy
from distaccum.planner.step_time import StepTime, step_time
from distaccum.step.overlap.schedule import AUTO

ACCURACY = 0.1  # of predicted peaks
FOR_MEASUREMENT = ("ddp", "every")  # it sends more and keeps no less
TAILS = (1, 2, 4, 8)  # overlap_micros that are looked at, where the time that they save can be told


@dataclass(frozen=True)
class Candidate:
    """One way of running a step, and what it needs on the rank that has most to do."""

    setup: Setup
    micro_size: int
    num_micros: int
    overlap_micros: int
    checkpoint: bool
    peak: Peak
    flops: int  # of a step
    sent_bytes: int  # by a network card in a step, under the ring algorithm
    time: StepTime | None  # None: no speeds are known

    @property
    def cost(self) -> tuple[float, ...]:
        """What is to be small beside the memory: seconds, or work, messages and micros where no speeds are known."""
        if self.time is not None:
            return (self.time.total_s,)
        return self.flops, float(f"{self.sent_bytes:.1e}"), self.num_micros  # two digits: padding is no reason

    def __str__(self) -> str:
        setup = self.setup
        tail = f", the last {self.overlap_micros} block by block" if self.overlap_micros > 1 else ""
        again = ", checkpointed" if self.checkpoint else ""
        return f"{setup.strategy} {setup.sync}, micro {self.micro_size} x {self.num_micros}{tail}{again}"


class Candidates:
    """Weighs the ways of running one configuration."""

    def __init__(
        self, config: Config, problem: Problem, world_size: int, machine: Machine | None, footprint: Footprint
    ) -> None:
        """Nothing is weighed yet; `machine` tells times where there is one."""
        self._config = config
        self._problem = problem
        self._world_size = world_size
        self._machine = machine
        self._footprint = footprint
        batches = (batches_for_auto if config.accum.micro == AUTO else effective_batches)(config, problem)
        self._batch = max(batches, default=None)
        self._blocks = len({p.group for p in footprint.model.parameters}) - 1

    def weigh(
        self, setup: Setup, micro_size: int, overlap_micros: int = 1, checkpoint: bool | None = None
    ) -> Candidate:
        """One way."""
        config, footprint = self._config, self._footprint
        checkpoint = config.nn.checkpoint if checkpoint is None else checkpoint
        if self._batch is not None:
            num_micros = solve(setup.world_size, self._batch, micro_size).num_micros
        else:
            num_micros = config.accum.num_micros or 1
        flops = footprint.flops(micro_size, checkpoint)
        sends = gradient_sends(footprint.model, setup, num_micros)
        tail = min(overlap_micros, num_micros)
        time = None
        if self._machine is not None:
            time = step_time(self._machine, footprint.model, setup, num_micros, flops, tail)
        return Candidate(
            setup=setup,
            micro_size=micro_size,
            num_micros=num_micros,
            overlap_micros=tail,
            checkpoint=checkpoint,
            peak=footprint.peak(setup, micro_size, num_micros, tail, checkpoint),
            flops=flops * num_micros,
            sent_bytes=sum(entry.card_bytes for entry in sends),
            time=time,
        )

    def choice(self, usable: int | None) -> tuple[Candidate, str]:
        """What a training would run, and why.

        Args:
            usable: bytes that a rank may take; None: no limit is known, and `auto` stays what it is without one.
        """
        if usable is None:
            return self.configured(), "as configured; auto chooses where a limit of memory is known (limits.memory)"
        return choose(self.open(), usable)

    def configured(self) -> Candidate:
        """As the configuration says, and as a training takes what it leaves open where no memory is short."""
        accum = self._config.accum
        tail = 1 if accum.overlap_micros == AUTO else accum.overlap_micros
        if accum.micro == AUTO:
            return self.weigh(setup_of(self._config, self._world_size), self.sizes()[-1], tail)
        arithmetic = batch_arithmetic(self._config, self._problem, self._world_size)
        return self.weigh(setup_of(self._config, self._world_size), arithmetic.micro_size, tail)

    def open(self) -> list[Candidate]:
        """Those among which `auto` chooses: of strategy, policy and micro size what the configuration leaves open."""
        config, own = self._config, self.configured()
        strategy = own.setup.strategy
        if config.parallel.name is StrategyName.auto:
            ways = self._ways()
        else:
            ways = [(strategy, policy) for policy in POLICIES[strategy] if (strategy, policy) != FOR_MEASUREMENT]
        if config.accum.sync is not Sync.auto:
            ways = [way for way in ways if way[1] == own.setup.sync] or [(strategy, own.setup.sync)]
        sizes = self.sizes() if config.accum.micro == AUTO else [own.micro_size]
        tail = own.overlap_micros
        return [self.weigh(self._spread(*way), size, tail) for way in ways for size in sizes]

    def all(self) -> list[Candidate]:
        """Every strategy, policy, micro size (by powers of two, and the configured one), tail and checkpointing."""
        own = self.configured()
        sizes = sorted({own.micro_size, *self.sizes()})
        found = []
        for way in self._ways():
            setup = self._spread(*way)
            tails = TAILS if self._machine is not None and self._has_tail(setup) else (1,)
            for size in sizes:
                for checkpoint in (False, True) if self._blocks else (False,):
                    found += [self.weigh(setup, size, tail, checkpoint) for tail in tails]
        return list(dict.fromkeys(found))  # tails that are longer than the window are as long

    def sizes(self) -> list[int]:
        """Micro sizes by powers of two, and the largest that leaves no rank without work."""
        if self._batch is None:
            return [batch_arithmetic(self._config, self._problem, self._world_size).micro_size]
        most = -(-min(self._batch, len(self._problem.train)) // self._world_size)
        sizes = [*(2**n for n in range(most.bit_length()) if 2**n < most), most]
        if self._config.accum.ragged is Ragged.refuse:
            sizes = [size for size in sizes if self._batch % (size * self._world_size) == 0] or sizes[:1]
        return sizes

    def _ways(self) -> list[tuple[Strategy, Policy]]:
        ranks = self._world_size
        if ranks == 1:
            return [("single", "boundary")]
        strategies: list[Strategy] = ["ddp", "fsdp"]
        replicas = self._config.parallel.replicas or 2
        if self._config.parallel.name is StrategyName.hsdp or (ranks % replicas == 0 and 1 < replicas < ranks):
            strategies.append("hsdp")
        return [(s, policy) for s in strategies for policy in POLICIES[s] if (s, policy) != FOR_MEASUREMENT]

    def _spread(self, strategy: Strategy, policy: Policy) -> Setup:
        return spread(self._config, self._world_size, strategy, policy)

    def _has_tail(self, setup: Setup) -> bool:
        """Where the last micros can be computed block by block, see Strategy.tail_obstacle."""
        whole = setup.strategy == "ddp" and not setup.own_sums(self._footprint.model)
        return self._blocks > 1 and (whole or (setup.sharded and setup.sync == "keep"))


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other one beats in memory and cost both, the cheapest first.

    What costs more has to take less memory by more than predictions may be off.
    """
    ordered = sorted(candidates, key=lambda one: (one.cost, one.peak.total))
    kept: list[Candidate] = []
    for one in ordered:
        beaten = any(
            (1 - ACCURACY) * other.peak.total <= one.peak.total
            and all(a <= b for a, b in zip(other.cost, one.cost, strict=True))
            for other in kept
        )
        if not beaten:
            kept.append(one)
    return kept


def choose(candidates: Sequence[Candidate], usable: int) -> tuple[Candidate, str]:
    """The cheapest one that fits, and why it is this one.

    Args:
        candidates: the simplest first, which is taken where costs are equal.
        usable: bytes that a rank may take.

    Returns:
        Where none fits, the one that takes least, and that it does not fit.
    """
    cheapest = min(candidates, key=lambda one: one.cost)
    by = "the fastest" if cheapest.time is not None else "the least work, then the least sent"
    fitting = [one for one in candidates if one.peak.total <= usable]
    if not fitting:
        least = min(candidates, key=lambda one: one.peak.total)
        return least, (
            f"nothing is predicted to fit {human(usable)}: this takes least, {human(least.peak.total)} in "
            f"{least.peak.moment}"
        )
    best = min(fitting, key=lambda one: one.cost)
    room = f"{human(best.peak.total)} of {human(usable)}"
    if best is cheapest:
        return best, f"{by} of all, and fits ({room})"
    return best, f"{by} of those that fit ({room}); {cheapest} would take {human(cheapest.peak.total)}"

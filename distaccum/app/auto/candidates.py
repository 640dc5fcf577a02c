"""Lists the plans for running a configuration, predicts what each one needs, and chooses one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distaccum.app.assembly import batch_arithmetic, effective_batch_sizes
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.setups import batches_for_auto, setup_of, spread
from distaccum.app.config import Config
from distaccum.app.task import Task
from distaccum.core.batch_size import Ragged, solve
from distaccum.core.strategies import POLICIES, StrategyName, Sync
from distaccum.metrics import size as human
from distaccum.planner.hardware import HardwareProfile
from distaccum.planner.shapes import Setup
from distaccum.planner.step_time import StepTime, step_time
from distaccum.planner.timeline import Peak
from distaccum.planner.traffic import gradient_sends
from distaccum.step.overlap.schedule import AUTO

ACCURACY = 0.1  # relative error of predicted memory peaks
# The policies to compare. DDP's `every` sends more and saves no memory: it is for measurements.
COMPARED = {**POLICIES, StrategyName.ddp: (Sync.boundary,)}
TAILS = (1, 2, 4, 8)  # values of overlap_micro_batches to compare when times can be predicted


@dataclass(frozen=True)
class Candidate:
    """Describes one plan for a step, and what it needs on the rank that has the most to do."""

    setup: Setup
    micro_batch_size: int
    gradient_accumulation_steps: int
    overlap_micro_batches: int
    checkpoint: bool
    peak: Peak
    flops: int  # per step
    sent_bytes: int  # that a network card sends per step under the ring algorithm
    time: StepTime | None  # None: the speeds of the machine are unknown

    @property
    def cost(self) -> tuple[float, ...]:
        """Return what to minimize besides memory, most important number first.

        This is the seconds of a step. If the speeds of the machine are unknown, it is the FLOPs,
        then the bytes sent, then the gradient accumulation steps.
        """
        if self.time is not None:
            return (self.time.total_s,)
        # Bytes are rounded to two digits, so that padding alone does not decide.
        return (self.flops, float(f"{self.sent_bytes:.1e}"), self.gradient_accumulation_steps)

    def __str__(self) -> str:
        tail = (
            f", overlap_micro_batches {self.overlap_micro_batches}"
            if self.overlap_micro_batches > 1
            else ""
        )
        again = ", checkpointed" if self.checkpoint else ""
        return (
            f"{self.setup}, micro-batch size {self.micro_batch_size}, "
            f"{self.gradient_accumulation_steps} accumulation step(s){tail}{again}"
        )


class Candidates:
    """Makes and compares the plans for one configuration."""

    def __init__(
        self,
        config: Config,
        task: Task,
        world_size: int,
        machine: HardwareProfile | None,
        footprint: Footprint,
    ) -> None:
        """Prepare the plans; none is made yet.

        Args:
            config: the configuration, which may contain `auto`.
            task: the task of the configuration.
            world_size: the number of ranks.
            machine: the measured speeds; None: no times are predicted.
            footprint: predicts the memory and FLOPs of the configuration.
        """
        self._config = config
        self._task = task
        self._world_size = world_size
        self._machine = machine
        self._footprint = footprint
        batches = (
            batches_for_auto if config.accum.micro_batch_size == AUTO else effective_batch_sizes
        )(config, task)
        self._batch = max(batches, default=None)
        self._blocks = len({p.group for p in footprint.model.parameters}) - 1

    def weigh(
        self,
        setup: Setup,
        micro_batch_size: int,
        overlap_micro_batches: int = 1,
        checkpoint: bool | None = None,
    ) -> Candidate:
        """Predict what one plan needs.

        Args:
            setup: how the model is distributed.
            micro_batch_size: samples per micro-batch.
            overlap_micro_batches: how many of the last micro-batches are computed block by block.
            checkpoint: whether blocks are checkpointed; None: as configured.
        """
        config, footprint = self._config, self._footprint
        checkpoint = config.nn.checkpoint if checkpoint is None else checkpoint
        num_micro_batches = config.accum.gradient_accumulation_steps or 1
        if self._batch is not None:
            solved = solve(setup.world_size, self._batch, micro_batch_size)
            num_micro_batches = solved.gradient_accumulation_steps
        tail = min(overlap_micro_batches, num_micro_batches)
        flops = footprint.flops(micro_batch_size, checkpoint)
        time = None
        if self._machine is not None:
            time = step_time(self._machine, footprint.model, setup, num_micro_batches, flops, tail)
        sends = gradient_sends(footprint.model, setup, num_micro_batches)
        return Candidate(
            setup=setup,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=num_micro_batches,
            overlap_micro_batches=tail,
            checkpoint=checkpoint,
            peak=footprint.peak(setup, micro_batch_size, num_micro_batches, tail, checkpoint),
            flops=flops * num_micro_batches,
            sent_bytes=sum(entry.bytes_sent_per_rank for entry in sends),
            time=time,
        )

    def choice(self, usable: int | None) -> tuple[Candidate, str]:
        """Return the plan that a training would run, and why.

        Args:
            usable: bytes that a rank may take; None: no limit is known, and the configured plan is
                returned.
        """
        if usable is None:
            why = (
                "as configured; auto compares plans only if a memory limit is known (limits.memory)"
            )
            return self.configured(), why
        return choose(self.open(), usable)

    def configured(self) -> Candidate:
        """Return the plan that the configuration describes.

        A value that is `auto` becomes the one that a training uses when no memory limit is known.
        The exception is `accum.micro_batch_size=auto`, which becomes the largest possible size.
        """
        accum = self._config.accum
        tail = 1 if accum.overlap_micro_batches == AUTO else accum.overlap_micro_batches
        size = self.sizes()[-1] if accum.micro_batch_size == AUTO else self._configured_size()
        return self.weigh(setup_of(self._config, self._world_size), size, tail)

    def open(self) -> list[Candidate]:
        """Return the plans among which `auto` chooses.

        They differ in strategy, policy and micro-batch size, as far as the configuration leaves
        these to `auto`.
        """
        config, own = self._config, self.configured()
        strategies = [own.setup.strategy]
        if config.parallel.name is StrategyName.auto:
            strategies = self._strategies()
        setups = self._setups(strategies)
        if config.accum.sync is not Sync.auto:
            setups = [setup for setup in setups if setup.sync is own.setup.sync] or [own.setup]
        sizes = self.sizes() if config.accum.micro_batch_size == AUTO else [own.micro_batch_size]
        return [
            self.weigh(setup, size, own.overlap_micro_batches) for setup in setups for size in sizes
        ]

    def all(self) -> list[Candidate]:
        """Return the plans for every strategy, policy, micro-batch size, overlap and checkpointing.

        Micro-batch sizes are those of `sizes` and the configured size.
        """
        sizes = sorted({self.configured().micro_batch_size, *self.sizes()})
        found = []
        for setup in self._setups(self._strategies()):
            tails = TAILS if self._machine is not None and self._has_tail(setup) else (1,)
            for size in sizes:
                for checkpoint in (False, True) if self._blocks else (False,):
                    found += [self.weigh(setup, size, tail, checkpoint) for tail in tails]
        return list(dict.fromkeys(found))  # capping the overlap makes duplicates

    def sizes(self) -> list[int]:
        """Return the micro-batch sizes to compare.

        These are powers of two, and the largest size that leaves no rank without work. With
        `accum.ragged=refuse` they must divide the effective batch. If the configuration fixes no
        effective batch, it is the configured size only.
        """
        if self._batch is None:
            return [self._configured_size()]
        most = -(-min(self._batch, len(self._task.train)) // self._world_size)
        sizes = [*(2**n for n in range(most.bit_length()) if 2**n < most), most]
        if self._config.accum.ragged is Ragged.refuse:
            sizes = [
                size for size in sizes if self._batch % (size * self._world_size) == 0
            ] or sizes[:1]
        return sizes

    def _configured_size(self) -> int:
        return batch_arithmetic(self._config, self._task, self._world_size).micro_batch_size

    def _strategies(self) -> list[StrategyName]:
        ranks, parallel = self._world_size, self._config.parallel
        if ranks == 1:
            return [StrategyName.single]
        replicas = parallel.replicas or 2
        hsdp = parallel.name is StrategyName.hsdp or (
            ranks % replicas == 0 and 1 < replicas < ranks
        )
        return [StrategyName.ddp, StrategyName.fsdp, *[StrategyName.hsdp] * hsdp]

    def _setups(self, strategies: Iterable[StrategyName]) -> list[Setup]:
        ways = [(strategy, sync) for strategy in strategies for sync in COMPARED[strategy]]
        return [spread(self._config, self._world_size, *way) for way in ways]

    def _has_tail(self, setup: Setup) -> bool:
        """Return whether the last micro-batches can run block by block.

        The conditions are those of `Strategy.tail_obstacle`.
        """
        sends_at_once = setup.strategy is StrategyName.ddp and not setup.own_sums(
            self._footprint.model
        )
        return self._blocks > 1 and (sends_at_once or setup.sync is Sync.gather_once)


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the plans that no other plan beats in both memory and cost, the cheapest first.

    A plan that costs more is kept only if it saves more memory than the error of predictions.
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
    """Choose the cheapest plan that fits, and give the reason.

    Args:
        candidates: the plans, the simplest first; the first one wins if costs are equal.
        usable: bytes that a rank may take.

    Returns:
        The plan and the reason. If no plan fits, it is the plan that takes the least memory, and
        the reason says that it does not fit.
    """
    cheapest = min(candidates, key=lambda one: one.cost)
    by = (
        "the fastest"
        if cheapest.time is not None
        else "the fewest FLOPs, then the fewest bytes sent,"
    )
    fitting = [one for one in candidates if one.peak.total <= usable]
    if not fitting:
        least = min(candidates, key=lambda one: one.peak.total)
        return (
            least,
            (
                f"no plan is predicted to fit {human(usable)}: this one takes the least, "
                f"{human(least.peak.total)} during {least.peak.moment}"
            ),
        )
    best = min(fitting, key=lambda one: one.cost)
    room = f"{human(best.peak.total)} of {human(usable)}"
    if best is cheapest:
        return best, f"{by} of all plans, and it fits ({room})"
    return (
        best,
        f"{by} of all plans that fit ({room}); {cheapest} would take {human(cheapest.peak.total)}",
    )

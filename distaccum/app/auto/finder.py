"""Finds the micro-batch size for `accum.micro_batch_size=auto` by dry runs before the training.

It is the largest size that fits on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distaccum.app.assembly import effective_batch_sizes
from distaccum.app.auto.dry_run import DryRun, dry_run
from distaccum.app.auto.setups import batches_for_auto, require_limit, usable_bytes
from distaccum.app.config import Config
from distaccum.app.task import Task
from distaccum.core.batch_size import Ragged, solve
from distaccum.core.strategies import StrategyName, Sync
from distaccum.data.text import TextConfig
from distaccum.errors import ConfigError
from distaccum.metrics import size as human
from distaccum.optim.optimizer import OptimName
from distaccum.parallel.apply import chosen
from distaccum.parallel.precision import Precision
from distaccum.parallel.world import World


@dataclass(frozen=True)
class Found:
    """Describes the largest micro-batch that fits on every rank; it is the same on all ranks."""

    micro_batch_size: int  # samples
    trials: tuple[int, ...]  # the sizes of the dry runs, in order
    text: str  # a message for the log


def find_max_micro_batch(config: Config, task: Task, world: World) -> Found:
    """Find the largest micro-batch size that fits on every rank, by dry runs.

    Call it on every rank. After each dry run the ranks agree by one small collective whether it
    fitted everywhere; ranks wait for each other only there. The effective batch does not change,
    and no size is tried that would leave a rank without work in a full window.

    Args:
        config: the configuration; its `accum.micro_batch_size` is not read.
        task: the task of the configuration.
        world: the ranks of the run.

    Raises:
        ConfigError: on all ranks, if no size fits, or if the memory limit or the effective batch is
            not configured.
    """
    sizes = _sizes(config, task, world.size)
    usable = require_limit(usable_bytes(config, world.device))
    # By size: for each rank the result of its dry run and the bytes that it may take.
    dry_runs: dict[int, list[tuple[DryRun, int]]] = {}

    def fits(place: int) -> bool:
        """Return whether the size at this position, counted from 1, fits on every rank."""
        size = sizes[place - 1]
        gradient_accumulation_steps = max(
            solve(world.size, batch, size).gradient_accumulation_steps
            for batch in effective_batch_sizes(config, task)
        )
        rows = dry_runs[size] = _on_all_ranks(
            config, task, world, size, gradient_accumulation_steps, usable
        )
        return all(dry_run.fits for dry_run, _ in rows)

    place = largest(fits, len(sizes))
    if place is None:
        raise ConfigError(_too_little(config, world, dry_runs[sizes[0]]))
    micro_batch_size = sizes[place - 1]
    # On the rank that has the least memory left.
    seen, usable = max(dry_runs[micro_batch_size], key=lambda row: row[0].peak_bytes / row[1])
    beyond = (
        f"{sizes[place]} did not"
        if place < len(sizes)
        else "a larger size would leave a rank without work"
    )
    plural = "s" if micro_batch_size > 1 else ""
    text = (
        f"accum.micro_batch_size=auto: {micro_batch_size} sample{plural} fit (peak "
        f"{human(seen.peak_bytes)} of {human(usable)}; {beyond}), found by {len(dry_runs)} dry "
        f"run{'s' if len(dry_runs) > 1 else ''}"
    )
    return Found(micro_batch_size, tuple(dry_runs), text)


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """Find the largest number from 1 to `most` that fits, assuming that all smaller ones fit too.

    The number is doubled until it does not fit, then bisected. This takes about 2 log2(n) trials if
    n is the result, and no number is tried twice.

    Args:
        fits: returns whether a number fits.
        most: the largest number to try.

    Returns:
        The number, or None if 1 does not fit.
    """
    good, bad = 0, most + 1
    while good + 1 < bad:
        number = (good + bad) // 2 if bad <= most else min(max(1, 2 * good), most)
        if fits(number):
            good = number
        else:
            bad = number
    return good or None


def _on_all_ranks(
    config: Config,
    task: Task,
    world: World,
    size: int,
    gradient_accumulation_steps: int,
    usable: int,
) -> list[tuple[DryRun, int]]:
    """Do a dry run on every rank, and return each rank's result and the bytes that it may take.

    Results are in rank order. An error on one rank raises an error on all of them.
    """
    own, error = DryRun(False, 0), None
    try:
        own = dry_run(config, task, world, size, gradient_accumulation_steps, usable)
    except Exception as caught:  # sent to the other ranks, which would wait for this one
        error = caught
    rows, _ = world.gather_rows([error is not None, own.fits, own.peak_bytes, usable]).read()
    if any(row[0] for row in rows):
        messages = world.gather_objects(
            None if error is None else f"{type(error).__name__}: {error}"
        )
        if error is not None:
            raise error
        failed = "; ".join(
            f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None
        )
        raise RuntimeError(
            f"accum.micro_batch_size=auto: the dry run with micro-batches of {size} sample(s) "
            f"failed on {failed}"
        )
    return [(DryRun(bool(row[1]), int(row[2])), int(row[3])) for row in rows]


def _sizes(config: Config, task: Task, ranks: int) -> list[int]:
    """Return, ascending, all micro-batch sizes that leave no rank without work."""
    accum, batches = config.accum, batches_for_auto(config, task)
    for batch in batches:
        solve(ranks, batch, 1, ragged=accum.ragged)  # raises if no size can make this batch
    windows = [min(batch, len(task.train)) for batch in batches]
    most = -(-min(windows) // ranks)
    if accum.ragged is Ragged.refuse:
        return [
            size
            for size in range(1, most + 1)
            if all(batch % (size * ranks) == 0 for batch in batches)
        ]
    # A window's micro-batches are as even as possible: 24 samples in micro-batches of at most 13
    # samples are two of 12.
    sizes = {-(-samples // number) for samples in windows for number in range(1, samples + 1)}
    return sorted(size for size in sizes if size <= most)


def _too_little(config: Config, world: World, rows: list[tuple[DryRun, int]]) -> str:
    """Write the error for the case that a micro-batch of one sample does not fit on some rank."""
    out_of_memory = {rank: row for rank, row in enumerate(rows) if not row[0].fits}
    seen, usable = min(out_of_memory.values(), key=lambda row: row[1])
    margin = f"minus limits.margin={config.limits.margin:g}"
    whose = (
        f"limits.memory={config.limits.memory} {margin}"
        if config.limits.memory
        else f"the device's memory {margin}"
    )
    ranks = f"rank{'s' if len(out_of_memory) > 1 else ''} {', '.join(map(str, out_of_memory))}"
    return (
        "accum.micro_batch_size=auto: not even 1 sample fits. A window with micro-batches of 1 "
        f"sample needs more than {human(usable)} ({whose}) on {ranks}: {human(seen.peak_bytes)} "
        "were in use when more was requested. To save memory, use "
        f"{' or '.join(_savings(config, world.size))}, or give the run more memory."
    )


def _savings(config: Config, ranks: int) -> list[str]:
    """Return the settings that would take less memory and are not used yet."""
    strategy, accum = chosen(config.parallel.name, ranks), config.accum
    candidates = {
        "nn.checkpoint=true": not config.nn.checkpoint,
        "parallel=fsdp": ranks > 1 and strategy is StrategyName.ddp,
        "accum.sync=boundary": accum.sync is Sync.gather_once,
        "accum.overlap_micro_batches=1": (
            isinstance(accum.overlap_micro_batches, int) and accum.overlap_micro_batches > 1
        ),
        "precision=bf16": config.precision.name is Precision.fp32,
        "precision=fp32": config.precision.name is Precision.fp64,
        "optim=sgd": config.optim.name is OptimName.adamw,
        "a shorter data.seq_len": isinstance(config.data, TextConfig),
    }
    return [text for text, saves in candidates.items() if saves] or ["a smaller model"]

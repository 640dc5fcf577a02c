"""`accum.micro=auto`: the largest micro-batch that fits on every rank, by trying, before the training begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distaccum.app.assembly import effective_batches
from distaccum.app.auto.dry_run import Rehearsal, rehearse
from distaccum.app.auto.limits import batches_for_auto, require_limit, usable_bytes
from distaccum.app.config import Config
from distaccum.app.task import Problem
from distaccum.core.batch_size import Ragged, solve
from distaccum.data.text import TextConfig
from distaccum.errors import ConfigError
from distaccum.metrics import size as human
from distaccum.optim.optimizer import OptimName
from distaccum.parallel.apply import StrategyName, chosen
from distaccum.parallel.base import Sync
from distaccum.parallel.precision import Precision
from distaccum.parallel.world import World


@dataclass(frozen=True)
class Found:
    """The largest micro that fits, the same on all ranks."""

    micro_size: int  # samples
    peak_bytes: int  # of a window of such micros, on the rank that has least room left
    usable_bytes: int  # what that rank may take: its limit less the margin
    trials: tuple[int, ...]  # the sizes that were rehearsed, in order
    text: str  # the same for people


def find_micro(config: Config, problem: Problem, world: World) -> Found:
    """Rehearse windows of more and fewer samples a micro on all ranks, which agree after each. Call it on every rank.

    A size fits where it fits on every rank; the only thing that ranks wait for is this one small collective after each
    rehearsal. The effective batch is not touched, and no size is tried that would leave a rank without work in a full
    window.

    Raises:
        ConfigError: on all ranks, where no size fits, and for settings that leave limit or effective batch open.
    """
    sizes = _sizes(config, problem, world.size)
    usable = require_limit(usable_bytes(config, world.device))
    rehearsed: dict[int, list[tuple[Rehearsal, int]]] = {}  # by size; of each rank, and what it may take

    def fits(place: int) -> bool:
        """Whether the size in this place, from 1, fits on every rank."""
        size = sizes[place - 1]
        num_micros = max(solve(world.size, batch, size).num_micros for batch in effective_batches(config, problem))
        rows = rehearsed[size] = _on_all_ranks(config, problem, world, size, num_micros, usable)
        return all(rehearsal.fits for rehearsal, _ in rows)

    place = largest(fits, len(sizes))
    if place is None:
        raise ConfigError(_too_little(config, world, rehearsed[sizes[0]]))
    micro_size = sizes[place - 1]
    peak, usable = max(
        ((seen.peak_bytes, most) for seen, most in rehearsed[micro_size]), key=lambda row: row[0] / row[1]
    )
    beyond = f"{sizes[place]} did not" if place < len(sizes) else "no more are needed to keep all ranks busy"
    text = (
        f"accum.micro=auto: {micro_size} sample{'s' if micro_size > 1 else ''} fit (peak {human(peak)} of "
        f"{human(usable)}; {beyond}), {len(rehearsed)} rehearsal{'s' if len(rehearsed) > 1 else ''}"
    )
    return Found(micro_size, peak, usable, tuple(rehearsed), text)


def largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, where all smaller ones fit too; None where 1 does not.

    It is doubled until it does not fit, then bisected: about 2 log2 of what is found trials, none of them twice.
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
    config: Config, problem: Problem, world: World, size: int, num_micros: int, usable: int
) -> list[tuple[Rehearsal, int]]:  # fmt: skip
    """What each rank has seen, in rank order. An error of one rank is raised on all of them."""
    own, error = Rehearsal(False, 0), None
    try:
        own = rehearse(config, problem, world, size, num_micros, usable)
    except Exception as caught:  # told to the others, who would wait for this rank
        error = caught
    rows, _ = world.share([error is not None, own.fits, own.peak_bytes, usable]).read()
    if any(row[0] for row in rows):
        told = world.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None)
        raise RuntimeError(f"accum.micro=auto: a window of micros of {size} could not be rehearsed on {failed}")
    return [(Rehearsal(bool(row[1]), int(row[2])), int(row[3])) for row in rows]


def _sizes(config: Config, problem: Problem, ranks: int) -> list[int]:
    """The sizes that the largest micro of a window can have, in rising order, where all ranks have work."""
    accum, batches = config.accum, batches_for_auto(config, problem)
    for batch in batches:
        solve(ranks, batch, 1, ragged=accum.ragged)  # refuses what no size can serve
    windows = [min(batch, len(problem.train)) for batch in batches]
    most = -(-min(windows) // ranks)
    if accum.ragged is Ragged.refuse:
        return [size for size in range(1, most + 1) if all(batch % (size * ranks) == 0 for batch in batches)]
    # A window's micros are as even as they can be: 24 samples in micros of at most 13 are two of 12.
    sizes = {-(-samples // number) for samples in windows for number in range(1, samples + 1)}
    return sorted(size for size in sizes if size <= most)


def _too_little(config: Config, world: World, rows: list[tuple[Rehearsal, int]]) -> str:
    short = {rank: row for rank, row in enumerate(rows) if not row[0].fits}
    seen, usable = min(short.values(), key=lambda row: row[1])
    margin = f"less limits.margin={config.limits.margin:g}"
    whose = f"limits.memory={config.limits.memory} {margin}" if config.limits.memory else f"the device's {margin}"
    return (
        f"accum.micro=auto: not even 1 sample fits. With it a window takes more than {human(usable)} ({whose}) on "
        f"rank{'s' if len(short) > 1 else ''} {', '.join(map(str, short))}: {human(seen.peak_bytes)} were in use when "
        f"more was asked for. Use {', '.join(_savings(config, world.size))}, or more memory."
    )


def _savings(config: Config, ranks: int) -> list[str]:
    """What takes less memory and is not used yet."""
    strategy, accum = chosen(config.parallel.name, ranks), config.accum
    candidates = {
        "nn.checkpoint=true": not config.nn.checkpoint,
        "parallel=fsdp": ranks > 1 and strategy is StrategyName.ddp,
        "accum.sync=boundary": accum.sync is Sync.keep,
        "accum.overlap_micros=1": isinstance(accum.overlap_micros, int) and accum.overlap_micros > 1,
        "precision=bf16": config.precision.name is Precision.fp32,
        "precision=fp32": config.precision.name is Precision.fp64,
        "optim=sgd": config.optim.name is OptimName.adamw,
        "a shorter data.seq_len": isinstance(config.data, TextConfig),
    }
    return [text for text, saves in candidates.items() if saves] or ["a smaller model"]

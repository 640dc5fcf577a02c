"""Computes how large micro-batches are and how many of them each rank has, in integers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from distaccum.errors import ConfigError

DEFAULT_MICRO_BATCH_SIZE = 8  # samples, if nothing else determines the micro-batch size


class Ragged(Enum):
    """Names what to do if equal micro-batches on all ranks do not fill the effective batch."""

    allow = "allow"  # use uneven micro-batches; the effective batch size is exact
    refuse = "refuse"  # raise an error that names the nearest sizes that divide evenly


@dataclass(frozen=True)
class BatchArithmetic:
    """Holds a solution of effective batch size = micro-batch size x accumulation steps x ranks.

    With uneven micro-batches the product is larger than the effective batch size.
    """

    effective_batch_size: int  # samples in one window, over all ranks
    micro_batch_size: int  # samples in the largest micro-batch
    gradient_accumulation_steps: int  # micro-batches on the rank that has the most
    world_size: int

    @property
    def even(self) -> bool:
        """Return whether every rank computes the same number of micro-batches of the same size."""
        return (
            self.effective_batch_size
            == self.micro_batch_size * self.gradient_accumulation_steps * self.world_size
        )


def solve(
    world_size: int,
    effective_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    ragged: Ragged = Ragged.allow,
) -> BatchArithmetic:
    """Solve effective batch size = micro-batch size x accumulation steps x ranks.

    Any two of the three sizes determine the third. If fewer than two are given, the micro-batch
    size defaults to `DEFAULT_MICRO_BATCH_SIZE` (to the effective batch size if that is smaller),
    and then, if one is still missing, the gradient accumulation steps default to 1.

    Args:
        world_size: number of data-parallel ranks.
        effective_batch_size: samples in one window, over all ranks.
        micro_batch_size: samples in the largest micro-batch.
        gradient_accumulation_steps: micro-batches per rank in one window.
        ragged: what to do if the sizes do not divide evenly.

    Raises:
        ConfigError: if a size is below 1, if the sizes contradict each other, or if they do not
            divide evenly and `ragged` is `refuse`.
    """
    for name, value in (
        ("effective_batch_size", effective_batch_size),
        ("micro_batch_size", micro_batch_size),
        ("gradient_accumulation_steps", gradient_accumulation_steps),
    ):
        if value is not None:
            require_positive(f"accum.{name}", value)
    if (
        effective_batch_size is not None
        and micro_batch_size is None
        and gradient_accumulation_steps is not None
    ):
        micro_batch_size = _ceil(effective_batch_size, gradient_accumulation_steps * world_size)
    elif micro_batch_size is None:
        micro_batch_size = (
            DEFAULT_MICRO_BATCH_SIZE
            if effective_batch_size is None
            else min(DEFAULT_MICRO_BATCH_SIZE, effective_batch_size)
        )
    if effective_batch_size is None:
        effective_batch_size = micro_batch_size * (gradient_accumulation_steps or 1) * world_size
    solved = _ceil(_ceil(effective_batch_size, micro_batch_size), world_size)
    if gradient_accumulation_steps is not None and solved != gradient_accumulation_steps:
        raise ConfigError(
            f"accum.gradient_accumulation_steps={gradient_accumulation_steps} contradicts "
            f"accum.effective_batch_size={effective_batch_size}: on {world_size} rank(s), "
            f"micro-batches of {micro_batch_size} samples make {solved} micro-batch(es) per rank. "
            "Set one of accum.effective_batch_size, accum.micro_batch_size and "
            "accum.gradient_accumulation_steps to null, or write accum.effective_batch_size="
            f"{micro_batch_size * gradient_accumulation_steps * world_size}."
        )
    solution = BatchArithmetic(effective_batch_size, micro_batch_size, solved, world_size)
    if ragged is Ragged.refuse and not solution.even:
        below, above = nearest_batches(solution)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"accum.effective_batch_size ({effective_batch_size}) needs "
            f"{effective_batch_size / (micro_batch_size * world_size):g} micro-batches of "
            f"{micro_batch_size} samples per rank on {world_size} rank(s), which is not a whole "
            f"number. Use accum.effective_batch_size={nearest}{_dividing_micro_batch(solution)}, "
            "or accum.ragged=allow for uneven micro-batches that make exactly "
            f"{effective_batch_size} samples."
        )
    return solution


def nearest_batches(arithmetic: BatchArithmetic) -> tuple[int, int]:
    """Return the two nearest effective batch sizes that divide evenly.

    The first one is at most the given size, or 0 if there is none. The second one is larger.
    """
    unit = arithmetic.micro_batch_size * arithmetic.world_size
    below = arithmetic.effective_batch_size // unit * unit
    return below, below + unit


def samples_of_tokens(effective_batch_tokens: int, tokens_per_sample: int | None) -> int:
    """Convert an effective batch size from tokens to samples.

    Args:
        effective_batch_tokens: tokens in one window, over all ranks.
        tokens_per_sample: None if samples differ in length.

    Raises:
        ConfigError: if samples differ in length, or the tokens are not a whole number of samples.
    """
    require_positive("accum.effective_batch_tokens", effective_batch_tokens)
    if tokens_per_sample is None:
        raise ConfigError(
            f"accum.effective_batch_tokens={effective_batch_tokens} needs samples of one length, "
            "but the samples here differ in length. Give accum.effective_batch_size in samples, or "
            "pack the sequences (data.layout=packed)."
        )
    samples, rest = divmod(effective_batch_tokens, tokens_per_sample)
    if rest:
        below = f"{samples * tokens_per_sample} or " if samples else ""
        raise ConfigError(
            f"accum.effective_batch_tokens={effective_batch_tokens} is "
            f"{effective_batch_tokens / tokens_per_sample:.3f} samples of {tokens_per_sample} "
            f"tokens. Use {below}{(samples + 1) * tokens_per_sample}, or give "
            "accum.effective_batch_size in samples."
        )
    return samples


def require_positive(name: str, value: int) -> None:
    """Raise ConfigError for a number below 1.

    Args:
        name: the option's name, for the message.
        value: what the user gave.

    Raises:
        ConfigError: if the value is below 1.
    """
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1.")


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _dividing_micro_batch(arithmetic: BatchArithmetic) -> str:
    """Return advice to use the largest smaller micro-batch size that divides evenly, or ''."""
    per_rank, rest = divmod(arithmetic.effective_batch_size, arithmetic.world_size)
    if rest:
        return ""
    micro_batch = next(
        m for m in range(min(arithmetic.micro_batch_size, per_rank), 0, -1) if per_rank % m == 0
    )
    return f", or accum.micro_batch_size={micro_batch}"

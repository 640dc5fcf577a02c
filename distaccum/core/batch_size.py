"""How large a micro-batch, how many of them on how many ranks: the arithmetic of an effective batch. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from distaccum.errors import ConfigError

DEFAULT_MICRO = 8  # samples, where nothing else says how large a micro-batch is


class Ragged(Enum):
    """What to do when micros of one size do not fill the effective batch on all ranks alike."""

    allow = "allow"  # uneven micros, the same effective batch
    refuse = "refuse"  # an error that names the nearest plans which divide


@dataclass(frozen=True)
class BatchArithmetic:
    """effective batch = micro size x micros per rank x ranks, solved for whichever was not given."""

    effective_batch: int  # samples
    micro_size: int  # samples in the largest micro
    num_micros: int  # per rank; with uneven micros, on the rank that has most
    world_size: int

    @property
    def even(self) -> bool:
        """Whether every rank computes the same number of micros of the same size."""
        return self.effective_batch == self.micro_size * self.num_micros * self.world_size


def solve(
    world_size: int,
    effective_batch: int | None = None,
    micro_size: int | None = None,
    num_micros: int | None = None,
    ragged: Ragged = Ragged.allow,
) -> BatchArithmetic:
    """Find the third of {effective batch, micro size, micros per rank} from any two, for the current world size.

    With fewer than two, the micro size is `DEFAULT_MICRO` and then the number of micros is 1.

    Raises:
        ConfigError: when the numbers contradict each other, or do not divide and `ragged` refuses.
    """
    for name, value in (("effective_batch", effective_batch), ("micro", micro_size), ("num_micros", num_micros)):
        if value is not None:
            require_positive(f"accum.{name}", value)
    if effective_batch is not None and micro_size is None and num_micros is not None:
        micro_size = _ceil(effective_batch, num_micros * world_size)
    elif micro_size is None:
        micro_size = DEFAULT_MICRO if effective_batch is None else min(DEFAULT_MICRO, effective_batch)
    if effective_batch is None:
        effective_batch = micro_size * (num_micros or 1) * world_size
    solved = _ceil(_ceil(effective_batch, micro_size), world_size)
    if num_micros is not None and solved != num_micros:
        raise ConfigError(
            f"accum.num_micros={num_micros} contradicts accum.effective_batch={effective_batch}: on {world_size} "
            f"rank(s), micros of {micro_size} samples make {solved} per rank. Leave one of accum.effective_batch, "
            f"accum.micro and accum.num_micros out (null), or write accum.effective_batch="
            f"{micro_size * num_micros * world_size}."
        )
    solution = BatchArithmetic(effective_batch, micro_size, solved, world_size)
    if ragged is Ragged.refuse and not solution.even:
        below, above = nearest_batches(solution)
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"accum.effective_batch ({effective_batch}) needs {effective_batch / (micro_size * world_size):g} "
            f"micro-batches of {micro_size} per rank on {world_size} rank(s). Use accum.effective_batch={nearest}"
            f"{_dividing_micro(solution)}, or accum.ragged=allow: uneven micros, exactly {effective_batch} samples."
        )
    return solution


def nearest_batches(arithmetic: BatchArithmetic) -> tuple[int, int]:
    """The effective batches at or below and above that divide into even micros; 0 where there is none below."""
    unit = arithmetic.micro_size * arithmetic.world_size
    below = arithmetic.effective_batch // unit * unit
    return below, below + unit


def samples_of_tokens(effective_tokens: int, tokens_per_sample: int | None) -> int:
    """The effective batch in samples for one that was given in tokens.

    Raises:
        ConfigError: when samples differ in length, or the tokens are not a whole number of samples.
    """
    require_positive("accum.effective_tokens", effective_tokens)
    if tokens_per_sample is None:
        raise ConfigError(
            f"accum.effective_tokens={effective_tokens} needs samples of one length, and here they differ. "
            "Give accum.effective_batch in samples, or pack the sequences (data.layout=packed)."
        )
    samples, rest = divmod(effective_tokens, tokens_per_sample)
    if rest:
        below = f"{samples * tokens_per_sample} or " if samples else ""
        raise ConfigError(
            f"accum.effective_tokens={effective_tokens} is {effective_tokens / tokens_per_sample:.3f} samples of "
            f"{tokens_per_sample} tokens. Use {below}{(samples + 1) * tokens_per_sample}, or give "
            "accum.effective_batch in samples."
        )
    return samples


def require_positive(name: str, value: int) -> None:
    """Refuse a count below 1.

    Raises:
        ConfigError: with the name that the user knows it by.
    """
    if value < 1:
        raise ConfigError(f"{name} is {value}; it counts things and must be at least 1.")


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _dividing_micro(arithmetic: BatchArithmetic) -> str:
    """The largest smaller micro size that divides, as a piece of advice."""
    per_rank, rest = divmod(arithmetic.effective_batch, arithmetic.world_size)
    if rest:
        return ""
    micro = next(m for m in range(min(arithmetic.micro_size, per_rank), 0, -1) if per_rank % m == 0)
    return f", or accum.micro={micro}"

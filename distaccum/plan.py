"""Which samples make which optimizer step: `Plan -> Window -> Micro`. Pure arithmetic, decided before anything runs.

What a window and its micros hold depends on (seed, epoch, effective batch, micro size) only. The world size decides
nothing but who computes which micro.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from distaccum.errors import ConfigError

DEFAULT_MICRO = 8  # samples, where nothing else says how large a micro-batch is


class LastWindow(Enum):
    """What becomes of the samples that are left over at the end of an epoch."""

    keep = "keep"  # a shorter window of their own
    drop = "drop"  # left out; the shuffle leaves out others in the next epoch
    fill = "fill"  # one window with the first samples of the next epoch


class Ragged(Enum):
    """What to do when micros of one size do not fill the effective batch on all ranks alike."""

    allow = "allow"  # uneven micros, the same effective batch
    refuse = "refuse"  # an error that names the nearest plans which divide


@dataclass(frozen=True)
class Micro:
    """What one rank sends through one forward and backward: consecutive samples of the shuffled stream."""

    step: int  # the window's step, from 0
    number: int  # global within the window, from 0: the same whatever the world size
    start: int  # position in the training's stream of samples (all epochs)
    size: int  # samples, at least 1


@dataclass(frozen=True)
class Window:
    """All micros, over all ranks, that make one optimizer step."""

    step: int  # from 0
    epoch: int  # the epoch of its first sample, from 0
    start: int  # position of its first sample in the stream; with `step`, all that a resumed run has to know
    size: int  # samples
    micro_size: int  # samples in its largest micro
    next_start: int  # where the next window starts

    @property
    def micros(self) -> tuple[Micro, ...]:
        """All micros in the order of their global numbers; their sizes differ by one sample at most."""
        micros, start = [], self.start
        for number, size in enumerate(_spread(self.size, _ceil(self.size, self.micro_size))):
            micros.append(Micro(self.step, number, start, size))
            start += size
        return tuple(micros)

    def deal(self, rank: int, world_size: int) -> tuple[Micro, ...]:
        """The micros that one rank computes. Counts of two ranks differ by one at most; some may have none."""
        return self.micros[rank::world_size]


@dataclass(frozen=True)
class Plan:
    """The sequence of windows over any number of epochs.

    Raises:
        ConfigError: for sizes that are not positive, or an epoch shorter than a window whose rest is dropped.
    """

    num_samples: int  # samples in one epoch
    effective_batch: int  # samples in one full window
    micro_size: int  # samples in one full micro
    seed: int = 0
    last_window: LastWindow = LastWindow.keep
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name in ("num_samples", "effective_batch", "micro_size"):
            _positive(name, getattr(self, name))
        if self.last_window is LastWindow.drop and self.num_samples < self.effective_batch:
            raise ConfigError(
                f"accum.last_window=drop leaves nothing: an epoch has {self.num_samples} samples and a window needs "
                f"{self.effective_batch}. Use accum.last_window=keep or fill, or a smaller accum.effective_batch."
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows that start in one epoch (with `fill`: in the first one)."""
        full, rest = divmod(self.num_samples, self.effective_batch)
        return full if self.last_window is LastWindow.drop or rest == 0 else full + 1

    @property
    def last_window_size(self) -> int:
        """Samples in the last window of an epoch."""
        rest = self.num_samples % self.effective_batch
        return rest if rest and self.last_window is LastWindow.keep else self.effective_batch

    def num_steps(self, epochs: int) -> int:
        """Windows in so many epochs. With `fill`, the samples after the last full window are not begun."""
        if self.last_window is LastWindow.fill:
            return epochs * self.num_samples // self.effective_batch
        return epochs * self.windows_per_epoch

    def window(self, step: int = 0, start: int = 0) -> Window:
        """The window that starts at a position of the stream.

        Args:
            step: its number, from 0.
            start: 0, or `next_start` of the window before it. Any position is legal: what was consumed stays consumed.
        """
        left = self.num_samples - start % self.num_samples  # samples until the end of the epoch
        if self.last_window is LastWindow.drop and left < self.effective_batch:
            start, left = start + left, self.num_samples
        size = self.effective_batch if self.last_window is LastWindow.fill else min(left, self.effective_batch)
        end = start + size
        if self.last_window is LastWindow.drop and left - size < self.effective_batch:
            end = start + left  # the rest is dropped now, so that next_start tells the epoch truly
        return Window(step, start // self.num_samples, start, size, self.micro_size, end)

    def windows(self, step: int = 0, start: int = 0) -> Iterator[Window]:
        """All windows from a position on, without end: the caller knows how many steps the training has."""
        while True:
            window = self.window(step, start)
            yield window
            step, start = step + 1, window.next_start

    def samples(self, micro: Micro) -> list[int]:
        """The numbers, in [0, num_samples), of the samples in a micro."""
        numbers = []
        keys: dict[int, list[int]] = {}
        for position in range(micro.start, micro.start + micro.size):
            epoch, index = divmod(position, self.num_samples)
            if self.shuffle:
                if epoch not in keys:
                    keys[epoch] = _round_keys(self.seed, epoch)
                index = _permute(index, self.num_samples, keys[epoch])
            numbers.append(index)
        return numbers


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
            _positive(f"accum.{name}", value)
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
    _positive("accum.effective_tokens", effective_tokens)
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


def random_key(seed: int, step: int, number: int) -> int:
    """The seed, in [0, 2^63), of all randomness in one micro: dropout and augmentation, on any world size."""
    digest = hashlib.blake2b(f"micro {seed} {step} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it counts things and must be at least 1.")


def _spread(total: int, parts: int) -> list[int]:
    """`total` in `parts` numbers that differ by one at most, the larger ones first."""
    size, larger = divmod(total, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def _dividing_micro(arithmetic: BatchArithmetic) -> str:
    """The largest smaller micro size that divides, as a piece of advice."""
    per_rank, rest = divmod(arithmetic.effective_batch, arithmetic.world_size)
    if rest:
        return ""
    micro = next(m for m in range(min(arithmetic.micro_size, per_rank), 0, -1) if per_rank % m == 0)
    return f", or accum.micro={micro}"


def _round_keys(seed: int, epoch: int) -> list[int]:
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=48).digest()
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 48, 8)]


def _permute(index: int, size: int, keys: list[int]) -> int:
    """Where a keyed permutation of range(size) sends an index: a Feistel network of six rounds with cycle walking.

    It needs no memory and no state, so that any position of any epoch is found at once. (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002; the round function is the finaliser of splitmix64.)
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = (right + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        index = left << half | right
        if index < size:
            return index

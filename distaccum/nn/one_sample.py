"""BatchNorm on one sample: torch refuses it, and what can be done about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distaccum.errors import ConfigError

CURES = (
    "BatchNorm cannot normalise with the statistics of a single sample. Three cures: make no micro-batch of one sample "
    "(drop the short last one, drop_last=True in the loader, or choose sizes that leave no rest of one); write "
    "da.convert_batchnorm(model, 'sync'), where other ranks have samples in the same round, or 'frozen', before the "
    "model is wrapped; or use GroupNorm, which knows one sample at a time."
)


@contextmanager
def explained(index: int) -> Iterator[None]:
    """Enter around the forward of a micro-batch of this rank, counted from 0.

    Raises:
        ConfigError: instead of torch's error about a single value in a channel, with the micro-batch and the cures.
    """
    try:
        yield
    except ValueError as error:
        if one_value_per_channel(error):
            raise ConfigError(f"Micro-batch {index} of this rank's window has one sample. {CURES}") from error
        raise


def one_value_per_channel(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came of, is BatchNorm's about a single value in a channel."""
    while error is not None:
        if "Expected more than 1 value per channel" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

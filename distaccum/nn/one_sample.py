"""BatchNorm on one sample: torch refuses it, and what can be done about it."""

from __future__ import annotations

from distaccum.errors import ConfigError

CURES = (
    "BatchNorm cannot normalise with the statistics of a single sample. Three cures: make no micro-batch of one sample "
    "(drop the short last one, drop_last=True in the loader, or choose sizes that leave no rest of one); write "
    "da.convert_batchnorm(model, 'sync'), where other ranks have samples in the same round, or 'frozen', before the "
    "model is wrapped; or use GroupNorm, which knows one sample at a time."
)


def explained(error: ValueError, index: int) -> ValueError:
    """Return the error to raise for one that a forward raised: with the cures, where it is BatchNorm's.

    Args:
        error: of the forward.
        index: of its micro-batch among those of this rank's window, from 0.
    """
    if one_value_per_channel(error):
        return ConfigError(f"Micro-batch {index} of this rank's window has one sample. {CURES}")
    return error


def one_value_per_channel(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came of, is BatchNorm's about a single value in a channel."""
    while error is not None:
        if "Expected more than 1 value per channel" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

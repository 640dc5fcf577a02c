"""Explains the error that torch's BatchNorm raises for a single sample."""

from __future__ import annotations

from distaccum.errors import ConfigError

CURES = (
    "BatchNorm cannot normalize with the statistics of a single sample. There are three remedies: "
    "avoid micro-batches of one sample (set drop_last=True in the loader to drop the short last "
    "one, or choose sizes that leave no remainder of one); before the model is wrapped, call "
    "da.convert_batchnorm(model, 'sync') if other ranks have samples in the same round, or use "
    "mode 'frozen'; or use GroupNorm, which normalizes each sample separately."
)


def explained(error: ValueError, index: int) -> ValueError:
    """Return the error to raise in place of a forward's, with remedies if BatchNorm raised it.

    Args:
        error: the error that the forward raised.
        index: the number of its micro-batch in this rank's window, from 0.
    """
    cause: BaseException | None = error
    while cause is not None:
        if "Expected more than 1 value per channel" in str(cause):  # torch's words
            return ConfigError(f"Micro-batch {index} of this rank's window has one sample. {CURES}")
        cause = cause.__cause__ or cause.__context__
    return error

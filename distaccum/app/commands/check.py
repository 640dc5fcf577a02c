"""What is wrong with a configuration before any rank works on it."""

from __future__ import annotations

from typing import Any

from distaccum.app.config import AccumConfig, typed
from distaccum.core.batch_schedule import Ramp
from distaccum.core.batch_size import Ragged
from distaccum.errors import ConfigError


def check(composed: dict[str, Any]) -> None:
    """Refuse a configuration that cannot be carried out, whatever the data and the ranks.

    Raises:
        ConfigError: for unknown keys, wrong types, and contradictions that need no data to be seen.
    """
    config = typed(composed)
    accum = config.accum
    if accum.effective_batch is not None and accum.effective_tokens is not None:
        raise ConfigError(
            f"accum.effective_batch={accum.effective_batch} and accum.effective_tokens={accum.effective_tokens} are "
            "both given. They say the same thing in two units: set one to null."
        )
    if accum.schedule is not None:
        _check_schedule(accum)


def _check_schedule(accum: AccumConfig) -> None:
    for name in ("effective_batch", "effective_tokens", "num_micros"):
        if getattr(accum, name) is not None:
            raise ConfigError(
                f"accum.schedule and accum.{name}={getattr(accum, name)} are both given; the schedule says the "
                f"effective batch, and the micros per rank follow from it. Set accum.{name}=null."
            )
    if accum.ramp is Ramp.linear and accum.ragged is Ragged.refuse:
        raise ConfigError(
            "accum.ragged=refuse contradicts accum.ramp=linear: a ramp goes in multiples of the micro size, which "
            "need not divide among the ranks. Use accum.ragged=allow, or accum.ramp=jump."
        )

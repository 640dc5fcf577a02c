"""Checks a configuration before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaccum.app.config import AccumConfig, missing, typed
from distaccum.app.names import RENAMED_VALUES, key_here, no_key
from distaccum.core.batch_schedule import Ramp
from distaccum.core.batch_size import Ragged
from distaccum.errors import ConfigError


def check(composed: dict[str, Any]) -> None:
    """Refuse a configuration that is wrong for any data and any number of ranks.

    Raises:
        ConfigError: for unknown keys, wrong types, and contradictions that can be seen without the
            data.
    """
    config = typed(composed)
    accum = config.accum
    if accum.effective_batch_size is not None and accum.effective_batch_tokens is not None:
        raise ConfigError(
            f"accum.effective_batch_size={accum.effective_batch_size} and accum.effective_batch_tokens="
            f"{accum.effective_batch_tokens} are both given. They set the same size in two units: set one to null."
        )
    if accum.schedule is not None:
        _check_schedule(accum)


def check_words(words: Sequence[str]) -> None:
    """Refuse overrides of keys that do not exist, under names from elsewhere or misspelled.

    Hydra would only say that there is no such key, not which one is meant.

    Args:
        words: the words of the command line, such as `gradient_accumulation_steps=4`,
            `+accum.micro=4` or `--learning-rate=1`.

    Raises:
        ConfigError: for the first such word, with what to write instead.
    """
    own_files = any(word.startswith(("--config", "-c")) for word in words)
    for word in words:
        if (now := RENAMED_VALUES.get(word.lstrip("+"))) is not None:
            raise ConfigError(f"{word} is now written {now}.")
        typed, has_value, value = word.partition("=")
        key = typed.lstrip("+~-").replace("-", "_")
        known = None if key.startswith("hydra") or {"@", "/"} & {*key} else missing(key)
        if known is None:
            continue
        # A flag of Hydra's, or a group of the user's own configuration files.
        own_group = "." not in key and (own_files or typed.startswith("+"))
        may_exist = not has_value or typed.startswith("--") or own_group
        if not may_exist or key_here(key) is not None:
            raise ConfigError(no_key(key, known, value if has_value else None))


def _check_schedule(accum: AccumConfig) -> None:
    for name in ("effective_batch_size", "effective_batch_tokens", "gradient_accumulation_steps"):
        if getattr(accum, name) is not None:
            raise ConfigError(
                f"accum.schedule and accum.{name}={getattr(accum, name)} are both given. The schedule sets the "
                f"effective batch size, and the micro-batches per rank follow from it. Set accum.{name}=null."
            )
    if accum.ramp is Ramp.linear and accum.ragged is Ragged.refuse:
        raise ConfigError(
            "accum.ragged=refuse contradicts accum.ramp=linear: the sizes of a ramp are multiples of the micro-batch "
            "size, which do not always divide evenly among the ranks. Use accum.ragged=allow, or accum.ramp=jump."
        )

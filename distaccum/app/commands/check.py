"""Checks a configuration before any rank starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distaccum.app.config import missing, typed
from distaccum.app.names import RENAMED_VALUES, key_here, no_key
from distaccum.errors import ConfigError


def check(composed: dict[str, Any]) -> None:
    """Refuse a configuration that is wrong for any data and any number of ranks.

    Raises:
        ConfigError: for unknown keys, wrong types, and contradictions that can be seen without the
            data.
    """
    typed(composed)


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
        written, has_value, value = word.partition("=")
        key = written.lstrip("+~-").replace("-", "_")
        known = None if key.startswith("hydra") or {"@", "/"} & {*key} else missing(key)
        if known is None:
            continue
        # A flag of Hydra's, or a group of the user's own configuration files.
        own_group = "." not in key and (own_files or written.startswith("+"))
        may_exist = not has_value or written.startswith("--") or own_group
        if not may_exist or key_here(key) is not None:
            raise ConfigError(no_key(key, known, value if has_value else None))

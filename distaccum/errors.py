"""Defines the errors and the warning that distaccum raises on purpose.

Each message says what was wrong, what was got, why, and what to write instead.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar


class DistaccumError(Exception):
    """Serves as the base class of all errors of distaccum, to catch them together."""


class ConfigError(DistaccumError, ValueError):
    """Reports a request that cannot be carried out.

    On the command line it is printed without a traceback, and the exit code is 2.
    """


class CheckpointError(DistaccumError, RuntimeError):
    """Reports that a checkpoint could not be written or read.

    All ranks raise it. Earlier checkpoints are unchanged.
    """


class RecordError(DistaccumError, RuntimeError):
    """Reports that metrics, the result or the mark of a stopped run could not be written."""


class DivergenceError(DistaccumError, ArithmeticError):
    """Reports a loss or a gradient norm that is not finite, if the policy is to stop.

    All ranks raise it at the same boundary.
    """


class OutOfMemoryError(DistaccumError, RuntimeError):
    """Reports that this rank or another one ran out of memory inside a window.

    With `agree_on_oom` all ranks raise it together.
    """


class LedgerError(DistaccumError, RuntimeError):
    """Reports a window whose network traffic differs from its forecast.

    Each rank checks its own traffic, so one rank may raise it alone.
    """


class ProofError(DistaccumError, AssertionError):
    """Reports that `verify` found a difference beyond its tolerance.

    All ranks raise it.
    """


def in_one_line(error: BaseException) -> str:
    """Return an error's class and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


E = TypeVar("E", bound=Enum)


class StateWarning(UserWarning):
    """Warns of something that is accepted but probably not intended.

    Python's warning filters can silence it.
    """


def choice(kind: type[E], value: E | str, name: str) -> E:
    """Return the member of an Enum that a user named.

    Args:
        kind: the Enum.
        value: one of its members, or the value of one.
        name: the option's name, for the message.

    Raises:
        ConfigError: if there is no such member; the message lists those that exist.
    """
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(
            f"{name}={value!r} is unknown. Use one of {[member.value for member in kind]}."
        ) from None


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with a message unless a condition holds.

    The message says what was got, why it is refused, and what to write instead.
    """
    if not holds:
        raise ConfigError(message)

"""The errors that distaccum raises on purpose. A message is a small letter: what, got, why, what to write instead."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar


class DistaccumError(Exception):
    """The root of all errors below, for callers that want to catch them together."""


class ConfigError(DistaccumError, ValueError):
    """What the user asked for cannot be done. On the command line: printed without a traceback, exit code 2."""


class CheckpointError(DistaccumError, RuntimeError):
    """A checkpoint could not be written or read. All ranks raise it; earlier checkpoints are as they were."""


class RecordError(DistaccumError, RuntimeError):
    """Signals that metrics, the result or the stop mark could not be written."""


class DivergenceError(DistaccumError, ArithmeticError):
    """A loss or a gradient norm is not finite and the policy says to stop. All ranks raise it at the same boundary."""


class OutOfMemoryError(DistaccumError, RuntimeError):
    """Memory ran out inside a window, on this rank or another. Where it is agreed on, all ranks raise it together."""


class LedgerError(DistaccumError, RuntimeError):
    """A window sent something else over the network than its forecast says. All ranks count for themselves."""


class ProofError(DistaccumError, AssertionError):
    """`verify` found a difference beyond its tolerance. All ranks raise it."""


def in_one_line(error: BaseException) -> str:
    """Write an error's class and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"


E = TypeVar("E", bound=Enum)


class StateWarning(UserWarning):
    """Warns of something that is accepted but probably not intended. Python's warning filters silence it."""


def choice(kind: type[E], value: E | str, name: str) -> E:
    """The member of an Enum that a user named.

    Raises:
        ConfigError: for what is none, with those that are.
    """
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is unknown. Use one of {[member.value for member in kind]}.") from None

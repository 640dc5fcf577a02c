"""Shows errors and ends the process of a rank.

After a failure a rank must not enter another collective, so it exits without destroying the process
group. Exit codes: 0; 2 for a mistake in what the user wrote (an error message without a traceback);
1 for everything else; 128 + signal.
"""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..errors import ConfigError, DistaccumError
from . import overrides

# Parts of what gloo, NCCL and the store say when the other end of a connection is gone. They have
# no error types of their own.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "pair closure",
    "failed to recv",
    "failed to send",
    "communicator was aborted",
    "recvvalue failed",
    "sendbytes failed",
)

# Parts of what gloo, NCCL and the store say when another rank is late.
_TIMED_OUT = (
    "timed out waiting",
    "timed out connecting",
    "waiting for clients",
    "wait timeout after",
    "collective operation timeout",
)

# What to write instead, which Hydra does not say, by a part of Hydra's message.
_ADVICE = {
    "does not support sweep type": (
        "interval(a,b) needs hydra/sweeper=optuna. Without it: key=1,2,3, key=range(1,4) "
        "or key=choice(a,b)."
    ),
    "Could not find 'hydra/sweeper/optuna'": "It comes with pip install 'distaccum[optuna]'.",
}


def say(text: str) -> None:
    """Print to stderr in one write, so that lines of several ranks do not mix."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def is_users(error: BaseException) -> bool:
    """Return whether the error is a mistake in what the user wrote."""
    return isinstance(error, ConfigError | HydraException | OmegaConfBaseException)


def is_foreseen(error: BaseException) -> bool:
    """Return whether the text of the error explains it completely, without a traceback.

    These are the user's mistakes, errors of this package (a divergence, a wrong forecast) and a
    disk that is full (or the user's quota) or read-only.
    """
    is_full_disk = isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
    )
    return is_users(error) or isinstance(error, DistaccumError) or is_full_disk


def report(error: BaseException, prefix: str = "") -> int:
    """Show the error and return the exit code for it.

    Foreseen errors are shown as one message, all others with their traceback.

    Args:
        error: The error to show.
        prefix: Printed before each line of a traceback.
    """
    if is_foreseen(error):
        say(f"error: {message_of(error)}")
        return exit_code(error)
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    say("\n".join(prefix + line for line in text.split("\n")))
    return 1


def message_of(error: BaseException) -> str:
    """Return the text of a foreseen error.

    Hydra's search path is left out, and so is its advice to append a key (unknown keys are refused
    anyway).
    """
    text, cause = str(error), str(error.__cause__)
    lines = text.split("\nConfig search path:", maxsplit=1)[0].split("\n")
    if isinstance(error.__cause__, OmegaConfBaseException) and cause not in text:
        lines += cause.split("\n")
    lines += [advice for part, advice in _ADVICE.items() if part in text]
    lines += overrides.advice(error)
    noise = ("To append to your config use", "object_type=", "reference_type=")
    return "\n".join(line.rstrip() for line in lines if line and not line.strip().startswith(noise))


def is_lost_peer(error: BaseException) -> bool:
    """Return whether the error says only that another rank is gone."""
    if isinstance(error, dist.DistNetworkError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST)


def is_timeout(error: BaseException) -> bool:
    """Return whether a collective, or the connection of ranks at the start, timed out."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _TIMED_OUT)


def first_line(error: BaseException) -> str:
    """Return one line for an error, as a table or a message about another error shows it."""
    return one_line(message_of(error) if is_foreseen(error) else f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """Return the first line of a text that is not empty, cut to 300 characters."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if is_users(error) else 1


def write_error_file(message: str, shown: str = "see the error message above") -> None:
    """Write torchrun's error file, if torchrun asked for one.

    Args:
        message: The text of the error.
        shown: The text for the summary that torchrun prints.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": shown, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:  # a full disk
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def record(error: BaseException) -> None:
    """Write torchrun's error file for an error that this rank has shown."""
    if is_foreseen(error):
        write_error_file(message_of(error))
    else:
        get_error_handler().record_exception(error)


def leave(code: int) -> NoReturn:
    """Flush the output and end this process now, without the interpreter's own shutdown.

    During that shutdown, communication hooks written in Python can abort a rank over gloo that has
    finished its work, and a rank that failed would wait for threads that wait for other ranks.
    """
    for child in multiprocessing.active_children():
        if child.daemon:  # data loader workers; the interpreter would end them too
            child.kill()  # at once: they have nothing to save
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe has no reader
            stream.flush()
    os._exit(code)

"""How an error is shown, and how a rank leaves. A rank that failed meets nobody: no collective, no process group.

Exit codes: 0; 2 for what the user can put right in what was written (a letter, no traceback); 1 for all else;
128 + signal.
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
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..errors import ConfigError, DistaccumError
from . import overrides

# What gloo, NCCL and the store say when the other end of a connection has gone. Texts, for want of error types.
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

# What gloo, NCCL and the store say when another rank has not come in time.
_TIMED_OUT = (
    "timed out waiting",
    "timed out connecting",
    "waiting for clients",
    "wait timeout after",
    "collective operation timeout",
)

# What Hydra leaves unsaid: by what it says, what to write instead.
_ADVICE = {
    "does not support sweep type": "interval(a,b) needs hydra/sweeper=optuna. Without it: key=1,2,3, key=range(1,4) "
    "or key=choice(a,b).",
    "Could not find 'hydra/sweeper/optuna'": "It comes with pip install 'distaccum[optuna]'.",
}


def say(text: str) -> None:
    """Print to stderr in one write, so that lines of several ranks do not mix."""
    sys.stderr.write(text.rstrip("\n") + "\n")
    sys.stderr.flush()


def is_users(error: BaseException) -> bool:
    """Whether the error is about what the user wrote."""
    return isinstance(error, ConfigError | HydraException | OmegaConfBaseException)


def is_foreseen(error: BaseException) -> bool:
    """Whether the error's text says all there is to say: the user's mistakes, a divergence, a broken forecast."""
    return is_users(error) or isinstance(error, DistaccumError) or is_full_disk(error)


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or what the user may take of it, is full, or is for reading only."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def report(error: BaseException, prefix: str = "") -> int:
    """Show the error, foreseen ones as a letter and all others with their traceback; the exit code for it."""
    if is_foreseen(error):
        say(f"error: {letter(error)}")
        return exit_code(error)
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    say("\n".join(prefix + line for line in text.split("\n")))
    return 1


def letter(error: BaseException) -> str:
    """The text of a foreseen error.

    Left out: Hydra's search path, and its advice to append a key (unknown keys are refused anyway).
    """
    texts = [str(error)]
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    lines = [line.rstrip() for text in texts for line in text.split("\nConfig search path:")[0].split("\n")]
    noise = ("To append to your config use", "object_type=", "reference_type=")
    lines += [advice for said, advice in _ADVICE.items() if said in texts[0]]
    lines += [text for text in [overrides.advice(error)] if text is not None]
    return "\n".join(line for line in lines if line and not line.strip().startswith(noise))


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error says no more than that another rank is gone."""
    if isinstance(error, dist.DistNetworkError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective, or the meeting of ranks before the first one, has waited too long for another rank."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _TIMED_OUT)


def first_line(error: BaseException) -> str:
    """What a table shows of an error."""
    return one_line(letter(error) if is_foreseen(error) else f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """The first line of a text that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def shorten(error: BaseException) -> str:
    """One line of an error."""
    first_line = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first_line[:160]}"


def fail(error: BaseException, rank: int, first: tuple[int, int], text: str | None) -> NoReturn:
    """Leave after `error` on this rank. Call it where the error is being handled.

    Args:
        error: what the task raised.
        rank: this rank.
        first: rank and exit code of whoever failed first. Only that rank shows its error and writes torchelastic's
            error file. The others give the launcher time to see the first one's exit, and say one line if they live.
        text: what says all there is to say, in place of the traceback; None to show the error itself.
    """
    if first[0] != rank:
        time.sleep(2.0)
        if not is_users(error):
            say(f"[rank {rank}] leaves, because rank {first[0]} failed first ({shorten(error)})")
        leave(first[1])
    if isinstance(error, SystemExit | KeyboardInterrupt):
        leave(exit_code(error))
    if text is not None:
        say(f"[rank {rank}] {text}")
        write_error_file(text, text)
        leave(1)
    code = report(error, f"[rank {rank}] ")
    if is_foreseen(error):
        write_error_file(letter(error), "see the error message above")
    else:
        get_error_handler().record_exception(error)
    leave(code)


def exit_code(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if is_users(error) else 1


def write_error_file(message: str, shown: str) -> None:
    """Tell torchrun, if it asked, what happened; `shown` is what stands in the summary that it prints."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": shown, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:  # of a full disk; the error itself is shown
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def read_error_file(path: Path) -> str | None:
    """What a rank that failed wrote to torchelastic's error file; None when there is none."""
    try:
        return error_message(json.loads(path.read_text())["message"])
    except (OSError, ValueError, KeyError):
        return None


def error_message(found: Any) -> str:
    """The text of a message of torchelastic, which is a text or a dict that holds one."""
    return str(found["message"] if isinstance(found, dict) else found)


def leave(code: int) -> NoReturn:
    """End this process now, flushed, without the interpreter's own end.

    There, communication hooks in Python over gloo can abort a rank that has done its work, and a rank that failed
    would wait for threads which wait for other ranks.
    """
    for child in multiprocessing.active_children():
        if child.daemon:  # as the interpreter would: the workers of data loaders
            child.kill()  # at once: nothing in them is to be saved
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe: nobody reads any more
            stream.flush()
    os._exit(code)

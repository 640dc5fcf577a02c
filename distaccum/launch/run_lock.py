"""Allows only one start at a time to use a run folder, by a kernel lock on RUN/lock.

The lock ends with the process, however the process ends.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from ..errors import ConfigError
from .failure import say

FILE_NAME = "lock"
_PATIENCE_S = 2.0  # a killed process releases its memory before its locks
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder while a start works in it.

    Call it on the rank that runs Hydra, before anything is changed. It is a POSIX lock
    (`fcntl.lockf`): processes forked from this one do not keep it when this one is killed, and NFS
    passes it on to other machines. It would be lost if this process opened and closed the file a
    second time.

    Raises:
        ConfigError: Another run uses the folder, or the folder cannot be written to.
    """
    with contextlib.ExitStack() as until_end:
        try:
            file = until_end.enter_context((run_dir / FILE_NAME).open("a+b", buffering=0))
            _lock(file, run_dir)
            file.truncate(0)
            now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {now}\n".encode())
        except OSError as error:
            raise cannot_write(run_dir, error) from None
        yield


def cannot_write(folder: Path | str, error: OSError) -> ConfigError:
    """Return the error for a folder that cannot be written to."""
    return ConfigError(
        f"Cannot write to the run folder {folder} ({error.strerror}). Free some space, fix its "
        "permissions, or choose another: run_dir=FOLDER (for a sweep hydra.sweep.dir=FOLDER). By "
        "default it is created under the current directory."
    )


def _lock(file: FileIO, run_dir: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(
                    f"warning: the file system of {run_dir} has no locks ({error.strerror}). A "
                    "second start in the same run folder would not be noticed, so make sure that "
                    "there is none."
                )
                return
            if error.errno not in _HELD:
                raise
        if time.monotonic() >= end:
            file.seek(0)
            holder = (
                file.read(1000).decode(errors="replace").strip() or "a process that left no name"
            )
            raise ConfigError(
                f"{run_dir} is in use by another run ({holder}). Two runs would overwrite each "
                "other's files, so nothing was changed. Wait for it or stop it, then start again "
                "to resume from its checkpoint; or choose another run_dir."
            )
        time.sleep(0.05)

"""Connects the ranks of one start over torch's key-value store, and names those that are missing.

The store hands out rank 0's word at the start, and records which rank failed first.
"""

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection
from datetime import timedelta

from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import DistaccumError
from .grace import Grace
from .ranks import Place

LIMIT_KEY = "train.timeout_s"
LIMIT_S = 600.0  # before anything is composed, if the command line does not set it
_PAUSE_S = 0.02
_LONGEST_TRY_S = 5.0
_LONGEST_WAIT = timedelta(days=20)  # in milliseconds it still fits into an int
_DONE = "done"


class MissingRankError(DistaccumError, RuntimeError):
    """Reports that a rank did not connect in time. Raised on the ranks that waited for it."""


class Peers:
    """Holds this rank's connection to the other ranks of its start. Every rank makes one.

    An agent of torchelastic keeps one store over restarts, so the store may hold keys of earlier
    starts. The restart count does not identify a start: each node has its own count, which does not
    change when nodes join. Therefore the keys of a start contain a random id, which rank 0 makes
    and gives to the ranks that are present now. Only `kept` is for later starts.

    Args:
        place: The rank of this process.
        grace: How long ranks wait for each other at the end.
        limit_s: Seconds to wait for the store.
        start_id: The id, if no rank has to be asked for it: in a store that is made for one start.

    Raises:
        MissingRankError: The store was not reachable in time.
    """

    def __init__(
        self, place: Place, grace: Grace, limit_s: float = LIMIT_S, start_id: str | None = None
    ) -> None:
        self.rank, self.size, self.grace = place.rank, place.world_size, grace
        self._limit_s = limit_s
        root = f"distaccum/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
        self.kept = PrefixStore(root, _connect(place, limit_s))
        self._start_id = start_id or uuid.uuid4().hex
        self._store = PrefixStore(self._start_id, self.kept)
        self._absent: list[int] | None = None  # None: rank 0 has not gathered the others yet

    def share(self, word: str, limit_s: float) -> None:
        """Give the other ranks a text, from rank 0, when all are present.

        Raises:
            MissingRankError: Not all ranks connected in time.
        """
        self._absent = self._gather(limit_s)
        if self._absent:
            raise _not_come(self._absent, self.size, limit_s)
        self._store.set("word", word)

    def end(self, word: str, code: int) -> None:
        """Give the others a last text before rank 0 exits, unless `share` has given them one.

        After a signal nobody is waited for: the others have got it too.
        """
        wait_s = 0.0 if code > 128 else self.grace.last_word_s
        if self._absent is None:
            self._absent = self._gather(wait_s if code else self._limit_s)
        self._store.compare_set("word", "", word)
        self.missing("left", wait_s, allowed=1 + len(self._absent))  # 1: this rank

    def receive(self) -> str:
        """Wait for the text that rank 0 gives, for as long as it needs. For the other ranks.

        Raises:
            RuntimeError: The store is gone.
        """
        token = uuid.uuid4().hex
        self.kept.set(f"hello/{self.rank}", token)
        self._start_id = _wait_for(self.kept, f"answer/{token}")
        self._store = PrefixStore(self._start_id, self.kept)
        self.note("here")
        return _wait_for(self._store, "word")

    def job_store(self) -> Store | None:
        """Return the store for the job, on a connection of its own; None for one rank.

        A waiting thread of the process group must not block a rank that fails.
        """
        return PrefixStore("job", self._store.clone()) if self.size > 1 else None  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Record that this rank has done its work. The last one ends the wait of all."""
        if self._store.add("done", 1) == self.size:
            self._store.compare_set("over", "", _DONE)

    def claim(self, code: int, patience_s: float = 0.0) -> tuple[int, int]:
        """Claim to be the first failed rank; return (rank, exit code) of the one that really is.

        Args:
            code: The exit code of this rank.
            patience_s: Seconds to wait for the claim of another rank before making this one.
        """
        _poll(lambda: self._store.check(["over"]), patience_s)
        first = self._store.compare_set("over", "", f"{self.rank} {code}").decode()
        rank, first_code = first.split()
        return int(rank), int(first_code)

    def wait_until_over(self) -> tuple[int, int] | None:
        """Block until the job is over; return (rank, exit code) of the first failed rank, or None.

        Meant for a thread: it opens its own connection. None means that all ranks have finished.

        Raises:
            RuntimeError: The store ended with its host.
        """
        found = _wait_for(self._store.clone(), "over")  # type: ignore[attr-defined]
        if found == _DONE:
            return None
        rank, code = found.split()
        return int(rank), int(code)

    def note(self, what: str) -> None:
        """Record that something holds for this rank."""
        self._store.set(f"{what}/{self.rank}", "")
        self._store.add(what, 1)

    def missing(self, what: str, patience_s: float, allowed: int) -> list[int]:
        """Return the ranks that have not noted something, as soon as only `allowed` are missing."""
        noted = self.size - allowed
        _poll(lambda: self._store.add(what, 0) >= noted, patience_s)
        return [rank for rank in range(self.size) if not self._store.check([f"{what}/{rank}"])]

    def _gather(self, limit_s: float) -> list[int]:
        """Give the start's id to all other ranks; return those that have not come in time.

        A greeting that an earlier start left is answered too; the rank of this start replaces it.
        """
        missing = list(range(1, self.size))
        end = time.monotonic() + limit_s
        while missing and time.monotonic() < end:
            for rank in missing:
                if self.kept.check([f"hello/{rank}"]):
                    token = self.kept.get(f"hello/{rank}").decode()
                    self.kept.set(f"answer/{token}", self._start_id)
            time.sleep(_PAUSE_S)
            missing = [rank for rank in missing if not self._store.check([f"here/{rank}"])]
        return missing


def agent_holds_store() -> bool:
    """Return whether the store lives in torchelastic's agent and so outlives this start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def asked_limit_s(argv: list[str]) -> float:
    """Return the time limit of the start in seconds, as the command line gives it.

    For ranks that know only their command line, because rank 0 alone composes the configuration.
    """
    given = re.findall(r"^\+*train\.timeout_s=(\d+\.?\d*)$", "\n".join(argv), re.MULTILINE)
    return float(given[-1]) if given else LIMIT_S


def _poll(done: Callable[[], bool], limit_s: float) -> None:
    """Wait until something is done, at most `limit_s` seconds."""
    # Not `Store.wait` with a timeout: the store prints a warning at each timeout.
    end = time.monotonic() + limit_s
    while not done() and time.monotonic() < end:
        time.sleep(_PAUSE_S)


def _wait_for(store: Store, key: str) -> str:
    """Block until the key exists, however long that takes, and return its value."""
    while True:
        with contextlib.suppress(DistStoreError):  # timeout; a lost host: DistNetworkError
            store.wait([key], _LONGEST_WAIT)
            return store.get(key).decode()


def _connect(place: Place, limit_s: float) -> Store:
    """Connect to the store of the launcher or of rank 0, which hosts it if no launcher does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = place.rank == 0 and not agent_holds_store()
    if place.rank != 0 and not agent_holds_store():
        _find_host(place, host, port, limit_s)
    timeout = timedelta(seconds=max(limit_s, 30.0))
    try:
        return TCPStore(host, port, is_master=hosts, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        if not hosts:
            raise
        reason = str(error).strip().split("\n")[0]
        raise MissingRankError(
            f"Rank 0 cannot listen on MASTER_ADDR={host} MASTER_PORT={port}: {reason.rstrip('.')}. "
            "The port is taken, or the address does not belong to this machine. Set a free port "
            "and an address of rank 0's machine."
        ) from None


def _find_host(place: Place, host: str, port: int, limit_s: float) -> None:
    """Wait until something listens at the address of rank 0."""
    end = time.monotonic() + limit_s
    while (reason := _why_not(host, port, max(0.1, end - time.monotonic()))) is not None:
        if time.monotonic() >= end:
            raise MissingRankError(
                f"Rank {place.rank} of {place.world_size} could not reach rank 0 at "
                f"MASTER_ADDR={host} MASTER_PORT={port} within {limit_s:g} s ({LIMIT_KEY}): "
                f"{reason}. Check rank 0's output first: it may have failed or never started. Then "
                "check that all ranks use the same address and port, that this machine can resolve "
                "the address, and that no firewall blocks the port. If rank 0 is only slow to "
                f"start, raise {LIMIT_KEY}."
            )
        time.sleep(10 * _PAUSE_S)


def _why_not(host: str, port: int, left_s: float) -> str | None:
    """Return why nothing can be reached at the address, or None if it can."""
    # The store would print a stack of C++ frames at each attempt, and not the reason.
    try:
        socket.create_connection((host, port), timeout=min(left_s, _LONGEST_TRY_S)).close()
    except socket.gaierror as error:
        return f"this machine cannot resolve that host name ({error.strerror})"
    except ConnectionRefusedError:
        return "nothing listens there (connection refused)"
    except OSError as error:
        return f"no connection ({error.strerror or error})"
    return None


def _not_come(missing: Collection[int], world_size: int, limit_s: float) -> MissingRankError:
    """Return the error that rank 0 raises when ranks are missing."""
    here = [rank for rank in range(world_size) if rank not in missing]
    here_shown, missing_shown = (", ".join(map(str, ranks)) for ranks in (here, missing))
    address = "MASTER_ADDR={MASTER_ADDR} and MASTER_PORT={MASTER_PORT}".format_map(os.environ)
    return MissingRankError(
        f"After {limit_s:g} s ({LIMIT_KEY}) only {len(here)} of {world_size} ranks have connected "
        f"({here_shown}); missing: {missing_shown}. Check the output of the missing ranks "
        f"first: they may have failed or never started. WORLD_SIZE={world_size} means {world_size} "
        f"processes with RANK 0 to {world_size - 1}, each once. Then check that they use the same "
        f"{address}, that their machines can resolve the address, and that no firewall blocks the "
        f"port. If they need longer to start, raise {LIMIT_KEY}."
    )

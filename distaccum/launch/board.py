"""Coordinates the ranks of one start over torch's key-value store.

The store holds the orders of rank 0, the rank that failed first, and the ranks that are done.
"""

import contextlib
import json
import os
import time
import uuid
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import meeting
from .job import Ended, Order
from .ranks import Place

_LONGEST_PAUSE_S = 0.2  # between two queries of the store
_GRACE_S = 10.0  # how long rank 0 waits for the other ranks when it exits
_CULPRIT_S = 3.0  # how long a rank that failed because of another one lets it report first
_LONGEST_WAIT = timedelta(days=20)  # in milliseconds it still fits into an int


class PeerFailedError(Exception):
    """Reports that another rank failed while this one waited. That rank has shown the error."""

    def __init__(self, rank: int, code: int) -> None:
        super().__init__(f"rank {rank} failed with exit code {code}")
        self.code = code


class Board:
    """Exchanges messages between the ranks of one start over the store. Every rank makes one.

    An agent of torchelastic keeps one store over restarts, so the store may hold keys of earlier
    starts. The restart count does not identify a start: each node has its own count, which does not
    change when nodes join. Therefore the keys of a start contain a random id, which rank 0 makes
    and gives to the ranks that are present now. Only `remember` and `count_start` write for later
    starts.

    Args:
        place: The rank of this process.
        start_id: The id, if the ranks know it and the store exists. None: rank 0 hands it out over
            the store, which it creates if no launcher has.
        limit_s: Seconds to wait for the store.

    Raises:
        MissingRankError: The store was not reachable in time.
    """

    def __init__(self, place: Place, start_id: str | None = None, limit_s: float = 600.0) -> None:
        self._place = place
        self._limit_s = limit_s
        hosts = start_id is None and place.rank == 0 and not agent_holds_store()
        # Two connections: a waiting thread of the process group must not block a failing rank.
        self._control, self._jobs = (meeting.host_store(limit_s) if hosts else self._connect() for _ in range(2))
        self._root = f"distaccum/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
        self._serial = 0
        self._gathered = start_id is not None
        self._num_here = place.world_size
        self._start_id = start_id or uuid.uuid4().hex

    def publish(self, order: Order) -> Store | None:
        """Publish an order from rank 0 and return the store for its job (None for one rank).

        Raises:
            MissingRankError: Not all ranks connected in time for the first order.
        """
        self._gather(meeting.limit_s(order.config), leave_on_failure=True)
        self._control.set(self._key(f"order/{self._serial}"), order.to_json())
        return self.job_store()

    def end(self, code: int) -> None:
        """Publish from rank 0 that no more orders follow and that all ranks exit with `code`."""
        self._gather(self._limit_s if code == 0 else _GRACE_S, leave_on_failure=False)
        self._control.set(self._key(f"order/{self._serial}"), json.dumps({"end": code}))
        if not agent_holds_store():  # the store lives in this process
            end = time.monotonic() + _GRACE_S
            while self._control.add(self._key("bye"), 0) < self._num_here - 1 and time.monotonic() < end:
                time.sleep(0.02)

    def receive(self) -> tuple[Order, Store | None] | int:
        """Return the next order and its job's store, or the exit code after the last order.

        For ranks other than 0. It waits for as long as rank 0 needs.

        Raises:
            RuntimeError: The store is gone.
            PeerFailedError: Another rank failed in the meantime.
        """
        self._greet()
        key = self._key(f"order/{self._serial}")
        self._wait(key)
        text = self._control.get(key).decode()
        found = json.loads(text)
        if "end" in found:
            return int(found["end"])
        return Order.from_json(text), self.job_store()

    def bye(self) -> None:
        """Report to rank 0, which may host the store, that this rank no longer needs it."""
        with contextlib.suppress(RuntimeError):  # the store is already gone
            self._control.add(self._key("bye"), 1)

    def job_store(self) -> Store | None:
        """Return the store for the current job, empty at its start; None for one rank."""
        if self._place.world_size == 1:
            return None
        return PrefixStore(self._key(f"job/{self._serial}"), self._jobs)

    def meet(self) -> None:
        """Wait, without a collective, until all ranks have finished the current order.

        Raises:
            PeerFailedError: A rank failed in the meantime.
        """
        count, all_done = self._key(f"done/{self._serial}"), self._key(f"all-done/{self._serial}")
        if self._control.add(count, 1) == self._place.world_size:
            self._control.set(self._key("over"), "")
            self._control.set(all_done, "")
        self._wait(all_done)
        self._serial += 1

    def job_name(self) -> str:
        """Return a name for the current job, the same on all ranks; its own board uses it as id."""
        return f"{self._start_id}-{self._serial}"

    def fail_job(self, job: str, ended: Ended) -> None:
        """Record that this rank's process for a job has failed. Only the first record counts.

        If the job's processes agreed that another rank failed first, that rank gets some time to
        record its failure first.
        """
        claim = f"{self._root}/{job}/failed"  # the key that `claim` of the job's own board sets
        if self._control.check([claim]) and int(self._control.get(claim).split()[0]) != self._place.rank:
            end = time.monotonic() + _CULPRIT_S
            while self.failed_job(job) is None and time.monotonic() < end:
                time.sleep(0.05)
        self._control.compare_set(self._ended(job), "", json.dumps(asdict(ended)))

    def failed_job(self, job: str) -> Ended | None:
        """Return the first record of `fail_job`, or None if there is none.

        Raises:
            PeerFailedError: A rank is leaving the whole sweep.
        """
        first = self._first()
        if first is not None:
            raise PeerFailedError(*first)
        if not self._control.check([self._ended(job)]):
            return None
        return Ended(**json.loads(self._control.get(self._ended(job))))

    def claim(self, code: int, patience_s: float) -> tuple[int, int]:
        """Claim to be the first failed rank; return (rank, exit code) of the one that really is.

        Args:
            code: The exit code of this rank.
            patience_s: Seconds to wait for the claim of another rank before making this one.
        """
        mine = f"{self._place.rank} {code}"
        try:
            end = time.monotonic() + patience_s
            while self._first() is None and time.monotonic() < end:
                time.sleep(0.05)
            rank, first_code = self._control.compare_set(self._key("failed"), "", mine).decode().split()
            self._control.set(self._key("over"), "")
            return int(rank), int(first_code)
        except RuntimeError:  # the store ended with its host; no rank can be asked
            return self._place.rank, code

    def wait_until_over(self) -> tuple[int, int] | None:
        """Block until the job is over; return (rank, exit code) of the first failed rank, or None.

        Meant for a thread: it opens its own connection. None means that all ranks have finished.

        Raises:
            RuntimeError: The store ended with its host.
        """
        store = self._connect()
        while True:
            with contextlib.suppress(DistStoreError):  # timeout; a lost host: DistNetworkError
                store.wait([self._key("over")], _LONGEST_WAIT)
                return self._first(store)

    def note_in_collective(self) -> None:
        """Record that this rank was in a collective that failed."""
        with contextlib.suppress(RuntimeError):
            self._control.set(self._key(f"came/{self._place.rank}"), "")
            self._control.add(self._key("came"), 1)

    def missing_in_collective(self, patience_s: float) -> list[int]:
        """Return the ranks not in the failed collective, after a wait until only one is missing."""
        end = time.monotonic() + patience_s
        while self._control.add(self._key("came"), 0) < self._place.world_size - 1 and time.monotonic() < end:
            time.sleep(0.05)
        ranks = range(self._place.world_size)
        return [rank for rank in ranks if not self._control.check([self._key(f"came/{rank}")])]

    def note_stack(self) -> None:
        """Record that this rank, which is not the first that failed, has written its stack."""
        with contextlib.suppress(RuntimeError):
            self._control.add(self._key("stacks"), 1)

    def wait_for_stacks(self, patience_s: float) -> None:
        """Wait up to `patience_s` seconds until all other ranks have written their stacks.

        The first rank that failed calls this, because a launcher ends the others when it exits.
        """
        end = time.monotonic() + patience_s
        with contextlib.suppress(RuntimeError):
            while self._control.add(self._key("stacks"), 0) < self._place.world_size - 1 and time.monotonic() < end:
                time.sleep(0.02)

    def remember(self, name: str, text: str) -> None:
        """Keep a text for later starts, if the launcher holds the store. Rank 0 only."""
        self._control.set(f"{self._root}/kept/{name}", text)

    def recall(self, name: str) -> str | None:
        """Return the text that an earlier start has kept, or None. Rank 0 only."""
        key = f"{self._root}/kept/{name}"
        return self._control.get(key).decode() if self._control.check([key]) else None

    def count_start(self) -> int:
        """Count this start and return the number of earlier ones. Rank 0 only, once per start."""
        return int(self._control.add(f"{self._root}/kept/starts", 1)) - 1

    def _first(self, store: Store | None = None) -> tuple[int, int] | None:
        store = store or self._control
        if not store.check([self._key("failed")]):
            return None
        rank, code = store.get(self._key("failed")).decode().split()
        return int(rank), int(code)

    def _wait(self, key: str) -> None:
        """Poll until the key exists."""
        # Not `Store.wait` with a timeout: the store prints a warning at each timeout.
        pause_s = 0.005
        while not self._control.check([key]):
            first = self._first()
            if first is not None:
                raise PeerFailedError(*first)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _greet(self) -> None:
        """Fetch the start's id from rank 0, once. For ranks other than 0."""
        if self._gathered:
            return
        token = uuid.uuid4().hex
        self._control.set(f"{self._root}/hello/{self._place.rank}", token)
        self._wait(f"{self._root}/answer/{token}")
        self._start_id = self._control.get(f"{self._root}/answer/{token}").decode()
        self._control.set(self._key(f"here/{self._place.rank}"), "")
        self._gathered = True

    def _gather(self, limit_s: float, *, leave_on_failure: bool) -> None:
        """Give the start's id to all other ranks, once. For rank 0.

        A greeting that an earlier start left in the store is answered too, until this start's rank
        overwrites it with its own.
        """
        missing = set() if self._gathered else set(range(1, self._place.world_size))
        answered: dict[int, bytes] = {}
        end = time.monotonic() + limit_s
        while missing and time.monotonic() < end:
            for rank in sorted(missing):
                if not self._control.check([f"{self._root}/hello/{rank}"]):
                    continue
                token = self._control.get(f"{self._root}/hello/{rank}")
                if answered.get(rank) != token:
                    answered[rank] = token
                    self._control.set(f"{self._root}/answer/{token.decode()}", self._start_id)
                elif self._control.check([self._key(f"here/{rank}")]):
                    missing.discard(rank)
            time.sleep(0.01)
        self._gathered = True
        self._num_here -= len(missing)
        if missing and leave_on_failure:
            self.claim(1, patience_s=0.0)  # makes the ranks that are present exit
            raise meeting.not_come(missing, self._place.world_size, limit_s)

    def _connect(self) -> Store:
        if agent_holds_store():  # the agent's store existed before any rank
            return meeting.open_store(self._limit_s)
        return meeting.find_store(self._place.rank, self._place.world_size, self._limit_s)

    def _key(self, name: str) -> str:
        return f"{self._root}/{self._start_id}/{name}"

    def _ended(self, job: str) -> str:
        return f"{self._root}/{job}/ended"


def agent_holds_store() -> bool:
    """Return whether the store lives in torchelastic's agent and so outlives this start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)

"""What the ranks of one start tell each other, over torch's key-value store: orders, who failed first, who is done."""

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

_LONGEST_PAUSE_S = 0.2  # between two questions to the store
_GRACE_S = 10.0  # how long rank 0 looks for the others before it leaves with an error
_CULPRIT_S = 3.0  # how long a rank that failed because of another one leaves the word to that one
_LONGEST_WAIT = timedelta(days=20)  # milliseconds that still fit into an int


class PeerFailedError(Exception):
    """Another rank has failed while this one waited; that rank has shown the error."""

    def __init__(self, rank: int, code: int) -> None:
        super().__init__(f"rank {rank} failed with exit code {code}")
        self.code = code


class Board:
    """The store, as the ranks of one start use it. Every rank makes one.

    An agent of torchelastic keeps the same store over restarts, so keys of earlier starts may stand in it, and the
    restart count does not tell starts apart (each node counts for itself, and not when nodes join). Therefore all keys
    carry a word which rank 0 has made up and gives to whoever is there now. Only `remember` writes for later starts.

    Args:
        place: this rank.
        word: the word, where the ranks were told it, and the store is there; None to let rank 0 hand it out over the
            store, which rank 0 makes where nobody has.
        limit_s: how long to look for the store.

    Raises:
        MissingRankError: it was not there in time.
    """

    def __init__(self, place: Place, word: str | None = None, limit_s: float = 600.0) -> None:
        self._place = place
        self._limit_s = limit_s
        hosts = word is None and place.rank == 0 and not agent_holds_store()
        # Two connections: a thread of the process group that waits on its own must not hold up a failing rank.
        self._control, self._jobs = (meeting.host_store(limit_s) if hosts else self._connect() for _ in range(2))
        self._root = f"distaccum/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
        self._serial = 0
        self._gathered = word is not None
        self._num_here = place.world_size
        self._word = word or uuid.uuid4().hex

    def publish(self, order: Order) -> Store | None:
        """Rank 0: hand out an order. The store for its job. MissingRankError when not all ranks come to the first."""
        self._gather(meeting.limit_s(order.config), leave_on_failure=True)
        self._control.set(self._key(f"order/{self._serial}"), order.to_json())
        return self.job_store()

    def end(self, code: int) -> None:
        """Rank 0: there are no more orders, and `code` is the exit code of all."""
        self._gather(self._limit_s if code == 0 else _GRACE_S, leave_on_failure=False)
        self._control.set(self._key(f"order/{self._serial}"), json.dumps({"end": code}))
        if not agent_holds_store():  # the store lives in this process
            end = time.monotonic() + _GRACE_S
            while self._control.add(self._key("bye"), 0) < self._num_here - 1 and time.monotonic() < end:
                time.sleep(0.02)

    def receive(self) -> tuple[Order, Store | None] | int:
        """The other ranks: the next order and the store for its job, or the exit code when there are no more.

        Waits for as long as rank 0 needs. RuntimeError when the store is gone, PeerFailedError as `meet`.
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
        """The other ranks: tell rank 0, which may hold the store, that this one needs it no more."""
        with contextlib.suppress(RuntimeError):  # it has gone already
            self._control.add(self._key("bye"), 1)

    def job_store(self) -> Store | None:
        """The store for the current job, empty at its start; None for one rank."""
        if self._place.world_size == 1:
            return None
        return PrefixStore(self._key(f"job/{self._serial}"), self._jobs)

    def meet(self) -> None:
        """All ranks: wait until all have done the current order. No collective.

        PeerFailedError when one fails in the meantime.
        """
        count, all_done = self._key(f"done/{self._serial}"), self._key(f"all-done/{self._serial}")
        if self._control.add(count, 1) == self._place.world_size:
            self._control.set(self._key("over"), "")
            self._control.set(all_done, "")
        self._wait(all_done)
        self._serial += 1

    def job_name(self) -> str:
        """A name for the current job, the same on all ranks; also the word of its own board, where it has one."""
        return f"{self._word}-{self._serial}"

    def fail_job(self, job: str, ended: Ended) -> None:
        """Note that the process of this rank for a job has failed. The first note counts.

        Where the processes have agreed that another rank failed first, that one gets some time to be noted first.
        """
        claim = f"{self._root}/{job}/failed"  # as `claim` of the job's own board makes it
        if self._control.check([claim]) and int(self._control.get(claim).split()[0]) != self._place.rank:
            end = time.monotonic() + _CULPRIT_S
            while self.failed_job(job) is None and time.monotonic() < end:
                time.sleep(0.05)
        self._control.compare_set(self._ended(job), "", json.dumps(asdict(ended)))

    def failed_job(self, job: str) -> Ended | None:
        """The first note of `fail_job`, if there is one. PeerFailedError when a rank leaves the whole sweep."""
        first = self._first()
        if first is not None:
            raise PeerFailedError(*first)
        if not self._control.check([self._ended(job)]):
            return None
        return Ended(**json.loads(self._control.get(self._ended(job))))

    def claim(self, code: int, patience_s: float) -> tuple[int, int]:
        """Claim to be the first rank that failed; rank and exit code of the one that is.

        Args:
            code: the exit code of this rank.
            patience_s: how long to leave the claim to another rank before making it.
        """
        mine = f"{self._place.rank} {code}"
        try:
            end = time.monotonic() + patience_s
            while self._first() is None and time.monotonic() < end:
                time.sleep(0.05)
            rank, first_code = self._control.compare_set(self._key("failed"), "", mine).decode().split()
            self._control.set(self._key("over"), "")
            return int(rank), int(first_code)
        except RuntimeError:  # the store has gone with its host: nobody is there to be asked
            return self._place.rank, code

    def wait_until_over(self) -> tuple[int, int] | None:
        """Block until the job is over: rank and exit code of the first that failed, None when all have done it.

        For a thread of its own: it has a connection of its own. RuntimeError when the store has gone with its host.
        """
        store = self._connect()
        while True:
            with contextlib.suppress(DistStoreError):  # the time is over; a lost host is a DistNetworkError
                store.wait([self._key("over")], _LONGEST_WAIT)
                return self._first(store)

    def note_in_collective(self) -> None:
        """Note that this rank was in a collective that failed."""
        with contextlib.suppress(RuntimeError):
            self._control.set(self._key(f"came/{self._place.rank}"), "")
            self._control.add(self._key("came"), 1)

    def missing_in_collective(self, patience_s: float) -> list[int]:
        """The ranks that have not noted that they were in it, once all but one have or after `patience_s`."""
        end = time.monotonic() + patience_s
        while self._control.add(self._key("came"), 0) < self._place.world_size - 1 and time.monotonic() < end:
            time.sleep(0.05)
        ranks = range(self._place.world_size)
        return [rank for rank in ranks if not self._control.check([self._key(f"came/{rank}")])]

    def note_stack(self) -> None:
        """Note that this rank, which is not the first that failed, has written its stack."""
        with contextlib.suppress(RuntimeError):
            self._control.add(self._key("stacks"), 1)

    def wait_for_stacks(self, patience_s: float) -> None:
        """The first rank that failed: give the others the time to write their stacks before a launcher ends them."""
        end = time.monotonic() + patience_s
        with contextlib.suppress(RuntimeError):
            while self._control.add(self._key("stacks"), 0) < self._place.world_size - 1 and time.monotonic() < end:
                time.sleep(0.02)

    def remember(self, name: str, text: str) -> None:
        """Rank 0: keep a text for later starts of the same launcher, where the launcher holds the store."""
        self._control.set(f"{self._root}/kept/{name}", text)

    def recall(self, name: str) -> str | None:
        """Rank 0: what an earlier start has remembered."""
        key = f"{self._root}/kept/{name}"
        return self._control.get(key).decode() if self._control.check([key]) else None

    def count_start(self) -> int:
        """Rank 0, once: how many starts of the same launcher came before this one."""
        return int(self._control.add(f"{self._root}/kept/starts", 1)) - 1

    def _first(self, store: Store | None = None) -> tuple[int, int] | None:
        store = store or self._control
        if not store.check([self._key("failed")]):
            return None
        rank, code = store.get(self._key("failed")).decode().split()
        return int(rank), int(code)

    def _wait(self, key: str) -> None:
        """Ask until the key is there."""
        # Not `Store.wait` with a timeout: the store prints a warning each time that one is over.
        pause_s = 0.005
        while not self._control.check([key]):
            first = self._first()
            if first is not None:
                raise PeerFailedError(*first)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _greet(self) -> None:
        """The other ranks: fetch the word, once."""
        if self._gathered:
            return
        token = uuid.uuid4().hex
        self._control.set(f"{self._root}/hello/{self._place.rank}", token)
        self._wait(f"{self._root}/answer/{token}")
        self._word = self._control.get(f"{self._root}/answer/{token}").decode()
        self._control.set(self._key(f"here/{self._place.rank}"), "")
        self._gathered = True

    def _gather(self, limit_s: float, *, leave_on_failure: bool) -> None:
        """Rank 0: give the word to all others, once. A greeting of an earlier start is answered and replaced."""
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
                    self._control.set(f"{self._root}/answer/{token.decode()}", self._word)
                elif self._control.check([self._key(f"here/{rank}")]):
                    missing.discard(rank)
            time.sleep(0.01)
        self._gathered = True
        self._num_here -= len(missing)
        if missing and leave_on_failure:
            self.claim(1, patience_s=0.0)  # those who are here leave
            raise meeting.not_come(missing, self._place.world_size, limit_s)

    def _connect(self) -> Store:
        if agent_holds_store():  # it was there before any rank
            return meeting.open_store(self._limit_s)
        return meeting.find_store(self._place.rank, self._place.world_size, self._limit_s)

    def _key(self, name: str) -> str:
        return f"{self._root}/{self._word}/{name}"

    def _ended(self, job: str) -> str:
        return f"{self._root}/{job}/ended"


def agent_holds_store() -> bool:
    """Whether the store lives in torchelastic's agent, and so outlives this start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)

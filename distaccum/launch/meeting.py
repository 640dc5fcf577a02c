"""Connects the ranks at their start: hosts or finds rank 0's store, and names missing ranks."""

import os
import socket
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from ..errors import DistaccumError

LIMIT_KEY = "train.timeout_s"
_LIMIT_S = 600.0  # before anything is composed, if the command line does not set it
_PAUSE_S = 0.2
_LONGEST_TRY_S = 5.0


class MissingRankError(DistaccumError, RuntimeError):
    """Reports that a rank did not connect in time. Raised on the ranks that waited for it."""


def limit_s(config: Mapping[str, Any]) -> float:
    """Return how many seconds ranks wait for each other at the start.

    Collectives later have the same limit (`train.timeout_s`).
    """
    found: Any = config
    for part in LIMIT_KEY.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else _LIMIT_S


def asked_limit_s(argv: list[str]) -> float:
    """Return the time limit of the start in seconds, as the command line gives it.

    For ranks that know only their command line, because rank 0 alone composes the configuration.
    """
    for word in reversed(argv):
        key, _, value = word.lstrip("+").partition("=")
        if key == LIMIT_KEY:
            try:
                return float(value)
            except ValueError:  # rank 0 refuses it
                break
    return _LIMIT_S


def host_store(limit_s: float) -> Store:
    """Create the store at MASTER_ADDR and MASTER_PORT, without waiting for other ranks.

    For rank 0 of a start in which no launcher holds a store.

    Args:
        limit_s: Seconds to try to reach the store at that address.

    Raises:
        MissingRankError: The port is taken, or the address does not belong to this machine.
    """
    host, port = _address()
    try:
        timeout = timedelta(seconds=limit_s)
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingRankError(
            f"Rank 0 cannot listen on MASTER_ADDR={host} MASTER_PORT={port}: {reason.rstrip('.')}. The port is taken, "
            "or the address does not belong to this machine. Set a free port and an address of rank 0's machine."
        ) from None


def find_store(rank: int, world_size: int, limit_s: float) -> Store:
    """Wait for the store that rank 0 hosts and connect to it.

    Raises:
        MissingRankError: Nothing answered at the address for `limit_s` seconds; the message says
            why.
    """
    host, port = _address()
    end = time.monotonic() + limit_s
    while (reason := _why_not(host, port, max(0.1, end - time.monotonic()))) is not None:
        if time.monotonic() >= end:
            raise MissingRankError(
                f"Rank {rank} of {world_size} could not reach rank 0 at MASTER_ADDR={host} MASTER_PORT={port} within "
                f"{limit_s:g} s ({LIMIT_KEY}): {reason}. Check rank 0's output first: it may have failed or never "
                "started. Then check that all ranks use the same address and port, that this machine can resolve the "
                "address, and that no firewall blocks the port. If rank 0 is only slow to start, raise "
                f"{LIMIT_KEY}."
            )
        time.sleep(_PAUSE_S)
    return open_store(limit_s)


def open_store(limit_s: float) -> Store:
    """Connect to a store that already exists."""
    host, port = _address()
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(limit_s, 30.0)))


def not_come(missing: Collection[int], world_size: int, limit_s: float) -> MissingRankError:
    """Return the error that rank 0 raises when ranks are missing."""
    host, port = _address()
    here = [rank for rank in range(world_size) if rank not in missing]
    return MissingRankError(
        f"After {limit_s:g} s ({LIMIT_KEY}) only {len(here)} of {world_size} ranks have connected ({_numbers(here)}); "
        f"missing: {_numbers(missing)}. Check the output of the missing ranks first: they may have failed or never "
        f"started. WORLD_SIZE={world_size} means {world_size} processes with RANK 0 to {world_size - 1}, each once. "
        f"Then check that they use the same MASTER_ADDR={host} and MASTER_PORT={port}, that their machines can resolve "
        "the address, and that no firewall blocks the port. If they need longer to start, raise "
        f"{LIMIT_KEY}."
    )


def _numbers(ranks: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:20]))
    return shown if len(ranks) <= 20 else f"{shown} and {len(ranks) - 20} more"


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


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

"""Runs one rank of benchmarks/links.py, which executes requests from a pipe and answers them."""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from hosts import LINK, sent_bytes
from links_arms import Arm, build, first_model
from links_names import COMPUTE, REFERENCE, Settings

from distaccum.launch.processes import tie_to_parent

TRANSFER_PORT = 29501
TIMEOUT_S = 600  # of a collective, far more than the slowest window on the slowest link takes


class Rank:
    """Holds the arms of this rank; its methods are called on all ranks at the same time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.start = first_model(settings)
        self.arms: dict[str, Arm] = {}

    def build(self, name: str) -> str | None:
        """Make an arm, and return None, or the reason if a peer is not installed."""
        try:
            self.arms[name] = build(name, self.settings, self.start)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        return None

    def facts(self) -> dict[str, Any]:
        """Return facts about the model for the report."""
        return {
            "parameters": sum(p.numel() for p in self.start.parameters()),
            "torch": torch.__version__,
        }

    def run(self, name: str) -> tuple[float, int]:
        """Train on one window.

        Returns:
            The seconds on this rank, and the bytes that its host sent until all ranks had finished.
        """
        arm = self.arms[name]
        dist.barrier()
        sent = sent_bytes()
        began = time.perf_counter()
        arm.step()
        seconds = time.perf_counter() - began
        dist.barrier()
        arm.windows += 1
        return seconds, sent_bytes() - sent

    def choose_again(self, name: str) -> None:
        """Let `overlap_micro_batches=auto` choose again, because the rate has changed."""
        self.arms[name].choose_again()

    def chosen(self, name: str) -> str:
        """Return what `overlap_micro_batches=auto` chose, and why."""
        return self.arms[name].chosen()

    def transfer(self, next_address: str, num_bytes: int) -> float:
        """Send bytes to the next host and receive as many from the previous one.

        Returns:
            The seconds until both transfers were complete.
        """
        payload, taken = bytes(num_bytes), 0
        with socket.create_server(("", TRANSFER_PORT)) as listener:
            dist.barrier()
            with (
                socket.create_connection((next_address, TRANSFER_PORT)) as out,
                listener.accept()[0] as into,
            ):
                dist.barrier()
                began = time.perf_counter()
                sending = threading.Thread(target=out.sendall, args=(payload,))
                sending.start()
                while taken < num_bytes:
                    taken += len(into.recv(1 << 20))
                sending.join()
                return time.perf_counter() - began

    def compare(self) -> dict[str, dict[str, float | bool]]:
        """Compare the parameters of each arm with those of the hand-written loop.

        Returns:
            For each arm, whether they are bitwise equal; their distance as a share of the distance
            from the initial parameters; and the tolerance of this share.
        """
        hand = self.arms[REFERENCE].parameters()
        start = list(self.start.parameters())
        way = _distance(hand, start)
        # A window adds K R gradients in an order of its own. Each addition rounds by at most 2^-24
        # of the sum of their norms, which is at most sqrt(K R) times the norm of the sum if their
        # directions are random. An update rounds by 2^-24 of the parameters. Both may add up over
        # the windows.
        windows = self.arms[REFERENCE].windows
        added = self.settings.num_micro_batches * dist.get_world_size()
        size = _distance(start, [torch.zeros(())] * len(start))
        tolerance = windows * 2**-24 * (added**1.5 + size / way)
        found = {}
        for name, arm in self.arms.items():
            if name != COMPUTE:
                assert arm.windows == windows, (
                    f"{name} has trained on {arm.windows} windows, the reference on {windows}"
                )
                own = arm.parameters()
                equal = all(torch.equal(a, b) for a, b in zip(own, hand, strict=True))
                found[name] = {
                    "bitwise": equal,
                    "relative": _distance(own, hand) / way,
                    "tolerance": tolerance,
                }
        return found


def _distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return math.sqrt(
        sum((a.detach().double() - b.detach().double()).square().sum().item() for a, b in pairs)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--store", required=True, help="ADDRESS:PORT of the TCPStore on host 0")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--pipe", type=int, required=True, help="a file descriptor")
    parser.add_argument("--settings", required=True, help="JSON")
    asked = parser.parse_args()
    tie_to_parent(asked.parent)
    torch.set_num_threads(1)
    address, port = asked.store.split(":")
    # The peers read these variables to detect that they are ranks, and then use the existing
    # process group.
    os.environ |= {
        "GLOO_SOCKET_IFNAME": LINK, "RANK": str(asked.rank), "WORLD_SIZE": str(asked.ranks),
        "LOCAL_RANK": "0", "NODE_RANK": str(asked.rank), "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }  # fmt: skip
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore(
        address, int(port), asked.ranks, is_master=asked.rank == 0, timeout=timeout
    )
    dist.init_process_group(
        "gloo", store=store, rank=asked.rank, world_size=asked.ranks, timeout=timeout
    )
    rank = Rank(Settings(**json.loads(asked.settings)))
    pipe = Connection(asked.pipe)
    pipe.send("ready")
    try:
        while True:
            what, *arguments = pipe.recv()
            pipe.send(getattr(rank, what)(*arguments))
    except EOFError:
        # the parent is done; the other ranks may be gone, so there is no last collective
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()

"""Simulates hosts on one machine, with links of a given rate.

Hosts are network namespaces that are joined by veth pairs and a bridge.

    with hosts(2) as two:
        two.limit(200)                                  # Mbit/s with Ethernet and TCP headers
        process = two.start(0, ["python", "rank.py"])   # a subprocess.Popen in the first host
        two.limit(None)                                 # no limit, while the process runs

It needs root, `ip` and `tc` (Debian: iproute2). The caller must end the processes that run inside,
by pid, before the block ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ETC = Path("/etc/netns")
LINK = "link0"  # the interface to the bridge, inside each host
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class NoHostsError(RuntimeError):
    """Signals that hosts cannot be made here: no root, no iproute2, or a kernel that refuses."""


@dataclass(frozen=True)
class Host:
    """Describes one host."""

    network: str  # name of its network namespace
    address: str  # IP address on its link


class Hosts:
    """Controls hosts that are connected to one switch by one link each."""

    def __init__(self, members: Sequence[Host], switch: str) -> None:
        """Keep the names of hosts and switch, which `hosts` makes and removes."""
        self.members = list(members)
        self._switch = switch

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: int) -> Host:
        return self.members[number]

    def limit(self, rate_mbit: float | None) -> None:
        """Limit the rate at which each host sends and receives.

        The limit can be changed at any time. The token bucket passes 2 ms of the rate at once, and
        at least 128 KiB, so that the large segments that the kernel sends are not split. Its queue
        holds 400 ms, so that senders are slowed down and nothing is dropped.

        Args:
            rate_mbit: Mbit/s; None: no limit.
        """
        for number, host in enumerate(self.members):
            for network, device in ((host.network, LINK), (self._switch, f"port{number}")):
                if rate_mbit is None:
                    _call(
                        "tc",
                        "-n",
                        network,
                        "qdisc",
                        "replace",
                        "dev",
                        device,
                        "root",
                        "pfifo",
                        "limit",
                        "10000",
                    )
                    continue
                burst = max(128 * 1024, int(rate_mbit * 1e6 / 8 * 0.002))
                shape = (
                    "tbf",
                    "rate",
                    f"{rate_mbit:g}mbit",
                    "burst",
                    str(burst),
                    "latency",
                    "400ms",
                )
                _call("tc", "-n", network, "qdisc", "replace", "dev", device, "root", *shape)

    def start(self, number: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside a host; `options` are those of Popen, the pid is the command's."""
        return subprocess.Popen(
            [_found("ip"), "netns", "exec", self.members[number].network, *command], **options
        )


@contextmanager
def hosts(number: int) -> Iterator[Hosts]:
    """Make hosts for the duration of the block, each with the interfaces `link0` and `lo` up.

    Each host resolves this machine's name to its own address, and the names of all networks to
    theirs. These names are unique to this run, so two runs on one machine do not interfere.

    Args:
        number: number of hosts, at most 250.

    Raises:
        NoHostsError: the hosts cannot be made. Nothing is left behind.
    """
    if os.geteuid() != 0:
        raise NoHostsError(
            "hosts are network namespaces, and only root may make them. Run this program as root."
        )
    _found("ip"), _found("tc")
    run = f"distaccum-{os.getpid()}-{secrets.token_hex(2)}"
    members = [Host(f"{run}-{i}", f"10.213.78.{i + 1}") for i in range(number)]
    switch = f"{run}-switch"
    made = []
    try:
        for network in (switch, *(host.network for host in members)):
            _call("ip", "netns", "add", network)
            made.append(network)
        for host in members:
            # `ip netns exec` replaces the files in /etc by these. No name server listens on
            # 127.0.0.1, so look-ups of other names fail at once and do not wait for a server.
            folder = _ETC / host.network
            folder.mkdir(parents=True)
            (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            names = (f"{other.address} {other.network}\n" for other in members)
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n{host.address} {socket.gethostname()}\n{''.join(names)}"
            )
        _call("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, host in enumerate(members):
            port = f"port{i}"
            pair = ("link", "add", LINK, "type", "veth", "peer", "name", port, "netns", switch)
            _call("ip", "-n", host.network, *pair)
            _call("ip", "-n", switch, "link", "set", port, "master", "bridge")
            _call("ip", "-n", switch, "link", "set", port, "up")
            _call("ip", "-n", host.network, "address", "add", f"{host.address}/24", "dev", LINK)
            for device in ("lo", LINK):
                _call("ip", "-n", host.network, "link", "set", device, "up")
        yield Hosts(members, switch)
    finally:
        for network in made:  # removes the veth pairs and the bridge, too
            subprocess.run(
                [_found("ip"), "netns", "del", network], capture_output=True, check=False
            )
            shutil.rmtree(_ETC / network, ignore_errors=True)


def sent_bytes() -> int:
    """Return the bytes that this process's host has sent over its link so far, with headers."""
    with open(f"/sys/class/net/{LINK}/statistics/tx_bytes") as counter:
        return int(counter.read())


def _found(program: str) -> str:
    where = shutil.which(program, path=_PATH)
    if where is None:
        raise NoHostsError(
            f"hosts need the program `{program}`, which is not installed. On Debian, install "
            "iproute2."
        )
    return where


def _call(program: str, *words: str) -> None:
    done = subprocess.run([_found(program), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoHostsError(
            f"hosts cannot be made here: `{program} {' '.join(words)}`: {done.stderr.strip()}"
        )

"""Two hosts, made of network namespaces: torchrun on both, the link is cut in the middle, and is
there again.

Needs root and iproute2. Where they are missing the test is skipped, and fails if CI is set.
"""

import os
import subprocess

import pytest
from processes import Host

from .programs import stacks, starts, wait_for_ranks, wait_until, wait_until_gone

ADDRESSES = ("10.213.77.1", "10.213.77.2")
NAMES = ("hosta", "hostb")
TIMEOUT_S = 6


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts(tmp_path):
    """Two hosts with a link; each resolves its own name and the other's."""
    networks = [f"distaccum{os.getpid()}{end}" for end in "ab"]
    try:
        try:
            for network in networks:
                ip("netns", "add", network)
            ip(
                "-n",
                networks[0],
                "link",
                "add",
                "link0",
                "type",
                "veth",
                "peer",
                "name",
                "link0",
                "netns",
                networks[1],
            )
            for network, address in zip(networks, ADDRESSES, strict=True):
                ip("-n", network, "address", "add", f"{address}/24", "dev", "link0")
                ip("-n", network, "link", "set", "lo", "up")
                ip("-n", network, "link", "set", "link0", "up")
        except OSError as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"NOT TESTED, a cut network: {error}")
        file = tmp_path / "hosts"
        file.write_text("127.0.0.1 localhost\n" + "".join(map("{} {}\n".format, ADDRESSES, NAMES)))
        yield [
            Host(network, str(file), name) for network, name in zip(networks, NAMES, strict=True)
        ]
    finally:
        for network in networks:
            subprocess.run(["ip", "netns", "del", network], capture_output=True, check=False)


def test_cut_link_ends_both_sides(start, hosts, tmp_path):
    """Later, with the link, a new start goes on in the same folder.

    The agent on the far side asks its rendezvous over the cut link, in torch, and would do so until
    TCP gives up, a quarter of an hour. Its ranks have left by then; it is killed as `srun
    --kill-on-bad-exit` would.
    """
    torchrun = [
        "--nnodes=2",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={NAMES[0]}:29123",
    ]

    def begin():
        arguments = ("fault.kind=loop", f"timeout_s={TIMEOUT_S}", "run_dir=mine")
        return [start(*arguments, torchrun=torchrun, host=host) for host in hosts]

    near, far = begin()
    ranks = wait_for_ranks(tmp_path, 4)
    assert {rank["parent"] for rank in ranks} == {near.pid, far.pid}
    ip("-n", hosts[0].network, "link", "set", "link0", "down")
    wait_until_gone([rank["pid"] for rank in ranks], TIMEOUT_S + 15)
    assert near.wait(10).code == 1
    if far.code is None:
        far.kill()
    lines = near.own_output() + far.own_output()
    (named,) = [line for line in lines if "did not join it" in line]
    assert f"] a collective took longer than train.timeout_s={TIMEOUT_S}: rank" in named
    assert (
        "exits without an answer from the other ranks: the host of the job's store does not answer"
        in far.output
    )
    assert sorted(stacks(tmp_path)) == [0, 1, 2, 3]

    ip("-n", hosts[0].network, "link", "set", "link0", "up")
    agents = begin()
    wait_until(lambda: len(starts(tmp_path)) == 2, what="a second start")
    (tmp_path / "mine" / "stop").touch()
    assert [program.wait(30).code for program in agents] == [0, 0], (
        agents[0].output + agents[1].output
    )
    assert {one["run_dir"] for one in starts(tmp_path)} == {str(tmp_path / "mine")}

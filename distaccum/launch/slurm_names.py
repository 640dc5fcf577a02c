"""Parses SLURM's host lists and task counts, and derives a port from a job's id."""

import re

_LOWEST_PORT, _NUM_PORTS = 10000, 20000  # below 32768: the kernel chooses from there on


def first_host(nodelist: str) -> str:
    """Return the first host of a list such as "gpu-[07-09,a][1-2]-ib,login"."""
    first_members = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodelist)
    return first_members.split(",")[0]


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node from a list such as "2(x2),1"."""
    found = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found


def port(job_id: int, step_id: int) -> int:
    """Return the port on which rank 0 listens.

    Jobs that run on a host at the same time have ids close to each other and so different ports;
    the elements of an array have their own ids. The ports of the steps of one job are far apart.
    """
    return _LOWEST_PORT + (job_id + 1009 * step_id) % _NUM_PORTS

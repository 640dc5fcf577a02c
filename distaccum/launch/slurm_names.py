"""Parses SLURM's host lists and task counts, and derives a port from a job's id."""

import itertools
import re

_LOWEST_PORT, _NUM_PORTS = 10000, 20000  # below 32768: the kernel chooses from there on


def hosts(nodelist: str) -> list[str]:
    """Return the hosts of a list such as "n[01-03,7],gpu-[a,b][1-2]-ib,login", in its order."""
    found = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", group)  # text and bracket contents in turn
        choices = [_members(part) if index % 2 else [part] for index, part in enumerate(parts)]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


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


def _members(inside: str) -> list[str]:
    """Expand the content of one bracket: "01-03,7" becomes 01, 02, 03, 7."""
    found = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        if dash:
            found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            found.append(part)
    return found

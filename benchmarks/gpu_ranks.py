"""Starts the ranks of the GPU check: processes that run parts of it and write what they found."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Place:
    """Describes where one rank runs a part."""

    rank: int
    ranks: int
    device: torch.device
    tiny: bool  # a dry run: the same code with small sizes


@dataclass
class Found:
    """Holds what a part found on one rank."""

    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def require(self, fine: bool, otherwise: str) -> None:
        """Add the failure `otherwise` unless `fine`; the part continues to get all its figures."""
        if not fine:
            self.failures.append(otherwise)


Part = Callable[[Place], Found]  # a function of a module, because ranks may be spawned


@dataclass(frozen=True)
class Job:
    """Describes parts that the same ranks run one after the other."""

    ranks: int
    parts: dict[str, Part]
    limit_s: float
    group: bool = True  # whether the ranks form a process group
    start: str = "spawn"  # or "fork", which saves imports but does not work with CUDA


def run(job: Job, device_type: str, tiny: bool) -> dict[str, Found]:
    """Start the ranks, wait for them, and return what they found.

    Returns:
        For each part, the figures of rank 0 and the failures of all ranks.
    """
    deadline = time.monotonic() + job.limit_s
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        context = mp.get_context(job.start)
        processes = [
            context.Process(target=_rank, args=(job, rank, device_type, tiny, folder))
            for rank in range(job.ranks)
        ]
        for process in processes:
            process.start()
        waiting = set(processes)
        while waiting and time.monotonic() < deadline:
            wait(
                [process.sentinel for process in waiting],
                timeout=max(0.0, deadline - time.monotonic()),
            )
            ended = {process for process in waiting if not process.is_alive()}
            waiting -= ended
            if any(process.exitcode for process in ended):
                # the others may wait for it forever
                deadline = min(deadline, time.monotonic() + 5.0)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        codes = [process.exitcode for process in processes]
        return {name: _gather(Path(folder), name, job, codes) for name in job.parts}


def _gather(folder: Path, name: str, job: Job, codes: list[int | None]) -> Found:
    found = Found()
    for rank in range(job.ranks):
        file = folder / f"{name}.{rank}.json"
        if not file.exists():
            found.failures.append(
                f"rank {rank} gave no answer within {job.limit_s:.0f} s (exit code {codes[rank]})"
            )
            continue
        answer = json.loads(file.read_text())
        found.figures = answer["figures"] if rank == 0 else found.figures
        found.failures += [f"rank {rank}: {failure}" for failure in answer["failures"]]
    return found


def _rank(job: Job, rank: int, device_type: str, tiny: bool, folder: str) -> None:
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name, part in job.parts.items():
        try:
            if job.group and not dist.is_initialized():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=dist.FileStore(str(Path(folder) / "store"), job.ranks), rank=rank,
                    world_size=job.ranks, timeout=timedelta(seconds=120),
                    device_id=device if device.type == "cuda" else None,
                )  # fmt: skip
            found = part(Place(rank, job.ranks, device, tiny))
        except BaseException as error:
            traceback.print_exc()
            found = Found(failures=[in_short(error)])
            _write(folder, name, rank, found)
            sys.stderr.flush()
            os._exit(1)  # the device may have failed, and the other ranks cannot be informed
        _write(folder, name, rank, found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _write(folder: str, name: str, rank: int, found: Found) -> None:
    unfinished = Path(folder) / f"{name}.{rank}.unfinished"
    unfinished.write_text(json.dumps({"figures": found.figures, "failures": found.failures}))
    unfinished.rename(Path(folder) / f"{name}.{rank}.json")


def in_short(error: BaseException) -> str:
    """Return the error and its origin, without folders of this machine: reports are published."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    where = " > ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames
    )
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message} [{where}]"

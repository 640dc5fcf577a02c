"""A task that writes what each rank got, and fails on request. Started as a real program by test_launch.py."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from distaccum.errors import ConfigError
from distaccum.launch import Job, launch


def check(config):
    unknown = set(config) - {"launch", "model", "device", "value", "fault"}
    if unknown:
        raise ConfigError(f"unknown key: {sorted(unknown)}. The keys are launch, model, device, value, fault.")


def task(job: Job) -> None:
    seen = {
        "config": job.config,
        "run_dir": str(job.run_dir),
        "overrides": job.overrides,
        "number": job.number,
        "rank": job.rank,
        "world_size": job.world_size,
        "local": [job.local_rank, job.local_world_size],
        "pid": os.getpid(),
        "parent": os.getppid(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    if job.store is not None:
        dist.init_process_group("gloo", store=job.store, rank=job.rank, world_size=job.world_size)
        total = torch.tensor(float(job.rank + job.config["value"]))
        dist.all_reduce(total)
        seen["total"] = total.item()
    # Renamed into place, so that whoever waits for the file never reads half of it.
    draft = job.run_dir / f"draft{job.rank}"
    draft.write_text(json.dumps(seen))
    draft.rename(job.run_dir / f"rank{job.rank}.json")
    fault = job.config["fault"]
    if fault["kind"] == "config":  # on all ranks at once
        raise ConfigError("the task refuses this configuration")
    if fault["kind"] != "none":
        misbehave(fault["kind"], job.rank == fault["rank"])
    if job.store is not None:
        dist.destroy_process_group()


def misbehave(kind: str, is_culprit: bool) -> None:
    if is_culprit and kind == "raise":
        raise ArithmeticError("the culprit's own error")
    if is_culprit and kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "sleep":
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))  # never completes: the culprit is gone


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:], config_dir=Path(__file__).parent / "conf", check=check, task=task))

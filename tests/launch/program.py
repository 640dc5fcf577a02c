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
from distaccum.launch import Job, launch, write_result
from distaccum.report.sweep import tell_sweep


def check(config):
    unknown = set(config) - {"launch", "model", "device", "value", "fault"}
    if unknown:
        raise ConfigError(f"unknown key: {sorted(unknown)}. The keys are launch, model, device, value, fault.")
    if config["value"] < 0:
        raise ConfigError(f"value ({config['value']}) must be 0 or more.")


def task(job: Job) -> None:
    seen = {
        "config": job.config,
        "run_dir": str(job.run_dir),
        "overrides": job.overrides,
        "number": job.number,
        "sweep": job.sweep,
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
    if job.rank == 0:
        write_result(job.run_dir, {"heldout_loss": (job.config["value"] - 2.0) ** 2, "samples_per_s": 10.0, "steps": 1})
    if job.store is not None:
        dist.destroy_process_group()


def misbehave(kind: str, is_culprit: bool) -> None:
    if is_culprit and kind in ("raise", "desert"):
        raise ArithmeticError("the culprit's own error")
    if is_culprit and kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("sleep", "desert"):  # without a collective, that would notice the culprit's end
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))  # never completes: the culprit is gone


if __name__ == "__main__":
    conf = Path(__file__).parent / "conf"
    sys.exit(launch(sys.argv[1:], config_dir=conf, check=check, task=task, summarise=tell_sweep))

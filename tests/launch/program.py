"""A task that writes what each rank got, and fails on request. Started as a real program by the
tests."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distaccum.errors import ConfigError
from distaccum.launch import Job, launch, write_result
from distaccum.launch.grace import GRACE
from distaccum.metrics.sweep import report_sweep

KEYS = ("launch", "model", "run_dir", "device", "value", "fault", "timeout_s", "train")


def check(config):
    unknown = set(config) - set(KEYS)
    if unknown:
        raise ConfigError(f"unknown key: {sorted(unknown)}. The keys are {', '.join(KEYS)}.")
    if config["value"] < 0:
        raise ConfigError(f"value ({config['value']}) must be 0 or more.")


def task(job: Job) -> None:
    fault = job.config["fault"]
    came = []
    if fault["kind"] == "save":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: came.append(number))
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
        timeout = timedelta(seconds=job.config["timeout_s"])
        dist.init_process_group(
            "gloo", store=job.store, rank=job.rank, world_size=job.world_size, timeout=timeout
        )
        total = torch.tensor(float(job.rank + job.config["value"]))
        dist.all_reduce(total)
        seen["total"] = total.item()
    if job.rank == 0:
        with (job.run_dir / "starts.jsonl").open("a") as file:
            file.write(
                json.dumps({"world_size": job.world_size, "run_dir": str(job.run_dir)}) + "\n"
            )
        num_starts = len((job.run_dir / "starts.jsonl").read_text().splitlines())
    # Renamed into place, so that whoever waits for the file never reads half of it.
    draft = job.run_dir / f"draft{job.rank}"
    draft.write_text(json.dumps(seen))
    draft.rename(job.run_dir / f"rank{job.rank}.json")
    if fault["kind"] == "config":  # on all ranks at once
        raise ConfigError("the task refuses this configuration")
    if job.store is not None:
        number = torch.tensor(num_starts if job.rank == 0 else 0)
        dist.all_reduce(number)
        num_starts = int(number)
    if fault["kind"] in ("save", "loop"):
        work_until(job, came)
    elif fault["kind"] != "none" and num_starts <= fault["times"]:
        misbehave(fault["kind"], job.rank == fault["rank"])
    if job.rank == 0:
        write_result(
            job.run_dir,
            {
                "validation_loss": (job.config["value"] - 2.0) ** 2,
                "samples_per_s": 10.0,
                "steps": 1,
            },
        )
    if job.store is not None:
        dist.destroy_process_group()


def work_until(job, came):
    """Collectives in a loop until a signal came, or somebody has written the file "stop"; then all
    end together."""
    stop = torch.zeros(1)
    while not stop:
        stop += len(came) + ((job.run_dir / "stop").exists() and job.rank == 0)
        if job.store is not None:
            dist.all_reduce(stop)
        time.sleep(0.01)
    (job.run_dir / f"saved{job.rank}").write_text(str([int(number) for number in came]))


def misbehave(kind: str, is_culprit: bool) -> None:
    if is_culprit and kind in ("raise", "desert"):
        time.sleep(0.3)  # the others are at work by then
        raise ArithmeticError("the culprit's own error")
    if is_culprit and kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    # no collective that would notice anything
    if kind in ("sleep", "desert") or (is_culprit and kind == "hang"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "hang" else signal.SIG_DFL)
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))  # never completes: the culprit is gone


if __name__ == "__main__":
    conf = Path(__file__).parent / "conf"
    # Ranks that are gone need not be waited for.
    grace = replace(GRACE, first_s=1.0, own_error_s=2.5)
    sys.exit(
        launch(
            sys.argv[1:],
            config_dir=conf,
            check=check,
            task=task,
            summarise=report_sweep,
            grace=grace,
        )
    )

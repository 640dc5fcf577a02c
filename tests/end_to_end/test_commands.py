"""`verify` and `plan` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

from commands import command_line

from distaccum.planner.hardware import KINDS, HardwareProfile, LinkTimings

SMALL = [
    "model.num_layers=1",
    "model.num_heads=2",
    "model.width=16",
    "data.seq_len=16",
    "accum.micro_batch_size=2",
]

# A user's mistake: the mean over a micro-batch's tokens in place of their sum, with the count of
# tokens as the weight.
WRONG = """
import torch.nn.functional as F
from distaccum.core import objectives
from distaccum.cli import main

right = objectives.CausalLM.loss_sum
objectives.CausalLM.loss_sum = lambda self, model, micro_batch: (
    right(self, model, micro_batch) / self.denominator(micro_batch)
)
main()
"""


def test_verify_under_torchrun(tmp_path: Path) -> None:
    done = command_line(
        ["verify", *SMALL, "parallel=fsdp", "accum.effective_batch_size=7"],
        tmp_path,
        torchrun=["--nproc-per-node", "2"],
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4 micro-batch(es) on 2 rank(s) against one big batch on one process in float64"
        in done.stdout
    )
    assert done.stdout.count("holds") == 4
    assert "exactly the forecast" in done.stdout
    assert "\nproven\n" in done.stdout
    (written,) = tmp_path.glob("runs/*/*/verify.json")
    proof = json.loads(written.read_text())
    assert proof["holds"]
    assert max(error for error, _ in proof["parameters"].values()) < 1e-5
    assert len(proof["parameters"]) == 16


def test_verify_refutes_a_mean_in_place_of_a_sum(tmp_path: Path) -> None:
    done = command_line(
        ["verify", *SMALL, "accum.gradient_accumulation_steps=4"], tmp_path, program=WRONG
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILS" in done.stdout
    assert "NOT PROVEN" in done.stdout
    assert "error: This configuration is not proven: gradient, loss, gradient norm" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_runs_nothing(tmp_path: Path) -> None:
    schedule = (
        "accum.schedule=[{from: 0, effective_batch_size: 100}, {from: 50, effective_batch_size: "
        "300}]"
    )
    command = ["plan", "world_size=64", "model=gpt2_124m", "parallel=hsdp"]
    done = command_line(
        [*command, schedule, "accum.micro_batch_size=1", "optim.scale.lr=sqrt"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    out = " ".join(done.stdout.split())
    assert (
        "100 samples in uneven micro-batches: at most 1 sample(s) x 2 accumulation step(s) x 64"
        " rank(s)" in out
    )
    assert "does not divide evenly; the nearest batch sizes that do: 64 or 128" in out
    assert "effective batch size 100 from 0, 300 from 50 steps (ramp: jump)" in out
    assert "124,439,808 parameters" in out
    assert "optimizer state" in out
    for policy in ("boundary (chosen)", "gather_once", "reduce_scatter", "every"):
        assert f"{policy}: gradients (all-reduce between replicas)" in out
    assert "effective batch (samples)" in out
    assert "learning rate" in out
    assert list(tmp_path.iterdir()) == []  # no run folder


def test_plan_refuses_what_train_would(tmp_path: Path) -> None:
    done = command_line(["plan", "world_size=6", "parallel=hsdp", "parallel.replicas=4"], tmp_path)
    assert done.returncode == 2
    assert "parallel.replicas=4 does not divide 6 ranks" in done.stderr
    done = command_line(["plan", "world_size=6", "accum.sync=reduce_scatter"], tmp_path)
    assert done.returncode == 2
    assert "accum.sync=reduce_scatter is not supported by ddp" in done.stderr


def test_plan_compares_and_chooses(tmp_path: Path) -> None:
    """Speeds made up: a link so slow that what is sent decides, and no limit of memory but the one
    given."""
    links = {kind: LinkTimings((1, 2**30), (1e-4, 100.0)) for kind in KINDS}
    HardwareProfile(
        "cpu", 1, "gpt, 1 parameters", "fp32", 1e-3, 1e10, 1e-9, 2, links, False, {}, "today"
    ).save(tmp_path / "machine.json")
    command = [
        "plan",
        "world_size=4",
        "data.seq_len=64",
        "accum.effective_batch_size=64",
        "accum.micro_batch_size=auto",
    ]
    done = command_line(
        [*command, "limits.memory=24MiB", "machine=machine.json", "device=cpu"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "this training has another model or precision, so the times are rough" in " ".join(
        done.stdout.split()
    )
    plans = [line for line in lines if line.startswith(("> ", "  ")) and line.endswith("%")]
    assert sum(line.startswith(">") for line in plans) == 1
    times = [float(line.split()[-3]) for line in plans if not line.startswith(">")]
    # the cheapest first, and each of those after it takes less memory
    assert times == sorted(times)
    assert any("too much" in line for line in plans)
    (why,) = [line for line in lines if line.startswith("> ") and ": the fastest" in line]
    assert " of 22.8 MiB)" in why
    rows = [line.split() for line in lines if line.endswith("%")]
    worlds = [words[0] for words in rows if words[0].replace(",", "").isdigit()]
    assert worlds == ["1", "8", "64", "512", "4,096", "16,384"]


def test_plan_tells_the_memory_of_every_rank_count_without_running(tmp_path: Path) -> None:
    command = [
        "plan",
        "world_size=16384",
        "parallel=fsdp",
        "accum.sync=gather_once",
        "data.seq_len=16",
        "accum.micro_batch_size=1",
    ]
    done = command_line([*command, "accum.gradient_accumulation_steps=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16384, fsdp, sync gather_once" in done.stdout
    assert "peak (parts are not all alive at once)" in done.stdout
    assert "as configured; auto compares plans only if a memory limit is known" in done.stdout

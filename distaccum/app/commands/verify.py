"""Implements `distaccum verify`, which proves a configuration by computing one window."""

from __future__ import annotations

import json

from distaccum.app.assembly import batch_arithmetic, make_accumulator
from distaccum.app.auto.resolve import resolve_auto
from distaccum.app.build import make_plan, num_steps, ranks, schedule_of
from distaccum.app.config import Config, typed
from distaccum.app.task import build_task, plain_model
from distaccum.data.loader import Loader
from distaccum.errors import ProofError
from distaccum.launch import Job
from distaccum.metrics import Console
from distaccum.metrics.table import table
from distaccum.parallel.world import World
from distaccum.verify.prove import verify as prove
from distaccum.verify.result import Proof


def verify(job: Job) -> None:
    """Prove the configuration of a job on this rank.

    Call it on every rank of the job. Rank 0 writes `verify.json` and prints a table.

    Raises:
        ProofError: on all ranks, if an error exceeds its tolerance or the ledger disagrees.
    """
    config = typed(job.config)
    with ranks(config, job) as world:
        proof = prove_configuration(config, world)
    if job.rank == 0:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        (job.run_dir / "verify.json").write_text(json.dumps(proof.facts(), indent=1) + "\n")
        console = Console()
        console.line(shown(proof))
        console.line(f"details of every parameter: {job.run_dir / 'verify.json'}")
    if not proof.holds:
        raise ProofError(f"This configuration is not proven: {proof.failures}")


def prove_configuration(config: Config, world: World) -> Proof:
    """Build what `train` would build, and prove its first window.

    Call it on every rank.
    """
    task = build_task(config)
    config, messages = resolve_auto(config, task, world)
    if world.rank == 0:
        for text in messages:
            Console().line(text)
    plan = make_plan(config, task, batch_arithmetic(config, task, world.size))
    accumulator = make_accumulator(config, task, world)
    schedule_of(config, task, plan, accumulator.optimizer, num_steps(config, plan)).set(0)
    _, window = next(Loader(task.train, plan, world.rank, world.size).windows(0, 0, 1))
    plain = plain_model(config, task, world.device)
    return prove(accumulator, window, plain=plain, objective=task.objective)


def shown(proof: Proof) -> str:
    """Format a proof as a table for a terminal."""
    rows = [
        [
            f"{line.name} ({line.note})",
            f"{line.error:.1e}",
            "-" if line.tolerance is None else f"{line.tolerance:.1e}",
            "info" if line.tolerance is None else ("holds" if line.holds else "FAILS"),
        ]
        for line in proof.lines
    ]
    network = "exactly the forecast" if proof.network_agrees else "NOT the forecast"
    return "\n".join(
        [
            proof.samples,
            table(["compared", "relative error", "tolerance", ""], rows),
            f"tolerance: {proof.tolerance}",
            f"network: {proof.network or 'nothing'}, {network}",
            "proven" if proof.holds else "NOT PROVEN",
        ]
    )

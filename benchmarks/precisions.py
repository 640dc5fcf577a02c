"""Measures the error and the memory of each precision, for the table of docs/precisions.md.

`python benchmarks/precisions.py` prints the table in two minutes. Error: the gradient of all
parameters of a small GPT over a window of K micro-batches per rank, of one sample of real text
each, against one float64 process with the same samples and the same weights. Constant gradient: y =
w * x, the loss is -y, SGD has a learning rate of 1, and each micro-batch has x = 1, so that the
update must be 1. Bytes: predicted from shapes, and compared with the tensors of these runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from why import on_ranks

import distaccum as da
from distaccum.core.objectives import cast_inputs
from distaccum.core.strategies import StrategyName, Sync
from distaccum.core.traffic import Traffic
from distaccum.data.text import Layout, Source, TextConfig, load_text
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.parallel.precision import Precision
from distaccum.planner.peak import peak
from distaccum.planner.shapes import Setup, describe
from distaccum.planner.trace import trace, update
from distaccum.planner.traffic import gradient_sends
from distaccum.verify import reference

RESULTS = Path(__file__).parent / "results" / "precisions.json"
NUMS_MICRO_BATCHES = (1, 16, 256, 1024)
SEQ_LEN = 32
MODEL = GPTConfig("gpt", 257, SEQ_LEN, num_layers=2, num_heads=4, width=64, dropout=0.0, bias=True)
OBJECTIVE = da.CausalLM(shift=False)
CPU = torch.device("cpu")
SAMPLES_AT_ONCE = 64  # in the float64 process, which only limits its memory


@dataclass(frozen=True)
class Case:
    """Describes one row of the table."""

    overrides: str  # of the command line
    precision: Precision = Precision.fp32
    accumulate: torch.dtype | None = None
    reduce: torch.dtype | None = None
    ranks: int = 1


@dataclass(frozen=True)
class Measured:
    """Holds the results of one window of the GPT."""

    gradient: np.ndarray[Any, np.dtype[np.float64]]  # [parameters], as the optimizer receives it
    held: dict[str, int]  # bytes of tensors, by part


CASES = (
    Case("precision=fp32"),
    Case("precision=bf16", Precision.bf16),
    Case("precision=fp16", Precision.fp16),
    Case("precision=bf16-pure", Precision.bf16_pure),
    Case("precision=fp32 accum.dtype=bf16", accumulate=torch.bfloat16),
    Case(
        "precision=bf16-pure accum.dtype=bf16 parallel.reduce_dtype=bf16",
        Precision.bf16_pure, torch.bfloat16, torch.bfloat16,
    ),
    Case("precision=fp32 parallel.reduce_dtype=bf16", reduce=torch.bfloat16, ranks=2),
)  # fmt: skip


# ---- one window ---------------------------------------------------------------------------------


def read_samples(
    count: int, cache_dir: str | None = None
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Read samples [1, T] from the whole standard library, and facts about the text."""
    config = TextConfig(
        "text", Source.stdlib, None, SEQ_LEN, Layout.packed, 0.05, cache_dir, "bytes"
    )
    train, _ = load_text(config)
    stride = len(train) // count
    batches = [train.batch([index * stride], torch.Generator()) for index in range(count)]
    return batches, {key: train.facts[key] for key in ("source", "digest")}


def make_model(dtype: torch.dtype) -> GPT:
    """Make the model with the same weights in each dtype, which bfloat16 represents exactly."""
    torch.manual_seed(0)
    return GPT(MODEL).bfloat16().to(dtype)


def exact(samples: Sequence[dict[str, Tensor]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Compute the gradient [parameters] of the mean loss in float64, by plain autograd."""
    batches = [
        samples[begin : begin + SAMPLES_AT_ONCE]
        for begin in range(0, len(samples), SAMPLES_AT_ONCE)
    ]
    groups = [
        {key: torch.cat([one[key] for one in batch]) for key in batch[0]} for batch in batches
    ]
    weights = {"loss": float(sum(OBJECTIVE.denominator(group) for group in groups))}
    return flat(
        reference.compute(
            make_model(torch.float64), OBJECTIVE, groups, weights, 1.0
        ).gradients.values()
    )


def measure(case: Case, samples: Sequence[dict[str, Tensor]], num_micro_batches: int) -> Measured:
    """Train one window with distaccum in micro-batches of one sample, on each rank of the case."""
    rank = dist.get_rank() if case.ranks > 1 else 0
    model: nn.Module = make_model(case.precision.parameter_dtype)
    parameters = list(model.parameters())
    if case.ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    found: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    held: dict[str, int] = {}

    def look(*_: Any) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        found.append(flat(gradients))
        held["gradients"] = nbytes(gradients)

    def loss_sum(module: nn.Module, micro_batch: Any) -> Tensor:
        sums = accumulator.strategy.sums
        # of the previous micro-batches
        held["sums"] = 0 if sums is None else nbytes(sums._sums.values())
        return OBJECTIVE.loss_sum(module, micro_batch)

    optimizer.register_step_pre_hook(look)
    accumulator = make_accumulator(
        case, model, optimizer, da.Objective(loss_sum, OBJECTIVE.denominator)
    )
    step(accumulator, samples[rank : case.ranks * num_micro_batches : case.ranks])
    held["weights"] = nbytes(parameters)
    held["optimizer"] = nbytes(
        value for state in optimizer.state.values() for value in state.values()
    )
    # which the ledger has checked
    traffic = accumulator.strategy.gradient_traffic(num_micro_batches)
    held["sent"] = traffic.bytes.get("all_reduce", 0)
    return Measured(found[-1], held)


def constant_gradient(case: Case, num_micro_batches: int) -> float:
    """Return the update of w, on each rank of the case."""
    model: nn.Module = nn.Linear(1, 1, bias=False, dtype=case.precision.parameter_dtype)
    (weight,) = model.parameters()
    nn.init.zeros_(weight)
    if case.ranks > 1:
        model = DistributedDataParallel(model)
    objective = da.Objective(
        lambda m, micro_batch: -m(micro_batch["x"]).float().sum(),
        lambda micro_batch: len(micro_batch["x"]),
    )
    accumulator = make_accumulator(case, model, torch.optim.SGD([weight], lr=1.0), objective)
    step(accumulator, [{"x": torch.ones(1, 1)}] * num_micro_batches)
    return float(weight.detach())


def make_accumulator(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, objective: da.Objective
) -> da.Accumulator:
    precision = case.precision
    if precision.compute_dtype is not precision.parameter_dtype:
        objective = da.autocast(objective, precision.compute_dtype)
    elif precision is Precision.bf16_pure:
        objective = cast_inputs(objective, precision.parameter_dtype)
    return da.Accumulator(
        model,
        optimizer,
        objective,
        audit="first",
        accum_dtype=case.accumulate,
        reduce_dtype=case.reduce,
        loss_scale=da.LossScale() if case.precision is Precision.fp16 else None,
    )


def step(accumulator: da.Accumulator, micro_batches: Sequence[Any]) -> None:
    """Make one update; repeat the window while float16 overflows, which halves the loss scale."""
    while accumulator.step(micro_batches).skipped is not None:
        pass


def flat(tensors: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy()


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# ---- the rows -----------------------------------------------------------------------------------


def predicted(case: Case) -> dict[str, int]:
    """Predict the bytes on one rank from shapes alone, which are the same for every K."""
    with torch.device("meta"):
        model = GPT(MODEL).to(case.precision.parameter_dtype)
    shape = describe(model, [])
    strategy = StrategyName.ddp if case.ranks > 1 else StrategyName.single
    setup = Setup(
        strategy, Sync.boundary, case.ranks, 1, None, case.accumulate, case.reduce, True, False, 25
    )
    took = update(torch.optim.AdamW, [(p.shape, p.dtype) for p in shape.trained])
    ids = torch.zeros(1, SEQ_LEN, dtype=torch.long)
    micro_batch = trace(
        model, lambda _: [], OBJECTIVE.loss_sum, {"input_ids": ids, "labels": ids}, 1
    )
    one, *others = [
        peak(shape, setup, took, micro_batch, number).parts for number in NUMS_MICRO_BATCHES
    ]
    assert all(other == one for other in others), (one, others)
    sent = Traffic.total(gradient_sends(shape, setup, 1))
    return {
        "weights": one["weights"],
        "gradients": one["gradients"],
        "sums": one["accumulation"],
        "optimizer": one["optimizer"],
        "reduction": one["buckets"] + one["messages"],
        "sent": sent.bytes["all_reduce"],
    }


def num_parameters() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(MODEL).parameters())


def run(
    case: Case, samples: Sequence[dict[str, Tensor]], nums_micro_batches: Sequence[int]
) -> dict[str, Any]:
    """Measure all windows of a case, on each of its ranks."""
    return {
        "windows": {
            num_micro_batches: measure(case, samples, num_micro_batches)
            for num_micro_batches in nums_micro_batches
        },
        "constant": {
            num_micro_batches: constant_gradient(case, num_micro_batches)
            for num_micro_batches in nums_micro_batches
        },
    }


def row(case: Case, ran: dict[str, Any], samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Make a row of the results from the measurements of one rank."""
    errors = {}
    for num_micro_batches, measured in ran["windows"].items():
        right = exact(samples[: case.ranks * num_micro_batches])
        errors[str(num_micro_batches)] = float(
            np.linalg.norm(measured.gradient - right) / np.linalg.norm(right)
        )
    held = next(
        measured.held
        for num_micro_batches, measured in ran["windows"].items()
        if num_micro_batches > 1
    )
    return {
        "case": case.overrides,
        "ranks": case.ranks,
        "errors": errors,
        "constant gradient": {
            str(num_micro_batches): update for num_micro_batches, update in ran["constant"].items()
        },
        "bytes": predicted(case),
        "bytes held": held,
    }


def is_held(found: dict[str, Any]) -> bool:
    """Return whether the tensors take the predicted bytes.

    A reduction's own copies do not live long enough to be measured here.
    """
    return all(num_bytes == found["bytes"][part] for part, num_bytes in found["bytes held"].items())


# ---- the table ----------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Format the rows as a table in Markdown."""
    nums_micro_batches = list(results["rows"][0]["errors"])
    parts = list(results["rows"][0]["bytes"])
    head = [
        "#", "on the command line", *(f"error, K = {int(n):,}" for n in nums_micro_batches),
        "constant gradient, the same K", *parts,
    ]  # fmt: skip
    lines = [head]
    for number, found in enumerate(results["rows"], 1):
        name = f"`{found['case']}`" + (f", {found['ranks']} ranks" if found["ranks"] > 1 else "")
        errors = [f"{found['errors'][n]:.1e}" for n in nums_micro_batches]
        updates = ", ".join(f"{found['constant gradient'][n]:g}" for n in nums_micro_batches)
        per_parameter = [f"{found['bytes'][part] / results['parameters']:.3g}" for part in parts]
        lines.append([str(number), name, *errors, updates, *per_parameter])
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Print the table, write the results, and return 1 if a prediction of bytes is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="file for the results; default: benchmarks/results/precisions.json"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="windows of 1 and 2 micro-batches; written to --out only",
    )
    asked = parser.parse_args()
    nums_micro_batches = (1, 2) if asked.smoke else NUMS_MICRO_BATCHES
    samples, text = read_samples(max(case.ranks for case in CASES) * max(nums_micro_batches))
    distributed = [case for case in CASES if case.ranks > 1]
    # Before anything else, because it forks.
    on_first_rank = on_ranks(
        *(partial(run, case, samples, nums_micro_batches) for case in distributed)
    )[0]
    torch.set_num_threads(1)
    ran = dict(zip(distributed, on_first_rank, strict=True))
    rows = [
        row(case, ran.get(case) or run(case, samples, nums_micro_batches), samples)
        for case in CASES
    ]
    described = {"device": "CPU, one thread per rank"} | machine.describe()
    results = {"machine": described, "text": text, "parameters": num_parameters(), "rows": rows}
    out = asked.out or (None if asked.smoke else RESULTS)
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results), end="")
    return 0 if all(map(is_held, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())

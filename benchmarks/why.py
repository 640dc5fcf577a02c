"""Shows what is wrong in the plain accumulation loop, and prints the table of docs/why.md.

Unless a case says otherwise: float64, y = w * x, the loss is -y, and SGD has a learning rate of 1.
So the update of w is the negative gradient: the mean of x over all that counts. Cases with ranks
run on two processes over gloo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import distaccum as da
from distaccum.parallel.ledger import Ledger

RANKS = 2


@dataclass(frozen=True)
class Row:
    """Holds the numbers of one case."""

    case: str
    asked: str  # what is measured
    plain: Any  # from the plain loop
    right: Any  # from arithmetic
    ours: Any  # from distaccum


def line(dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def plain_loop(
    model: nn.Module, loader: list[Tensor], steps: int, epochs: int = 1, flush: bool = False
) -> list[float]:
    """Return the updates of the usual loop; with `flush`, the end of an epoch makes a step too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights = [0.0]
    for _ in range(epochs):
        for i, x in enumerate(loader):
            loss = -model(x).mean() / steps
            loss.backward()
            if (i + 1) % steps == 0 or (flush and i + 1 == len(loader)):
                optimizer.step()
                optimizer.zero_grad()
                weights.append(weight_of(model))
    return differences(weights)


def our_loop(
    model: nn.Module,
    loader: Iterable[Any],
    steps: int,
    epochs: int = 1,
    objective: da.Objective | None = None,
) -> list[float]:
    """Return the updates of the same training with distaccum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulator = da.Accumulator(
        model, optimizer, objective or da.Objective(lambda m, x: -m(x).double().sum(), len)
    )
    weights = [0.0]
    for _ in range(epochs):
        for window in da.windows(loader, gradient_accumulation_steps=steps):
            accumulator.step(window)
            weights.append(weight_of(model))
    return differences(weights)


def weight_of(model: nn.Module) -> float:
    return float(next(model.parameters()).detach())


def differences(weights: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(weights)]


# ---- one process --------------------------------------------------------------------------------


def dropped_window() -> Row:
    loader = [column(1.0)] * 5
    return Row(
        "the last window is dropped, its gradient leaks into the next epoch",
        "5 micro-batches of x = 1, windows of 4, 2 epochs: updates",
        plain_loop(line(), loader, 4, epochs=2),
        [1.0, 1.0, 1.0, 1.0],
        our_loop(line(), loader, 4, epochs=2),
    )


def short_window() -> Row:
    loader = [column(1.0)] * 5
    return Row(
        "a short last window is divided by K",
        "the same in 1 epoch, with a step at its end: updates",
        plain_loop(line(), loader, 4, flush=True),
        [1.0, 1.0],
        our_loop(line(), loader, 4),
    )


TOKENS = (1, 9, 9, 9)  # in four micro-batches; only the one token of the first has x = 1


def masked(number: int) -> tuple[Tensor, Tensor]:
    """Return the x [9, 1] of a micro-batch and which tokens count [9]."""
    return column(*[float(number == 0)] * 9), (torch.arange(9) < TOKENS[number]).double()


def masked_sum(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    x, counts = micro_batch
    return -(model(x)[:, 0] * counts).sum()


TOKEN_OBJECTIVE = da.Objective(masked_sum, lambda micro_batch: int(micro_batch[1].sum()))


def mean_of_means() -> Row:
    model = line()
    for number in range(4):
        x, counts = masked(number)
        (masked_sum(model, (x, counts)) / counts.sum() / 4).backward()
    (gradient,) = [p.grad for p in model.parameters()]
    return Row(
        "a mean of means, where micro-batches count different numbers of tokens",
        "1, 9, 9 and 9 tokens, the first has x = 1: update",
        [float(-gradient)],
        [1 / 28],
        our_loop(line(), map(masked, range(4)), 4, objective=TOKEN_OBJECTIVE),
    )


MICRO_BATCHES, WINDOW = 16, 4


def rates(total: int, each_micro_batch: bool) -> list[float]:
    """Return the learning rates of the updates and of the end, linear from 1 to 0 over `total`."""
    optimizer = torch.optim.SGD(line().parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))
    optimizer.step()  # without a gradient, because torch warns if the scheduler steps first
    found = []
    for i in range(MICRO_BATCHES):
        if (i + 1) % WINDOW == 0:
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            if not each_micro_batch:
                scheduler.step()
        if each_micro_batch:
            scheduler.step()
    return [*found, scheduler.get_last_lr()[0]]


def our_rates() -> list[float]:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    windows = da.windows([column(1.0)] * MICRO_BATCHES, gradient_accumulation_steps=WINDOW)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step * WINDOW / MICRO_BATCHES))
    accumulator = da.Accumulator(
        model, optimizer, da.Objective(lambda m, x: -m(x).double().sum(), len), scheduler=scheduler
    )
    return [*(accumulator.step(window).lr for window in windows), scheduler.get_last_lr()[0]]


def rate_over_micro_batches() -> Row:
    return Row(
        "the schedule's length is `len(loader)`, in micro-batches",
        "16 micro-batches, windows of 4, linear from 1 to 0: rates of the updates, and the rate at "
        "the end",
        rates(MICRO_BATCHES, each_micro_batch=False),
        [1.0, 0.75, 0.5, 0.25, 0.0],
        our_rates(),
    )


def rate_each_micro_batch() -> Row:
    return Row(
        "`scheduler.step()` is called outside of the `if`",
        "the same with a schedule over 4 updates",
        rates(MICRO_BATCHES // WINDOW, each_micro_batch=True),
        [1.0, 0.75, 0.5, 0.25, 0.0],
        our_rates(),
    )


def stalled_sums(num_micro_batches: int) -> Row:
    loader = [column(1.0, dtype=torch.bfloat16)] * num_micro_batches
    return Row(
        "sums of gradients in bf16 stall",
        f"bf16 parameters, {num_micro_batches:,} micro-batches of x = 1: update",
        plain_loop(line(torch.bfloat16), loader, num_micro_batches),
        [1.0],
        our_loop(line(torch.bfloat16), loader, num_micro_batches),
    )


def logged_loss() -> Row:
    values = [1.0, 2.0, 3.0, 6.0]
    model = line()
    nn.init.constant_(model.weight, -1.0)
    printed = [float(-model(column(x)).mean().detach() / len(values)) for x in values][-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulator = da.Accumulator(
        model, optimizer, da.Objective(lambda m, x: -m(x).double().sum(), len)
    )
    return Row(
        "the loss that is printed is the last micro-batch's, divided by K",
        "micro-batches with losses 1, 2, 3 and 6: loss",
        printed,
        3.0,
        accumulator.step([column(x) for x in values]).loss,
    )


# ---- two ranks ----------------------------------------------------------------------------------


def all_reduces() -> tuple[int, int, int]:
    """Count the all-reduces of a window: plain loop, distaccum's gradients, all of distaccum."""
    loader = [column(1.0)] * 4
    plain = DistributedDataParallel(line())
    with Ledger() as ledger:
        plain_loop(plain, loader, 4)
    model = DistributedDataParallel(line())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulator = da.Accumulator(
        model, optimizer, da.Objective(lambda m, x: -m(x).double().sum(), len), audit="always"
    )  # fmt: skip
    first, second = (
        accumulator.step(window) for window in da.windows(loader * 2, gradient_accumulation_steps=4)
    )
    assert first.verdict is not None
    assert second.verdict is not None
    ours = second.verdict.counted.counts["all_reduce"]
    return (
        ledger.traffic.counts["all_reduce"],
        ours - accumulator.control_traffic().counts["all_reduce"],
        ours,
    )


def own_denominators() -> tuple[list[float], list[float]]:
    """Divide by the tokens of each rank's own micro-batches, and average gradients over ranks."""
    own = [masked(number) for number in range(4)[dist.get_rank() * 2 :][:2]]
    model = DistributedDataParallel(line())
    tokens = sum(counts.sum() for _, counts in own)
    with model.no_sync():
        (masked_sum(model, own[0]) / tokens).backward()
    (masked_sum(model, own[1]) / tokens).backward()
    (gradient,) = [p.grad for p in model.parameters()]
    return [float(-gradient)], our_loop(
        DistributedDataParallel(line()), own, 2, objective=TOKEN_OBJECTIVE
    )


def with_ranks() -> list[Row]:
    (reduces, (plain, ours)), (other_reduces, (_, other)) = on_ranks(all_reduces, own_denominators)
    assert reduces == other_reduces
    assert ours == other
    return [
        Row(
            "DDP sends all gradients on each micro-batch",
            "2 ranks, a window of 4 micro-batches: all-reduces of gradients",
            reduces[0],
            1,
            reduces[1],
        ),
        Row(
            "each rank divides by its own tokens",
            "2 ranks with 1 + 9 and 9 + 9 tokens, the first has x = 1: update",
            plain,
            [1 / 28],
            ours,
        ),
    ]


def on_ranks(*functions: Callable[[], Any]) -> list[list[Any]]:
    """Return the results of the functions by rank; it forks, so call it before torch computes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            processes.append(
                context.Process(
                    target=rank_main, args=(rank, folder, functions, theirs), daemon=True
                )
            )
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        found = [pipe.recv() for pipe in pipes]  # EOFError if a rank ended, which has printed why
        for process in processes:
            process.join()
    return found


def rank_main(rank: int, folder: str, functions: tuple[Callable[[], Any], ...], pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    pipe.send([function() for function in functions])
    dist.destroy_process_group()


# ---- the table ----------------------------------------------------------------------------------


def rows() -> list[Row]:
    """Compute all cases, in the order of docs/why.md."""
    sync, denominators = with_ranks()  # first, see on_ranks
    return [
        dropped_window(), short_window(), mean_of_means(), denominators, sync,
        rate_over_micro_batches(), rate_each_micro_batch(), stalled_sums(512), stalled_sums(1024),
        logged_loss(),
    ]  # fmt: skip


def show(value: Any) -> str:
    """Format a number, or a list of numbers, with four digits."""
    if isinstance(value, list) and len(value) == 1:
        return show(value[0])
    return "[" + ", ".join(map(show, value)) + "]" if isinstance(value, list) else f"{value:.4g}"


def table(found: list[Row]) -> str:
    """Format the rows as a table in Markdown."""
    head = (
        "| # | what is wrong | measured | plain loop | right | distaccum"
        " |\n|---|---|---|---|---|---|\n"
    )
    cells = (
        (str(n), r.case, r.asked, show(r.plain), show(r.right), show(r.ours))
        for n, r in enumerate(found, 1)
    )
    return head + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def is_right(row: Row) -> bool:
    """Return whether distaccum is right, up to float64 rounding of at most 1e-15 per operation."""
    right, ours = (value if isinstance(value, list) else [value] for value in (row.right, row.ours))
    return all(abs(a - b) <= 1e-14 for a, b in zip(right, ours, strict=True))


def main() -> int:
    """Print the table, and return 1 if a number of distaccum is not right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="has no effect, because the program takes only seconds"
    )
    parser.parse_args()
    torch.set_num_threads(1)
    found = rows()
    print(table(found), end="")
    return 0 if all(is_right(row) for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())

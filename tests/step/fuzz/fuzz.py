"""Training loops composed at random, each exact or refused: `python tests/step/fuzz/fuzz.py
[--seeds 300] [--start 0]`.

A seed decides the number of ranks, the wrapper, the optimizer, the data, the surroundings of the
loop and perhaps a mistake. Every window must be one big batch on one process, to 1e-12; or the loop
is refused with a ConfigError on all ranks, where something in it may be, and what was done until
then is right. `--case SEED` runs one loop again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# where worlds.py is; pytest has it there already
sys.path.insert(1, str(Path(__file__).parents[2] / "support"))

import torch
from fuzz_cases import Case, draw, reasons_to_refuse
from fuzz_loop import Told, run_case
from fuzz_reference import Reference, reference
from torch import Tensor
from worlds import World

TOLERANCE = 1e-12
TIMEOUT_S = 20.0  # a case takes less than one second
GRACE_S = 4.0  # for the others, when a rank has ended its loop
FIELDS = (
    "step",
    "skipped",
    "loss",
    "losses",
    "denominators",
    "grad_norm",
    "lr",
    "num_micro_batches",
)


@dataclass(frozen=True)
class Verdict:
    """What became of a case."""

    kind: str  # "exact" and "refused" are right; "WRONG", "HANG", "OTHER ERROR" are not
    why: str = ""
    detail: str = ""

    @property
    def right(self) -> bool:
        """Whether it is what was promised."""
        return self.kind in ("exact", "refused")

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


class Judge:
    """Runs cases in worlds that live on from case to case, and compares."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}
        self._used: set[int] = set()  # sizes of worlds whose last case ended early

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds.values():
            world.close()

    def judge(self, case: Case) -> Verdict:
        """Run the case on its ranks and on one process."""
        right = reference(case)
        used = case.ranks in self._used
        verdict = self._run(case, right)
        # What a broken window left in the process group is not this case's.
        return verdict if verdict.right or not used else self._run(case, right, anew=True)

    def _run(self, case: Case, right: Reference, anew: bool = False) -> Verdict:
        if case.ranks not in self._worlds:
            self._worlds[case.ranks] = World(case.ranks)
        world = self._worlds[case.ranks]
        if anew:
            world.close()  # the next run starts new ranks
        told = world.try_to_run(run_case, case, timeout_s=TIMEOUT_S, grace_s=GRACE_S)
        verdict = compare(case, right, told)
        if not verdict.right:
            world.close()
        (self._used.add if verdict.kind == "refused" else self._used.discard)(case.ranks)
        return verdict


def compare(case: Case, right: Reference, told: list[Told | None]) -> Verdict:
    """Judge what the ranks tell of a case."""
    answers = [answer for answer in told if answer is not None]
    for rank, answer in enumerate(told):
        if answer is not None and answer.error is not None:
            return Verdict("OTHER ERROR", f"rank {rank}: {answer.error}", answer.traceback)
    refused = [answer.refused for answer in answers if answer.refused is not None]
    if len(answers) < len(told):
        late = [rank for rank, answer in enumerate(told) if answer is None]
        others = f"; another was refused: {refused[0]}" if refused else ""
        return Verdict("HANG", f"rank(s) {late} wait, or died{others}")
    for rank, answer in enumerate(answers):
        difference = _difference(case, right, answer, rank)
        if difference is not None:
            return Verdict(
                "WRONG",
                f"rank {rank}: {difference}" + (f"; then refused: {refused[0]}" if refused else ""),
            )
    if not refused:
        return Verdict("exact")
    if len(refused) < len(told) or len({len(answer.records) for answer in answers}) > 1:
        return Verdict(
            "WRONG",
            f"refused in different windows, or on {len(refused)} of {len(told)} ranks: "
            f"{refused[0]}",
        )
    if not reasons_to_refuse(case):
        return Verdict("WRONG", f"refused, though nothing in it may be: {refused[0]}")
    return Verdict("refused", f"after {len(answers[0].records)} window(s): {refused[0]}")


def _difference(case: Case, right: Reference, told: Told, rank: int) -> str | None:
    """The first thing in a rank's windows that is not right."""
    done, windows = len(told.records), right.windows
    for number, (record, parameters, result) in enumerate(
        zip(told.records, told.parameters, windows, strict=False)
    ):
        for name in FIELDS:
            if not _same(record[name], getattr(result, name)):
                return f"window {number}: {name} is {record[name]}, not {getattr(result, name)}"
        difference = _parameter_difference(case, parameters, result.parameters, rank)
        if difference is not None:
            return f"window {number}: {difference}"
    if done > len(windows) or (done < len(windows) and told.refused is None):
        return f"{done} windows were made, and there are {len(windows)}"
    last = windows[done - 1].parameters if done else right.start
    difference = _parameter_difference(case, told.at_the_end, last, rank)
    return None if difference is None else f"window {done} was refused, and moved: {difference}"


def _parameter_difference(
    case: Case, found: list[list[float]], right: list[Tensor], rank: int
) -> str | None:
    for number, (values, whole) in enumerate(zip(found, right, strict=True)):
        parts = whole.chunk(case.ranks) if len(values) != whole.numel() else [whole] * case.ranks
        part = (parts[rank] if rank < len(parts) else whole[:0]).flatten()
        error = float(
            (torch.tensor(values, dtype=torch.float64) - part).norm() / whole.norm().clamp(min=1e-3)
        )
        if not error <= TOLERANCE:
            return f"parameter {number} is off by {error:.1e}"
    return None


def _same(found: object, right: object) -> bool:
    if isinstance(right, dict):
        return (
            isinstance(found, dict)
            and found.keys() == right.keys()
            and all(_same(found[k], right[k]) for k in right)
        )
    if isinstance(right, float) and isinstance(found, int | float):
        both_nan = math.isnan(found) and math.isnan(right)
        return both_nan or math.isclose(found, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return found == right


def run(seeds: Iterable[int], *, detailed: bool = False) -> int:
    """Print a line for each seed, with tracebacks where `detailed`; return how many cases are not
    right."""
    kinds: Counter[str] = Counter()
    began = time.monotonic()
    with Judge() as judge:
        for seed in seeds:
            case = draw(seed)
            verdict = judge.judge(case)
            kinds[verdict.kind] += 1
            print(
                f"{seed:5d}  {verdict.kind:11}  "
                f"{case}{'  -> ' if verdict.why else ''}{verdict.why}",
                flush=True,
            )
            if detailed:
                print(verdict.detail)
    total, seconds = sum(kinds.values()), time.monotonic() - began
    print(f"{total} loops in {seconds:.0f} s ({seconds / max(total, 1):.2f} s each): {dict(kinds)}")
    return total - kinds["exact"] - kinds["refused"]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--seeds", type=int, default=300, help="how many loops")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--case", type=int, help="one seed only")
    args = parser.parse_args()
    # the warnings of torch's reducer, on every rank
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.case is not None:
        return 1 if run([args.case], detailed=True) else 0
    return 1 if run(range(args.start, args.start + args.seeds)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs killed at random and started again: `python tests/app/resume/chaos.py N [SEED]`, or
scripts/chaos.sh."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# where worlds.py is; pytest has it there already
sys.path.insert(1, str(Path(__file__).parents[2] / "support"))

from faults import Fault
from runs import STEPS, TINY, Run, Undisturbed, assert_each_sample_once

from distaccum.metrics.run_log import read_metrics

EVALUATE_EVERY = 4
assert f"train.validate_every_steps={EVALUATE_EVERY}" in TINY


@dataclass(frozen=True)
class ByClock:
    """A kill at some moment between start and end."""

    share: float  # of the time that an undisturbed run takes
    rank: int | None  # None: all


@dataclass(frozen=True)
class Point:
    """One run and what befalls it: one kill in each start, and then none."""

    ranks: int
    parallel: str
    every_steps: int
    asynchronous: bool
    kills: tuple[Fault | ByClock, ...]

    def __str__(self) -> str:
        how = "asynchronous" if self.asynchronous else "synchronous"
        kills = "; ".join(
            (
                f"{kill.kind} {kill.at} of step {kill.step} on rank {kill.rank}"
                if isinstance(kill, Fault)
                else (
                    f"kill {'all' if kill.rank is None else f'rank {kill.rank}'} after "
                    f"{kill.share:.0%} of its time"
                )
            )
            for kill in self.kills
        )
        return f"{self.parallel} x{self.ranks}, every {self.every_steps} {how}: {kills}"


@dataclass(frozen=True)
class StepStats:
    """What became of it."""

    trouble: str  # empty: the run is the undisturbed one, bit for bit and sample by sample
    lost: list[int]  # steps that were done again, by start
    hit: int  # kills that came before the end of a start
    while_saving: int  # of these, how many left something half-saved


def draw(seed: int, number: int) -> Point:
    """The point of this number; a function of both."""
    dice = random.Random(f"{seed} {number}")
    ranks = dice.randint(1, 4)
    every = dice.choice([1, 2, 3])
    steps = sorted(dice.sample(range(1, STEPS + 1), dice.choice([1, 1, 2, 3])))
    kills = [_draw_kill(dice, ranks, every, step) for step in steps]
    # last: nobody knows which step they let a run come to
    kills.sort(key=lambda kill: isinstance(kill, ByClock))
    return Point(
        ranks,
        "single" if ranks == 1 else dice.choice(["ddp", "fsdp"]),
        every,
        dice.random() < 0.5,
        tuple(kills),
    )


def _draw_kill(dice: random.Random, ranks: int, every: int, step: int) -> Fault | ByClock:
    rank = dice.randrange(ranks)
    if dice.random() < 0.3:
        return ByClock(dice.random(), dice.choice([None, rank]))
    inside = ["forward", "backward", "reduce", "update"]
    outside = ["save", "publish", "pointer"] if step % every == 0 or step == STEPS else []
    outside += ["evaluate"] if step % EVALUATE_EVERY == 0 else []
    at = dice.choice(dice.choice([inside, outside or inside]))
    rank = 0 if at in ("publish", "pointer") else rank
    return Fault(rank, step, at, dice.choice(["kill", "kill_all"]))


def befall(point: Point, folder: Path, undisturbed: Undisturbed) -> StepStats:
    """Let it happen, start the run again until the end, and compare."""
    expected = undisturbed.of(point.ranks, f"parallel={point.parallel}")
    run = Run(
        folder,
        *undisturbed.overrides,
        f"parallel={point.parallel}",
        f"checkpoint.every.steps={point.every_steps}",
        f"checkpoint.asynchronous={str(point.asynchronous).lower()}",
    )
    hit = while_saving = 0
    for kill in point.kills:
        if isinstance(kill, Fault):
            attempt = run.start(point.ranks, faults=[kill])
            if not run.acted(kill):
                return StepStats(
                    f"the fault did not happen: {kill}\n{attempt}", [], hit, while_saving
                )
        else:
            attempt = run.start(
                point.ranks, meanwhile=_killer(kill, kill.share * expected.attempts[0].seconds)
            )
        killed = -signal.SIGKILL in attempt.codes
        hit += killed
        while_saving += killed and any(run.run_dir.glob("checkpoints/*.part"))
    attempt = run.start(point.ranks)
    if any(attempt.codes):
        return StepStats(f"it could not go on:\n{attempt}", [], hit, while_saving)
    troubles = [
        text
        for text, differs in (
            ("other bits", run.sha256() != expected.sha256()),
            ("another trajectory", run.trajectory() != expected.trajectory()),
            ("other samples", run.samples() != expected.samples()),
        )
        if differs
    ]
    assert_each_sample_once(run)
    lost = _lost(run)
    # A save behind the training is in place when the next one begins, or before.
    if max(lost, default=0) > point.every_steps * (2 if point.asynchronous else 1):
        troubles.append(f"lost {lost} steps")
    return StepStats(", ".join(troubles), lost, hit, while_saving)


def _killer(kill: ByClock, delay_s: float) -> Callable[[list[int]], None]:
    def meanwhile(pids: list[int]) -> None:
        time.sleep(delay_s)
        for pid in pids if kill.rank is None else [pids[kill.rank]]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    return meanwhile


def _lost(run: Run) -> list[int]:
    """By start that followed another: the steps that rank 0 had recorded, and that were done
    again."""
    lost, step = [], 0
    for record in read_metrics(run.run_dir / "metrics.jsonl"):
        if record["kind"] == "step":
            assert isinstance(record["step"], int)
            if record["step"] != step + 1:
                lost.append(step + 1 - record["step"])
            step = record["step"]
    return lost


def main(count: int, seed: int) -> int:
    """A line a point and a summary; 1 if any differs."""
    began = time.monotonic()
    hit = while_saving = 0
    lost: list[int] = []
    bad: list[int] = []
    with tempfile.TemporaryDirectory(prefix="chaos") as place:
        undisturbed = Undisturbed(Path(place))
        for number in range(count):
            point = draw(seed, number)
            try:
                outcome = befall(point, Path(place) / f"point-{number}", undisturbed)
            except AssertionError as error:
                outcome = StepStats(str(error), [], 0, 0)
            print(
                f"{number:4} {point}: {outcome.trouble or 'equal'}; steps lost {outcome.lost}",
                flush=True,
            )
            hit, while_saving = hit + outcome.hit, while_saving + outcome.while_saving
            lost += outcome.lost
            bad += [number] if outcome.trouble else []
    print(
        f"{count} runs (seed {seed}), killed {hit} times, {while_saving} of these while something "
        f"was half-saved; {sum(lost)} steps done again, {max(lost, default=0)} at most; "
        + (
            f"different: {bad}"
            if bad
            else "all equal to the undisturbed runs, bit for bit and sample by sample"
        )
        + f"; {time.monotonic() - began:.0f} s"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))

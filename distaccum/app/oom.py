"""What a step was predicted to need, what it needs, and what is done where memory does not suffice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum

from distaccum._torch import is_out_of_memory
from distaccum.core.batch_size import solve
from distaccum.core.plan import Plan, Window
from distaccum.errors import OutOfMemoryError
from distaccum.metrics import size
from distaccum.planner.meter import Meter

MEASURED_STEPS = 2  # the second one finds the optimizer's state there
TIMED_STEPS = 3  # after them


REMEDIES = "use nn.checkpoint=true, parallel=fsdp on several ranks, or more memory"


class OnOutOfMemory(Enum):
    """What to do when memory runs out inside a window, on whichever rank."""

    error = "error"  # end the run on all ranks, and say what would have fitted
    shrink = "shrink"  # compute the window once more, and those after it, in micros of half the size


@dataclass(frozen=True)
class Predicted:
    """Of a step on this rank."""

    peak: int  # bytes
    moment: str  # of the peak, in words
    step_s: float | None  # None: no speeds of this machine are known


class Budget:
    """Measures steps beside their prediction."""

    def __init__(self, meter: Meter, on_oom: OnOutOfMemory, predicted: Predicted | None = None) -> None:
        """Nothing is measured yet.

        Args:
            meter: of this rank's device. On the CPU, where counting costs time, it counts the first steps only unless
                it has a limit to keep.
            on_oom: what to do.
            predicted: what to compare with; None says nothing.
        """
        self.on_oom = on_oom
        self.predicted = predicted
        self._meter = meter
        self._steps = 0
        self._seconds: list[float] = []

    @contextmanager
    def building(self) -> Iterator[None]:
        """Enter around all that makes the model and its optimizer.

        Raises:
            OutOfMemoryError: on this rank, where they do not fit.
        """
        with self._meter:
            try:
                yield
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"The model and its optimizer do not fit: {_line(error)} Use parallel=fsdp on more ranks, a "
                    "smaller model, or more memory (limits.memory)."
                ) from None

    @contextmanager
    def step(self, number: int, plan: Plan, window: Window, world_size: int) -> Iterator[None]:
        """Enter around each step, whose number is for messages.

        Raises:
            OutOfMemoryError: on this rank, where memory ran out and it was not agreed on.
        """
        counts = self._meter.costs_nothing or self._meter.limit is not None or self._steps < MEASURED_STEPS
        began = time.perf_counter()
        with self._meter if counts else nullcontext():
            try:
                yield
            except OutOfMemoryError:
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(self._letter(_line(error), number, plan, window, world_size)) from None
        self._steps += 1
        if len(self._seconds) < TIMED_STEPS and self._steps > MEASURED_STEPS:
            self._seconds.append(time.perf_counter() - began)

    def told(self, last: bool) -> list[str]:
        """What to say after a step, once: predicted beside measured. At the latest after the last step."""
        predicted = self.predicted
        if predicted is None or not (last or len(self._seconds) == TIMED_STEPS):
            return []
        self.predicted = None
        measured = self._meter.peak_bytes
        texts = [f"peak memory {size(predicted.peak)} predicted ({predicted.moment}), {size(measured)} measured"]
        if predicted.step_s is not None and self._seconds:
            measured_s = statistics.median(self._seconds)
            texts.append(f"a step {predicted.step_s:.3g} s predicted, {measured_s:.3g} s measured")
        return ["plan: " + "; ".join(texts)]

    def _letter(self, line: str, number: int, plan: Plan, window: Window, world_size: int) -> str:
        micro, peak = window.micro_size, size(self._meter.peak_bytes)
        text = f"Step {number} ran out of memory in micro-batches of {micro} sample(s), peak {peak}: {line}"
        if micro == 1:
            return f"{text} One sample cannot be halved: {REMEDIES}."
        smaller = solve(world_size, plan.largest_batch, -(-micro // 2))
        return (
            f"{text} Use accum.micro={smaller.micro_size} ({smaller.num_micros} micros per rank, the same effective "
            f"batch), accum.micro=auto, accum.on_oom=shrink; or {REMEDIES}."
        )


def _line(error: BaseException) -> str:
    """The first line of an error's text, as a sentence."""
    return f"{str(error).strip().split(chr(10))[0].rstrip('.')}."

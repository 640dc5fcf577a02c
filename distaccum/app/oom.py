"""Compares the predicted with the measured memory of a step, and explains out-of-memory errors."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from distaccum._torch import is_out_of_memory
from distaccum.core.batch_size import solve
from distaccum.core.plan import Plan, Window
from distaccum.errors import OutOfMemoryError
from distaccum.metrics import size
from distaccum.parallel.world import World
from distaccum.planner.meter import Meter

MEASURED_STEPS = 2  # from the second step on, the optimizer's state takes memory
TIMED_STEPS = 3  # the steps after the measured ones

SHRUNK = "out_of_memory.json"  # in the run folder: the micro-batch size that did not fit

REMEDIES = "use nn.checkpoint=true, parallel=fsdp on several ranks, or more memory"


class OnOutOfMemory(Enum):
    """Selects what happens when any rank runs out of memory inside a window."""

    error = "error"  # end the run on all ranks, and suggest a smaller micro-batch size
    # Continue with micro-batches of half the size. If micro-batches send nothing (single, ddp), all
    # ranks retry the window; otherwise the run ends, and its next start continues so.
    shrink = "shrink"


@dataclass(frozen=True)
class Predicted:
    """Holds the prediction of memory and time for one step on this rank."""

    peak: int  # bytes
    moment: str  # description of when the peak occurs
    step_s: float | None  # seconds; None if the speeds of this machine are unknown


class Budget:
    """Measures the memory and time of steps and compares them with their prediction."""

    def __init__(
        self, meter: Meter, on_oom: OnOutOfMemory, run_dir: Path, predicted: Predicted | None = None
    ) -> None:
        """Store the meter and the policy; nothing is measured yet.

        Args:
            meter: measures this rank's device. On the CPU, where measuring takes time, it measures
                only the first steps, unless it has a limit to enforce.
            on_oom: what to do when memory runs out.
            run_dir: the run folder, for what the next start must know.
            predicted: the prediction to compare with; None compares nothing.
        """
        self.on_oom = on_oom
        self.predicted = predicted
        # whether all ranks agree on running out of memory, and retry the window
        self.retries = False
        self._run_dir = run_dir
        self._meter = meter
        self._steps = 0
        self._seconds: list[float] = []

    @contextmanager
    def building(self) -> Iterator[None]:
        """Measure memory while the model and its optimizer are built.

        Raises:
            OutOfMemoryError: on this rank, if they do not fit.
        """
        with self._meter:
            try:
                yield
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"The model and its optimizer do not fit into memory: {_first_line(error)} Use "
                    "parallel=fsdp on more ranks, a smaller model, or more memory (limits.memory)."
                ) from None

    def halvings(self, micro_batch_size: int, world: World) -> int:
        """Return how often to halve micro-batches where those of an earlier start did not fit.

        Args:
            micro_batch_size: of this start, in samples.
            world: all ranks; every rank must call it.
        """
        path = self._run_dir / SHRUNK
        failed: object = None
        if self.on_oom is OnOutOfMemory.shrink and world.rank == 0 and path.is_file():
            failed = int(json.loads(path.read_text())["micro_batch_size"])
        failed = world.broadcast_object(failed, 0)
        halvings = 0
        while (
            isinstance(failed, int) and failed > 1 and -(-micro_batch_size // 2**halvings) >= failed
        ):
            halvings += 1
        return halvings

    @contextmanager
    def step(self, number: int, plan: Plan, window: Window, world_size: int) -> Iterator[None]:
        """Measure the memory and time of one step.

        Args:
            number: the step's number, for messages.
            plan: the plan of the training.
            window: the window that the step computes.
            world_size: the number of ranks.

        Raises:
            OutOfMemoryError: if this rank ran out of memory. An error that all ranks agreed on is
                passed on.
        """
        counts = (
            self._meter.costs_nothing
            or self._meter.limit is not None
            or self._steps < MEASURED_STEPS
        )
        began = time.perf_counter()
        with self._meter if counts else nullcontext():
            try:
                yield
            except OutOfMemoryError:
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = self._message(_first_line(error), number, plan, window, world_size)
                raise OutOfMemoryError(message) from None
        self._steps += 1
        if len(self._seconds) < TIMED_STEPS and self._steps > MEASURED_STEPS:
            self._seconds.append(time.perf_counter() - began)

    def message(self, last: bool) -> list[str]:
        """Return a message that compares prediction and measurement.

        It is returned once, as soon as enough steps are timed.

        Args:
            last: whether this was the last step, so that the message cannot wait for more steps.

        Returns:
            One message, or an empty list.
        """
        predicted = self.predicted
        if predicted is None or not (last or len(self._seconds) == TIMED_STEPS):
            return []
        self.predicted = None
        measured = self._meter.peak_bytes
        texts = [
            f"peak memory {size(predicted.peak)} predicted ({predicted.moment}), {size(measured)} "
            "measured"
        ]
        if predicted.step_s is not None and self._seconds:
            measured_s = statistics.median(self._seconds)
            texts.append(f"a step {predicted.step_s:.3g} s predicted, {measured_s:.3g} s measured")
        return ["plan: " + "; ".join(texts)]

    def _message(self, line: str, number: int, plan: Plan, window: Window, world_size: int) -> str:
        micro_batch, peak = window.micro_batch_size, size(self._meter.peak_bytes)
        text = (
            f"Step {number} ran out of memory with micro-batches of {micro_batch} sample(s) at a "
            f"peak of {peak}: {line}"
        )
        if micro_batch == 1:
            return f"{text} A micro-batch of one sample cannot be halved; {REMEDIES}."
        smaller = solve(world_size, plan.largest_batch, -(-micro_batch // 2))
        if self.on_oom is OnOutOfMemory.shrink and not self.retries:
            draft = self._run_dir / f"{SHRUNK}.{os.getpid()}"
            draft.write_text(json.dumps({"micro_batch_size": micro_batch}) + "\n")
            draft.replace(self._run_dir / SHRUNK)
            return (
                f"{text} This strategy communicates inside micro-batches, so the window cannot be "
                "retried. The next start of this run folder continues from its last checkpoint "
                f"with micro-batches of {smaller.micro_batch_size} sample(s) "
                f"({smaller.gradient_accumulation_steps} per rank, the same effective batch); "
                "launch.max_restarts or torchrun --max-restarts start it automatically."
            )
        return (
            f"{text} Use accum.micro_batch_size={smaller.micro_batch_size} "
            f"({smaller.gradient_accumulation_steps} micro-batches per rank, the same effective "
            f"batch), accum.micro_batch_size=auto or accum.on_oom=shrink; or {REMEDIES}."
        )


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, ended by a period."""
    return f"{str(error).strip().split(chr(10))[0].rstrip('.')}."

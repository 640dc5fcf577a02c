"""Runs that are stopped, fail, or go on elsewhere: on other numbers of ranks, under other
strategies."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from disks import fill, small_disk
from faults import Fault, flip_byte
from runs import STEPS, Attempt, Run, Undisturbed, assert_each_sample_once, wait_for
from torch.utils._python_dispatch import TorchDispatchMode

from distaccum.app.names import RENAMED
from distaccum.step.accumulator import Accumulator

Make = Callable[..., Run]

# A step's gradient is a sum of a thousand or so float64 numbers of which each is rounded by 1.1e-16
# of itself, in another order; eight steps of AdamW carry it on, whose division by a root of small
# second moments may enlarge it by some hundreds. 1e-9 leaves room for that and would show a sample
# too many (1e-2) or float32 anywhere (1e-7).
TOLERANCE = 1e-9


def stop_after(step: int, rank: int = 0, kind: str = "SIGTERM") -> list[Fault]:
    """A signal in the forward of this step: its boundary is where all ranks stop."""
    return [Fault(rank, step, "forward", kind)]


def assert_stopped(run: Run, attempt: Attempt, step: int, reason: str) -> None:
    """All ranks saved at this step and ended well."""
    assert attempt.codes == [0] * len(attempt.codes), str(attempt)
    assert json.loads((run.run_dir / "PREEMPTED").read_text()) == {"step": step, "reason": reason}
    assert run.step == step == run.checkpoint().step
    assert run.trajectory()[-1][0] == step
    assert not list(run.run_dir.glob("checkpoints/*.part"))


def assert_same_numbers(found: Run, expected: Run) -> None:
    assert len(found.trajectory()) == len(expected.trajectory())
    for own, other in zip(found.trajectory(), expected.trajectory(), strict=True):
        assert own == pytest.approx(other, rel=TOLERANCE, abs=0), f"step {other[0]}"
    (own_end,), (other_end,) = found.records("validation")[-1:], expected.records("validation")[-1:]
    assert own_end["loss"] == pytest.approx(other_end["loss"], rel=TOLERANCE, abs=0)


def assert_same_bits(found: Run, expected: Run) -> None:
    assert found.sha256() == expected.sha256()
    assert found.trajectory() == expected.trajectory()


def go_on(run: Run, stages: list[tuple[int, int, str]], *more: str) -> None:
    """Train by stages of (until which step, ranks, strategy)."""
    for until, ranks, parallel in stages:
        extra = (
            f"parallel={parallel}",
            *more,
            *(["parallel.replicas=2"] if parallel == "hsdp" else []),
        )
        if until == STEPS:
            run.finish(ranks, *extra)
        else:
            faults = stop_after(until, rank=ranks - 1)
            assert_stopped(run, run.start(ranks, *extra, faults=faults), until, reason_of(ranks))
            assert run.acted(*faults)
    assert not (run.run_dir / "PREEMPTED").exists()


def reason_of(ranks: int) -> str:
    """Rank 0 writes the marker, and the signal came to the last rank."""
    return "SIGTERM" if ranks == 1 else "a request from another rank"


# Another number of ranks, another strategy.

CHAINS = {
    "4 ranks, 2, 3": [(3, 4, "ddp"), (5, 2, "ddp"), (STEPS, 3, "ddp")],
    "ddp, fsdp, single, hsdp": [
        (2, 2, "ddp"),
        (4, 2, "fsdp"),
        (6, 1, "single"),
        (STEPS, 4, "hsdp"),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_trajectory_is_that_of_one_process(
    chain: str, run: Make, undisturbed: Undisturbed
) -> None:
    found = run("precision=fp64")
    go_on(found, CHAINS[chain])
    assert_same_numbers(found, undisturbed.of(1, "precision=fp64"))
    assert_each_sample_once(found)


@pytest.mark.parametrize(
    ("last_window", "ramp", "unit"),
    [("fill", "linear", "samples"), ("keep", "jump", "steps")],
    ids=["fill", "keep"],
)
def test_an_effective_batch_that_changes(
    last_window: str, ramp: str, unit: str, run: Make, undisturbed: Undisturbed
) -> None:
    second = 12 if unit == "samples" else 3
    more = (
        "precision=fp64", "accum.effective_batch_size=null", f"accum.last_window={last_window}",
        f"accum.ramp={ramp}",
        f"accum.schedule=[{{from: 0, effective_batch_size: 4}}, {{from: {second}, "
        "effective_batch_size: 10}]",
        f"accum.schedule_unit={unit}",
    )  # fmt: skip
    found, expected = run(*more), undisturbed.of(1, *more)
    go_on(found, [(2, 2, "ddp"), (5, 3, "fsdp"), (STEPS, 1, "single")])
    assert_same_numbers(found, expected)
    assert found.samples() == expected.samples()
    assert len({len(rows) for rows in found.computed().values()}) > 1


def test_batchnorm(run: Make, undisturbed: Undisturbed) -> None:
    more = (
        "precision=fp64", "data=digits", "model=resnet", "model.widths=[4,4]",
        "nn.batchnorm=pooled", "train.steps=5", "accum.effective_batch_size=10",
    )  # fmt: skip
    more = (
        *(word for word in undisturbed.overrides if not word.startswith(("model.", "data"))),
        *more,
    )
    expected, found = run(), run()
    expected.overrides = found.overrides = more
    expected.finish(1)
    for until, ranks in ((2, 2), (None, 3)):
        if until is None:
            found.finish(ranks, "parallel=ddp")
        else:
            assert_stopped(
                found,
                found.start(ranks, "parallel=ddp", faults=stop_after(until)),
                until,
                "SIGTERM",
            )
    assert_same_numbers(found, expected)
    statistics, other = found.tensors(), expected.tensors()
    running = [name for name in other if "running_" in name]
    assert running
    for name in running:
        torch.testing.assert_close(statistics[name], other[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_loss_scale_goes_on(run: Make, undisturbed: Undisturbed) -> None:
    more = (
        "precision=fp16",
        "precision.loss_scale=1024",
        "precision.loss_scale_growth_windows=3",
        "parallel=ddp",
    )
    found, expected = run(*more), undisturbed.of(2, *more)
    assert_stopped(found, found.start(2, faults=stop_after(5)), 5, "SIGTERM")
    assert found.checkpoint().facts["accumulator"]["loss_scale"] == {"value": 2048.0, "good": 2}
    found.finish(2)
    assert found.checkpoint().facts["accumulator"] == expected.checkpoint().facts["accumulator"]
    assert_same_bits(found, expected)


def test_micro_batches_times_ranks_stay_the_same_effective_batch(
    run: Make, undisturbed: Undisturbed
) -> None:
    found = run(
        "precision=fp64",
        "accum.effective_batch_size=null",
        "accum.micro_batch_size=2",
        "accum.gradient_accumulation_steps=2",
    )
    go_on(found, [(3, 2, "ddp"), (STEPS, 4, "ddp")])
    expected = undisturbed.of(1, "precision=fp64")
    assert_same_numbers(found, expected)
    assert found.computed() == expected.computed()


def test_a_checkpoint_of_version_0_1_continues(run: Make, undisturbed: Undisturbed) -> None:
    """With the names that its configuration had then, bit for bit and without a note of other
    settings."""
    then = {now: before for before, now in RENAMED.items()}
    found = run("parallel=single")
    assert_stopped(found, found.start(1, faults=stop_after(3)), 3, "SIGTERM")
    manifest = found.checkpoint().path / "manifest.json"
    written = json.loads(manifest.read_text())
    facts = written["facts"]
    for section, part in facts["config"].items():
        if isinstance(part, dict):
            names = {
                name: then.get(f"{section}.{name}", f"{section}.{name}").partition(".")[2]
                for name in part
            }
            facts["config"][section] = {names[name]: value for name, value in part.items()}
    assert {"micro", "num_micros", "effective_batch"} <= facts["config"]["accum"].keys()
    facts["identity"] = {then.get(name, name): value for name, value in facts["identity"].items()}
    facts["progress"]["heldout"] = facts["progress"].pop("validation")
    facts["micro_size"] = facts.pop("micro_batch_size")
    manifest.write_text(json.dumps(written))
    found.finish(1)
    assert_same_bits(found, undisturbed.of(1, "parallel=single"))
    assert "setting changed" not in str(found.attempts[-1])


# Signals and clocks.


def test_a_signal_to_one_rank_stops_all_at_one_boundary(
    run: Make, undisturbed: Undisturbed
) -> None:
    found = run("parallel=ddp")
    plan = {1: ("SIGTERM", 1), 3: ("SIGUSR1", 0), 4: ("SIGUSR2", 1), 7: ("SIGINT", 0)}
    for step, (name, rank) in plan.items():
        faults = stop_after(step, rank, name)
        reason = name if rank == 0 else "a request from another rank"
        assert_stopped(found, found.start(2, faults=faults), step, reason)
        assert found.acted(*faults)
    found.finish(2)
    assert not (found.run_dir / "PREEMPTED").exists()
    resumed = [record["step"] for record in found.records("resume")]
    assert resumed == list(plan), "each start goes on where the one before has stopped"
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))
    assert_each_sample_once(found)


def test_processes_that_read_ahead(run: Make, undisturbed: Undisturbed) -> None:
    """What they have read and nobody has computed is read again; the signal is not theirs."""
    found = run("parallel=ddp", "loader.workers=1")
    assert_stopped(found, found.start(2, faults=stop_after(3)), 3, "SIGTERM")
    # of one alone, its reader would keep the sockets open for 5 s
    killed = [Fault(1, 6, "update", "kill_all")]
    assert found.start(2, faults=killed).codes == [-signal.SIGKILL] * 2
    assert found.acted(*stop_after(3), *killed)
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))
    assert_each_sample_once(found)


def test_only_a_second_ctrl_c_ends_the_process_before_it_has_saved(
    run: Make, undisturbed: Undisturbed
) -> None:
    found = run("parallel=single")
    (hang,) = faults = [Fault(0, 4, "update", "hang")]

    def signals(pids: list[int]) -> None:
        wait_for(hang.record(found.run_dir))
        os.kill(pids[0], signal.SIGUSR1)  # a scheduler's announcement, and its limit
        time.sleep(2.2)  # what this is about: more than two seconds later
        os.kill(pids[0], signal.SIGTERM)
        for _ in range(2):  # as a terminal and a launcher send it: one Ctrl-C
            os.kill(pids[0], signal.SIGINT)
        time.sleep(2.2)
        os.kill(pids[0], signal.SIGINT)

    attempt = found.start(1, faults=faults, meanwhile=signals)
    assert attempt.codes == [-signal.SIGINT], str(attempt)
    assert found.acted(*faults)
    assert (
        "saving and stopping after this step. Press Ctrl-C again to stop at once."
        in attempt.texts[0]
    )
    assert not (found.run_dir / "PREEMPTED").exists()
    assert found.step == 2
    found.finish(1)
    assert_same_bits(found, undisturbed.of(1, "parallel=single"))


def test_the_clock_stops_a_run_as_a_signal_does(run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=ddp")
    for step in range(1, 4):  # one step is more than this time, so that each start makes one
        assert_stopped(
            found, found.start(2, "train.max_minutes=1e-6"), step, "train.max_minutes=1e-06"
        )
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


def test_a_clock_run_that_is_started_again_and_again_ends(run: Make) -> None:
    found = run("parallel=single", "train.steps=3")
    for _ in range(2):
        assert found.start(1, "train.max_minutes=1e-6").codes == [0]
        assert (found.run_dir / "PREEMPTED").exists()
    found.finish(1, "train.max_minutes=1e-6")  # its last step is its end, not a stop
    assert found.step == 3
    assert not (found.run_dir / "PREEMPTED").exists()
    assert found.records("end")[-1]["reason"] == "all 3 steps done"


def test_a_signal_while_a_save_is_on_its_way(run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=ddp", "checkpoint.asynchronous=true")
    faults = [Fault(0, 2, "publish", "slow"), Fault(1, 3, "forward", "SIGTERM")]
    assert_stopped(found, found.start(2, faults=faults), 3, "a request from another rank")
    assert found.acted(*faults)
    assert {path.name for path in found.run_dir.glob("checkpoints/step-*")} == {
        "step-00000002",
        "step-00000003",
    }
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


def test_a_signal_in_the_thread_that_saves(run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=single", "checkpoint.asynchronous=true")
    faults = [Fault(0, 2, "save", "SIGUSR1")]
    attempt = found.start(1, faults=faults)
    assert attempt.codes == [0], str(attempt)
    assert found.acted(*faults)
    if found.step < STEPS:  # the thread may come late, and the last step is no stop
        assert_stopped(found, attempt, found.step, "SIGUSR1")
    found.finish(1)
    assert_same_bits(found, undisturbed.of(1, "parallel=single"))


# What is refused.


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder by its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed) -> Run:
    """A run of one process that was stopped after step 3."""
    found = Run(tmp_path_factory.mktemp("stopped"), *undisturbed.overrides, "parallel=single")
    assert_stopped(found, found.start(1, faults=stop_after(3)), 3, "SIGTERM")
    return found


REFUSED = {
    "model": (
        ["model.width=32"],
        "weight is (16, 16) float32 in the checkpoint and (32, 32) float32 here",
    ),
    "layers": (["model.num_layers=2"], "missing in the checkpoint and"),
    "effective batch": (
        ["accum.effective_batch_size=6"],
        "accum.effective_batch_size is 8 in the checkpoint and 6 here",
    ),
    "data": (["data.path={other}"], "data digest is"),
    "samples": (["data.seq_len=8"], "samples per epoch is 21 in the checkpoint and 42 here"),
    "seed": (["train.seed=1"], "train.seed is 0 in the checkpoint and 1 here"),
    "optimizer": (["optim=sgd"], "optim.name is adamw in the checkpoint and sgd here"),
    "precision": (["precision=fp64"], "float32 in the checkpoint and"),
    "steps": (
        ["train.steps=2", "optim.schedule.warmup=1"],
        "already has 3 steps, but the training has only 2",
    ),
    "resume=none": (["resume=none"], "resume=none, but"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_go_on_is_refused(what: str, stopped: Run, tmp_path: Path) -> None:
    overrides, text = REFUSED[what]
    (file,) = (
        word.removeprefix("data.path=")
        for word in stopped.overrides
        if word.startswith("data.path=")
    )
    (tmp_path / "other.txt").write_text(Path(file).read_text().swapcase())
    overrides = [word.format(other=tmp_path / "other.txt") for word in overrides]
    before = {
        name: digest
        for name, digest in tree(stopped.run_dir).items()
        if not name.startswith("faults")
    }
    attempt = stopped.start(1, *overrides)
    assert attempt.codes == [2], str(attempt)
    assert text in attempt.texts[0], str(attempt)
    assert "Traceback" not in attempt.texts[0]
    after = {
        name: digest
        for name, digest in tree(stopped.run_dir).items()
        if not name.startswith("faults")
    }
    assert {name for name in before if before[name] != after.get(name)} <= {"PREEMPTED"}
    assert set(after) <= set(before)


def test_a_checkpoint_that_is_not_there(run: Make, tmp_path: Path) -> None:
    found = run("parallel=single", f"resume={tmp_path / 'nowhere'}")
    attempt = found.start(1)
    assert attempt.codes == [2], str(attempt)
    assert f"resume={tmp_path / 'nowhere'}: there is no such folder" in attempt.texts[0]


def test_another_runs_checkpoint(stopped: Run, run: Make, undisturbed: Undisturbed) -> None:
    before = tree(stopped.run_dir / "checkpoints")
    found = run("parallel=single").finish(1, f"resume={stopped.run_dir}")
    assert found.records("resume")[0]["step"] == 3
    assert [row[0] for row in found.trajectory()] == list(range(4, STEPS + 1))
    assert found.sha256() == undisturbed.of(1, "parallel=single").sha256()
    assert tree(stopped.run_dir / "checkpoints") == before


def test_the_key_faults_is_not_of_the_package(tmp_path: Path) -> None:
    from commands import command_line

    for word in ("+faults=[{rank: 0, step: 1, at: start, kind: kill}]", "faults=[]"):
        ended = command_line(["train", word, f"run_dir={tmp_path / 'run'}"], tmp_path)
        assert ended.returncode == 2, ended.stderr
        assert "faults" in ended.stderr
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Failures.


def test_a_damaged_checkpoint_is_passed_over(run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=ddp", "checkpoint.best=false")
    faults = [Fault(0, 5, "forward", "corrupt"), Fault(1, 6, "forward", "kill")]
    attempt = found.start(2, faults=faults)
    assert attempt.codes[1] == -signal.SIGKILL
    assert found.acted(*faults)
    found.finish(2)
    damaged = found.run_dir / "checkpoints" / "step-00000004"
    (told,) = [note for note in found.notes().splitlines() if note.startswith(f"{damaged}: ")]
    assert "is damaged: its checksum is not the one in the manifest" in told
    assert [record["step"] for record in found.records("resume")] == [2]
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))
    assert_each_sample_once(found)


def test_a_damaged_checkpoint_of_another_run_is_named(run: Make) -> None:
    """And a start that is refused leaves everything as it was, half-written folders too."""
    found = run("parallel=single", "checkpoint.best=false").finish(1, "train.steps=4")
    folder = found.run_dir / "checkpoints"
    flip_byte(folder / "step-00000004")
    (folder / "step-00000006.part").mkdir()
    before = tree(folder)
    assert found.start(1, "train.seed=9").codes == [2]
    assert tree(folder) == before
    assert (folder / "step-00000006.part").is_dir()
    other = run("parallel=single", "checkpoint.best=false").finish(1, f"resume={found.run_dir}")
    assert "step-00000004: shard-00000.safetensors is damaged" in other.notes()
    assert [record["step"] for record in other.records("resume")] == [2]
    assert tree(folder) == before


def test_only_damaged_checkpoints(run: Make) -> None:
    found = run("parallel=single").finish(1, "train.steps=4")
    folder = found.run_dir / "checkpoints"
    for checkpoint in folder.glob("step-*"):
        flip_byte(checkpoint)
    before = tree(folder)
    attempt = found.start(1)
    assert attempt.codes == [1], str(attempt)
    assert "none of them can be read" in attempt.texts[0]
    assert "Traceback" not in attempt.texts[0]
    assert tree(folder) == before


@pytest.mark.parametrize("at", ["save", "publish", "pointer"])
def test_half_a_checkpoint_is_removed_and_told(
    at: str, run: Make, undisturbed: Undisturbed
) -> None:
    found = run("parallel=ddp")
    faults = [Fault(0, 4, at, "kill_all")]
    assert found.start(2, faults=faults).codes == [-signal.SIGKILL] * 2
    assert found.acted(*faults)
    left = {path.name for path in found.run_dir.glob("checkpoints/*.part")}
    assert left >= ({"latest.part"} if at == "pointer" else {"step-00000004.part"})
    assert found.step == 2
    found.finish(2)
    for name in left:
        assert f"removed {found.run_dir / 'checkpoints' / name}" in found.notes()
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


def test_a_save_behind_the_training_holds_its_own_step(run: Make, undisturbed: Undisturbed) -> None:
    """Half of the file is written when two more steps are done: it is the state of step 2 all the
    same."""
    found = run("parallel=single", "checkpoint.asynchronous=true")
    faults = [Fault(0, 2, "save", "slow"), Fault(0, 4, "save", "kill")]
    assert found.start(1, faults=faults).codes == [-signal.SIGKILL]
    assert found.acted(*faults)
    assert found.step == 2
    assert [record["step"] for record in found.records("step")] == [1, 2, 3, 4]
    found.finish(1)
    assert [record["step"] for record in found.records("resume")] == [2]
    assert_same_bits(found, undisturbed.of(1, "parallel=single"))


def test_numbers_that_are_not_finite(run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=ddp")
    for fault, text in (
        (
            Fault(1, 3, "forward", "nan"),
            "Step 3: loss not finite on rank 1, its micro-batch 0 (global 1)",
        ),
        (Fault(0, 6, "backward", "nan"), "Step 6: gradient norm nan, though every loss was finite"),
    ):
        attempt = found.start(2, faults=[fault])
        assert attempt.codes == [1, 1]
        assert found.acted(fault)
        assert all(f"{text}. Nothing was updated." in told for told in attempt.texts), str(attempt)
        assert found.step == (fault.step - 1) // 2 * 2
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_disk(asynchronous: bool, run: Make, undisturbed: Undisturbed) -> None:
    found = run("parallel=ddp", f"checkpoint.asynchronous={str(asynchronous).lower()}")
    stop, go_on = Fault(1, 4, "save", "fill_disk"), Fault(0, 6, "save", "fill_disk")
    attempt = found.start(2, faults=[stop])
    assert attempt.codes == [1, 1]
    assert found.acted(stop)
    for text in attempt.texts:
        assert "The checkpoint of step 4 was not saved" in text
        assert (
            "rank 1: OSError: [Errno 28] No space left on device. The last good one is"
            " step-00000002" in text
        )
    assert found.step == 2
    assert not list(found.run_dir.glob("checkpoints/*.part"))
    attempt = found.start(2, "checkpoint.on_failure=continue", faults=[go_on])
    assert attempt.codes == [0, 0], str(attempt)
    assert found.acted(go_on)
    assert (
        "checkpoint.on_failure=continue, so the training continues: The checkpoint of step 6"
        in found.notes()
    )
    assert re.search(r"not written: the checkpoint of step 6$", attempt.texts[0], re.MULTILINE), (
        attempt.texts[0]
    )
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


@pytest.fixture
def full_while_it_trains(run: Make) -> Iterator[tuple[Run, Callable[..., Attempt]]]:
    """A run on a disk of its own that is full from step 4 on; the function starts it."""
    found = run("parallel=ddp")
    found.run_dir.rmdir()
    with small_disk(found.run_dir, 1 << 20) as disk:
        if disk is None:
            pytest.skip("no file system can be mounted here")
        slow = Fault(0, 4, "forward", "slow")

        def meanwhile(_: list[int]) -> None:
            wait_for(slow.record(found.run_dir))
            fill(found.run_dir)

        yield found, lambda *more: found.start(2, *more, faults=[slow], meanwhile=meanwhile)


def test_a_disk_that_is_full_ends_no_run_that_is_to_go_on(
    full_while_it_trains: tuple[Run, Callable[..., Attempt]], undisturbed: Undisturbed
) -> None:
    found, start = full_while_it_trains
    attempt = start("checkpoint.on_failure=continue")
    assert attempt.codes == [0, 0], str(attempt)
    told = attempt.texts[0]
    warning = (
        "metrics.jsonl cannot be written (No space left on device); the run continues without "
        "these records"
    )
    assert told.count(warning) == 1
    assert "Traceback" not in told
    lost = [
        *(f"the checkpoint of step {step}" for step in (4, 6, 8)),
        r"result.json \(No space left on device\)",
    ]
    assert re.search(
        rf"not written: {'; '.join(lost)}; [1-9]\d* record\(s\) of metrics.jsonl", told
    ), told
    # and what the file's last block had room for
    assert [step for step, *_ in found.trajectory()][:3] == [1, 2, 3]
    (found.run_dir / "ballast").unlink()
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


def test_a_disk_that_is_full_is_one_message(
    full_while_it_trains: tuple[Run, Callable[..., Attempt]],
) -> None:
    _, start = full_while_it_trains
    attempt = start("checkpoint.keep=0", "train.steps=80")
    assert attempt.codes[0] == 1
    assert (
        "metrics.jsonl cannot be written (No space left on device), so the run stops."
        in attempt.texts[0]
    )
    assert "Traceback" not in attempt.texts[0]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("raise", "ArithmeticError: the culprit's own error"),
        ("oom", "out of memory, says the test"),
    ],
)
def test_an_error_on_one_rank_ends_all(
    kind: str, text: str, run: Make, undisturbed: Undisturbed
) -> None:
    found = run("parallel=ddp")
    for fault in (Fault(1, 3, "backward", kind), Fault(0, 6, "forward", kind)):
        attempt = found.start(2, faults=[fault])
        assert found.acted(fault)
        assert attempt.codes == [1, 1], str(attempt)
        assert text in attempt.texts[fault.rank]
        assert text not in attempt.texts[1 - fault.rank]
    found.finish(2)
    assert_same_bits(found, undisturbed.of(2, "parallel=ddp"))


# What it costs.


@contextmanager
def counting(place: Path, rank: int) -> Iterator[None]:
    """Note each collective of the thread that trains, a line a step: from its begin to that of the
    next one."""
    step = Accumulator.step

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: Counter[str] = Counter()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                self.names[func._schema.name.partition("::")[2].rstrip("_")] += 1
            return func(*args, **(kwargs or {}))

    count = Count()

    def stepping(self: Any, window: Any, asking: Any = None) -> Any:
        with (place / f"collectives-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(count.names) + "\n")
        count.names.clear()
        return step(self, window, asking)

    with mock.patch.object(Accumulator, "step", stepping), count:
        yield


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopping_and_saving_cost_no_collective_of_their_own(parallel: str, run: Make) -> None:
    found = run(
        f"parallel={parallel}", "accum.audit=always", "checkpoint.every.steps=null",
        "checkpoint.every.minutes=60", "train.max_minutes=60", "train.validate_every_steps=100",
    )  # fmt: skip
    attempt = found.start(2, around=counting)
    assert attempt.codes == [0, 0], str(attempt)
    for rank in range(2):
        lines = (
            (found.folder / "attempts" / "1" / f"collectives-{rank}.jsonl").read_text().splitlines()
        )
        # The first line is the set-up, the second the first window; in the second window DDP
        # arranges its buckets. The last window has no line, as evaluation and save follow it.
        windows = [json.loads(line) for line in lines[3:]]
        assert len(windows) == STEPS - 3
        # DDP: one bucket of gradients and the one row of control numbers. FSDP2 sums no gradient by
        # all-reduce.
        assert {window["allreduce"] for window in windows} == {2 if parallel == "ddp" else 1}
        if parallel == "ddp":
            assert all(set(window) == {"allreduce"} for window in windows)
    ledger = [note for note in found.notes().splitlines() if note.startswith("ledger: step")]
    assert len(ledger) == STEPS
    assert all("exactly the forecast" in note for note in ledger)
    assert all(math.isfinite(row[1]) for row in found.trajectory())

"""The program that measures a GPU, on the CPU: every arm trains alike, and nothing that was not
measured is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import command_line

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_arms import ARMS, GPT2_124M, TINY, missing  # noqa: E402
from gpu_turns import GoneError, Job, Order, Turn  # noqa: E402

PROGRAM = (
    f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\nfrom gpu import"
    " main\nsys.exit(main())\n"
)


def test_every_arm_trains_to_the_losses_of_the_loop_by_hand(tmp_path: Path) -> None:
    done = command_line(
        ["--device", "cpu", "--smoke", "--out", "found.json"], tmp_path, program=PROGRAM
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["problems"], found["smoke"], found["peak_tflops"]) == ([], True, None)
    assert found["setting"]["window_tokens"] == 4 * 2 * 32
    assert len(found["groups"]) == 2
    for rows in found["groups"].values():
        assert [row["arm"] for row in rows] == list(ARMS)
        for row in rows:
            if missing(row["arm"]):
                assert row["status"] == "not installed"
                assert row["turns"] == row["samples_s"] == []
                continue
            assert (row["status"], row["reason"]) == ("measured", "")
            # One turn to warm up, two rounds, one with the alarm; each has a window before those
            # that are timed.
            assert [len(turn["losses"]) for turn in row["turns"]] == [2, 2, 2, 2]
            assert len(row["samples_s"]) == 2
            assert row["window_reads"] == (1 if row["arm"] == "distaccum" else 0)
            assert row["window_syncs"] is None  # needs CUDA
    arms = [arm for arm in ARMS if not missing(arm)]
    assert {"by hand", "distaccum", "Accelerate", "HF Trainer"} <= set(arms)
    assert done.stdout.count("2 turns") == 2 * len(arms)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--out", str(tmp_path / "found.json")]) == 2
    assert "no GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [TINY, GPT2_124M])
def test_flops_are_those_of_the_formula(sizes: Any) -> None:
    # Weights of all matrices: 12 width^2 a layer, and the head. 2 FLOPs each and token, three times
    # with the backward for inputs and for weights. Attention: two products of T x T x width, three
    # times.
    weights = 12 * sizes.layers * sizes.width**2 + sizes.vocab * sizes.width
    tokens = sizes.micro_batch_size * sizes.length
    assert (
        sizes.flops()
        == 6 * weights * tokens + 12 * sizes.layers * sizes.length * sizes.width * tokens
    )


def test_only_gpus_of_known_speed_have_a_peak() -> None:
    assert gpu.known_peak("NVIDIA H100 80GB HBM3") == gpu.known_peak("NVIDIA H200") == 989
    assert gpu.known_peak("NVIDIA A100-SXM4-80GB") == 312
    assert (
        gpu.known_peak("NVIDIA H100 PCIe")
        is gpu.known_peak("NVIDIA H200 NVL")
        is gpu.known_peak("CPU")
        is None
    )


class Clock:
    """Time that only arms take."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Fake:
    """An arm that takes a second per window, and longer for the first."""

    def __init__(self, job: Job, clock: Clock) -> None:
        self.job, self._clock, self._trained = job, clock, 0

    def ready(self, limit_s: float) -> None:
        if self.job.arm == "Lightning Trainer":
            raise GoneError("its process ended with exit code 1")

    def turn(self, order: Order, limit_s: float) -> Turn:
        if self.job.arm == "HF Trainer":
            raise GoneError("RuntimeError: fault")
        num_windows = order.untimed + order.timed
        taken_s = num_windows + (20.0 if self._trained == 0 else 0.0)
        self._clock.now += min(taken_s, limit_s)
        if taken_s > limit_s:
            raise GoneError("no answer")
        losses = [10.0 - 0.1 * (self._trained + index) for index in range(num_windows)]
        self._trained += num_windows
        syncs = order.timed if order.watch else None
        return Turn(float(order.timed), 2**30, losses, [1.0] * num_windows, reads=0, syncs=syncs)

    def end(self) -> None:
        pass


SETTING = gpu.Setting(
    "cuda", TINY, num_micro_batches=4, rounds=5, turn_windows=2, backend="inductor", limit_s=0.0
)


def rows_in(limit_s: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, gpu.Row]:
    clock = Clock()
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "Arm", lambda job: Fake(job, clock))
    monkeypatch.setattr(
        gpu, "missing", lambda arm: ["lightning"] if arm == "Lightning Fabric" else []
    )
    rows = gpu.measure(SETTING, None, limit_s)
    assert clock.now <= limit_s
    return {row.arm: row for row in rows}


def test_all_arms_but_those_that_fail_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_in(1000, monkeypatch)
    status = {
        name: (row.status, len(row.samples_s), row.window_syncs) for name, row in rows.items()
    }
    measured = ("measured", 5, 1.0)
    assert status == {
        "by hand": measured, "distaccum": measured, "Accelerate": measured, "HF Trainer": ("failed",
        0, None), "Lightning Fabric": ("not installed", 0, None), "Lightning Trainer": ("failed", 0,
        None),
    }  # fmt: skip
    assert gpu.judge(list(rows.values())) == [
        "HF Trainer: RuntimeError: fault", "Lightning Trainer: its process ended with exit code 1"
    ]  # fmt: skip
    printed = gpu.table(
        list(rows.values()), window_tokens=1000, window_flops=10**12, peak_tflops=10.0
    )
    assert (
        "distaccum          1,000 (1,000, 1,000)  1.000       10.0%  1,024     1           22.0"
        in printed
    )
    assert "failed: RuntimeError: fault" in printed
    assert "not installed: needs lightning" in printed


# Each arm needs 20 s and two windows to warm up, three windows a round, and two at the end.
@pytest.mark.parametrize(
    ("limit_s", "measured", "rounds"),
    [
        (0.0, 0, 0),
        (26.0, 0, 0),
        (29.0, 1, 1),
        (60.0, 2, 1),
        (75.0, 2, 4),
        (95.0, 3, 2),
        (200.0, 3, 5),
    ],
)
def test_arms_that_do_not_fit_are_told(
    limit_s: float, measured: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_in(limit_s, monkeypatch)
    took_part = [row for row in rows.values() if row.samples_s]
    assert len(took_part) == measured
    assert all(len(row.samples_s) >= rounds for row in took_part)
    late = [row for row in rows.values() if row.status == "no time left"]
    assert (
        len(took_part)
        + len(late)
        + sum(row.status in ("failed", "not installed") for row in rows.values())
        == 6
    )
    assert all(
        "no time left" in line
        for row in late
        for line in gpu.table([row], 1, 1, None).splitlines()[1:]
    )
    assert bool(measured) is ("not measured" not in "".join(gpu.judge(list(rows.values()))))


def trained(
    arm: str, losses: list[float], norms: list[float], syncs: float | None = None
) -> gpu.Row:
    turn = Turn(1.0, None, losses, norms, reads=0, syncs=None)
    return gpu.Row(arm, turns=[turn], samples_s=[1.0], window_syncs=syncs)


def test_a_loop_that_does_not_train_alike_is_no_result() -> None:
    hand = trained("by hand", [10.0, 9.8, 9.6], [2.0, 1.9, 1.8])
    right = trained("Accelerate", [10.0, 9.801, 9.602], [2.0, 1.901, 1.802])
    assert gpu.judge([hand, right, trained("distaccum", [10.0], [2.0], syncs=1.0)]) == []
    for wrong, what in (
        (trained("distaccum", [10.0, 10.0, 10.0], [2.0, 2.0, 2.0]), "its loss is not"),
        (trained("distaccum", [10.0, float("nan"), 9.6], [2.0, 1.9, 1.8]), "its loss is not"),
        (
            trained("distaccum", [10.0, 9.8, 9.6], [2.0 / 4, 1.9 / 4, 1.8 / 4]),
            "its gradient norm is not",
        ),
        (trained("distaccum", [10.0, 9.8, 9.6], [2.0, 1.9, 1.8], syncs=5.0), "5.0 host syncs"),
    ):
        assert any(what in problem for problem in gpu.judge([hand, wrong])), what
    stuck = trained("by hand", [10.0, 10.0, 10.0], [2.0, 2.0, 2.0])
    assert any("learned too little" in problem for problem in gpu.judge([stuck]))
    assert any(
        "was not measured" in problem
        for problem in gpu.judge([gpu.Row("by hand", "failed", "fault"), right])
    )

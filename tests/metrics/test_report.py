"""The report: metrics.jsonl, console, W&B with the real library, curve.png. No network beyond a
closed loopback port.

Everything that starts W&B runs in a process of its own, with warnings as errors: W&B keeps
settings, threads and an exit hook per process, and reads its address from the environment only
once. No warning filter is needed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pty
import re
import select
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distaccum.metrics import (
    Console,
    LoggerConfig,
    LoggerName,
    MetricsFile,
    WandbMode,
    count,
    duration,
    make_report,
    rate,
    read_metrics,
    size,
)
from distaccum.metrics.curve import draw_curve, loss_limits
from distaccum.metrics.plain import to_plain
from distaccum.metrics.wandb_run import allowed

CONF = Path(__file__).parents[2] / "conf" / "logger"
NO_LOGGER = LoggerConfig(
    name=LoggerName.none,
    project="p",
    entity=None,
    run_name=None,
    group=None,
    mode=WandbMode.offline,
    init_timeout_s=1.0,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- metrics.jsonl


def test_a_record_is_on_disk_when_write_returns(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write("step", step=1, loss=2.5, skipped=None, lr=1e-3)
    assert (
        tmp_path / "m.jsonl"
    ).read_text() == '{"kind": "step", "step": 1, "loss": 2.5, "skipped": null, "lr": 0.001}\n'
    metrics.write("validation", step=1, loss=3.0)
    metrics.close()
    assert [record["kind"] for record in read_metrics(tmp_path / "m.jsonl")] == [
        "step",
        "validation",
    ]


def test_non_finite_floats_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path)
    metrics.write(
        "step", loss=math.nan, grad_norm=math.inf, other=-math.inf, lr=0.5, nested={"x": math.nan}
    )
    metrics.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["loss"] is None
    assert raw["non_finite"] == {"loss": "nan", "grad_norm": "inf", "other": "-inf"}
    (record,) = read_metrics(path)
    assert math.isnan(record.pop("loss"))
    assert record == {
        "kind": "step",
        "grad_norm": math.inf,
        "other": -math.inf,
        "lr": 0.5,
        "nested": {"x": "nan"},
    }


@pytest.mark.parametrize("name", ["kind", "non_finite"])
def test_a_field_cannot_take_the_name_of_the_frame(tmp_path, name):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=name):
        metrics.write("step", **{name: 1})
    metrics.close()


def test_a_torn_last_line_is_said_and_the_rest_is_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    assert read_metrics(path) == [{"kind": "step", "step": 1}, {"kind": "torn", "bytes": 20}]


def test_the_next_run_in_the_same_folder_starts_on_a_new_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    metrics = MetricsFile(path)
    metrics.write("step", step=2)
    metrics.close()
    assert (
        path.read_text()
        == '{"kind": "step", "step": 1}\n{"kind": "torn", "bytes": 20}\n{"kind": "step", "step":'
        " 2}\n"
    )


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "step", "step": 1}')
    MetricsFile(path).close()
    assert read_metrics(path) == [{"kind": "step", "step": 1}]
    assert path.read_text().endswith("}\n")


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "step"}\nhello\n{"kind": "step"}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: .*hello"):
        read_metrics(path)


def test_any_configuration_becomes_plain_json():
    class Word(Enum):
        a = "A"

    @dataclass
    class Inner:
        path: Path
        word: Word

    value = {
        "inner": Inner(Path("x/y"), Word.a),
        3: (1, 2.5, None, True),
        Word.a: {"b", "a"},
        "bad": math.inf,
        "t": io,
    }
    plain = to_plain(value)
    json.dumps(plain, allow_nan=False)
    assert plain == {
        "inner": {"path": "x/y", "word": "A"},
        "3": [1, 2.5, None, True],
        "A": ["a", "b"],
        "bad": "inf",
        "t": str(io),
    }


# ---- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(0), "0"),
        (count(999), "999"),
        (count(1234), "1.23K"),
        (count(12345678), "12.3M"),
        (count(999_999), "1M"),
        (count(0.5), "0.5"),
        (count(-1500), "-1.5K"),
        (count(math.nan), "nan"),
        (size(0), "0 B"),
        (size(1023), "1023 B"),
        (size(1024), "1.0 KiB"),
        (size(4_300_000), "4.1 MiB"),
        (size(1024**2 - 1), "1.0 MiB"),
        (size(3 * 2**30), "3.0 GiB"),
        (rate(12345.6), "12.3K/s"),
        (duration(0.25), "0.25s"),
        (duration(9.999), "10s"),
        (duration(59.7), "1m 00s"),
        (duration(92), "1m 32s"),
        (duration(7500), "2h 05m"),
        (duration(100_000), "1d 03h"),
    ],
)
def test_numbers_for_people(text, expected):
    assert text == expected


# ---- console


def test_start_block_is_aligned_and_wrapped_at_100_columns_without_a_terminal():
    stream = io.StringIO()
    words = "word " * 60
    Console(stream).start_block(
        {"Batch": {"effective batch": "64 samples", "x": words.strip()}, "Model": {"size": "1.2M"}}
    )
    lines = stream.getvalue().splitlines()
    assert lines[1:3] == ["Batch", "  effective batch  64 samples"]
    assert max(map(len, lines)) <= 100
    assert "Model" in lines
    column = len("  effective batch  ")
    wrapped = [line for line in lines if "word" in line]
    assert len(wrapped) > 2
    assert wrapped[0][:column] == "  x".ljust(column)
    assert all(line[:column].isspace() for line in wrapped[1:])
    assert " ".join(line[column:] for line in wrapped) == words.strip()
    assert "  size".ljust(column) + "1.2M" in lines


def test_start_block_does_not_cut_what_is_to_be_copied():
    stream = io.StringIO()
    digest = "0123456789abcdef" * 8
    Console(stream).start_block({"Data": {"digest": digest}})
    assert digest in stream.getvalue()


def test_without_a_terminal_one_plain_line_per_call():
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, clock)
    for step in range(1, 5):
        clock.now += 0.001  # faster than a bar would be redrawn: all the same every call is a line
        console.progress(step, 100, {"loss": f"{step}.0", "lr": "1e-3"})
    console.end("stopped", {"steps": "4"})
    assert (
        stream.getvalue() == "step   1/100  loss 1.0  lr 1e-3\n"
        "step   2/100  loss 2.0  lr 1e-3  left 0.10s\n"
        "step   3/100  loss 3.0  lr 1e-3  left 0.10s\n"
        "step   4/100  loss 4.0  lr 1e-3  left 0.10s\n"
        "end: stopped  steps 4\n"
    )
    assert "\r" not in stream.getvalue()


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOBase, int]]:
    leader, follower = pty.openpty()
    with open(
        follower, "w", encoding="ascii"
    ) as stream:  # strict: anything that is not ASCII raises
        yield stream, leader
    os.close(leader)


def typed(leader: int) -> str:
    """What a terminal has been sent since the last call; the line discipline writes a newline as CR
    LF."""
    sent = b""
    # the kernel hands over in pieces, a moment later
    while select.select([leader], [], [], 0.3)[0]:
        sent += os.read(leader, 1 << 16)
    return sent.decode("ascii").replace("\r\n", "\n")


def test_on_a_terminal_one_bar_redrawn_ten_times_a_second(terminal):
    stream, leader = terminal
    clock = Clock()
    console = Console(stream, clock)
    assert console.is_terminal
    for step in range(1, 101):
        clock.now = step * 0.01
        console.progress(step, 100, {"loss": f"{200 - step}"})
    sent = typed(leader)
    drawings = sent.split("\r")[1:]
    assert 9 <= len(drawings) <= 12  # one second's worth, and the last
    assert sent.count("\n") == 1
    assert sent.endswith("\n")
    assert "\x1b" not in sent
    assert re.match(r"\[#{24}\] 100% step 100/100  loss 100 *\n", drawings[-1])
    # a pseudo-terminal without a size counts as 80 wide
    assert max(len(drawing.rstrip("\n")) for drawing in drawings) < 80


def test_on_a_terminal_another_line_leaves_the_bar_with_its_newest_numbers(terminal):
    stream, leader = terminal
    clock = Clock()
    console = Console(stream, clock)
    console.progress(1, 100, {"loss": "a long text that is longer than the next"})
    clock.now = 0.01  # too soon to be drawn by itself
    console.progress(2, 100, {"loss": "short"})
    first = typed(leader)
    assert "short" not in first
    console.line("held-out")
    bar, line, rest = typed(leader).split("\n")
    assert "step   2/100  loss short" in bar
    assert len(bar) == len(first)  # spaces wipe what was longer
    assert (line, rest) == ("held-out", "")
    console.line("again")
    assert typed(leader) == "again\n"  # the bar was left once, not drawn again


# ---- curve.png


def write_run(path: Path, losses: list[float], validation: dict[int, float]) -> None:
    metrics = MetricsFile(path)
    for step, loss in enumerate(losses, start=1):
        metrics.write("step", step=step, loss=loss, lr=1e-3 / step)
        if step in validation:
            metrics.write("validation", step=step, loss=validation[step])
    metrics.close()


def test_the_curve_is_drawn(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.pyplot")]:
        monkeypatch.delitem(sys.modules, name)  # other tests of this process may have used it
    write_run(
        tmp_path / "m.jsonl", [1 + 5 / i for i in range(1, 101)] + [math.nan], {50: 1.3, 100: 1.1}
    )
    out = tmp_path / "curve.png"
    assert draw_curve(tmp_path / "m.jsonl", out, baseline=3.1)

    from matplotlib.image import imread

    pixels = imread(out)
    assert pixels.shape == (1050, 1350, 4)

    def near(colour: tuple[float, float, float]):
        return (abs(pixels[:, :, :3] - colour) < 0.03).all(axis=2)

    for colour in ((0.267, 0.467, 0.667), (0.8, 0.2, 0.067), (0.133, 0.533, 0.2)):
        assert near(colour).sum() > 200, colour  # training, held-out, learning rate
    assert near((0.333, 0.333, 0.333)).sum(axis=1).max() > 400  # the baseline: a row of grey dashes
    assert "matplotlib.pyplot" not in sys.modules


def test_nothing_to_draw(tmp_path):
    out = tmp_path / "curve.png"
    assert not draw_curve(tmp_path / "missing.jsonl", out)
    write_run(tmp_path / "m.jsonl", [math.nan], {})
    assert not draw_curve(tmp_path / "m.jsonl", out)
    assert not out.exists()


def test_the_axis_shows_all_but_rare_spikes():
    falling = [5.5 * 0.99**i for i in range(300)]
    low, high, above = loss_limits(falling, [3.0])
    assert (low < min(falling), high > 5.5, above) == (True, True, 0)
    low, high, above = loss_limits([*falling, 1e4], [3.0])
    assert above == 1
    assert 5 < high < 7
    _, high, _ = loss_limits(falling, [50.0])  # a mark is never cut off
    assert high > 50
    low, high, _ = loss_limits([2.0], [])
    assert low < 2.0 < high


# ---- report


def step_fields(step: int) -> dict[str, float | int | str | None]:
    return {
        "step": step,
        "epoch": 0.5,
        "samples": 64 * step,
        "tokens": 6400 * step,
        "loss": 4.0 / step,
        "grad_norm": None if step == 2 else 1.25,
        "lr": 1e-3,
        "weight": 6400,
        "skipped": "denominator 0" if step == 2 else None,
        "samples_per_s": 1234.0,
        "tokens_per_s": None,
        "data_wait_share": 0.02,
        "comm_share": 0.1,
        "peak_memory_bytes": 3 * 2**30,
    }


def test_a_report_without_a_logger(tmp_path):
    stream = io.StringIO()
    report = make_report(tmp_path / "run", NO_LOGGER, {}, stream)
    report.start({"Batch": {"effective": "64"}}, {"plan": {"effective_batch_size": 64}})
    for step in range(1, 4):
        report.step(step_fields(step), 3, show=step != 1)
    report.validation({"step": 3, "loss": 1.5, "samples": 192, "tokens": 19200})
    report.note("ledger: as forecast")
    report.end(
        "all 3 steps done",
        {"validation loss": 1.5, "samples": 192_000, "none": None},
        0,
        baseline=3.0,
    )
    report.end("again", {}, 1)  # a finally clause may end what has ended

    text = stream.getvalue()
    assert "step 1/3" not in text
    assert (
        "step 2/3  epoch 0.5  loss 2.0000  grad -  lr 1.00e-03  samples 1.23K/s  data 2%  comm 10% "
        " mem 3.0 GiB" in text
    )
    assert "skipped denominator 0" in text
    assert "validation loss 1.5000 at step 3\nledger: as forecast\n" in text
    assert "end: all 3 steps done  validation loss 1.5  samples 192,000  time 0." in text
    assert text.endswith(f"run folder: {tmp_path / 'run'}\n")
    assert "again" not in text

    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["kind"] for record in records] == [
        "start",
        "step",
        "step",
        "step",
        "validation",
        "note",
        "end",
    ]
    assert records[2] == {"kind": "step", **step_fields(2)}
    assert records[-1]["reason"] == "all 3 steps done"
    assert records[-1]["baseline"] == 3.0
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_picture_that_fails_does_not_end_the_run_badly(tmp_path):
    stream = io.StringIO()
    report = make_report(tmp_path, NO_LOGGER, {}, stream)
    report.step(step_fields(1), 1, show=True)
    (tmp_path / "curve.png").mkdir()
    report.end("done", {}, 0)
    assert "curve.png was not drawn (IsADirectoryError" in stream.getvalue()
    assert stream.getvalue().endswith(f"run folder: {tmp_path}\n")


def test_the_configuration_of_the_group_fits_the_schema():
    none = OmegaConf.load(CONF / "none.yaml")
    own = OmegaConf.load(CONF / "wandb.yaml")
    assert own.pop("defaults") == ["none", "_self_"]
    for config, name in ((none, LoggerName.none), (OmegaConf.merge(none, own), LoggerName.wandb)):
        merged = OmegaConf.merge(OmegaConf.structured(LoggerConfig), config)
        assert not OmegaConf.missing_keys(merged)
        logger = OmegaConf.to_object(merged)
        assert isinstance(logger, LoggerConfig)
        assert logger.name is name
        assert logger.mode is WandbMode.offline


# ---- W&B

TRAINING = """
    import os, signal, sys, time
    from pathlib import Path
    from distaccum.metrics import LoggerConfig, LoggerName, WandbMode, make_report

    # Importing distaccum.metrics must stay light.
    assert not {"wandb", "matplotlib"} & sys.modules.keys()
    run_dir, mode, fault = Path(sys.argv[1]), WandbMode(sys.argv[2]), sys.argv[3]
    config = LoggerConfig(
        name=LoggerName.wandb, project="proj", entity=None, run_name="a run", group="a group",
        mode=mode, init_timeout_s=1.5,
    )
    started = time.monotonic()
    settings = {"optim": {"lr": 0.001}, "mode": mode, "folder": Path("data")}
    report = make_report(run_dir, config, settings)
    print(f"made in {time.monotonic() - started:.2f}")
    report.start({}, {"plan": {"effective_batch_size": 64}})
    run = report._wandb
    if fault == "service killed":
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                stat = Path(f"/proc/{pid}/stat").read_text()
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid() and "wandb" in command:
                os.kill(int(pid), signal.SIGKILL)
                print("fault: killed")
        time.sleep(0.5)
    for step in (1, 2, 3, 2):  # the last: an earlier step again, as after a resumption
        if fault == "odd value" and step == 2:
            run.log("train", {"odd": object()})
            print("fault: odd")
        counts = {"step": step, "samples": 64 * step, "tokens": 640 * step}
        report.step({**counts, "loss": 4.0 / step, "lr": None}, 3, True)
    report.validation({"step": 3, "loss": 1.5, "samples": 192, "tokens": 1920})
    started = time.monotonic()
    report.end("done", {"validation_loss": 1.5}, 3, baseline=2.5)
    report._wandb.finish(0)  # twice is once
    print(f"ended in {time.monotonic() - started:.2f}")
"""


@dataclass
class StepStats:
    out: str
    run_dir: Path

    def seconds(self, what: str) -> float:
        found = re.search(rf"^{what} in ([\d.]+)$", self.out, re.MULTILINE)
        assert found, self.out
        return float(found[1])

    def said(self) -> list[str]:
        return [line for line in self.out.splitlines() if line.startswith("W&B")]


def train(tmp_path: Path, mode: str, fault: str, api_key: str) -> StepStats:
    """Run TRAINING in a process that can reach nothing: W&B's address is a loopback port where
    nobody listens."""
    import matplotlib as mpl

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    no_proxy = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
    own = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{closed_port}",
        "WANDB_API_KEY": api_key,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "NETRC": str(tmp_path / "netrc"),
        "HOME": str(tmp_path),
        "MPLCONFIGDIR": mpl.get_cachedir(),  # else each home starts with listing all fonts
    }
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(TRAINING), str(run_dir), mode, fault],
        env=inherited | no_proxy | own,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if not fault:  # a killed service makes W&B's own exit hook print
        assert done.stderr == ""
    # whatever W&B did: start, 4 steps, held-out, end
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 7
    assert (run_dir / "curve.png").exists()
    assert done.stdout.rstrip().splitlines()[-2] == f"run folder: {run_dir}"
    return StepStats(done.stdout, run_dir)


RUNS = {  # mode, fault, key
    "offline": ("offline", "", "k" * 40),
    "nobody answers": ("online", "", "k" * 40),
    "no key": ("online", "", ""),
    "service killed": ("offline", "service killed", "k" * 40),
    "odd value": ("offline", "odd value", "k" * 40),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Future[StepStats]]]:
    """All trainings with W&B, two at a time: most of their time they wait."""
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for name, arguments in RUNS.items():
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            if arguments[1]:  # as after a killed run: its W&B folder is there
                (folder / "run" / "wandb" / "offline-run-20260101_000000-abcdefgh").mkdir(
                    parents=True
                )
            started[name] = pool.submit(train, folder, *arguments)
        yield started
        pool.shutdown(cancel_futures=True)


def wandb_records(run_dir: Path) -> list:
    """All records of the one offline run in a run folder, in order.

    The format is LevelDB's log: after a header of 7 bytes, blocks of 32 KiB hold frames of checksum
    (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last) and payload; fewer than 7
    bytes at a block's end are padding.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    records, payload, at = [], b"", 7
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(payload))
            payload = b""
    return records


def of_kind(records: list, kind: str) -> list:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def named(items) -> dict[str, object]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def check_offline_run(outcome: StepStats) -> None:
    records = wandb_records(outcome.run_dir)
    run = of_kind(records, "run")[0]
    assert (run.project, run.display_name, run.run_group) == ("proj", "a run", "a group")
    config = named(run.config.update)
    for late in of_kind(records, "config"):
        config |= named(late.update)
    assert config["optim"] == {"lr": 0.001}
    assert config["mode"] in ("offline", "online")
    assert config["folder"] == "data"
    assert config["plan"] == {"effective_batch_size": 64}

    metrics = {
        metric.name or metric.glob_name: metric.step_metric for metric in of_kind(records, "metric")
    }
    for axis in ("step", "samples", "tokens"):
        assert metrics[axis] == ""
    assert metrics["train/*"] == metrics["validation/*"] == "step"

    rows = [named(row.item) for row in of_kind(records, "history")]
    rows = [
        {name: value for name, value in row.items() if not name.startswith("_")} for row in rows
    ]
    assert rows == [
        *(
            {"step": s, "samples": 64 * s, "tokens": 640 * s, "train/loss": 4.0 / s}
            for s in (1, 2, 3, 2)
        ),
        {"step": 3, "samples": 192, "tokens": 1920, "validation/loss": 1.5},
    ]
    summary: dict[str, object] = {}
    for update in of_kind(records, "summary"):
        summary |= named(update.update)
    assert summary["end/reason"] == "done"
    assert summary["end/validation_loss"] == 1.5
    assert [final.exit_code for final in of_kind(records, "exit")] == [3]
    assert not of_kind(records, "output_raw")  # the console is not captured


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "disabled"),
        ("WANDB_DISABLED", "true"),
        ("WANDB_DISABLED", "1"),
        ("WANDB_MODE", "Disabled"),
    ],
)
def test_a_disabled_wandb_writes_nothing_and_is_said(name, value, tmp_path, monkeypatch):
    for other in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "distaccum.metrics.wandb_run._start", lambda *_: pytest.fail("it was started")
    )
    stream = io.StringIO()
    report = make_report(
        tmp_path, dataclasses.replace(NO_LOGGER, name=LoggerName.wandb), {}, stream
    )
    report.end("done", {}, 0)
    lines = [line for line in stream.getvalue().splitlines() if "W&B" in line]
    assert lines == [f"W&B: {name}={value}, so W&B is off in this run and writes no files"]
    assert not (tmp_path / "wandb").exists()


def test_wandbs_variables_never_add_to_what_was_asked():
    online, offline = WandbMode.online, WandbMode.offline
    assert allowed(online, {}) == (online, "")
    assert allowed(offline, {"WANDB_MODE": "online", "WANDB_DISABLED": "false"}) == (offline, "")
    mode, message = allowed(online, {"WANDB_MODE": "offline"})
    assert mode is offline
    assert message == "W&B: WANDB_MODE=offline overrides logger.mode=online, so this run is offline"


def test_wandb_offline(runs):
    outcome = runs["offline"].result()
    (folder,) = (outcome.run_dir / "wandb").glob("offline-run-*")
    assert outcome.said() == [f"W&B offline: {folder}"]
    check_offline_run(outcome)
    # Nothing is left beside the run folder.
    beside = {path.name for path in outcome.run_dir.parent.iterdir()}
    assert beside <= {"run", "config", "cache", "data"}


def test_wandb_online_falls_back_to_offline_within_the_timeout(runs):
    outcome = runs["nobody answers"].result()
    warning, where = outcome.said()
    assert re.match(r"W&B: init failed \(.*127\.0\.0\.1.*\): falling back to offline$", warning)
    assert where.startswith("W&B offline: ")
    # 1.5 s for the server (W&B alone would wait 90), the rest is importing and starting offline on
    # a busy machine.
    assert 1.5 <= outcome.seconds("made") < 15
    assert outcome.seconds("ended") < 15
    check_offline_run(outcome)


def test_wandb_online_without_a_key_falls_back_and_asks_nobody(runs):
    outcome = runs["no key"].result()
    warning, where = outcome.said()
    assert (
        warning
        == "W&B: init failed (UsageError: No API key configured. Use `wandb login` to log in.):"
        " falling back to offline"
    )
    assert where.startswith("W&B offline: ")


@pytest.mark.parametrize("fault", ["service killed", "odd value"])
def test_a_failure_of_wandb_is_one_line_and_the_training_goes_on(runs, fault):
    outcome = runs[fault].result()
    assert "\nfault: " in outcome.out  # it did happen
    earlier, _where, off = outcome.said()  # that the new start is a second run has to be said
    assert "already holds 1 run(s); this start is recorded as a separate run" in earlier
    assert re.match(
        r"W&B: log failed \(\w+: .*\): W&B is off from here on, metrics\.jsonl continues$", off
    )
    assert outcome.seconds("ended") < 15
    if fault == "odd value":  # what came before is kept, and the run is closed with its exit code
        records = wandb_records(outcome.run_dir)
        assert len(of_kind(records, "history")) == 1
        assert [final.exit_code for final in of_kind(records, "exit")] == [3]


def test_a_line_of_metrics_costs_little(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    started = time.perf_counter()
    for step in range(1000):
        metrics.write("step", **step_fields(step + 1))
    assert (
        time.perf_counter() - started
    ) / 1000 < 1e-3  # measured: tens of microseconds; a step takes milliseconds
    metrics.close()

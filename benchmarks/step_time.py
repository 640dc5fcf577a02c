"""Compares the predicted with the measured step time on links of several rates.

python benchmarks/step_time.py [--rates 100 200 400 1000 unlimited] [--rounds 3] [--out FILE.json]
    [--plot FILE.png] [--smoke]

There are two hosts with one rank each, made of network namespaces; `tc` limits the rate at which
each sends and receives. At every rate, `distaccum profile` measures the two hosts for a few
seconds. From its file alone, the time of a step is predicted for each way to train and each K (see
step_time_rank.py). Only then are real windows timed, in turns: a round is one window of each.

Printed for each: the predicted seconds and their parts; the median over rounds of the slowest
rank's seconds, with minimum and maximum; predicted / measured; and whether this is within 25 %. A
micro-batch without communication is timed between the windows, to show whether the machine has
become slower or faster since it was profiled. The ledger counts what each window sends, and the
bytes must be exactly those predicted; otherwise the exit code is 1. It does not depend on times.

This needs root, `ip` and `tc`. `--smoke` needs none of them: it runs two ranks on this host with a
tiny model for one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
from hosts import LINK, NoHostsError, hosts

from distaccum.metrics.table import table

UNLIMITED = "unlimited"
RANKS, PORT = 2, 29500
WITHIN = 0.25
PACKAGE = Path(__file__).resolve().parents[1] / "distaccum"  # its source is the text to train on
MODEL = [
    "model.num_layers=6",
    "model.width=192",
    "model.num_heads=6",
    "data.seq_len=64",
    "accum.micro_batch_size=2",
]
BUCKETS = "parallel.bucket_mb=2"  # about the gradients of a block
# For --smoke: the command line with as few repetitions as possible.
SHORT = """from distaccum.app.commands import profile
profile.COMPUTE_BUDGET_S, profile.MESSAGE_BUDGET_S, profile.LARGEST_BYTES = 0.0, 0.0, 2**18
from distaccum.cli import main
main()
"""
TINY = [
    "model.num_layers=2",
    "model.width=32",
    "model.num_heads=2",
    "data.seq_len=16",
    "accum.micro_batch_size=2",
]


class Here:
    """Stands in for two hosts with this one, for --smoke."""

    address, link, limit = "127.0.0.1", "lo", staticmethod(lambda rate: None)

    def start(self, number: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command, as `Hosts.start` does."""
        return subprocess.Popen(command, **options)


@contextmanager
def two_hosts() -> Iterator[Any]:
    """Make two hosts that have the address of rank 0 and the name of the link, as `Here` does."""
    with hosts(RANKS) as made:
        made.address, made.link = made[0].address, LINK
        yield made


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _asked(arguments)
    # removes hosts and ends ranks
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    where = machine.describe() | {"kernel": platform.release()}
    found: dict[str, Any] = {"command": " ".join(sys.argv), "machine": where, "rates": {}}
    try:
        with tempfile.TemporaryDirectory(prefix="step_time") as folder:
            if asked.smoke:
                _measure(asked, Here(), Path(folder), TINY, found)
            else:
                with two_hosts() as made:
                    _measure(asked, made, Path(folder), MODEL, found)
    except NoHostsError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return _show_all(found)


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rates = ["100", "200", "400", "1000", UNLIMITED]
    parser.add_argument("--rates", nargs="+", default=rates, help=f"Mbit/s, or {UNLIMITED}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="two ranks on this host, a tiny model, one round"
    )
    asked = parser.parse_args(arguments)
    if asked.smoke:
        asked.rates, asked.rounds = [UNLIMITED], 1
    return asked


def _measure(
    asked: argparse.Namespace, made: Any, folder: Path, model: list[str], found: dict[str, Any]
) -> None:
    data = ["data=path", f"data.path={PACKAGE}", f"data.cache_dir={folder}"]
    overrides = [*model, *data, "device=cpu", BUCKETS]
    port = PORT if not isinstance(made, Here) else _free_port()
    program = [str(Path(__file__).with_name("step_time_rank.py")), f"--parent={os.getpid()}"]
    words = [sys.executable, *program, f"--rounds={asked.rounds}", *overrides]
    running = _start(made, port, words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        found |= _answers(running)[0]
        print(
            f"{found['parameters']:,} parameters, {found['micro_batch_flops'] / 1e9:.3g} GFLOP a "
            "micro-batch",
            flush=True,
        )
        for number, rate in enumerate(asked.rates):
            made.limit(None if rate == UNLIMITED else float(rate))
            file = folder / f"{rate}.json"
            profiled = _profile(made, port + 1 + number, file, overrides)
            for process in running:
                process.stdin.write(f"{file}\n")
                process.stdin.flush()
            measured = _answers(running)[0]
            found["rates"][rate] = {
                "profile": json.loads(file.read_text()),
                "printed": profiled,
                **measured,
            }
            _show(rate, profiled, **measured)
            if asked.out is not None:
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        for process in running:
            process.kill()  # a rank that waits for another one would not react to anything else
        for process in running:
            process.wait()
    if asked.plot is not None:
        draw(found, asked.plot)


def _start(
    made: Any, port: int, words: Sequence[str], **options: Any
) -> list[subprocess.Popen[Any]]:
    """Start one process per rank, with torch's environment variables."""
    common = {
        "GLOO_SOCKET_IFNAME": made.link, "MASTER_ADDR": made.address, "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        made.start(
            rank,
            words,
            env={**os.environ, **common, "RANK": str(rank)},
            start_new_session=True,
            **options,
        )
        for rank in range(RANKS)
    ]


def _profile(made: Any, port: int, file: Path, overrides: list[str]) -> str:
    """Run `distaccum profile` on all hosts, and return what it prints on the first."""
    entry = ["-c", SHORT] if isinstance(made, Here) else ["-m", "distaccum"]
    words = [
        sys.executable,
        *entry,
        "profile",
        f"machine={file}",
        f"run_dir={file.parent}/run",
        *overrides,
    ]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": file.parent,
    }
    running = _start(made, port, words, **options)
    outputs = [process.communicate(timeout=300)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("`distaccum profile` failed with this output:\n" + "\n".join(outputs))
    return outputs[0]


def _answers(running: Sequence[subprocess.Popen[Any]]) -> list[Any]:
    answers = [process.stdout.readline() for process in running]
    if not all(answers):
        raise RuntimeError("A rank of step_time_rank.py ended. Its error is printed above.")
    return [json.loads(answer) for answer in answers]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _show(
    rate: str, profiled: str, micro_batch: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    print(f"\n{rate if rate == UNLIMITED else f'{rate} Mbit/s'}\n{profiled.strip()}\n")
    least, median, most = (f(micro_batch["seconds"]) for f in (min, statistics.median, max))
    print(
        f"a micro-batch without communication: {micro_batch['predicted_s']:.4f} s when profiled, "
        f"{median:.4f} s ({least:.4f} to {most:.4f}) since then"
    )
    lines = []
    for row in rows:
        parts, seconds = row["predicted"], row["seconds"]
        lines.append([
            f"{row['way']}, K = {row['num_micro_batches']}",
            f"{parts['compute_s']:.3f}", f"{parts['exposed_s']:.3f}", f"{parts['update_s']:.3f}",
            f"{row['predicted_s']:.3f}",
            f"{row['measured_s']:.3f} ({min(seconds):.3f}, {max(seconds):.3f})",
            f"{_ratio(row):.2f}{'' if _is_within(row) else ' !'}",
        ])  # fmt: skip
    print(
        table(["seconds", "compute", "exposed", "update", "predicted", "measured", "ratio"], lines),
        flush=True,
    )


def _show_all(found: dict[str, Any]) -> int:
    rows = [row for one in found["rates"].values() for row in one["rows"]]
    ratios = [_ratio(row) for row in rows]
    within, equal = sum(map(_is_within, rows)), sum(map(_is_equal, rows))
    print(
        f"\npredicted / measured: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to"
        f" {max(ratios):.2f}"
    )
    print(f"within {WITHIN:.0%}: {within} of {len(rows)}")
    print(f"traffic as predicted, to the byte: {equal} of {len(rows)}")
    return 0 if equal == len(rows) else 1


def _ratio(row: dict[str, Any]) -> float:
    return row["predicted_s"] / row["measured_s"]


def _is_within(row: dict[str, Any]) -> bool:
    return abs(_ratio(row) - 1) <= WITHIN


def _is_equal(row: dict[str, Any]) -> bool:
    return row["traffic"]["predicted"] == row["traffic"]["counted"]


def draw(found: dict[str, Any], out: Path) -> None:
    """Draw predicted against measured times on log axes, with a band of 25 %."""
    # Not pyplot, because it keeps a global list of figures and may need a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = [(rate, row) for rate, one in found["rates"].items() for row in one["rows"]]
    values = [row[name] for _, row in rows for name in ("predicted_s", "measured_s")]
    ends = [min(values) / 1.4, max(values) * 1.4]
    low, high = ([end * (1 + sign * WITHIN) for end in ends] for sign in (-1, 1))
    axis.fill_between(ends, low, high, color="#dddddd", label="within 25 %", linewidth=0)
    axis.plot(ends, ends, color="#888888", linewidth=1)
    markers = dict(zip(found["rates"], "osD^v<>", strict=False))
    ways = list(dict.fromkeys(row["way"] for _, row in rows))
    colors = dict(zip(ways, ["#1f5fa8", "#66aadd", "#228833", "#88bb66", "#b3541e"], strict=True))
    for rate, row in rows:
        size = 40 if row["num_micro_batches"] == 2 else 100
        axis.scatter(
            row["measured_s"],
            row["predicted_s"],
            s=size,
            marker=markers[rate],
            color=colors[row["way"]],
        )
    for way in ways:
        axis.scatter([], [], color=colors[way], label=way)
    for rate, marker in markers.items():
        axis.scatter(
            [],
            [],
            color="#444444",
            marker=marker,
            label=rate if rate == UNLIMITED else f"{rate} Mbit/s",
        )
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axis.set_xlabel("measured seconds of a step (median); small: K = 2, large: K = 8")
    axis.set_ylabel("predicted from `distaccum profile`")
    axis.legend(frameon=False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    sys.exit(main())

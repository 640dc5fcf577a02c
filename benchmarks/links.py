"""Measures gradient accumulation on slow links: step time and bytes of distaccum and of its peers.

python benchmarks/links.py [--hosts 2 4] [--rates 100 200 400 1000 unlimited] [--rounds 5]
    [--slow-rounds 2] [--arms NAME ...] [--overlap 2 4 8 auto] [--bucket-mb 5] [--micro-batches 8]
    [--micro-batch-size 1] [--seq-len 64] [--layers 8] [--width 320] [--out FILE.json]
    [--plot FILE.png] [--smoke]

There is one rank per host. The hosts are network namespaces that are joined by a bridge; `tc`
limits the rate at which each sends and receives. This needs root, `ip` and `tc`. All arms (see
links_arms.py) train copies of one GPT in float32 with AdamW on the same micro-batches, in turns: a
round is one optimizer step of each. The rate is changed while the ranks run.

Printed for each arm: the median over rounds of the slowest rank's seconds, with minimum and
maximum; its ratio to hand-written DDP with `no_sync`; the bytes that the link of a host counted as
sent; and the lower bound max(compute, bytes / rate). Compute is the time of the window without
communication on as many busy ranks. The rate is the payload of the limit, or, if there is no limit,
the best that plain TCP reached. The rate of plain TCP is measured and printed for every limit. Arms
that send a window's gradients or parameters several times take part in the first `--slow-rounds`
rounds only. At the end, all arms catch up on an unlimited link, and their parameters must be those
of the hand-written loop.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from hosts import Hosts, NoHostsError, hosts
from links_names import COMPUTE, REFERENCE, SLOW, Settings, names, same_order
from links_plot import bound_s, draw, median_s
from links_ranks import Ranks

UNLIMITED = "unlimited"
# At least what overlap_micro_batches=auto needs: two windows to warm up, three timed, one more,
# three timed.
WINDOWS_TO_CHOOSE = 10
# Payload as a share of the limit: 1448 of the 1514 bytes of a full frame.
PAYLOAD = 1448 / 1514


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _asked(arguments)
    settings = Settings(
        asked.micro_batches,
        asked.micro_batch_size,
        asked.seq_len,
        asked.layers,
        asked.width,
        asked.bucket_mb,
    )
    found: dict[str, Any] = {
        "command": " ".join(sys.argv), "machine": _machine(), "settings": asdict(settings),
        "worlds": {},
    }  # fmt: skip
    # removes hosts and ends ranks
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    agree = True
    try:
        for number in asked.hosts:
            with hosts(number) as made, Ranks(made, settings) as ranks:
                measured = found["worlds"][str(number)] = _measure(asked, made, ranks)
                found |= ranks.ask("facts")[0]
                agree &= _show_agreement(number, measured)
            _save(asked, found)
    except NoHostsError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if agree else 1


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    rates = ["100", "200", "400", "1000", UNLIMITED]
    parser.add_argument("--rates", nargs="+", default=rates, help=f"Mbit/s, or {UNLIMITED}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=2, help=f"rounds of {', '.join(SLOW)}")
    parser.add_argument(
        "--overlap", nargs="*", default=["2", "4", "8", "auto"], help="overlap_micro_batches to try"
    )
    parser.add_argument(
        "--arms", nargs="+", help="only these, and the two that all are compared with"
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=8,
        help="K, micro-batches per rank in a window; a power of two",
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=1, help="sequences in a micro-batch; a power of two"
    )
    parser.add_argument(
        "--seq-len", type=int, default=64, help="tokens in a sequence; a power of two"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument(
        "--bucket-mb", type=int, default=5, help="size of DDP's buckets in the overlap arms"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--smoke", action="store_true", help="2 hosts, one rate, a tiny model, 2 rounds"
    )
    asked = parser.parse_args(arguments)
    if asked.smoke:
        asked.hosts, asked.rates, asked.rounds, asked.layers, asked.width = [2], ["400"], 2, 2, 128
        asked.overlap = ["2"]
    known = names(asked.overlap)
    unknown = sorted(set(asked.arms or []) - set(known))
    if unknown:
        parser.error(f"--arms: there is no arm {unknown[0]!r}; choose from {known}")
    asked.arms = [
        name for name in known if asked.arms is None or name in (COMPUTE, REFERENCE, *asked.arms)
    ]
    return asked


def _machine() -> dict[str, Any]:
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return machine.describe("accelerate", "lightning") | {
        "kernel": platform.release(),
        "tcp": congestion,
    }


def _measure(asked: argparse.Namespace, made: Hosts, ranks: Ranks) -> dict[str, Any]:
    """Measure all arms at all rates on one group of ranks."""
    missing = {name: why for name in asked.arms if (why := ranks.ask("build", name)[0]) is not None}
    arms = [name for name in asked.arms if name not in missing]
    windows = dict.fromkeys(arms, 0)

    def run(name: str) -> dict[str, list[float]]:
        windows[name] += 1
        seconds, sent = zip(*ranks.ask("run", name), strict=True)
        return {"seconds": list(seconds), "bytes": list(sent)}

    for name in arms * 2:  # DDP rebuilds its buckets after the first window
        run(name)
    results: dict[str, Any] = {"missing": missing, "rates": {}}
    for rate in asked.rates:
        limit = None if rate == UNLIMITED else float(rate)
        made.limit(limit)
        measured = [_transfer_rate(made, ranks, limit) for _ in range(3)]
        # The limit is exact. Short transfers over one connection stay a little below it, and would
        # make the bound too high.
        rate_bytes = max(measured) if limit is None else limit * 1e6 / 8 * PAYLOAD
        for name in [name for name in arms if name.endswith("auto")]:
            ranks.ask("choose_again", name)
            for _ in range(WINDOWS_TO_CHOOSE):
                run(name)
            print(f"{name} at {rate}: {ranks.ask('chosen', name)[0]}", flush=True)
        samples: dict[str, list[dict[str, list[float]]]] = {name: [] for name in arms}
        for number in range(asked.rounds):
            for name in arms:
                if number < asked.slow_rounds or name not in SLOW:
                    samples[name].append(run(name))
        results["rates"][rate] = {
            "bytes_per_s": rate_bytes,
            "plain_tcp_bytes_per_s": measured,
            "samples": samples,
        }
        _show(len(made), rate, results["rates"][rate], missing)
    made.limit(None)
    for name in arms:
        while windows[name] < max(windows.values()):
            run(name)
    return results | {"windows": max(windows.values()), "agreement": ranks.ask("compare")[0]}


def _transfer_rate(made: Hosts, ranks: Ranks, limit: float | None) -> float:
    """Return the payload bytes per second of plain TCP, while each host sends to the next one.

    The transfer takes about one second.
    """
    num_bytes = int((limit or 8000) * 1e6 / 8)
    after = [made[(rank + 1) % len(made)].address for rank in range(len(made))]
    return num_bytes / max(ranks.ask_each("transfer", [(address, num_bytes) for address in after]))


def _show(number: int, rate: str, found: dict[str, Any], missing: dict[str, str]) -> None:
    samples = found["samples"]
    mbit = [value * 8e-6 for value in found["plain_tcp_bytes_per_s"]]
    asked_for = (
        "no limit"
        if rate == UNLIMITED
        else f"limit of {rate} Mbit/s, {float(rate) * PAYLOAD:.0f} of it payload"
    )
    print(
        f"\n{number} hosts, {asked_for}; plain TCP reaches {min(mbit):.0f} to {max(mbit):.0f}"
        " Mbit/s"
    )
    print(
        f"{'':22} {'seconds per step':>24}  {'x no_sync':>9} {'MB sent':>9} {'bound in s':>10} "
        f"{'x bound':>8}"
    )
    reference = median_s(samples[REFERENCE])
    for name, taken in samples.items():
        seconds = [max(sample["seconds"]) for sample in taken]
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        sent = statistics.median(max(sample["bytes"]) for sample in taken) / 1e6
        bound = bound_s(found, name)
        middle = median_s(taken)
        columns = f"{middle / reference:9.3f} {sent:9.2f} {bound:10.3f} {middle / bound:8.2f}"
        print(f"{name:22} {middle:7.3f} ({spread})  {columns}")
    for name, why in missing.items():
        print(f"{name:22} {why}")
    sys.stdout.flush()


def _show_agreement(number: int, results: dict[str, Any]) -> bool:
    """Print how the parameters of each arm differ; return whether all arms agree."""
    agree = True
    print(
        f"\n{number} hosts, {results['windows']} windows: distance of the parameters from those of"
        f" {REFERENCE}, as a share of their distance from the initial ones"
    )
    for name, found in results["agreement"].items():
        right = found["bitwise"] or (
            not (number == 2 and same_order(name)) and found["relative"] <= found["tolerance"]
        )
        agree &= right
        how = (
            "bitwise equal"
            if found["bitwise"]
            else f"{found['relative']:.1e} (at most {found['tolerance']:.1e})"
        )
        print(f"{name:22} {how}{'' if right else '   DIFFERENT'}")
    return agree


def _save(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    if asked.plot is not None:
        draw(found, asked.plot)


if __name__ == "__main__":
    sys.exit(main())

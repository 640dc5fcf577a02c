"""Compares the time of `import distaccum` with that of `import torch`, in new interpreters.

    python benchmarks/import_time.py [--runs 15] [--out benchmarks/results/import_time.json]

The two are started in turns: torch, distaccum, torch, distaccum. The first round reads the files
and does not count. Medians and ranges are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write all samples to")
    parser.add_argument("--smoke", action="store_true", help="only one round, which counts")
    asked = parser.parse_args()
    unused = 0 if asked.smoke else 1
    runs = 1 if asked.smoke else asked.runs
    seconds: dict[str, list[float]] = {"torch": [], "distaccum": []}
    for index in range(runs + unused):
        for module, taken in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            if index >= unused:
                taken.append(time.perf_counter() - began)
    for module, taken in seconds.items():
        print(
            f"import {module:10} median {statistics.median(taken):.3f} s, {min(taken):.3f} to "
            f"{max(taken):.3f}"
        )
    ratios = [
        ours / torch for ours, torch in zip(seconds["distaccum"], seconds["torch"], strict=True)
    ]
    print(
        f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}, "
        f"of {runs} pairs"
    )
    if asked.out is not None:
        found = {
            "machine": machine.describe(),
            "smoke": asked.smoke,
            "seconds": seconds,
            "ratios": ratios,
        }
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

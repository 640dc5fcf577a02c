"""How long `import distaccum` takes beside `import torch`: fresh interpreters in turn, medians and spread.

python benchmarks/import_time.py [--runs 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {"torch": [], "distaccum": []}
    for _ in range(runs + 1):  # the first round reads the files
        for module, taken in seconds.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            taken.append(time.perf_counter() - began)
    for module, taken in seconds.items():
        median, low, high = statistics.median(taken[1:]), min(taken[1:]), max(taken[1:])
        print(f"import {module:10} median {median:.3f} s, {low:.3f} to {high:.3f}")
    ratios = [ours / torch for ours, torch in zip(seconds["distaccum"][1:], seconds["torch"][1:], strict=True)]
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}, of {runs} pairs")


if __name__ == "__main__":
    main()

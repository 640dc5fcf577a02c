"""Checks what only a GPU can show.

Start it with scripts/gpu_check.sh, which says what it needs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist

NEEDED_TORCH = (2, 11)
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run all checks, print the report, write it, and return the exit code."""
    arguments = _arguments()
    if _version(torch.__version__) < NEEDED_TORCH:
        needed = ".".join(map(str, NEEDED_TORCH))
        print(
            f"This check needs torch {needed} or later, and torch {torch.__version__} is installed."
        )
        return 1
    begin = time.monotonic()
    described = describe(arguments.device)
    _print_machine(described)
    checks = list(run_all(arguments, begin))
    failed = [check for check in checks if check["status"] == "failed"]
    report = {
        "date": described["date"],
        "dry run": arguments.tiny or arguments.device == "cpu",
        "machine": described,
        "checks": checks,
        "seconds": round(time.monotonic() - begin, 1),
    }
    counts = {
        status: sum(c["status"] == status for c in checks)
        for status in ("passed", "failed", "not run")
    }
    print(
        "\n"
        + ", ".join(f"{n} {status}" for status, n in counts.items())
        + f", {report['seconds']:.0f} s"
    )
    for check in failed:
        print(f"FAILED: {check['check']} on {check['ranks']} rank(s)")
    if counts["passed"] or failed:
        _write(report, arguments.out)
    return 1 if failed or not counts["passed"] else 0


def run_all(arguments: argparse.Namespace, begin: float) -> list[dict[str, Any]]:
    """Run each check on one rank, and those that communicate on all GPUs if there are several."""
    # Imported here, so that a torch that is too old is reported and does not fail in an import.
    import gpu_parts
    import gpu_ranks
    import gpu_speed

    on_gpu, tiny = arguments.device == "cuda", arguments.tiny or arguments.device == "cpu"
    obstacle = _obstacle(arguments.device)
    num_gpus = torch.cuda.device_count() if on_gpu else 0
    several = num_gpus if on_gpu else 2
    exact = {"numerics": gpu_parts.numerics, "bf16": gpu_parts.bf16}
    syncs, speed = {"host syncs": gpu_parts.host_syncs}, {"speed and memory": gpu_speed.speed}
    if on_gpu:
        jobs = [
            gpu_ranks.Job(1, exact | syncs, limit_s=150),
            gpu_ranks.Job(several, exact | syncs, limit_s=150),
            gpu_ranks.Job(1, speed, limit_s=220, group=False),  # alone, for the memory peak
        ]
    else:
        jobs = [
            gpu_ranks.Job(1, exact | speed, limit_s=150, start="fork"),
            gpu_ranks.Job(several, exact, limit_s=150, start="fork"),
        ]
    checks = []

    def note(
        name: str, ranks: int, status: str, figures: dict[str, Any], reasons: list[str]
    ) -> None:
        checks.append(
            {
                "check": name,
                "ranks": ranks,
                "status": status,
                "figures": figures,
                "reasons": reasons,
            }
        )
        _print_check(checks[-1])

    for index, job in enumerate(jobs):
        if obstacle or (index == 1 and several < 2):
            reason = obstacle or f"this machine has {num_gpus} GPU"
            for name in job.parts:
                note(name, max(job.ranks, 2 if index == 1 else 1), "not run", {}, [reason])
            continue
        left_s = arguments.limit_s - (time.monotonic() - begin)
        limited = replace(job, limit_s=max(5.0, min(job.limit_s, left_s)))
        for name, found in gpu_ranks.run(limited, arguments.device, tiny).items():
            note(
                name,
                job.ranks,
                "failed" if found.failures else "passed",
                found.figures,
                found.failures,
            )
    if not on_gpu:
        note("host syncs", 1, "not run", {}, ["torch.cuda.set_sync_debug_mode needs CUDA"])
    return checks


def describe(device: str, *packages: str) -> dict[str, Any]:
    """Describe the machine and the versions that the figures depend on."""
    found: dict[str, Any] = (
        {"device": "CPU"} | machine.describe(*packages) | {"torch": torch.__version__}
    )
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = machine.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": properties.name,
            "GPUs": torch.cuda.device_count(),
            "GPU memory in GiB": round(properties.total_memory / 2**30, 1),
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": query.splitlines()[0] if query else "unknown",
            "CUDA": torch.version.cuda,
            "NCCL": (
                ".".join(map(str, torch.cuda.nccl.version()))
                if dist.is_nccl_available()
                else "none"
            ),
        }
    return found


def _obstacle(device: str) -> str | None:
    """Return why the checks cannot run on this device, or None if they can."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU here; for a dry run on the CPU use --device cpu --tiny"
    if not dist.is_nccl_available():
        return "this torch was built without NCCL"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bf16"
    return None


def _print_machine(described: dict[str, Any]) -> None:
    print("\n".join(f"{name:20} {value}" for name, value in described.items()), flush=True)


def _print_check(check: dict[str, Any]) -> None:
    print(f"\n{check['check']}, {check['ranks']} rank(s): {check['status'].upper()}")
    for name, value in check["figures"].items():
        print(f"    {name:55} {_readable(value)}")
    for reason in check["reasons"]:
        print(f"  ! {reason}")
    sys.stdout.flush()


def _readable(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return (
            f"median {value['median']:,.0f} (min {value['least']:,.0f}, max {value['most']:,.0f})"
        )
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "  ".join(_readable(one) for one in value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.1 else f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _write(report: dict[str, Any], out: Path | None) -> None:
    """Write the report to --out, or else to the results unless it is a dry run."""
    folder = out or (None if report["dry run"] else RESULTS)
    if folder is None:
        print("This was a dry run, so the report is written only with --out.")
        return
    name = re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{name}-{report['date'][:10]}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {file}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu is a dry run and implies --tiny",
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run with small sizes")
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/results"
    )
    parser.add_argument(
        "--limit-s", type=float, default=570.0, help="seconds for all checks together"
    )
    return parser.parse_args()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


if __name__ == "__main__":
    sys.exit(main())

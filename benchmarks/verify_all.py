"""Runs `distaccum verify` on two CPU ranks for all combinations that conf/ offers.

    python benchmarks/verify_all.py [--model NAME ...] [--out benchmarks/results/verify_all.json]

A combination is a model, a precision, a strategy and a sync policy. Prints a row for each and exits
with 1 if any is not proven. To save time, large models are reduced: GPTs to two layers and a
vocabulary of 2,000, ResNet-18 to a quarter of its channels. `--whole` does not reduce them.
`--smoke` takes four combinations, with every strategy and both kinds of small models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distaccum.app.commands.check import check
from distaccum.app.commands.verify import prove_configuration
from distaccum.app.config import config_dir, typed
from distaccum.parallel.world import World

RANKS = 2
POLICIES = [
    ("ddp", "boundary"), ("ddp", "every"),
    ("fsdp", "boundary"), ("fsdp", "gather_once"), ("fsdp", "every"),
    ("hsdp", "boundary"), ("hsdp", "gather_once"), ("hsdp", "reduce_scatter"), ("hsdp", "every"),
]  # fmt: skip
DATA = {
    "gpt": ["data.seq_len=32"],
    "gpt_10m": ["data.seq_len=8"],
    "gpt2_124m": ["data.seq_len=8"],
    "gpt2_350m": ["data.seq_len=8"],
    "hf": ["data.seq_len=32"],
    "resnet": ["data=digits"],
    # The last stage reduces the 8x8 pixels of digits to one, so BatchNorm needs more than two
    # samples.
    "resnet18": ["data=digits", "model.large_stem=false", "accum.micro_batch_size=16"],
}
CUT = {
    "gpt_10m": ["model.num_layers=2"],
    "gpt2_124m": ["model.num_layers=2", "model.vocab_size=2000"],
    "gpt2_350m": ["model.num_layers=2", "model.vocab_size=2000"],
    "resnet18": ["model.widths=[16,32,64,128]"],
}
SMOKE = [
    ("gpt", "fp64", "ddp", "boundary"),
    ("gpt", "bf16", "fsdp", "gather_once"),
    ("resnet", "fp32", "ddp", "every"),
    ("resnet", "fp64", "hsdp", "reduce_scatter"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="only four combinations")
    parser.add_argument("--model", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--policy", nargs="*", default=[sync for _, sync in POLICIES])
    parser.add_argument("--strategy", nargs="*", default=["ddp", "fsdp", "hsdp"])
    parser.add_argument(
        "--precision",
        nargs="*",
        default=[p.stem for p in sorted((config_dir() / "precision").glob("*"))],
    )
    parser.add_argument("--whole", action="store_true", help="do not reduce large models")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    combinations = [
        (model, precision, strategy, sync)
        for model, precision, (strategy, sync) in product(args.model, args.precision, POLICIES)
        if sync in args.policy and strategy in args.strategy
    ]
    if args.smoke:
        combinations = SMOKE
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, combinations, args.whole), nprocs=RANKS)
        rows = json.loads((Path(folder) / "rows.json").read_text())
    failed = [row for row in rows if not row["holds"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} combinations proven on {RANKS} ranks")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "machine": machine.describe(),
            "ranks": RANKS,
            "whole": args.whole,
            "smoke": args.smoke,
            "rows": rows,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def work(
    rank: int, folder: str, combinations: list[tuple[str, str, str, str]], whole: bool
) -> None:
    """Prove all combinations on one rank, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=20)
    )
    rows = []
    for model, precision, strategy, sync in combinations:
        began = time.perf_counter()
        row: dict[str, Any] = {
            "model": model,
            "precision": precision,
            "strategy": strategy,
            "sync": sync,
        }
        sizes = DATA[model] + ([] if whole else CUT.get(model, []))
        choice = [
            f"model={model}",
            f"precision={precision}",
            f"parallel={strategy}",
            f"accum.sync={sync}",
        ]
        config = composed([*choice, *sizes])
        proof = prove_configuration(config, World.of(torch.device("cpu")))
        row |= {"holds": proof.holds, "network_agrees": proof.network_agrees}
        row |= {"lines": [[line.name, line.error, line.tolerance] for line in proof.lines]}
        rows.append(row)
        if rank == 0:
            worst = "  ".join(
                f"{line.name} {line.error:.1e}"
                for line in proof.lines
                if line.tolerance is not None
            )
            verdict = "proven" if proof.holds else "NOT PROVEN"
            seconds = time.perf_counter() - began
            print(
                f"{model:10} {precision:9} {strategy:4} {sync:8} {verdict}  {worst}  "
                f"({seconds:.1f} s)",
                flush=True,
            )
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()


def composed(overrides: list[str]) -> Any:
    """Compose a configuration as the command line does, with 2 micro-batches of 2 samples."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(
            "config",
            ["accum.micro_batch_size=2", "accum.gradient_accumulation_steps=2", *overrides],
        )
    plain: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    check(plain)
    return typed(plain)


if __name__ == "__main__":
    main()

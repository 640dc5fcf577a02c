"""Measures the overhead of accumulation per micro-batch: hand-written, distaccum and its peers.

python benchmarks/overhead.py [--gradient-accumulation-steps 8] [--rounds 15] [--clip-norm 1.0]
    [--out results.json] [--smoke]

There are three settings: nn.Linear(8, 8) on one process and on 2 ranks (DDP over gloo), and a GPT
of 10M parameters on one process. Each arm trains the same model on the same tensors with SGD, in a
process of its own (one per rank, one thread each) that sleeps between its turns. First, the
parameters of each arm are compared with those of the hand-written loop. Then the arms run in turns,
A B C A B C, each for a block of windows, and each round begins with another arm. The clock is in
the data: it measures the time between the reads of two micro-batches at the beginning and the end
of the block, so that start and end of a trainer do not count. Ratios to the plain hand-written loop
are taken within a round.

All arms compute forward, backward, one reduction and one update per window. The plain hand-written
loop computes neither the loss nor the gradient norm. distaccum computes the loss over all
micro-batches and ranks in float64, its denominator and the norm, and makes an update only if they
are finite, on all ranks alike. A hand-written loop with loss and norm is measured as well. The
peers do what they do by default, without logs, progress bars and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from overhead_arms import Data, Setting
from overhead_peers import ARMS, HEAVY, REFERENCE, missing

WARM_WINDOWS, TAIL_WINDOWS, CHECKED_WINDOWS = 2, 1, 3
# The largest difference of a parameter. Three updates with lr 0.01 and gradients below 3 move
# parameters by less than 0.1. Sums of some hundred numbers in another order differ by at most 2^-24
# x 100 of that, and parameters below 2 are rounded three times by 2^-24. Leaving out one
# micro-batch of 8 moves them by more than 1e-4 in the empty model.
TOLERANCE = 0.1 * 100 * 2**-24 + 3 * 2**-23


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        default=8,
        help="K, the micro-batches per rank in a window",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clip-norm", type=float, help="let all arms clip gradients; default: none clips"
    )
    parser.add_argument(
        "--only", nargs="*", choices=list(ARMS), help=f"only these arms, and '{REFERENCE}'"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny blocks, two rounds")
    asked = parser.parse_args()
    names = [name for name in ARMS if asked.only is None or name in (REFERENCE, *asked.only)]
    rounds = 2 if asked.smoke else asked.rounds
    found: dict[str, Any] = {
        "num_micro_batches": asked.gradient_accumulation_steps, "clip_norm": asked.clip_norm,
        "rounds": rounds, "smoke": asked.smoke,
        "machine": machine.describe("distaccum", "accelerate", "lightning", "transformers",
        "deepspeed"), "settings": {},
    }  # fmt: skip
    # A smoke test imports the peers only once. Otherwise, no peer's process imports another peer.
    preloaded = HEAVY if asked.smoke else []
    for ranks, plan in ((1, [("empty", 60), ("gpt", 1)]), (2, [("empty", 40)])):
        arms = {name: _Ranks(name, ranks, preloaded) for name in names if missing(name) is None}
        try:
            for model, num_windows in plan:
                title = f"{model}, {ranks} {'process' if ranks == 1 else 'ranks, DDP'}"
                setting = Setting(
                    model, asked.gradient_accumulation_steps, asked.clip_norm, tiny=asked.smoke
                )
                measured = _measure(arms, setting, rounds, 2 if asked.smoke else num_windows)
                found["settings"][title] = {
                    name: measured.get(name) or _not_installed(name) for name in names
                }
                _show(title, found["settings"][title])
                if asked.out is not None:
                    asked.out.write_text(json.dumps(found, indent=1) + "\n")
        finally:
            for arm in arms.values():
                arm.end()
    unequal = [
        f"{name} ({title})"
        for title, arms in found["settings"].items()
        for name, arm in arms.items()
        if arm["status"] == "measured" and not arm["equal"]
    ]
    if unequal:
        raise SystemExit(
            f"These arms did not train the same parameters as the hand loop: {', '.join(unequal)}"
        )


def _not_installed(name: str) -> dict[str, Any]:
    return {"status": f"not installed ({missing(name)})"}


def _measure(
    arms: dict[str, _Ranks], setting: Setting, rounds: int, num_windows: int
) -> dict[str, Any]:
    """Measure all arms, and return the results by arm; an arm that fails is not timed."""
    found: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for arm in arms.values():
        arm.send(setting)
    for name, arm in list(arms.items()):
        trained[name] = arm.answers()  # parameters after the first windows, by rank
        found[name] = {"status": "measured"}
        if isinstance(trained[name], str):
            found[name]["status"] = f"failed: {trained[name]}"
            arms.pop(name).end()
    for name in arms:
        pairs = zip(trained[name][0], trained[REFERENCE][0], strict=True)
        error = max(float(abs(own - hand).max()) for own, hand in pairs)
        found[name] |= {
            "difference": error,
            "equal": error <= TOLERANCE,
            "us_per_micro_batch": [],
            "ratio": [],
        }
    for index in range(rounds):
        order = list(arms)
        for name in order[index % len(order) :] + order[: index % len(order)]:
            arms[name].send(num_windows)
            answers = arms[name].answers()
            if isinstance(answers, str):
                raise RuntimeError(f"{name}: {answers}")
            found[name]["us_per_micro_batch"].append(
                max(answers) / (num_windows * setting.num_micro_batches) * 1e6
            )
        for name in arms:
            found[name]["ratio"].append(
                found[name]["us_per_micro_batch"][-1] / found[REFERENCE]["us_per_micro_batch"][-1]
            )
    return found


class _Ranks:
    """Controls the processes of one arm, one per rank."""

    def __init__(self, name: str, ranks: int, preloaded: list[str]) -> None:
        """Start the processes."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "distaccum", "overhead_peers", *preloaded])
        self._folder = tempfile.TemporaryDirectory(prefix="overhead")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        port = _free_port()
        for rank in range(ranks):
            own, theirs = context.Pipe()
            arguments = (name, rank, ranks, self._folder.name, port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(own)
            self._processes.append(process)

    def send(self, task: Setting | int) -> None:
        """Send each rank a setting to build and check, or a number of windows to time."""
        for pipe in self._pipes:
            pipe.send(task)

    def answers(self) -> list[Any] | str:
        """Return the answer of each rank, or the error of a rank that failed.

        An answer is the list of parameters, or the seconds of a block.
        """
        received: dict[Connection, Any] = {}
        while len(received) < len(self._pipes):
            for pipe in wait([pipe for pipe in self._pipes if pipe not in received]):
                try:
                    received[pipe] = pipe.recv()
                except EOFError:
                    received[pipe] = "its process ended"
                if isinstance(received[pipe], str):
                    return received[pipe]
        return [received[pipe] for pipe in self._pipes]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(name: str, rank: int, ranks: int, folder: str, port: int, pipe: Connection) -> None:
    """Run one rank of one arm in its process."""
    with open(os.devnull, "w") as nothing:  # peers print greetings, and warn of small dataloaders
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
    }
    os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OVERHEAD_FOLDER": folder}
    torch.set_num_threads(1)
    try:
        if ranks > 1:
            store = dist.FileStore(str(Path(folder) / "store"), ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        while True:
            task = pipe.recv()
            if isinstance(task, Setting):
                setting = task
                train, model = ARMS[name][0](setting)
                train(Data(setting.micro_batches(CHECKED_WINDOWS, rank), 0, 0))
                pipe.send([parameter.detach().clone().numpy() for parameter in model.parameters()])
            else:
                pipe.send(_block(train, setting, rank, num_windows=task))
    except EOFError:
        pass
    except BaseException as error:
        place_in_code = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place_in_code.filename).name}:{place_in_code.lineno}"
        pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]} ({where})")
    finally:
        os._exit(0)


def _block(train: Callable[[Data], None], setting: Setting, rank: int, num_windows: int) -> float:
    micro_batches = setting.micro_batches(WARM_WINDOWS + num_windows + TAIL_WINDOWS, rank)
    first = WARM_WINDOWS * setting.num_micro_batches
    data = Data(micro_batches, first, first + num_windows * setting.num_micro_batches)
    if dist.is_initialized():
        dist.barrier()
    train(data)
    return data.seconds


def _show(title: str, arms: dict[str, Any]) -> None:
    print(f"\n{title}\n{'':30}{'us per micro-batch':>26}{'x hand loop':>26}")
    for name, arm in arms.items():
        if arm["status"] == "measured":
            note = "" if arm["equal"] else f"  NOT EQUAL: differs by {arm['difference']:.1e}"
            times, ratio = _spread(arm["us_per_micro_batch"], 1), _spread(arm["ratio"], 3)
            print(f"{name:30}{times:>26}{ratio:>26}{note}")
        else:
            print(f"{name:30}  {arm['status']}")
    sys.stdout.flush()


def _spread(values: list[float], digits: int) -> str:
    low, mid, high = (
        f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{mid} ({low} to {high})"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()

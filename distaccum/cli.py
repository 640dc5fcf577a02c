"""One entry, one word for what to do: `distaccum train ...`, the same as `python -m distaccum` and under torchrun."""

from __future__ import annotations

import sys

USAGE = """usage: distaccum train | verify | plan [OVERRIDE ...]

  train    train a model: distaccum train parallel=ddp accum.effective_batch=64 accum.micro=4 launch.nproc_per_node=2
           torchrun --nproc-per-node 2 -m distaccum train ... does the same with torchrun's ranks
           distaccum train --multirun accum.num_micros=1,2,4 ... trains each, and ends with a table of all
  verify   prove that configuration: one window against one big batch on one process in float64; exit code 1 if not
  plan     run nothing; print batch arithmetic, memory, network and schedules: distaccum plan ... world_size=64

OVERRIDE is Hydra's: group=choice, key=value, --cfg job (print the configuration), --help; with --multirun also
key=1,2,4 'key=range(1,5)' 'key=choice(a,b)', and with hydra/sweeper=optuna 'key=interval(0.1,1)'."""


WORDS = ("train", "verify", "plan")


def main() -> None:
    """Do what the first word says and end the process: exit code 0, 1 for a failure, 2 for a user's mistake."""
    word, *overrides = sys.argv[1:] or [""]
    if word in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0)
    if word not in WORDS:
        print(f"distaccum: there is no command {word!r}.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    # Imported here, so that help and mistakes cost nothing.
    from distaccum.commands.check import check
    from distaccum.commands.plan import plan
    from distaccum.commands.train import train
    from distaccum.commands.verify import verify
    from distaccum.config import config_dir
    from distaccum.launch import launch
    from distaccum.report.sweep import tell_sweep

    if word == "plan":  # nothing runs, so that there is no run folder
        overrides += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    task = {"train": train, "verify": verify, "plan": plan}[word]
    sys.exit(launch(overrides, config_dir=config_dir(), check=check, task=task, summarise=tell_sweep))

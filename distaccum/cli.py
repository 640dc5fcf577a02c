"""Runs the program `distaccum`: the first argument is the command, as in `distaccum train ...`.

`python -m distaccum` is the same program, also for the ranks that torchrun starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = """usage: distaccum train | verify | plan | profile [OVERRIDE ...]
       distaccum export RUN TARGET

  train    Train a model, here on two ranks that distaccum or torchrun starts:
             distaccum train parallel=ddp launch.nproc_per_node=2 accum.micro_batch_size=4
             torchrun --nproc-per-node 2 -m distaccum train parallel=ddp ...
           Train once for each value, and print a table of all runs:
             distaccum train --multirun accum.gradient_accumulation_steps=1,2,4 ...
           Submit a batch job:
             distaccum train launch=slurm launch.nodes=2 launch.gpus_per_node=4 ...
  verify   Compare one window of this configuration with one big batch, computed in float64 on one
           process. The exit code is 1 if they differ.
  plan     Print batch arithmetic, memory, network traffic and schedules without running anything:
             distaccum plan world_size=64 ...
  profile  Measure this machine in a few seconds, with the configured model on its ranks, and write
           machine.json.
  export   Write the weights of a checkpoint, or of the newest checkpoint in a run folder, for
           other programs. TARGET is NAME.safetensors or, for a Hugging Face model, a folder for
           from_pretrained.
           To start a run with exported weights: distaccum train init_weights=NAME.safetensors

OVERRIDE has Hydra's syntax: group=choice, key=value, --cfg job (print the configuration), --help;
with --multirun also key=1,2,4 'key=range(1,5)' 'key=choice(a,b)', and with hydra/sweeper=optuna
'key=interval(0.1,1)'."""


WORDS = ("train", "verify", "plan", "profile", "export")


def main() -> None:
    """Run the command that the first argument names, and end the process.

    The exit code is 0 for success, 1 for a failure and 2 for a mistake of the user.
    """
    word, *overrides = sys.argv[1:] or ["help"]
    if word in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0 if sys.argv[1:] else 2)
    if word not in WORDS:
        print(f"distaccum: there is no command {word!r}.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    if word == "export":
        sys.exit(_export(overrides))
    # Imported here, so that help and mistakes are answered without loading the whole program.
    from distaccum.app.commands.check import check, check_words
    from distaccum.app.commands.plan import plan
    from distaccum.app.commands.profile import profile
    from distaccum.app.commands.train import train
    from distaccum.app.commands.verify import verify
    from distaccum.app.config import config_dir
    from distaccum.launch import Program, launch
    from distaccum.metrics.sweep import report_sweep

    if word == "plan":  # nothing runs, so there is no run folder
        overrides += ["hydra.run.dir=."]
    task = {"train": train, "verify": verify, "plan": plan, "profile": profile}[word]
    program = None if word == "plan" else Program(command=word, sweep_key="logger.group")
    sys.exit(
        launch(
            overrides,
            config_dir=config_dir(),
            check=check,
            check_words=check_words,
            task=task,
            summarise=report_sweep,
            program=program,
            keeps_folder=word != "plan",
        )
    )


def _export(paths: list[str]) -> int:
    """Run `distaccum export` and return its exit code."""
    if len(paths) != 2:
        print(
            f"distaccum export needs two arguments, RUN and TARGET; got {len(paths)}.\n\n{USAGE}",
            file=sys.stderr,
        )
        return 2
    from distaccum.app.commands.export import export
    from distaccum.launch.failure import report

    try:
        export(Path(paths[0]), Path(paths[1]))
    except Exception as error:
        return report(error)
    return 0

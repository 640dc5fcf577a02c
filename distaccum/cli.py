"""One entry, one word for what to do: `distaccum train ...`, the same as `python -m distaccum` and under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = """usage: distaccum train | verify | plan | profile [OVERRIDE ...]
       distaccum export RUN TARGET

  train    train a model: distaccum train parallel=ddp accum.effective_batch=64 accum.micro=4 launch.nproc_per_node=2
           torchrun --nproc-per-node 2 -m distaccum train ... does the same with torchrun's ranks
           distaccum train --multirun accum.num_micros=1,2,4 ... trains each, and ends with a table of all
           distaccum train launch=slurm launch.nodes=2 launch.gpus_per_node=4 ... submits a batch job
  verify   prove that configuration: one window against one big batch on one process in float64; exit code 1 if not
  plan     run nothing; print batch arithmetic, memory, network and schedules: distaccum plan ... world_size=64
  profile  measure this machine in seconds, with the configured model on its ranks, and write machine.json
  export   the weights of a run folder's newest checkpoint, or of a checkpoint, for other programs: TARGET.safetensors,
           or for a Hugging Face model a folder that from_pretrained reads; back: distaccum train init_weights=FILE

OVERRIDE is Hydra's: group=choice, key=value, --cfg job (print the configuration), --help; with --multirun also
key=1,2,4 'key=range(1,5)' 'key=choice(a,b)', and with hydra/sweeper=optuna 'key=interval(0.1,1)'."""


WORDS = ("train", "verify", "plan", "profile", "export")


def main() -> None:
    """Do what the first word says and end the process: exit code 0, 1 for a failure, 2 for a user's mistake."""
    word, *overrides = sys.argv[1:] or [""]
    if word in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0)
    if word not in WORDS:
        print(f"distaccum: there is no command {word!r}.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    if word == "export":
        sys.exit(_export(overrides))
    # Imported here, so that help and mistakes cost nothing.
    from distaccum.app.commands.check import check
    from distaccum.app.commands.plan import plan
    from distaccum.app.commands.profile import profile
    from distaccum.app.commands.train import train
    from distaccum.app.commands.verify import verify
    from distaccum.app.config import config_dir
    from distaccum.launch import Program, launch
    from distaccum.metrics.sweep import tell_sweep

    if word == "plan":  # nothing runs, so that there is no run folder
        overrides += ["hydra.run.dir=."]
    task = {"train": train, "verify": verify, "plan": plan, "profile": profile}[word]
    program = None if word == "plan" else Program(command=word, sweep_key="logger.group")
    sys.exit(
        launch(
            overrides,
            config_dir=config_dir(),
            check=check,
            task=task,
            summarise=tell_sweep,
            program=program,
            keeps_folder=word != "plan",
        )
    )


def _export(paths: list[str]) -> int:
    if len(paths) != 2:
        print(f"distaccum export needs RUN and TARGET, and got {len(paths)} words.\n\n{USAGE}", file=sys.stderr)
        return 2
    from distaccum.app.commands.export import export
    from distaccum.launch.failure import report

    try:
        export(Path(paths[0]), Path(paths[1]))
    except Exception as error:
        return report(error)
    return 0

"""One entry, one word for what to do: `distaccum train ...`, the same as `python -m distaccum` and under torchrun."""

from __future__ import annotations

import sys

USAGE = """usage: distaccum train [OVERRIDE ...]

  train    train a model: distaccum train parallel=ddp accum.effective_batch=64 accum.micro=4 launch.nproc_per_node=2
           torchrun --nproc-per-node 2 -m distaccum train ... does the same with torchrun's ranks

OVERRIDE is Hydra's: group=choice, key=value, --multirun key=1,2,4, --cfg job (print the configuration), --help."""


def main() -> None:
    """Do what the first word says and end the process: exit code 0, 1 for a failure, 2 for a user's mistake."""
    word, *overrides = sys.argv[1:] or [""]
    if word in ("-h", "--help", "help"):
        print(USAGE)
        sys.exit(0)
    if word != "train":
        print(f"distaccum: there is no command {word!r}.\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    # Imported here, so that help and mistakes cost nothing.
    from distaccum.build import check, train
    from distaccum.config import config_dir
    from distaccum.launch import launch

    sys.exit(launch(overrides, config_dir=config_dir(), check=check, task=train))

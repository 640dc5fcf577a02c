"""The command line with one more key: `train ... '+faults=[{rank: 1, step: 3, at: backward, kind:
kill}]'`."""

from __future__ import annotations

import sys
from typing import Any

from faults import faults_of, train_with_faults

from distaccum.app.commands.check import check
from distaccum.app.config import config_dir
from distaccum.launch import launch
from distaccum.metrics.sweep import report_sweep


def check_without_faults(config: dict[str, Any]) -> None:
    """What the package checks never sees the key."""
    check(faults_of(config)[1])


if __name__ == "__main__":
    word, *overrides = sys.argv[1:]
    assert word == "train", word
    sys.exit(
        launch(
            overrides,
            config_dir=config_dir(),
            check=check_without_faults,
            task=train_with_faults,
            summarise=report_sweep,
        )
    )

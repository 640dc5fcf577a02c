"""Runs Hydra once per job or sweep, on one rank. No other module composes a configuration."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from .failure import exit_code, first_line, report, say
from .job import Ended, Job
from .run_lock import cannot_write, held
from .sweep import Outcomes, signals_raise

MULTIRUN = {"-m", "--multirun"}
_SHOWS = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info"}


@contextmanager
def arguments(argv: list[str]) -> Iterator[None]:
    """Give Hydra its arguments, and make it raise errors that it would otherwise print."""
    before = sys.argv
    # Hydra fails if overrides are on both sides of --multirun.
    sys.argv = [before[0], *sorted(argv, key=lambda word: word not in MULTIRUN)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The sweeper would log for each job without a number that the number must be "float-castable".
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.argv = before
        del os.environ["HYDRA_FULL_ERROR"]


def check_words(argv: list[str]) -> None:
    """Check what is asked of Hydra itself.

    Raises:
        ConfigError: Another launcher of Hydra is to start the jobs.
    """
    if any(word.startswith("hydra/launcher=") and word != "hydra/launcher=basic" for word in argv):
        raise ConfigError(
            "hydra/launcher is refused. It starts jobs elsewhere, so this process would not learn "
            "how they end, and no job could have several ranks. Use launch=slurm, or leave it out "
            "to run jobs one after the other."
        )


def hydra_task(
    on_job: Callable[[Job], Ended], outcomes: Outcomes, until_end: ExitStack
) -> Callable[[DictConfig], float | None]:
    """Return the function that Hydra calls with each configuration that it has composed.

    Args:
        on_job: Runs a job and returns how it ended. What it raises is shown.
        outcomes: Records the jobs of a sweep.
        until_end: Gets what a sweep holds until its end.
    """

    def run(config: DictConfig) -> float | None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            return _run_in_sweep(settings, lambda: on_job(_job(config)), outcomes, until_end)
        try:
            code = on_job(_job(config)).code
        except Exception as error:
            code = report(error)
        if code:
            raise SystemExit(code)  # passes through Hydra silently
        return None

    return run


def _run_in_sweep(
    settings: Any, do: Callable[[], Ended], outcomes: Outcomes, until_end: ExitStack
) -> float | None:
    """Run one job of a sweep; return its number for the sweeper, or None.

    A failure is not raised to Hydra, which would then start no further job.
    """
    folder = Path(settings.sweep.dir).absolute()
    if not outcomes.jobs:
        until_end.enter_context(held(folder))
        until_end.enter_context(signals_raise())
    run_dir = Path(settings.runtime.output_dir).absolute()
    outcomes.run(int(settings.job.num), list(settings.overrides.task), folder, run_dir, do)
    # Optuna's limit is 0 by default and would end a sweep at its first failure.
    limit = "hydra.sweeper.max_failure_rate"
    limited = any(override.startswith(f"{limit}=") for override in settings.overrides.hydra)
    if limited and outcomes.jobs[-1].status == "failed":
        say(f"error: the sweep was stopped: more jobs failed than {limit} allows")
        raise SystemExit(1)
    return outcomes.last_objective()


def ended(error: BaseException, outcomes: Outcomes) -> int:
    """Show what has ended Hydra, and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return exit_code(error)
    if isinstance(error, OSError) and error.filename is not None:  # Hydra makes the folders
        return report(cannot_write(Path(error.filename).absolute(), error))
    if any(job.status != "done" for job in outcomes.jobs):
        # Optuna's sweeper fails at its end, when all jobs are done.
        say(
            f"the last job of the grid failed, or no job gave a finite {outcomes.objective}, so "
            f"the sweeper wrote no results of its own ({first_line(error)})"
        )
        return 1
    if type(error) is ValueError and not outcomes.jobs:  # Hydra's own check of its flags
        return report(ConfigError(str(error)))
    return report(error)


def refuse_empty_sweep(argv: list[str]) -> int:
    """Return the exit code of a start that has run no job: 2 if it was to be a sweep."""
    if not MULTIRUN & set(argv) or _SHOWS & set(argv):
        return 0
    say(
        "error: the sweep has no jobs: one of its keys has no values, as in range(3,1). Give each "
        "key a value."
    )
    return 2


def composed_with(overrides: list[str]) -> dict[str, Any]:
    """Compose the same files with other overrides and return plain containers.

    Call it while a job is handled.
    """
    return _plain(hydra.compose(HydraConfig.get().job.config_name, overrides))


def flags() -> list[str]:
    """Return the flags that another start of the program needs to compose the same configuration.

    Call it while a job is handled.
    """
    settings = HydraConfig.get()
    found: list[str] = []
    for source in settings.runtime.config_sources:
        if source.provider == "command-line":
            found += ["--config-dir", str(Path(source.path).absolute())]
    if settings.job.config_name != "config":
        found += ["--config-name", str(settings.job.config_name)]
    return found


def keep_composed(job: Job) -> None:
    """Write the composed configuration into RUN/.hydra. Call it while a job is handled.

    Hydra itself would write it before it is known whether this start may use that folder. So the
    configuration has `hydra.output_subdir: null`.
    """
    folder = job.run_dir / ".hydra"
    composed = {
        "config": OmegaConf.create(job.config),
        "hydra": HydraConfig.instance().cfg,
        "overrides": OmegaConf.create(job.overrides),
    }
    try:
        folder.mkdir(exist_ok=True)
        for name, values in composed.items():
            OmegaConf.save(values, folder / f"{name}.yaml")
    except OSError as error:
        raise cannot_write(job.run_dir, error) from None


def sweeper_needs_results() -> bool:
    """Return whether the sweeper chooses jobs by the results of earlier ones.

    Call it while a job is handled.
    """
    builtin = "hydra._internal.core_plugins."
    return not str(HydraConfig.get().sweeper["_target_"]).startswith(builtin)


def _job(config: DictConfig) -> Job:
    settings = HydraConfig.get()
    in_sweep = settings.mode == RunMode.MULTIRUN
    return Job(
        config=_plain(config),
        run_dir=Path(settings.runtime.output_dir).absolute(),
        overrides=list(settings.overrides.task),
        number=int(settings.job.num) if in_sweep else 0,
        sweep=Path(settings.sweep.dir).absolute().name if in_sweep else None,
    )


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    return dict(json.loads(json.dumps(plain)))  # the same containers however the job is started

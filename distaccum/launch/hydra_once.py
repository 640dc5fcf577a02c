"""Runs Hydra once per job or sweep, on one rank. No other module composes a configuration.

In a sweep a failure is not raised to Hydra, which would then start no further job. It is recorded,
and the sweeper gets None.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.api import SignalException

from .failure import exit_code, first_line, is_users, report, say
from .job import Ended, Order
from .run_lock import cannot_write, held
from .sweep import Outcomes, Summarise, Sweep, signals_raise

_MULTIRUN = {"-m", "--multirun"}


class JobFailedError(Exception):
    """Ends a sweep in which a job failed, if the user has limited how many may fail.

    The job has already shown its own error.
    """


def run(
    argv: list[str],
    config_dir: Path,
    on_job: Callable[[Order], Ended],
    objective: str,
    summarise: Summarise | None,
) -> int:
    """Let Hydra do what the command line asks: run one job or a sweep, or show help or a config.

    Args:
        argv: Hydra's arguments, without the program's name.
        config_dir: The folder of `config.yaml`.
        on_job: Called for each job; returns how it ended. What it raises is shown here.
        objective: The name of the number in a job's result that the sweeper gets.
        summarise: Called once at the end of a sweep in which a job was started.

    Returns:
        The exit code. For one job: 0 or that of the job. For a sweep: 0; 1 when any job failed or
        was refused; 128 + signal. For both: 2 when nothing was started, because Hydra could not
        compose or had no job. It never raises.
    """
    if any(word.startswith("hydra/launcher=") and word != "hydra/launcher=basic" for word in argv):
        say(
            "error: hydra/launcher is refused. It starts jobs elsewhere, so this process would not learn how they end, "
            "and no job could have several ranks. Use launch=slurm, or leave it out to run jobs one after the other."
        )
        return 2
    outcomes = Outcomes(objective)
    with contextlib.ExitStack() as until_end:
        code = _run_hydra(argv, config_dir, on_job, outcomes, until_end)
        if not outcomes.jobs:
            return code or _refuse_empty_sweep(argv)
        code = outcomes.exit_code(code)
        if summarise is not None:
            try:
                summarise(Sweep(outcomes.folder, tuple(outcomes.jobs)))
            except Exception as error:
                refused = report(error)
                code = code or refused
        return code


def composed_with(overrides: list[str]) -> dict[str, Any]:
    """Compose the same files with other overrides and return plain containers.

    Call it while a job is handled.
    """
    config = hydra.compose(HydraConfig.get().job.config_name, overrides)
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    return dict(plain)


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


def keep_composed(order: Order) -> None:
    """Write the composed configuration into RUN/.hydra. Call it while a job is handled.

    Hydra itself would write it before it is known whether this start may use that folder. So the
    configuration has `hydra.output_subdir: null`.
    """
    folder = Path(order.run_dir) / ".hydra"
    composed = {
        "config": OmegaConf.create(order.config),
        "hydra": HydraConfig.instance().cfg,
        "overrides": OmegaConf.create(order.overrides),
    }
    try:
        folder.mkdir(exist_ok=True)
        for name, values in composed.items():
            OmegaConf.save(values, folder / f"{name}.yaml")
    except OSError as error:
        raise cannot_write(order.run_dir, error) from None


def sweeper_needs_results() -> bool:
    """Return whether the sweeper chooses jobs by the results of earlier ones.

    Call it while a job is handled.
    """
    return not str(HydraConfig.get().sweeper["_target_"]).startswith("hydra._internal.core_plugins.")


def _run_hydra(
    argv: list[str],
    config_dir: Path,
    on_job: Callable[[Order], Ended],
    outcomes: Outcomes,
    until_end: contextlib.ExitStack,
) -> int:
    began = False

    def hydra_task(config: DictConfig) -> float | None:
        nonlocal began
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN:
            if not began:
                until_end.enter_context(held(Path(settings.sweep.dir)))
                until_end.enter_context(signals_raise())
            began = True
            return _job_of_sweep(settings, lambda: on_job(_order(config)), outcomes)
        began = True
        try:
            code = on_job(_order(config)).code
        except Exception as error:
            code = report(error)
        if code:
            raise SystemExit(code)  # passes through Hydra silently
        return None

    with _arguments(argv), _plain_errors() as wants_traceback:
        try:
            hydra.main(config_path=str(config_dir.absolute()), config_name="config", version_base="1.3")(hydra_task)()
        except JobFailedError:
            say("error: the sweep was stopped: more jobs failed than hydra.sweeper.max_failure_rate allows")
            return 1
        except SignalException as error:  # from torch's handler, outside a job
            return 128 + int(error.sigval)
        except SystemExit as error:
            code = exit_code(error)
            return 2 if code and not began else code
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except OSError as error:  # Hydra makes the folders of runs and sweeps
            if wants_traceback:
                traceback.print_exc()
            return report(error if error.filename is None else cannot_write(Path(error.filename).absolute(), error))
        except Exception as error:
            if outcomes.jobs and all(job.result.get(outcomes.objective) is None for job in outcomes.jobs):
                say(f"error: no job gave the sweeper a finite {outcomes.objective} ({first_line(error)})")
            elif outcomes.jobs and "`Study.stop` is supposed to be invoked" in str(error):
                # Optuna's sweeper fails if the last job of a grid has no number. All jobs are done.
                say("the last job of the grid failed, so Optuna wrote no optimization_results.yaml")
            elif wants_traceback:
                traceback.print_exc()
            elif isinstance(error, ValueError) and not began and not is_users(error):
                say(f"error: {error}")  # Hydra's own check of its flags
                return 2
            else:
                return report(error)
            return exit_code(error)
    return 0


def _refuse_empty_sweep(argv: list[str]) -> int:
    if not _MULTIRUN & set(argv) or {"-h", "--help", "--hydra-help"} & set(argv):
        return 0
    say("error: the sweep has no jobs: one of its keys has no values, as in range(3,1). Give each key a value.")
    return 2


def _job_of_sweep(settings: Any, do: Callable[[], Ended], outcomes: Outcomes) -> float | None:
    overrides = list(settings.overrides.task)
    folder = Path(settings.sweep.dir).absolute()
    outcomes.run(int(settings.job.num), overrides, folder, Path(settings.runtime.output_dir).absolute(), do)
    # Optuna's limit is 0 by default and would end a sweep at its first failure.
    limited = any(override.startswith("hydra.sweeper.max_failure_rate=") for override in settings.overrides.hydra)
    if limited and outcomes.jobs[-1].status == "failed":
        raise JobFailedError("a job has failed")
    return outcomes.last_objective()


def _order(config: DictConfig) -> Order:
    settings = HydraConfig.get()
    in_sweep = settings.mode == RunMode.MULTIRUN
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    order = Order(
        config=plain,
        run_dir=str(Path(settings.runtime.output_dir).absolute()),
        overrides=list(settings.overrides.task),
        number=int(settings.job.num) if in_sweep else 0,
        sweep=Path(settings.sweep.dir).absolute().name if in_sweep else None,
    )
    return Order.from_json(order.to_json())  # the same containers however the job is started


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Set `sys.argv`, from which alone Hydra takes its arguments, with `--multirun` in front.

    Hydra fails if overrides are on both sides of a flag.
    """
    before = sys.argv
    sys.argv = [before[0], *sorted(argv, key=lambda word: word not in _MULTIRUN)]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _plain_errors() -> Iterator[bool]:
    """Make Hydra raise its errors, not print them; yield whether its tracebacks are wanted."""
    # The sweeper would log for each job without a number that the number must be "float-castable".
    sweeper = logging.getLogger("hydra_plugins.hydra_optuna_sweeper")
    level = sweeper.level
    sweeper.setLevel(logging.CRITICAL)
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield before == "1"
    finally:
        sweeper.setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

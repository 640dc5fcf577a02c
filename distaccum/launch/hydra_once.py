"""Hydra, run once for a job or a sweep, on one rank. Nothing else in the package composes a configuration."""

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

from .failure import exit_code, is_users, report, say
from .job import Order


class JobFailedError(Exception):
    """A job of a sweep has failed and has shown why. Hydra notes it and goes on with the next one."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def run(argv: list[str], config_dir: Path, on_job: Callable[[Order], int]) -> int:
    """Let Hydra do what the command line asks for: one job, a sweep, or showing help or a configuration.

    Args:
        argv: Hydra's arguments, without the program's name.
        config_dir: the folder of `config.yaml`.
        on_job: called for each job; gives its exit code. What it raises is shown here.

    Returns:
        the exit code: 0, or that of the first job that failed. 2 when Hydra could not compose. Never raises.
    """
    began = False

    def hydra_task(config: DictConfig) -> None:
        nonlocal began
        began = True
        try:
            code = on_job(_order(config))
        except Exception as error:
            code = report(error)
        if code and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise JobFailedError(code)
        if code:
            raise SystemExit(code)  # passes through Hydra without a word

    with _arguments(argv), _plain_errors() as wants_traceback:
        try:
            hydra.main(config_path=str(config_dir.absolute()), config_name="config", version_base="1.3")(hydra_task)()
        except JobFailedError as error:
            return error.code
        except SignalException as error:  # torch's handler, outside of a job
            return 128 + int(error.sigval)
        except SystemExit as error:
            code = exit_code(error)
            return 2 if code and not began else code
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except Exception as error:
            if wants_traceback:
                traceback.print_exc()
            elif isinstance(error, ValueError) and not began and not is_users(error):
                say(f"error: {error}")  # Hydra's own check of its flags
                return 2
            else:
                return report(error)
            return exit_code(error)
    return 0


def _order(config: DictConfig) -> Order:
    settings = HydraConfig.get()
    in_sweep = settings.mode == RunMode.MULTIRUN
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)
    order = Order(
        config=plain,
        run_dir=str(Path(settings.runtime.output_dir).absolute()),
        overrides=list(settings.overrides.task),
        number=int(settings.job.num) if in_sweep else 0,
    )
    return Order.from_json(order.to_json())  # the same containers whichever way the job is started


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv` and nothing else."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _plain_errors() -> Iterator[bool]:
    """Let Hydra hand its errors to us in place of printing them; whether the user asked for its tracebacks."""
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield before == "1"
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

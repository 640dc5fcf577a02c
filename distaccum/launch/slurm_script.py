"""The text of a batch script: slurm/train.sbatch with other #SBATCH lines and settings."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .settings import SlurmLaunch

_HEAD = "#SBATCH "
_SETTINGS = re.compile(r"(?<=^# settings\n).*(?=^# end of settings$)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Element:
    """One job: the only one, or one of an array."""

    number: int
    run_dir: Path  # absolute
    arguments: tuple[str, ...]  # of the program: overrides, without what concerns the launch and the run folder


def render(settings: SlurmLaunch, python: str, command: str, elements: Sequence[Element], folder: Path | None) -> str:
    """The script for one job, or for an array of several.

    Args:
        settings: what the user asked for.
        python: the interpreter on the nodes.
        command: the word after `-m distaccum`.
        elements: the jobs; one without `folder`.
        folder: the array's folder, which holds a folder for each element that has its number for a name.
    """
    text = template_file().read_text()
    lines = text.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.startswith(_HEAD))
    kept = [line for line in lines[first:] if not line.startswith(_HEAD)]
    numbers = None if folder is None else [element.number for element in elements]
    log = f"{_literal(elements[0].run_dir)}/job.log" if folder is None else f"{_literal(folder)}/%a/job.log"
    head = [_HEAD + line + "\n" for line in _head(settings, log, numbers)]
    shebang = lines[0]
    made = "# Made by `distaccum` from slurm/train.sbatch, for the run folder that it stands in.\n"
    body = "".join([shebang, made, *head, *kept])
    return _SETTINGS.sub(lambda _: _settings(settings, python, command, elements, folder), body)


def template_file() -> Path:
    """slurm/train.sbatch: inside the package when installed from a wheel, else beside it. ConfigError without it."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "slurm", package.parent / "slurm"):
        if (folder / "train.sbatch").is_file():
            return folder / "train.sbatch"
    raise ConfigError(f"No train.sbatch at {package / 'slurm'} or {package.parent / 'slurm'}. Reinstall distaccum.")


def _head(settings: SlurmLaunch, log: str, numbers: list[int] | None) -> list[str]:
    array = None
    if numbers is not None:
        parallel = "" if settings.array_parallel is None else f"%{settings.array_parallel}"
        array = f"0-{numbers[-1]}{parallel}"
    asked = {
        "job-name": "distaccum",
        "array": array,
        "output": shlex.quote(log),
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": settings.ranks_per_node,
        "gpus-per-node": settings.gpus_per_node,
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.memory,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": None if settings.constraint is None else shlex.quote(settings.constraint),
        "signal": f"USR1@{settings.signal_s}" if settings.signal_s else None,
    }
    lines = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return [*lines, "--requeue" if settings.requeue else "--no-requeue", *settings.extra]


def _settings(
    settings: SlurmLaunch, python: str, command: str, elements: Sequence[Element], folder: Path | None
) -> str:
    lines = [
        *settings.setup,
        f"python={shlex.quote(python)}",
        f"command={shlex.quote(command)}",
        f"launcher={settings.launcher.value}",
        "max_restarts=0",
        f"requeue={str(settings.requeue).lower()}",
    ]
    if folder is None:
        lines += _of(elements[0])
    else:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        lines += [f"{element.number}) {'; '.join(_of(element))} ;;" for element in elements]
        lines.append("esac")
    return "\n".join(lines) + "\n"


def _literal(path: Path) -> str:
    return str(path).replace("%", "%%")  # sbatch replaces %a, %j ...


def _of(element: Element) -> list[str]:
    return [f"run_dir={shlex.quote(str(element.run_dir))}", f"overrides=({shlex.join(element.arguments)})"]

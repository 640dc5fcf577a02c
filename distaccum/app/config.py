"""Defines the types of a run's configuration; the folder conf/ defines all default values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from distaccum.app.names import no_key
from distaccum.app.oom import OnOutOfMemory
from distaccum.checkpoint.saver import CheckpointConfig
from distaccum.core.batch_schedule import Ramp, ScheduleUnit
from distaccum.core.batch_size import Ragged
from distaccum.core.plan import LastWindow
from distaccum.core.strategies import Sync
from distaccum.data.images import ImagesConfig
from distaccum.data.loader import LoaderConfig
from distaccum.data.text import TextConfig
from distaccum.errors import ConfigError, require
from distaccum.grads.accumulate import SumDtype
from distaccum.huggingface.models import HFConfig
from distaccum.launch import LocalLaunch, SlurmLaunch
from distaccum.metrics import LoggerConfig
from distaccum.models.gpt import GPTConfig
from distaccum.models.resnet import ResNetConfig
from distaccum.nn.blocks import NNConfig
from distaccum.optim import OptimConfig
from distaccum.parallel.apply import ParallelConfig
from distaccum.parallel.ledger import Audit
from distaccum.parallel.precision import PrecisionConfig
from distaccum.planner.meter import LimitsConfig
from distaccum.step.record import NonFinite


class Device(Enum):
    """Selects the device of each rank: `auto` is its GPU if there are GPUs, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class AccumConfig:
    """Configures how micro-batches make up an effective batch, see `core.batch_size.solve`."""

    effective_batch_size: int | None
    effective_batch_tokens: int | None
    micro_batch_size: Any  # a number, auto or null; OmegaConf has no such union type
    gradient_accumulation_steps: int | None
    # parsed by batch_schedule.entries_of, as `from` cannot be a field name
    schedule: list[dict[str, int]] | None
    schedule_unit: ScheduleUnit
    ramp: Ramp
    ragged: Ragged
    last_window: LastWindow
    sync: Sync
    nonfinite: NonFinite
    audit: Audit
    dtype: SumDtype | None
    overlap_micro_batches: Any  # a number or auto; OmegaConf has no such union type
    overlap_memory_mb: int | None
    on_oom: OnOutOfMemory

    def validate(self) -> None:
        """Refuse values that are wrong for any data and any number of ranks."""
        overlap, memory_mb = self.overlap_micro_batches, self.overlap_memory_mb
        require(
            overlap == "auto" or (type(overlap) is int and overlap >= 1),
            f"accum.overlap_micro_batches is {overlap!r}; give a number of micro-batches of at "
            "least 1, or auto.",
        )
        require(
            memory_mb is None or memory_mb >= 0,
            f"accum.overlap_memory_mb is {memory_mb}; give at least 0 (MiB), or null for no limit.",
        )
        require(
            self.micro_batch_size in (None, "auto") or type(self.micro_batch_size) is int,
            f"accum.micro_batch_size is {self.micro_batch_size!r}; give a number of samples, auto "
            "for the most that fit, or null.",
        )
        require(
            self.effective_batch_size is None or self.effective_batch_tokens is None,
            f"accum.effective_batch_size={self.effective_batch_size} and "
            f"accum.effective_batch_tokens={self.effective_batch_tokens} are both given. They set "
            "the same size in two units: set one to null.",
        )
        if self.schedule is not None:
            self._validate_schedule()

    def _validate_schedule(self) -> None:
        for name in (
            "effective_batch_size",
            "effective_batch_tokens",
            "gradient_accumulation_steps",
        ):
            require(
                getattr(self, name) is None,
                f"accum.schedule and accum.{name}={getattr(self, name)} are both given. The "
                "schedule sets the effective batch size, and the micro-batches per rank follow "
                f"from it. Set accum.{name}=null.",
            )
        require(
            self.ramp is Ramp.jump or self.ragged is Ragged.allow,
            "accum.ragged=refuse contradicts accum.ramp=linear: the sizes of a ramp are multiples "
            "of the micro-batch size, which do not always divide evenly among the ranks. Use "
            "accum.ragged=allow, or accum.ramp=jump.",
        )


@dataclass
class TrainConfig:
    """Configures the length of the training and how often it logs and validates."""

    steps: int | None
    epochs: int | None
    seed: int
    log_every_steps: int
    validate_every_steps: int
    validation_samples: int
    timeout_s: float
    max_minutes: float | None
    deterministic: bool

    def validate(self) -> None:
        """Refuse values out of range."""
        for name in ("log_every_steps", "validate_every_steps", "validation_samples"):
            require(
                getattr(self, name) >= 1,
                f"train.{name} is {getattr(self, name)}; it must be at least 1.",
            )
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"train.max_minutes is {self.max_minutes}; give a positive number, or null.",
        )
        require(
            (self.steps is None) != (self.epochs is None),
            f"train.steps={self.steps} and train.epochs={self.epochs}: give one of them and set "
            "the other to null, because exactly one of them sets the length of the training.",
        )


@dataclass
class Config:
    """Configures one run.

    The types of `model`, `data` and `launch` depend on their `name`, see `CHOICES`.
    """

    model: Any
    data: Any
    launch: Any
    accum: AccumConfig
    parallel: ParallelConfig
    optim: OptimConfig
    precision: PrecisionConfig
    nn: NNConfig
    logger: LoggerConfig
    loader: LoaderConfig
    train: TrainConfig
    device: Device
    run_dir: str
    resume: str
    init_weights: str | None
    checkpoint: CheckpointConfig
    limits: LimitsConfig
    machine: str | None
    world_size: int | None
    experiment: str | None = None


CHOICES: dict[str, dict[str, type]] = {
    "model": {"gpt": GPTConfig, "hf": HFConfig, "resnet": ResNetConfig},
    "data": {"text": TextConfig, "images": ImagesConfig},
    "launch": {"local": LocalLaunch, "slurm": SlurmLaunch},
}


def typed(composed: dict[str, Any]) -> Config:
    """Convert a composed configuration to its types and check its values.

    Raises:
        ConfigError: for an unknown key (also one that `+` added), a missing value, a wrong type, or
            a value out of range.
    """
    schema = OmegaConf.structured(Config)
    for section, kinds in CHOICES.items():
        chosen = composed.get(section)
        name = chosen.get("name") if isinstance(chosen, dict) else None
        require(
            name in kinds,
            f"{section}.name is {name!r}. Known: {', '.join(kinds)}. Choose a file of "
            f"conf/{section}/ with {section}=NAME.",
        )
        schema[section] = OmegaConf.structured(kinds[str(name)])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except ConfigKeyError as error:
        section_type: Any = error.object_type
        known = [field.name for field in fields(section_type)]
        raise ConfigError(no_key(str(error.full_key), known)) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from None
    assert isinstance(config, Config)
    require(
        bool(config.run_dir.strip()),
        "run_dir is empty, perhaps because of an unset shell variable. Give a folder, or leave "
        "run_dir out.",
    )
    for field in fields(config):
        section = getattr(config, field.name)
        if hasattr(section, "validate"):
            section.validate()
    return config


def missing(key: str, kinds: Sequence[Any] = (Config,)) -> list[str] | None:
    """Return the names that exist where a dotted key stops to exist, or None if it exists.

    A key exists if some choice of model, data and launch has it.

    Args:
        key: the dotted key, from the section of `kinds` on.
        kinds: the dataclasses that the section may have.
    """
    name, _, rest = key.partition(".")
    known = {field.name: kind for kind in kinds for field in fields(kind)}
    if name not in known:
        return list(known)
    hint = get_type_hints(known[name])[name]
    inner = [*CHOICES[name].values()] if kinds == (Config,) and name in CHOICES else [hint]
    return missing(rest, inner) if rest and all(map(is_dataclass, inner)) else None


def config_dir() -> Path:
    """Return the folder conf/, which is inside the package in a wheel and beside it in a checkout.

    Raises:
        ConfigError: if neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"There is no configuration folder at {package / 'conf'} or {package.parent / 'conf'}. "
        "Reinstall distaccum."
    )

"""Defines the types of a run's configuration; the folder conf/ defines all default values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distaccum.app.names import no_key
from distaccum.app.oom import OnOutOfMemory
from distaccum.checkpoint.saver import CheckpointConfig
from distaccum.core.batch_schedule import Ramp, ScheduleUnit
from distaccum.core.batch_size import Ragged
from distaccum.core.plan import LastWindow
from distaccum.core.strategies import Sync
from distaccum.data.images import ImagesConfig
from distaccum.data.text import TextConfig
from distaccum.errors import ConfigError
from distaccum.grads.accumulate import SumDtype
from distaccum.huggingface.models import HFConfig
from distaccum.launch import LocalLaunch, SlurmLaunch
from distaccum.metrics import LoggerConfig
from distaccum.models.gpt import GPTConfig
from distaccum.models.resnet import ResNetConfig
from distaccum.nn.batchnorm_layers import BatchNormMode
from distaccum.optim import OptimConfig
from distaccum.parallel.apply import ParallelConfig
from distaccum.parallel.ledger import Audit
from distaccum.parallel.precision import Precision
from distaccum.planner.meter import parse_bytes
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
    schedule: list[dict[str, int]] | None  # parsed by batch_schedule.entries_of, as `from` cannot be a field name
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


@dataclass
class LimitsConfig:
    """Limits how much memory a rank may use on its device."""

    memory: Any  # such as 2GiB, a number of bytes, or null
    margin: float  # share of the memory that automatic choices leave free

    @property
    def memory_bytes(self) -> int | None:
        """Return the limit in bytes, or None for the memory of the device (no limit on the CPU).

        Raises:
            ConfigError: if `memory` is not a positive amount.
        """
        return None if self.memory is None else parse_bytes(self.memory, "limits.memory")


@dataclass
class PrecisionConfig:
    """Configures the dtype in which the model computes and, for fp16, the loss scale."""

    name: Precision
    loss_scale: float
    loss_scale_growth_windows: int


@dataclass
class NNConfig:
    """Configures BatchNorm, compilation and activation checkpointing inside the model."""

    batchnorm: BatchNormMode
    compile: bool
    checkpoint: bool


@dataclass
class LoaderConfig:
    """Configures how samples are read."""

    workers: int
    pin_memory: bool | None


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


@dataclass
class Config:
    """Configures one run.

    The types of `model`, `data` and `launch` depend on their `name`, see `MODELS`, `DATA` and
    `LAUNCH`.
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


MODELS: dict[str, type] = {"gpt": GPTConfig, "hf": HFConfig, "resnet": ResNetConfig}
DATA: dict[str, type] = {"text": TextConfig, "images": ImagesConfig}
LAUNCH: dict[str, type] = {"local": LocalLaunch, "slurm": SlurmLaunch}

T = TypeVar("T")


def typed(composed: dict[str, Any]) -> Config:
    """Convert a composed configuration to its types and check its values.

    Raises:
        ConfigError: for an unknown key (also one that `+` added), a missing value, a wrong type, or
            a value out of range.
    """
    composed = dict(composed)
    model = _choose(composed.pop("model", None), MODELS, "model")
    data = _choose(composed.pop("data", None), DATA, "data")
    launch = _choose(composed.pop("launch", None), LAUNCH, "launch")
    config = _convert(Config, composed, "")
    config.model, config.data, config.launch = model, data, launch
    if not config.run_dir.strip():
        raise ConfigError(
            "run_dir is empty, perhaps because of an unset shell variable. Give a folder, or leave run_dir out."
        )
    for name in ("log_every_steps", "validate_every_steps", "validation_samples"):
        if getattr(config.train, name) < 1:
            raise ConfigError(f"train.{name} is {getattr(config.train, name)}; it must be at least 1.")
    for name, value in (
        ("train.max_minutes", config.train.max_minutes),
        ("checkpoint.every.steps", config.checkpoint.every.steps),
        ("checkpoint.every.minutes", config.checkpoint.every.minutes),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is {value}; give a positive number, or null.")
    overlap, memory_mb = config.accum.overlap_micro_batches, config.accum.overlap_memory_mb
    if overlap != "auto" and (isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 1):
        raise ConfigError(
            f"accum.overlap_micro_batches is {overlap!r}; give a number of micro-batches of at least 1, or auto."
        )
    if memory_mb is not None and memory_mb < 0:
        raise ConfigError(f"accum.overlap_memory_mb is {memory_mb}; give at least 0 (MiB), or null for no limit.")
    micro_batch = config.accum.micro_batch_size
    if micro_batch not in (None, "auto") and (isinstance(micro_batch, bool) or not isinstance(micro_batch, int)):
        raise ConfigError(
            f"accum.micro_batch_size is {micro_batch!r}; give a number of samples, auto for the most that fit, or null."
        )
    warmup = config.optim.schedule.warmup
    if warmup != "auto" and (isinstance(warmup, bool) or not isinstance(warmup, int)):
        raise ConfigError(
            f"optim.schedule.warmup is {warmup!r}; give a whole number in optim.schedule.unit, 0 for none, or auto."
        )
    if not 0 <= config.limits.margin < 1:
        raise ConfigError(
            f"limits.margin is {config.limits.margin}; it is a share of the memory and must be at least 0 and below 1."
        )
    _ = config.limits.memory_bytes  # raises ConfigError if it is not an amount
    if config.checkpoint.keep < 0:
        raise ConfigError(
            f"checkpoint.keep is {config.checkpoint.keep}; give the number of checkpoints to keep, or 0 to save none."
        )
    if (config.train.steps is None) == (config.train.epochs is None):
        raise ConfigError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs}: give one of them and set the "
            "other to null, because exactly one of them sets the length of the training."
        )
    return config


def _choose(node: Any, kinds: dict[str, type], where: str) -> Any:
    name = node.get("name") if isinstance(node, dict) else None
    if name not in kinds:
        raise ConfigError(
            f"{where}.name is {name!r}. Known: {', '.join(kinds)}. Choose a file of conf/{where}/ with {where}=NAME."
        )
    return _convert(kinds[name], node, f"{where}.")


def _convert(kind: type[T], node: dict[str, Any], prefix: str) -> T:
    _refuse_unknown(kind, node, prefix)
    try:
        schema = OmegaConf.structured(kind)
        if kind is Config:
            node = {"model": None, "data": None, "launch": None, **node}
        result = OmegaConf.to_object(OmegaConf.merge(schema, node))
    except OmegaConfBaseException as error:
        key = prefix + str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}: {reason}.") from None
    assert isinstance(result, kind)
    return result


def _refuse_unknown(kind: Any, node: Any, prefix: str) -> None:
    """Raise ConfigError for an unknown key; OmegaConf's own error would not list the known ones."""
    if not isinstance(node, dict) or not hasattr(kind, "__dataclass_fields__"):
        return
    known = [field.name for field in fields(kind)]
    for key, value in node.items():
        if key not in known:
            raise ConfigError(no_key(f"{prefix}{key}", known))
        inner = _dataclass_of(kind, key)
        if inner is not None:
            _refuse_unknown(inner, value, f"{prefix}{key}.")


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
    choices = {"model": MODELS, "data": DATA, "launch": LAUNCH}
    inner = [*choices[name].values()] if kinds == (Config,) and name in choices else [_dataclass_of(known[name], name)]
    return None if not rest or None in inner else missing(rest, inner)


def _dataclass_of(kind: Any, name: str) -> Any:
    hint = get_type_hints(kind)[name]
    return hint if hasattr(hint, "__dataclass_fields__") else None


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
        f"There is no configuration folder at {package / 'conf'} or {package.parent / 'conf'}. Reinstall distaccum."
    )

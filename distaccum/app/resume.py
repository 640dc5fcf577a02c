"""Chooses the checkpoint to resume from, checks that it fits, and reports what has changed."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distaccum.app.config import AccumConfig, Config
from distaccum.app.names import renamed
from distaccum.app.progress import Progress
from distaccum.app.task import Task
from distaccum.checkpoint.state import make_optimizer_state, model_tensors, optimizer_tensors
from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.core.plan import Plan
from distaccum.errors import CheckpointError, require
from distaccum.metrics.plain import plain_dict
from distaccum.parallel.world import World
from distaccum.step.accumulator import Accumulator
from distaccum.version import __version__

# Changes of these keys between two starts of a run are not reported, because they do not affect
# what is learned.
_NOT_REPORTED = (
    "run_dir", "resume", "init_weights", "checkpoint", "logger", "launch", "loader", "device",
    "machine", "world_size", "experiment", "train.log_every_steps", "train.validate_every_steps",
    "train.timeout_s", "train.max_minutes", "accum.audit",
)  # fmt: skip

# Prefixes of the keys on which the memory of a micro-batch depends.
_AFFECTS_MEMORY = (
    "accum.",
    "data.",
    "device",
    "limits.",
    "model.",
    "nn.",
    "optim.name",
    "parallel.",
    "precision.",
)


def find(
    config: Config, run_dir: Path, checkpoints: Checkpoints, world: World
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start from step 0.

    Call it on every rank. All ranks get the same checkpoint.

    Raises:
        ConfigError: if `resume` is none although there are checkpoints, or is a path that does not
            exist.
        CheckpointError: if there are checkpoints, and none of them can be read.
    """
    newest = checkpoints.newest()
    if newest is None and checkpoints.passed_over and config.resume != "none":
        raise CheckpointError(
            f"{run_dir} has checkpoints, but none of them can be read: "
            f"{'; '.join(checkpoints.passed_over)}. Nothing was changed. Use another run_dir to "
            "start from step 0, or another run_dir with resume=PATH to continue from another "
            "checkpoint."
        )
    require(
        config.resume != "none" or (newest is None and not checkpoints.passed_over),
        f"resume=none, but {run_dir} has checkpoints of an earlier run, and the checkpoints of two "
        "runs would be mixed. Use another run_dir, or resume=auto to continue that run.",
    )
    if newest is None and config.resume not in ("auto", "none"):
        path = Path(config.resume)
        require(
            path.exists(),
            f"resume={path}: there is no such folder. Give a run folder or a checkpoint.",
        )
        newest = Checkpoint.open(path, world)
    if newest is not None:
        newest.facts = renamed(newest.facts)
    return newest


def facts_of(
    config: Config, composed: Mapping[str, Any], task: Task, plan: Plan, warmup: int, world: World
) -> dict[str, Any]:
    """Return the facts that every checkpoint of a run holds, besides its progress.

    Args:
        config: the typed configuration of this start.
        composed: the plain configuration that `config` was made from.
        task: the task of `config`.
        plan: the plan of the training.
        warmup: the length of the warm-up, in `optim.schedule.unit`.
        world: the ranks of this start.
    """
    facts = {
        "identity": _identity(config, task, plan),
        "micro_batch_size": plan.micro_batch_size,
        "warmup": warmup,
        "config": composed,
        "world_size": world.size,
        "versions": {
            "distaccum": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    return plain_dict(facts)


def keep_effective_batch(
    accum: AccumConfig, checkpoint: Checkpoint | None, world_size: int
) -> AccumConfig:
    """Keep the effective batch size of a resumed run when the number of ranks changes.

    This matters if the configuration gives only the micro-batch size and the micro-batches per
    rank, so that the effective batch size would change with the ranks. The returned settings then
    ask for the effective batch size of the checkpoint. In all other cases `accum` is returned
    unchanged.
    """
    if checkpoint is None or checkpoint.facts["world_size"] == world_size:
        return accum
    before = checkpoint.facts["config"]["accum"]
    names = (
        "effective_batch_size",
        "effective_batch_tokens",
        "schedule",
        "micro_batch_size",
        "gradient_accumulation_steps",
    )
    now = {name: getattr(accum, name) for name in names}
    if any(now[name] is not None for name in names[:3]) or any(
        before[name] != now[name] for name in names
    ):
        return accum
    return replace(
        accum,
        gradient_accumulation_steps=None,
        effective_batch_size=int(checkpoint.facts["identity"]["accum.effective_batch_size"]),
    )


def kept_micro_batch_size(
    checkpoint: Checkpoint | None, composed: Mapping[str, Any], world_size: int
) -> int | None:
    """Return the checkpoint's micro-batch size if it can be reused, else None.

    It can be reused if the number of ranks and all settings that affect memory are unchanged. A
    size that `accum.micro_batch_size=auto` has found is then not searched for again, so that a run
    continues bit for bit.
    """
    if checkpoint is None or checkpoint.facts["world_size"] != world_size:
        return None
    then, here = (dict(_flat(config)) for config in (checkpoint.facts["config"], composed))
    same = all(
        then.get(key) == here.get(key) for key in {*then, *here} if key.startswith(_AFFECTS_MEMORY)
    )
    return checkpoint.facts.get("micro_batch_size") if same else None


def load(
    checkpoint: Checkpoint, accumulator: Accumulator, facts: Mapping[str, Any], steps: int
) -> Progress:
    """Load model, optimizer and accumulator from a checkpoint.

    Call it on every rank.

    Args:
        checkpoint: the checkpoint from `find`.
        accumulator: a new accumulator, which has made no step.
        facts: the facts of this start, from `facts_of`.
        steps: the length of the whole training, in windows of its plan.

    Returns:
        The progress of the training at the checkpoint.

    Raises:
        ConfigError: if the checkpoint has another model, other data or another plan, or is
            longer than the training. Nothing was loaded then.
        CheckpointError: if the checkpoint cannot be read.
    """
    model, optimizer = accumulator.strategy.evaluation_model, accumulator.optimizer
    here = {name: (tensor.shape, tensor.dtype) for name, tensor in model_tensors(model).items()}
    there = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    differ = [
        *_other_plan(checkpoint.facts["identity"], facts["identity"]),
        *_other_model(there, here),
    ]
    require(
        not differ,
        f"{checkpoint.path} cannot be continued with these settings: {'; '.join(differ)}. Use the "
        "settings of the checkpoint (its manifest.json holds the configuration), or start from "
        "step 0 with another run_dir. To change the effective batch size during a training, use "
        "accum.schedule.",
    )
    progress = _progress(checkpoint.facts)
    require(
        progress.windows <= steps,
        f"{checkpoint.path} already has {progress}, but the training has only {steps} (train.steps "
        "or train.epochs). Set a larger number, or start from step 0 with another run_dir.",
    )
    make_optimizer_state(model, optimizer, there, checkpoint.facts["optimizer"])
    checkpoint.load({**model_tensors(model), **optimizer_tensors(model, optimizer)})
    accumulator.load_state_dict(checkpoint.facts["accumulator"])
    return progress


def _progress(facts: Mapping[str, Any]) -> Progress:
    """Return the saved progress; in checkpoints of older versions, `step` counts windows."""
    saved = dict(facts["progress"])
    if "windows" not in saved:
        step = int(facts["accumulator"]["steps"])
        saved |= {
            "windows": saved["step"],
            "step": step,
            "evaluated_step": min(saved["evaluated_step"], step),
        }
    return Progress(**saved)


def message(checkpoint: Checkpoint, facts: Mapping[str, Any], progress: Progress) -> Iterator[str]:
    """Yield one line on the checkpoint, and one on every changed setting and version."""
    before, now = checkpoint.facts, facts
    ranks = f"{before['world_size']} rank(s)"
    if before["world_size"] != now["world_size"]:
        ranks += (
            f" before, {now['world_size']} now; micro-batches are redistributed, the effective "
            "batch is unchanged"
        )
    yield f"continues after step {progress.step} from {checkpoint.path} ({ranks})"
    then, here = _settings(before), _settings(now)
    for key in sorted({*then, *here}):
        if not key.startswith(_NOT_REPORTED) and then.get(key) != here.get(key):
            yield f"setting changed: {key} {then.get(key)} -> {here.get(key)}"
    for name, found in now["versions"].items():
        if before["versions"].get(name) != found:
            yield f"version changed: {name} {before['versions'].get(name)} -> {found}"


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration by dotted key, with the warm-up length in place of `auto`.

    Thus a change of that length is reported like any other changed setting.
    """
    settings = dict(_flat(facts["config"]))
    return {
        **settings,
        "optim.schedule.warmup": facts.get("warmup", settings.get("optim.schedule.warmup")),
    }


def _identity(config: Config, task: Task, plan: Plan) -> dict[str, Any]:
    """Return the facts that must not change within a run.

    A change would lose or repeat samples, or lose the optimizer's state.
    """
    training = task.facts["training"]
    return {
        "data digest": training.get("digest") if isinstance(training, Mapping) else None,
        "samples per epoch": plan.num_samples,
        "train.seed": config.train.seed,
        "accum.last_window": config.accum.last_window,
        "accum.effective_batch_size": (
            None if plan.schedule is not None else plan.effective_batch_size
        ),
        "optim.name": config.optim.name,
    }


def _other_plan(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name, value in here.items():
        scheduled = name == "accum.effective_batch_size" and value is None
        if there.get(name) != value and not scheduled:
            yield f"{name} is {there.get(name)} in the checkpoint and {value} here"


def _other_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    names = {name for name in there if name.startswith("model.")}
    differing = [name for name in sorted({*names, *here}) if there.get(name) != here.get(name)]
    for name in differing[:3]:
        shown = [_shown(each.get(name)) for each in (there, here)]
        yield f"{name.removeprefix('model.')} is {shown[0]} in the checkpoint and {shown[1]} here"
    if differing[3:]:
        yield f"{len(differing) - 3} more tensors of the model differ"


def _shown(info: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if info is None else f"{tuple(info[0])} {str(info[1]).removeprefix('torch.')}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

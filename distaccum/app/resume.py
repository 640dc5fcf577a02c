"""Whether a run goes on from a checkpoint: from which one, whether it fits, and what is said of it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distaccum.app.config import AccumConfig, Config
from distaccum.app.progress import Progress
from distaccum.app.task import Problem
from distaccum.checkpoint.state import make_optimizer_state, model_tensors, optimizer_tensors
from distaccum.checkpoint.store import Checkpoint, Checkpoints
from distaccum.core.plan import Plan
from distaccum.errors import CheckpointError, ConfigError
from distaccum.metrics.plain import to_plain
from distaccum.parallel.world import World
from distaccum.step.accumulator import Accumulator
from distaccum.version import __version__

# What may differ between two starts of a run without a word: it does not change what is learned.
_UNSAID = (
    "run_dir", "resume", "init_weights", "checkpoint", "logger", "launch", "loader", "device", "machine", "world_size",
    "experiment", "train.log_every_steps", "train.evaluate_every_steps", "train.timeout_s", "train.max_minutes",
    "accum.audit",
)  # fmt: skip

# What the memory of a micro-batch depends on.
_IN_MEMORY = ("accum.", "data.", "device", "limits.", "model.", "nn.", "optim.name", "parallel.", "precision.")


def find(config: Config, run_dir: Path, checkpoints: Checkpoints, world: World) -> Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks; None to begin anew. Call it on every rank.

    Raises:
        ConfigError: for a `resume` that cannot be followed.
        CheckpointError: where there are checkpoints and none of them is good.
    """
    newest = checkpoints.newest()
    if newest is None and checkpoints.passed_over and config.resume != "none":
        raise CheckpointError(
            f"{run_dir} has checkpoints, and none of them can be read: {' '.join(checkpoints.passed_over)} Nothing was "
            "changed. Begin anew with another run_dir, or give another one with resume=PATH."
        )
    if config.resume == "none" and (newest is not None or checkpoints.passed_over):
        raise ConfigError(
            f"resume=none, and {run_dir} has checkpoints of an earlier run: those of two runs would be mixed. Give "
            "another run_dir, or leave resume=auto to go on."
        )
    if newest is not None or config.resume in ("auto", "none"):
        return newest
    path = Path(config.resume)
    if not path.exists():
        raise ConfigError(f"resume={config.resume}: there is no such folder. Give a run folder or a checkpoint.")
    return Checkpoint.open(path, world)


def facts_of(
    config: Config, composed: Mapping[str, Any], problem: Problem, plan: Plan, warmup: int, world: World
) -> dict[str, Any]:  # fmt: skip
    """What every checkpoint of a run holds, beside where it stands; `composed` is what `config` was made of."""
    facts = {
        "identity": _identity(config, problem, plan),
        "micro_size": plan.micro_size,
        "warmup": warmup,
        "config": composed,
        "world_size": world.size,
        "versions": {
            "distaccum": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
    plain = to_plain(facts)
    assert isinstance(plain, dict)
    return plain


def keep_effective_batch(accum: AccumConfig, checkpoint: Checkpoint | None, world_size: int) -> AccumConfig:
    """Where the effective batch was asked for as micro x micros x ranks, and the ranks are others now: what it was."""
    if checkpoint is None or checkpoint.facts["world_size"] == world_size:
        return accum
    before = checkpoint.facts["config"]["accum"]
    names = ("effective_batch", "effective_tokens", "schedule", "micro", "num_micros")
    now = {name: getattr(accum, name) for name in names}
    if any(now[name] is not None for name in names[:3]) or any(before[name] != now[name] for name in names):
        return accum
    return replace(accum, num_micros=None, effective_batch=int(checkpoint.facts["identity"]["accum.effective_batch"]))


def kept_micro(checkpoint: Checkpoint | None, composed: Mapping[str, Any], world_size: int) -> int | None:
    """The micro size of before, where ranks and all settings that its memory depends on are as they were; else None.

    What `accum.micro=auto` found once is not looked for again, so that a run goes on bit for bit.
    """
    if checkpoint is None or checkpoint.facts["world_size"] != world_size:
        return None
    then, here = (dict(_flat(config)) for config in (checkpoint.facts["config"], composed))
    same = all(then.get(key) == here.get(key) for key in {*then, *here} if key.startswith(_IN_MEMORY))
    return checkpoint.facts.get("micro_size") if same else None


def load(checkpoint: Checkpoint, accumulator: Accumulator, facts: Mapping[str, Any], steps: int) -> Progress:
    """Load everything; where the training stands. Call it on every rank.

    Args:
        checkpoint: from `find`.
        accumulator: fresh.
        facts: from `facts_of`, of this start.
        steps: of the whole training.

    Raises:
        ConfigError: for a checkpoint of another model, other data or another plan; nothing was loaded.
    """
    model, optimizer = accumulator.strategy.evaluation_model, accumulator.optimizer
    here = {name: (tensor.shape, tensor.dtype) for name, tensor in model_tensors(model).items()}
    there = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
    differ = [*_other_plan(checkpoint.facts["identity"], facts["identity"]), *_other_model(there, here)]
    if differ:
        raise ConfigError(
            f"{checkpoint.path} cannot be continued: {'; '.join(differ)}. Use what the checkpoint has (its "
            "manifest.json holds the configuration), or begin anew with another run_dir. To change the effective batch "
            "in the middle of a training use accum.schedule."
        )
    progress = _progress(checkpoint.facts)
    if progress.windows > steps:
        raise ConfigError(
            f"{checkpoint.path} has {progress} already, and the training has {steps} (train.steps or "
            "train.epochs). Give more, or begin anew with another run_dir."
        )
    make_optimizer_state(model, optimizer, there, checkpoint.facts["optimizer"])
    checkpoint.load({**model_tensors(model), **optimizer_tensors(model, optimizer)})
    accumulator.load_state_dict(checkpoint.facts["accumulator"])
    return progress


def _progress(facts: Mapping[str, Any]) -> Progress:
    """Where the training stands. Checkpoints of older versions have windows only, under the name of steps."""
    saved = dict(facts["progress"])
    if "windows" not in saved:
        step = int(facts["accumulator"]["steps"])
        saved |= {"windows": saved["step"], "step": step, "evaluated_step": min(saved["evaluated_step"], step)}
    return Progress(**saved)


def told(checkpoint: Checkpoint, facts: Mapping[str, Any], progress: Progress) -> Iterator[str]:
    """What people have to know of it, a line each."""
    before, now = checkpoint.facts, facts
    ranks = f"{before['world_size']} rank(s)"
    if before["world_size"] != now["world_size"]:
        ranks += f" then, {now['world_size']} now: micros are dealt anew, the effective batch is the same"
    yield f"continues after step {progress.step} from {checkpoint.path} ({ranks})"
    then, here = _settings(before), _settings(now)
    for key in sorted({*then, *here}):
        if not key.startswith(_UNSAID) and then.get(key) != here.get(key):
            yield f"other settings than before: {key} {then.get(key)} -> {here.get(key)}"
    for name, found in now["versions"].items():
        if before["versions"].get(name) != found:
            yield f"another version than before: {name} {before['versions'].get(name)} -> {found}"


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration key by key, with the warm-up that `auto` came to: of another length it is another one."""
    settings = dict(_flat(facts["config"]))
    return {**settings, "optim.schedule.warmup": facts.get("warmup", settings.get("optim.schedule.warmup"))}


def _identity(config: Config, problem: Problem, plan: Plan) -> dict[str, Any]:
    """What a run cannot change on its way without losing or doubling samples, or its optimizer's state."""
    training = problem.facts["training"]
    return {
        "data digest": training.get("digest") if isinstance(training, Mapping) else None,
        "samples per epoch": plan.num_samples,
        "train.seed": config.train.seed,
        "accum.last_window": config.accum.last_window,
        "accum.effective_batch": None if plan.schedule is not None else plan.effective_batch,
        "optim.name": config.optim.name,
    }


def _other_plan(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name, value in here.items():
        scheduled = name == "accum.effective_batch" and value is None
        if there.get(name) != value and not scheduled:
            yield f"{name} is {there.get(name)} there and {value} here"


def _other_model(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    names = {name for name in there if name.startswith("model.")}
    differing = [name for name in sorted({*names, *here}) if there.get(name) != here.get(name)]
    for name in differing[:3]:
        shown = [_shown(each.get(name)) for each in (there, here)]
        yield f"{name.removeprefix('model.')} is {shown[0]} there and {shown[1]} here"
    if differing[3:]:
        yield f"and {len(differing) - 3} more tensors of the model"


def _shown(info: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if info is None else f"{tuple(info[0])} {str(info[1]).removeprefix('torch.')}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

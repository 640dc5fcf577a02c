"""The composition root: the only file that knows every class. From a typed configuration to a training that runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distaccum import summary
from distaccum.config import Config, Device, typed
from distaccum.data.loader import Loader
from distaccum.data.text import TextDataset, load_text, unigram_loss
from distaccum.errors import ConfigError
from distaccum.launch import Job
from distaccum.loss import Objective
from distaccum.models.gpt import GPT
from distaccum.objectives import CausalLM
from distaccum.optim import LRSchedule, ScheduleUnit, make_optimizer
from distaccum.parallel.world import World
from distaccum.plan import BatchArithmetic, Plan, samples_of_tokens, solve
from distaccum.report import Report, make_report
from distaccum.step import Accumulator
from distaccum.trainer import Heldout, Rhythm, Trainer
from distaccum.wrap import StrategyName, wrap


def check(composed: dict[str, Any]) -> None:
    """Refuse a configuration before any rank works on it.

    Raises:
        ConfigError: for unknown keys, wrong types, and contradictions that need no data to be seen.
    """
    config = typed(composed)
    if config.accum.effective_batch is not None and config.accum.effective_tokens is not None:
        raise ConfigError(
            f"accum.effective_batch={config.accum.effective_batch} and accum.effective_tokens="
            f"{config.accum.effective_tokens} are both given. They say the same thing in two units: set one to null."
        )


def train(job: Job) -> None:
    """Train on this rank as the job says. Every rank of the job runs this.

    Raises:
        ConfigError: on all ranks alike, for what only shows with the data and the ranks at hand.
    """
    config = typed(job.config)
    device = _device(config.device, job.local_rank)
    with _process_group(config, job, device):
        training = build(config, World.of(device), job.run_dir)
        report = training.report
        try:
            loss = training.trainer.run()
        except BaseException as error:
            if report is not None:
                report.end(
                    f"{type(error).__name__}: {error}", {"step": training.trainer.progress.step}, 1, training.baseline
                )
            raise
        if report is not None:
            report.note(
                f"held-out loss {loss:.4f} against {training.baseline:.4f} nats per token of the unigram baseline "
                f"({loss / math.log(2):.3f} against {training.baseline / math.log(2):.3f} bits per byte)"
            )
            report.end(
                f"all {training.trainer.rhythm.steps} steps done",
                {"heldout_loss": loss, "unigram_baseline": training.baseline},
                0,
                training.baseline,
            )


@dataclass(frozen=True)
class Training:
    """Everything that one rank needs to train."""

    trainer: Trainer
    report: Report | None  # on rank 0
    baseline: float  # held-out loss of the unigram distribution


def build(config: Config, world: World, run_dir: Path) -> Training:
    """Make model, data, plan and all collaborators, and draw the start block on rank 0."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    train_text, heldout_text = load_text(config.data)
    arithmetic = _arithmetic(config, train_text, world.size)
    plan = Plan(
        num_samples=len(train_text),
        effective_batch=arithmetic.effective_batch,
        micro_size=arithmetic.micro_size,
        seed=config.train.seed,
        last_window=config.accum.last_window,
    )
    steps = config.train.steps if config.train.steps is not None else plan.num_steps(config.train.epochs or 0)
    if steps < 1:
        raise ConfigError(f"The training has {steps} steps; give train.steps or train.epochs of at least 1.")

    precision = config.precision.name
    model = _model(config, train_text, world.device)
    wrapped = wrap(model, config.parallel, world, precision.sharded_policy)
    objective = CausalLM(shift=False)
    accumulator = Accumulator(
        wrapped,
        optimizer := make_optimizer(wrapped, config.optim),
        Objective(precision.autocast(objective.loss_sum, world.device), objective.weight),
        sync=config.accum.sync,
        clip_norm=config.optim.clip_norm,
        seed=config.train.seed,
        nonfinite=config.accum.nonfinite,
        audit=config.accum.audit,
    )
    unit = config.optim.schedule.unit
    total = (
        steps
        * {
            ScheduleUnit.steps: 1,
            ScheduleUnit.samples: plan.effective_batch,
            ScheduleUnit.tokens: plan.effective_batch * config.data.seq_len,
        }[unit]
    )
    schedule = LRSchedule(optimizer, config.optim.schedule, total)
    pin_memory = config.loader.pin_memory if config.loader.pin_memory is not None else world.device.type == "cuda"
    loader = Loader(train_text, plan, world.rank, world.size, workers=config.loader.workers, pin_memory=pin_memory)
    heldout_plan = Plan(
        num_samples=len(heldout_text),
        effective_batch=min(len(heldout_text), config.train.heldout_samples),
        micro_size=arithmetic.micro_size,
    )
    evaluated = [n for micro in heldout_plan.window().micros for n in heldout_plan.samples(micro)]
    report, baseline = None, unigram_loss(train_text, heldout_text, evaluated)
    if world.rank == 0:
        sections, facts = summary.start_block(
            config, arithmetic, plan, steps, accumulator, train_text.facts, heldout_text.facts, baseline
        )  # fmt: skip
        report = make_report(run_dir, config.logger, {**_plain(config), **facts})
        report.start(sections, facts)
    trainer = Trainer(
        plan,
        loader,
        accumulator,
        schedule,
        unit,
        Heldout(heldout_text, heldout_plan),
        Rhythm(steps, config.train.log_every_steps, config.train.evaluate_every_steps),
        report,
    )
    return Training(trainer, report, baseline)


def _arithmetic(config: Config, text: TextDataset, world_size: int) -> BatchArithmetic:
    accum = config.accum
    effective_batch = accum.effective_batch
    if accum.effective_tokens is not None:
        effective_batch = samples_of_tokens(accum.effective_tokens, text.tokens_per_sample)
    return solve(world_size, effective_batch, accum.micro, accum.num_micros, accum.ragged)


def _model(config: Config, text: TextDataset, device: torch.device) -> nn.Module:
    """The model on its device, with the same weights on every rank: they are drawn on the CPU from the seed alone."""
    gpt = replace(
        config.model,
        vocab_size=config.model.vocab_size or text.vocab_size,
        max_seq_len=config.model.max_seq_len or text.seq_len,
    )
    if gpt.vocab_size < text.vocab_size or gpt.max_seq_len < text.seq_len:
        raise ConfigError(
            f"The model has {gpt.vocab_size} token ids and {gpt.max_seq_len} positions; the data needs "
            f"{text.vocab_size} and {text.seq_len}. Leave model.vocab_size and model.max_seq_len null, or set "
            f"data.seq_len={min(gpt.max_seq_len, text.seq_len)}."
        )
    torch.manual_seed(config.train.seed)
    return GPT(gpt).to(device=device, dtype=config.precision.name.parameter_dtype)


def _device(asked: Device, local_rank: int) -> torch.device:
    if asked is Device.cpu or (asked is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, and torch sees no GPU here. Use device=auto or device=cpu.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(config: Config, job: Job, device: torch.device) -> Iterator[None]:
    """Ranks that talk to each other; one process too, where it is asked to be spread as if it were several."""
    if job.world_size == 1 and config.parallel.name in (StrategyName.auto, StrategyName.single):
        yield
        return
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=job.store or dist.HashStore(),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=config.train.timeout_s),
        device_id=gpu,
    )
    # Our models and objectives do nothing in place on a module's output, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    yield
    # Reached only when every rank succeeded: after an error a rank leaves without a word to the others.
    dist.destroy_process_group()


def _plain(config: Config) -> dict[str, Any]:
    return asdict(config)

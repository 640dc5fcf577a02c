"""Defines training tasks: datasets, objective, model factory, and how results are formatted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from distaccum.app.config import Config
from distaccum.core.loss import SupportsObjective
from distaccum.core.objectives import (
    CausalLM,
    Classification,
    ClassificationAccuracy,
    autocast,
    cast_inputs,
)
from distaccum.core.strategies import StrategyName
from distaccum.data.base import Dataset
from distaccum.data.images import ImageDataset, ImagesConfig, frequency_loss, load_images
from distaccum.data.text import TextConfig, TextDataset, load_text, unigram_loss
from distaccum.errors import ConfigError, require
from distaccum.huggingface import HuggingFaceCausalLM
from distaccum.huggingface.models import HFConfig, allow_float64, build_hf, configuration
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.models.resnet import ResNet, ResNetConfig
from distaccum.nn.batchnorm import convert_batchnorm
from distaccum.nn.blocks import blocks_of


@dataclass(frozen=True)
class Task:
    """Describes the data, objective and model of a run; it is the same on every rank."""

    train: Dataset
    validation: Dataset
    objective: SupportsObjective  # what training optimizes
    evaluated: SupportsObjective  # what validation computes; its first term is the loss
    unit: str  # what the objective counts, such as "token"
    tokens_per_sample: int | None  # None if samples differ in length or are not text
    # on the default device; weights from torch's global generator
    make_model: Callable[[], nn.Module]
    # parts that are gathered and checkpointed as units
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]]
    # Returns the loss on given validation samples when targets are predicted by frequency alone.
    baseline: Callable[[Sequence[int]], float]
    # Converts a loss in nats per token on given validation samples to bits per byte; None if the
    # data is not text.
    bits_per_byte: Callable[[float, Sequence[int]], float] | None
    described: Mapping[str, str]  # lines of the start block, by name
    facts: Mapping[str, object]  # the same information for machines


def build_task(config: Config) -> Task:
    """Load the data and build the task that belongs to it.

    Raises:
        ConfigError: if the data cannot be read, or the model does not fit the data.
    """
    return (
        _text(config, config.data)
        if isinstance(config.data, TextConfig)
        else _images(config, config.data)
    )


def make_model(config: Config, task: Task, device: torch.device) -> nn.Module:
    """Build the model on its device, with the same weights on every rank.

    The weights are drawn on the CPU and depend only on `train.seed`.
    """
    torch.manual_seed(config.train.seed)
    model, dtype = task.make_model(), config.precision.name.parameter_dtype
    model = (allow_float64(model) if dtype is torch.float64 else model).to(
        device=device, dtype=dtype
    )
    return convert_batchnorm(model, config.nn.batchnorm)


def meta_model(config: Config, task: Task) -> nn.Module:
    """Build the model on the meta device, where it has shapes and dtypes but no memory."""
    with torch.device("meta"):
        model = task.make_model().to(dtype=config.precision.name.parameter_dtype)
    return convert_batchnorm(model, config.nn.batchnorm)


def plain_model(config: Config, task: Task, device: torch.device) -> nn.Module:
    """Build the unconverted model that `verify` uses as a reference, with any weights."""
    return allow_float64(task.make_model()).to(device)


def in_precision(config: Config, objective: SupportsObjective) -> SupportsObjective:
    """Return an objective whose forward runs in the configured precision."""
    precision = config.precision.name
    if precision.parameter_dtype is not torch.float32:
        return cast_inputs(objective, precision.parameter_dtype)
    # FSDP2 casts by its own mixed-precision policy.
    sharded = config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp)
    narrower = precision.compute_dtype is not precision.parameter_dtype and not sharded
    return autocast(objective, precision.compute_dtype) if narrower else objective


def _text(config: Config, data: TextConfig) -> Task:
    train, validation = load_text(data)
    make, objective = _language_model(config, train)
    return Task(
        train=(
            _CountedByObjective(train, objective)
            if isinstance(objective, HuggingFaceCausalLM)
            else train
        ),
        validation=validation,
        objective=objective,
        evaluated=(
            HuggingFaceCausalLM() if isinstance(objective, HuggingFaceCausalLM) else objective
        ),
        unit="token",
        tokens_per_sample=train.tokens_per_sample,
        make_model=make,
        blocks_of=_blocks,
        baseline=lambda samples: unigram_loss(train, validation, samples),
        bits_per_byte=lambda nats, samples: (
            nats
            / math.log(2)
            * validation.num_targets(samples)
            / max(1, validation.bytes_of(samples))
        ),
        described={
            "source": "{source}: {files:,} files, {bytes:,} bytes, digest {digest}".format(
                **train.facts
            ),
            "tokens": (
                f"{train.facts['tokenizer']}, {train.facts['bytes_per_token']:.2f} bytes per token"
            ),
            "training": "{samples:,} samples, {tokens:,} predicted tokens per epoch".format(
                **train.facts
            ),
            "validation": "{samples:,} samples, {tokens:,} predicted tokens; split {split}".format(
                **validation.facts
            ),
        },
        facts={"training": dict(train.facts), "validation": dict(validation.facts)},
    )


def _images(config: Config, data: ImagesConfig) -> Task:
    train, validation = load_images(data)
    require(
        isinstance(config.model, ResNetConfig),
        f"model={config.model.name} does not read images. Use model=resnet, or data=text.",
    )
    resnet = _fitted_to_images(config.model, train)
    return Task(
        train=train,
        validation=validation,
        objective=Classification(),
        evaluated=ClassificationAccuracy(),
        unit="image",
        tokens_per_sample=None,
        make_model=lambda: ResNet(resnet),
        blocks_of=_blocks,
        baseline=lambda samples: frequency_loss(train, validation, samples),
        bits_per_byte=None,
        described={
            "source": "{source}: {bytes:,} bytes, digest {digest}".format(**train.facts),
            "training": (
                f"{len(train):,} images of {'x'.join(map(str, train.shape))} in "
                f"{train.num_classes} classes"
            ),
            "validation": "{samples:,} images; split {split}".format(**validation.facts),
        },
        facts={"training": dict(train.facts), "validation": dict(validation.facts)},
    )


@dataclass(frozen=True)
class _CountedByObjective:
    """Wraps a text dataset to count targets for each term of the objective (auxiliary losses)."""

    dataset: TextDataset
    objective: HuggingFaceCausalLM

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(
        self, indices: Sequence[int], generator: torch.Generator
    ) -> Mapping[str, torch.Tensor]:
        return self.dataset.batch(indices, generator)

    def num_targets(self, indices: Sequence[int]) -> Mapping[str, int] | int | None:
        return self.objective.weighed(self.dataset.num_targets(indices))

    def longest_samples(self, count: int) -> list[int]:
        return self.dataset.longest_samples(count)


def _language_model(
    config: Config, text: TextDataset
) -> tuple[Callable[[], nn.Module], SupportsObjective]:
    model = config.model
    if isinstance(model, GPTConfig):
        gpt = _fitted(model, text)
        return lambda: GPT(gpt), CausalLM(shift=False)
    if isinstance(model, HFConfig):
        make = partial(build_hf, model, text.vocab_size, text.seq_len)
        return make, HuggingFaceCausalLM.of(configuration(model, text.vocab_size, text.seq_len))
    raise ConfigError(
        f"model={model.name} does not read text. Use model=gpt or model=hf, or data=digits."
    )


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    own = getattr(model, "blocks", None)
    return list(own) if isinstance(own, nn.ModuleList) else blocks_of(model)


def _fitted(model: GPTConfig, text: TextDataset) -> GPTConfig:
    vocab_size, max_seq_len = model.vocab_size or text.vocab_size, model.max_seq_len or text.seq_len
    require(
        vocab_size >= text.vocab_size and max_seq_len >= text.seq_len,
        f"The model has {vocab_size} token ids and {max_seq_len} positions; the data needs "
        f"{text.vocab_size} and {text.seq_len}. Leave model.vocab_size and model.max_seq_len null, "
        f"or set data.seq_len={min(max_seq_len, text.seq_len)}.",
    )
    return replace(model, vocab_size=vocab_size, max_seq_len=max_seq_len)


def _fitted_to_images(model: ResNetConfig, images: ImageDataset) -> ResNetConfig:
    num_classes = model.num_classes or images.num_classes
    in_channels = model.in_channels or images.shape[0]
    require(
        num_classes >= images.num_classes and in_channels == images.shape[0],
        f"The model has {num_classes} classes and {in_channels} input channels; the data has "
        f"{images.num_classes} and {images.shape[0]}. Leave model.num_classes and "
        "model.in_channels null.",
    )
    return replace(model, num_classes=num_classes, in_channels=in_channels)


def message(task: Task, means: Mapping[str, float], baseline: float, samples: Sequence[int]) -> str:
    """Return the validation results as one line; the first of the means is the loss."""
    (_, loss), *others = means.items()
    text = (
        f"validation loss {loss:.4f} against {baseline:.4f} nats per {task.unit} by frequency alone"
    )
    if task.bits_per_byte is not None:
        bits, by_frequency = (task.bits_per_byte(nats, samples) for nats in (loss, baseline))
        text += f" ({bits:.3f} against {by_frequency:.3f} bits per byte)"
    return text + "".join(f", {name} {value:.4f}" for name, value in others)

"""What is learned: samples, what is optimised over them, a model that fits them, and how to speak of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from distaccum.app.config import Config
from distaccum.core.loss import SupportsObjective
from distaccum.core.objectives import CausalLM, Classification, ClassificationAccuracy, autocast, cast_inputs
from distaccum.data.base import Dataset
from distaccum.data.images import ImageDataset, ImagesConfig, frequency_loss, load_images
from distaccum.data.text import TextConfig, TextDataset, load_text, unigram_loss
from distaccum.errors import ConfigError
from distaccum.huggingface import HuggingFaceCausalLM
from distaccum.huggingface.models import HFConfig, allow_float64, build_hf, configuration
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.models.resnet import ResNet, ResNetConfig
from distaccum.nn.batchnorm import convert_batchnorm
from distaccum.nn.blocks import blocks_of
from distaccum.parallel.apply import StrategyName


@dataclass(frozen=True)
class Problem:
    """Data and objective of a run; the same on every rank."""

    train: Dataset
    heldout: Dataset
    objective: SupportsObjective  # what is optimised
    evaluated: SupportsObjective  # on held-out samples; its first term is the loss
    unit: str  # what the objective counts, such as "token"
    tokens_per_sample: int | None  # where samples have one length
    make_model: Callable[[], nn.Module]  # on the default device, drawn from torch's global generator
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]]  # a model's parts that are gathered and checkpointed as one
    baseline: Callable[[Sequence[int]], float]  # loss on these held-out samples by frequency alone
    bits_per_byte: Callable[[float, Sequence[int]], float] | None  # of a loss on these held-out samples; None: no text
    described: Mapping[str, str]  # for people
    facts: Mapping[str, object]  # for machines


def make_problem(config: Config) -> Problem:
    """Open the data and choose what belongs to it.

    Raises:
        ConfigError: for data that cannot be read, and a model that does not fit them.
    """
    return _text(config, config.data) if isinstance(config.data, TextConfig) else _images(config, config.data)


def make_model(config: Config, problem: Problem, device: torch.device) -> nn.Module:
    """The model on its device, with the same weights on every rank: they are drawn on the CPU from the seed alone."""
    torch.manual_seed(config.train.seed)
    model, dtype = problem.make_model(), config.precision.name.parameter_dtype
    model = (allow_float64(model) if dtype is torch.float64 else model).to(device=device, dtype=dtype)
    return convert_batchnorm(model, config.nn.batchnorm)


def meta_model(config: Config, problem: Problem) -> nn.Module:
    """The same without memory, for its shapes."""
    with torch.device("meta"):
        model = problem.make_model().to(dtype=config.precision.name.parameter_dtype)
    return convert_batchnorm(model, config.nn.batchnorm)


def plain_model(config: Config, problem: Problem, device: torch.device) -> nn.Module:
    """The same architecture as torch has it, with any weights: what `verify` compares with."""
    return allow_float64(problem.make_model()).to(device)


def in_precision(config: Config, objective: SupportsObjective) -> SupportsObjective:
    """An objective whose forward is in the configured precision."""
    precision = config.precision.name
    if precision.parameter_dtype is not torch.float32:
        return cast_inputs(objective, precision.parameter_dtype)
    sharded = config.parallel.name in (StrategyName.fsdp, StrategyName.hsdp)  # FSDP2 casts by its own policy
    narrower = precision.compute_dtype is not precision.parameter_dtype and not sharded
    return autocast(objective, precision.compute_dtype) if narrower else objective


def _text(config: Config, data: TextConfig) -> Problem:
    train, heldout = load_text(data)
    make, objective = _language_model(config, train)
    return Problem(
        train=_Weighed(train, objective) if isinstance(objective, HuggingFaceCausalLM) else train,
        heldout=heldout,
        objective=objective,
        evaluated=HuggingFaceCausalLM() if isinstance(objective, HuggingFaceCausalLM) else objective,
        unit="token",
        tokens_per_sample=train.tokens_per_sample,
        make_model=make,
        blocks_of=_blocks,
        baseline=lambda samples: unigram_loss(train, heldout, samples),
        bits_per_byte=lambda nats, samples: (
            nats / math.log(2) * heldout.counted(samples) / max(1, heldout.bytes_of(samples))
        ),
        described={
            "source": "{source}: {files:,} files, {bytes:,} bytes, digest {digest}".format(**train.facts),
            "tokens": f"{train.facts['tokenizer']}, {train.facts['bytes_per_token']:.2f} bytes per token",
            "training": "{samples:,} samples, {tokens:,} predicted tokens per epoch".format(**train.facts),
            "held out": "{samples:,} samples, {tokens:,} predicted tokens; split {split}".format(**heldout.facts),
        },
        facts={"training": dict(train.facts), "heldout": dict(heldout.facts)},
    )


def _images(config: Config, data: ImagesConfig) -> Problem:
    train, heldout = load_images(data)
    if not isinstance(config.model, ResNetConfig):
        raise ConfigError(f"model={config.model.name} does not read images. Use model=resnet, or data=text.")
    resnet = _fitted_to_images(config.model, train)
    return Problem(
        train=train,
        heldout=heldout,
        objective=Classification(),
        evaluated=ClassificationAccuracy(),
        unit="image",
        tokens_per_sample=None,
        make_model=lambda: ResNet(resnet),
        blocks_of=_blocks,
        baseline=lambda samples: frequency_loss(train, heldout, samples),
        bits_per_byte=None,
        described={
            "source": "{source}: {bytes:,} bytes, digest {digest}".format(**train.facts),
            "training": f"{len(train):,} images of {'x'.join(map(str, train.shape))} in {train.num_classes} classes",
            "held out": "{samples:,} images; split {split}".format(**heldout.facts),
        },
        facts={"training": dict(train.facts), "heldout": dict(heldout.facts)},
    )


@dataclass(frozen=True)
class _Weighed:
    """Text that tells its weights as the objective has them, with a term for the auxiliary loss."""

    dataset: TextDataset
    objective: HuggingFaceCausalLM

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Mapping[str, torch.Tensor]:
        return self.dataset.batch(indices, generator)

    def counted(self, indices: Sequence[int]) -> Mapping[str, int] | int | None:
        return self.objective.weighed(self.dataset.counted(indices))

    def longest(self, count: int) -> list[int]:
        return self.dataset.longest(count)


def _language_model(config: Config, text: TextDataset) -> tuple[Callable[[], nn.Module], SupportsObjective]:
    model = config.model
    if isinstance(model, GPTConfig):
        gpt = _fitted(model, text)
        return lambda: GPT(gpt), CausalLM(shift=False)
    if isinstance(model, HFConfig):
        make = partial(build_hf, model, text.vocab_size, text.seq_len)
        return make, HuggingFaceCausalLM.of(configuration(model, text.vocab_size, text.seq_len))
    raise ConfigError(f"model={model.name} does not read text. Use model=gpt or model=hf, or data=digits.")


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    own = getattr(model, "blocks", None)
    return list(own) if isinstance(own, nn.ModuleList) else blocks_of(model)


def _fitted(model: GPTConfig, text: TextDataset) -> GPTConfig:
    vocab_size, max_seq_len = model.vocab_size or text.vocab_size, model.max_seq_len or text.seq_len
    if vocab_size < text.vocab_size or max_seq_len < text.seq_len:
        raise ConfigError(
            f"The model has {vocab_size} token ids and {max_seq_len} positions; the data needs {text.vocab_size} and "
            f"{text.seq_len}. Leave model.vocab_size and model.max_seq_len null, or set "
            f"data.seq_len={min(max_seq_len, text.seq_len)}."
        )
    return replace(model, vocab_size=vocab_size, max_seq_len=max_seq_len)


def _fitted_to_images(model: ResNetConfig, images: ImageDataset) -> ResNetConfig:
    num_classes, in_channels = model.num_classes or images.num_classes, model.in_channels or images.shape[0]
    if num_classes < images.num_classes or in_channels != images.shape[0]:
        raise ConfigError(
            f"The model tells {num_classes} classes and reads {in_channels} channels; the data has "
            f"{images.num_classes} and {images.shape[0]}. Leave model.num_classes and model.in_channels null."
        )
    return replace(model, num_classes=num_classes, in_channels=in_channels)


def told(problem: Problem, means: Mapping[str, float], baseline: float, samples: Sequence[int]) -> str:
    """What was measured on held-out samples in one line; the first of the means is the loss."""
    (_, loss), *others = means.items()
    text = f"held-out loss {loss:.4f} against {baseline:.4f} nats per {problem.unit} by frequency alone"
    if problem.bits_per_byte is not None:
        bits, by_frequency = (problem.bits_per_byte(nats, samples) for nats in (loss, baseline))
        text += f" ({bits:.3f} against {by_frequency:.3f} bits per byte)"
    return text + "".join(f", {name} {value:.4f}" for name, value in others)

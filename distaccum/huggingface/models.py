"""Builds models of transformers from a configuration.

Nothing is downloaded, and nothing is loaded that could run code.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distaccum.errors import ConfigError

# The values of `model.head`, and the Auto class of the architectures with such a head.
HEADS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "image_classification": "AutoModelForImageClassification",
}


@dataclass
class HFConfig:
    """Configures a model of transformers; conf/model has the values, so nothing has a default here.

    Attributes:
        name: "hf", by which the application finds this class.
        config: a configuration class of transformers (GPT2Config), or a local folder with a
            config.json.
        head: the task of the model, one of `HEADS`; the command line trains causal_lm.
        weights: a local folder with *.safetensors to start from; None: random weights.
        options: fields of the configuration class that replace its own (or the folder's) values.
    """

    name: str
    config: str | None
    head: str
    weights: str | None
    options: dict[str, Any]


def build_hf(
    config: HFConfig, vocab_size: int | None = None, seq_len: int | None = None
) -> nn.Module:
    """Build the model in float32 on the CPU, in training mode, without a cache for generation.

    Random weights are drawn from torch's global CPU generator, which the caller seeds, so they are
    equal on every rank. Dropout is the configuration's; use `options` to change it.

    Args:
        config: what to build.
        vocab_size: token ids of the data. The model has as many, unless a folder or the options set
            another number.
        seq_len: tokens in the longest sample of the data.

    Raises:
        ConfigError: if transformers is not installed, a name is unknown, or the data does not fit
            into the model.
    """
    hf_config = configuration(config, vocab_size, seq_len)
    auto = getattr(_transformers(), HEADS[config.head])
    folder = (
        None
        if config.weights is None
        else _folder(config.weights, "model.weights", "*.safetensors")
    )
    try:
        # on meta no values can be loaded
        if folder is None or torch.get_default_device().type == "meta":
            model = auto.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
        else:
            model = auto.from_pretrained(
                folder,
                config=hf_config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except ValueError as error:
        raise ConfigError(
            f"model.config={config.config} cannot be built with model.head={config.head}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    built: nn.Module = model.train()
    return built


def allow_float64(model: nn.Module) -> nn.Module:
    """Make the experts of a model run one after another, which supports float64.

    transformers' grouped matrix product does not. The model is changed in place and returned.
    Models without experts are not changed.
    """
    set_experts = getattr(model, "set_experts_implementation", None)
    if set_experts is not None:
        set_experts("eager")
    return model


def configuration(
    config: HFConfig, vocab_size: int | None = None, seq_len: int | None = None
) -> Any:
    """Return the transformers configuration of the model that `build_hf` builds.

    Arguments and errors are those of `build_hf`. No weights are made.
    """
    transformers = _transformers()
    if config.head not in HEADS:
        raise ConfigError(f"model.head={config.head} is unknown.{_near(config.head, HEADS)}")
    hf_config = _configuration(transformers, config, vocab_size)
    _check_data(hf_config, vocab_size, seq_len)
    return hf_config


def _configuration(transformers: Any, config: HFConfig, vocab_size: int | None) -> Any:
    if not config.config:
        raise ConfigError(
            "model.config is null. Give a configuration class (GPT2Config), or a folder with "
            "config.json."
        )
    _refuse_kernels("model.options", config.options)
    if "/" in config.config or Path(config.config).is_dir():
        folder = _folder(config.config, "model.config", "config.json")
        _refuse_kernels(
            str(folder / "config.json"), json.loads((folder / "config.json").read_text())
        )
        try:
            hf_config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except ValueError as error:
            raise ConfigError(
                f"model.config={config.config}: {str(error).splitlines()[0]}"
            ) from error
        _check_options(hf_config, config.options)
        for name, value in config.options.items():
            setattr(hf_config, name, value)
    else:
        kind = (
            getattr(transformers, config.config, None) if config.config.endswith("Config") else None
        )
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedConfig):
            names = [name for name in dir(transformers) if name.endswith("Config")]
            raise ConfigError(
                f"model.config={config.config} is neither a configuration class of transformers "
                f"{transformers.__version__} nor a folder.{_near(config.config, names)}"
            )
        _check_options(kind(), config.options)
        options = dict(config.options)
        if vocab_size is not None:
            options.setdefault("vocab_size", vocab_size)
        # The class's defaults belong to its own vocabulary.
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            options.setdefault(token, None)
        hf_config = kind(**options)
    hf_config.use_cache = False
    return hf_config


def _check_options(hf_config: Any, options: dict[str, Any]) -> None:
    """Refuse options that are not fields of the configuration.

    Configuration classes accept any keyword, and would train with their defaults after a misspelled
    one.
    """
    known = {*hf_config.to_dict(), *type(hf_config).attribute_map}
    for name in sorted(options.keys() - known):
        raise ConfigError(
            f"model.options.{name}: {type(hf_config).__name__} has no such "
            f"field.{_near(name, known)}"
        )


def _refuse_kernels(where: str, node: Any) -> None:
    """Refuse an implementation of the form owner/name.

    It would run code from a hub, whatever trust_remote_code says.
    """
    for name, value in node.items() if isinstance(node, dict) else ():
        if name.endswith("_implementation") and "/" in str(value):
            raise ConfigError(
                f"{where} has {name}={value!r}, which means code on a hub. Use an implementation "
                "that is part of transformers, such as sdpa or eager."
            )
        _refuse_kernels(where, value)


def _check_data(hf_config: Any, vocab_size: int | None, seq_len: int | None) -> None:
    text = hf_config.get_text_config()
    token_ids = getattr(text, "vocab_size", None)
    if vocab_size is not None and token_ids is not None and token_ids < vocab_size:
        raise ConfigError(
            f"The model has {token_ids} token ids, but the data has {vocab_size}. Leave "
            f"model.options.vocab_size out, or set it to at least {vocab_size}. A model from a "
            "folder needs data encoded with its own tokenizer."
        )
    positions = getattr(text, "max_position_embeddings", None)
    if seq_len is not None and positions is not None and 0 < positions < seq_len:
        raise ConfigError(
            f"The model has {positions} positions, but samples have {seq_len} tokens. Use "
            f"data.seq_len={positions}, or model.options.max_position_embeddings={seq_len} for a "
            "model with random weights."
        )


def _folder(path: str, key: str, pattern: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir() or not any(folder.glob(pattern)):
        missing = (
            f"there is no {pattern} in {folder}"
            if folder.is_dir()
            else f"there is no folder {folder}"
        )
        raise ConfigError(
            f"{key}={path}: {missing}. Models are read from local folders with config.json and "
            "*.safetensors, as save_pretrained() writes them. Model names of a hub and pickled "
            "weights are not read."
        )
    return folder


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return (
        f" Did you mean {' or '.join(near)}?"
        if near
        else f" Known: {', '.join(sorted(known)[:12])}."
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "model=hf needs transformers, which cannot be imported. Install it with: pip install "
            "distaccum[hf]"
        ) from error
    return transformers

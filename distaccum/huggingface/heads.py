"""Reads what heads of transformers return: the mean loss, the auxiliary loss and its factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distaccum.core.loss import widened
from distaccum.errors import ConfigError


def mean_and_aux(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return the mean loss [] of a model's output, and its auxiliary loss [] or None.

    Both are float32 or wider.

    Raises:
        ConfigError: if the output has no scalar loss, or further losses whose denominators are not
            known.
    """
    fields = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "loss") else {}
    loss = fields.get("loss") if fields else output[0] if isinstance(output, tuple) and output else None
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = (
            f"a loss of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"no loss in {type(output).__name__}"
        )
        raise ConfigError(
            f"HuggingFace: the model returned {got}. It must return its mean as one number .loss. For other models, "
            "write an Objective(loss_sum, denominator) over .logits."
        )
    others = [name for name, value in fields.items() if name.endswith("_loss") and isinstance(value, Tensor)]
    if others not in ([], ["aux_loss"]):
        raise ConfigError(
            f"HuggingFace: the model returned {others} in addition to .loss. It is not known how they are contained in "
            ".loss and what each is averaged over. Switch them off, or write an Objective with one term for each."
        )
    aux = fields["aux_loss"] if others else None
    return widened(loss), None if aux is None else widened(aux)


def config_of(model: nn.Module) -> Any:
    """Return the configuration of a model, wrapped or not."""
    return (model.module if isinstance(model, DistributedDataParallel) else model).config


def configured_aux_coef(config: Any) -> float | None:
    """Return the factor of the auxiliary loss in a configuration of transformers, or None."""
    for owner in (config, config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if getattr(owner, name, None) is not None:
                return float(getattr(owner, name))
    return None

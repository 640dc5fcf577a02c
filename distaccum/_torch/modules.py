"""Uses private names under which wrappers of torch and other packages keep their module."""

from __future__ import annotations

from torch import nn

# Classes that wrap a module and call it, with the attribute in which each keeps the module.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module"}


def seen_through(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile` and Lightning Fabric's `setup`.

    A model without these wrappers is returned as it is.
    """
    while (inner := getattr(model, _WRAPPERS.get(type(model).__name__, ""), None)) is not None:
        model = inner
    return model


def composed(model: nn.Module) -> list[str]:
    """List the functions of torch's composable API that were applied to a model or its parts.

    An example is `replicate`. torch records them under a private key.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY

    found = [name for module in model.modules() for name in getattr(module, REGISTRY_KEY, {})]
    return list(dict.fromkeys(found))

"""Uses of names by which modules and wrappers of other packages keep what they wrap."""

from __future__ import annotations

from torch import nn

# What wraps a module and calls it, and where it keeps the module.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "_FabricModule": "_forward_module"}


def seen_through(model: nn.Module) -> nn.Module:
    """Return what `torch.compile(model)` and Lightning Fabric's `setup` have wrapped, or the model itself."""
    while (inner := getattr(model, _WRAPPERS.get(type(model).__name__, ""), None)) is not None:
        model = inner
    return model


def composed(model: nn.Module) -> list[str]:
    """Name the functions of torch's composable API, such as `replicate`, that were applied to a module or a part."""
    from torch.distributed._composable.contract import REGISTRY_KEY

    found = [name for module in model.modules() for name in getattr(module, REGISTRY_KEY, {})]
    return list(dict.fromkeys(found))

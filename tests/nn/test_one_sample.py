"""BatchNorm on one sample is recognised, in torch's own layers and converted ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distaccum.errors import ConfigError
from distaccum.nn.batchnorm import convert_batchnorm
from distaccum.nn.one_sample import CURES, explained


@pytest.mark.parametrize("mode", ["micro_batch", "pooled"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm2d(3)])
def test_one_value_per_channel_is_recognised(layer: nn.Module, mode: str) -> None:
    x = torch.ones(1, 3) if isinstance(layer, nn.BatchNorm1d) else torch.ones(1, 3, 1, 1)
    with pytest.raises(ValueError, match="1 value per channel") as caught:
        convert_batchnorm(layer, mode)(x)
    assert isinstance(explained(caught.value, 0), ConfigError)
    around = RuntimeError("compiled code")
    around.__cause__ = caught.value
    assert isinstance(explained(around, 0), ConfigError)
    other = ValueError("Expected more than 1 spatial element when training")
    assert explained(other, 0) is other


@pytest.mark.parametrize("mode", ["sync", "frozen"])
def test_what_the_letter_names_takes_one_sample(mode: str) -> None:
    assert f"'{mode}'" in CURES
    layer = convert_batchnorm(nn.BatchNorm1d(3), mode)
    assert layer(torch.ones(1, 3)).isfinite().all()
    assert nn.GroupNorm(1, 3)(torch.ones(1, 3)).isfinite().all()

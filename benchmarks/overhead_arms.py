"""What overhead.py trains, and how one trains it by hand and with ours."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig

Micro = tuple[Tensor, Tensor]


class Data:
    """Micro-batches that are read one by one, or in windows. The clock is in here, and so the same for every arm."""

    def __init__(self, micros: list[Micro], first: int, last: int) -> None:
        """Time what happens between the reads of two micros, both at a window's begin."""
        self.micros = micros
        self._first, self._last = first, last
        self._began = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """Between the two, once both were read."""
        return self._ended - self._began

    def at(self, index: int) -> None:
        """Call when a micro is read."""
        if index == self._first:
            self._began = time.perf_counter()
        if index == self._last:
            self._ended = time.perf_counter()

    def __iter__(self) -> Iterator[Micro]:
        for index, micro in enumerate(self.micros):
            self.at(index)
            yield micro


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    model: str  # "empty" or "gpt"
    num_micros: int  # K
    clip_norm: float | None
    tiny: bool

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The same parameters in every process."""
        torch.manual_seed(0)
        model: nn.Module = nn.Linear(8, 8)
        if self.model == "gpt":
            layers, width = (2, 32) if self.tiny else (8, 320)
            model = GPT(GPTConfig("gpt", 256, 32, layers, num_heads=width // 16, width=width, dropout=0.0, bias=True))
        return model, self.optimizer(model)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Without state, so that a trainer may make it anew for each block."""
        return torch.optim.SGD(model.parameters(), lr=0.01)

    def micros(self, num_windows: int, rank: int) -> list[Micro]:
        """The same ones again and again: what it takes to make them is not the matter."""
        generator = torch.Generator().manual_seed(rank)
        if self.model == "gpt":
            tokens = [torch.randint(256, (2, 33), generator=generator) for _ in range(self.num_micros)]
            window = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]
        else:
            window = [
                (torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator))
                for _ in range(self.num_micros)
            ]
        return window * num_windows

    def loss(self, model: nn.Module, micro: Micro, reduction: str = "mean") -> Tensor:
        """Of a micro []."""
        inputs, labels = micro
        if self.model == "gpt":
            return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction=reduction)
        return F.mse_loss(model(inputs), labels, reduction=reduction)

    def windows(self, data: Data) -> Iterator[list[Micro]]:
        """In lists."""
        for start in range(0, len(data.micros), self.num_micros):
            data.at(start)
            yield data.micros[start : start + self.num_micros]

    @property
    def synced(self) -> list[bool]:
        """By micro, whether it is the last one of a window."""
        return [index == self.num_micros - 1 for index in range(self.num_micros)]


Train = Callable[[Data], None]


def _spread(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def by_hand(setting: Setting, *, listed: bool = False, told: bool = False) -> tuple[Train, nn.Module]:
    """What one writes. `told`: the loss over all micros and ranks and the gradient norm are known after each window."""
    inner, optimizer = setting.make()
    model = _spread(inner)
    parameters = list(model.parameters())
    distributed = dist.is_initialized()

    def train(data: Data) -> None:
        windows: Iterable[Iterable[Micro]] = setting.windows(data)
        if not listed:
            micros = iter(data)
            windows = (
                itertools.islice(micros, setting.num_micros) for _ in range(len(data.micros) // setting.num_micros)
            )
        for window in windows:
            total = torch.zeros(())
            for micro, synced in zip(window, setting.synced, strict=True):
                with model.no_sync() if distributed and not synced else nullcontext():
                    loss = setting.loss(model, micro) / setting.num_micros
                    loss.backward()
                if told:
                    total += loss.detach()
            if setting.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(parameters, setting.clip_norm)
            elif told:
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if told:
                if distributed:
                    dist.all_reduce(total)
                torch.stack([total, norm]).tolist()
            optimizer.step()
            optimizer.zero_grad()

    return train, inner


def ours(setting: Setting, *, listed: bool = False, seed: int | None = None) -> tuple[Train, nn.Module]:
    """An accumulator. It knows loss, weight and gradient norm of each window, on all ranks, and refuses NaN."""
    inner, optimizer = setting.make()
    objective = da.Objective(
        loss_sum=lambda model, micro: setting.loss(model, micro, "sum"), weight=lambda micro: micro[1].numel()
    )
    accumulator = da.Accumulator(_spread(inner), optimizer, objective, clip_norm=setting.clip_norm, seed=seed)

    def train(data: Data) -> None:
        for window in setting.windows(data) if listed else da.windows(data, setting.num_micros):
            accumulator.step(window)

    return train, inner

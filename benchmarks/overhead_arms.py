"""Defines what overhead.py trains, and how a hand-written loop and distaccum train it."""

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

MicroBatch = tuple[Tensor, Tensor]


class Data:
    """Yields micro-batches one by one, and measures the time between the reads of two of them.

    The clock is in the data, so that it is the same for every arm.

    Args:
        micro_batches: all micro-batches.
        first: index of the micro-batch whose read starts the clock, the first one of a window.
        last: index of the micro-batch whose read stops the clock, the first one of a window.
    """

    def __init__(self, micro_batches: list[MicroBatch], first: int, last: int) -> None:
        self.micro_batches = micro_batches
        self._first, self._last = first, last
        self._began = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds between the two reads, after both."""
        return self._ended - self._began

    def at(self, index: int) -> None:
        """Start or stop the clock when the micro-batch with this index is read."""
        if index == self._first:
            self._began = time.perf_counter()
        if index == self._last:
            self._ended = time.perf_counter()

    def __iter__(self) -> Iterator[MicroBatch]:
        for index, micro_batch in enumerate(self.micro_batches):
            self.at(index)
            yield micro_batch


@dataclass(frozen=True)
class Setting:
    """Describes what is trained."""

    model: str  # "empty" or "gpt"
    num_micro_batches: int  # K
    clip_norm: float | None
    tiny: bool

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Make the model, with the same parameters in every process, and its optimizer."""
        torch.manual_seed(0)
        model: nn.Module = nn.Linear(8, 8)
        if self.model == "gpt":
            layers, width = (2, 32) if self.tiny else (8, 320)
            model = GPT(
                GPTConfig(
                    "gpt",
                    256,
                    32,
                    layers,
                    num_heads=width // 16,
                    width=width,
                    dropout=0.0,
                    bias=True,
                )
            )
        return model, self.optimizer(model)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make an optimizer without state, so that a trainer can make one for each block."""
        return torch.optim.SGD(model.parameters(), lr=0.01)

    def micro_batches(self, num_windows: int, rank: int) -> list[MicroBatch]:
        """Return the micro-batches of one window, repeated, because making them is not measured."""
        generator = torch.Generator().manual_seed(rank)
        if self.model == "gpt":
            tokens = [
                torch.randint(256, (2, 33), generator=generator)
                for _ in range(self.num_micro_batches)
            ]
            window = [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]
        else:
            window = [
                (torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator))
                for _ in range(self.num_micro_batches)
            ]
        return window * num_windows

    def loss(self, model: nn.Module, micro_batch: MicroBatch, reduction: str = "mean") -> Tensor:
        """Compute the loss [] of a micro-batch."""
        inputs, labels = micro_batch
        if self.model == "gpt":
            return F.cross_entropy(
                model(inputs).flatten(0, 1), labels.flatten(), reduction=reduction
            )
        return F.mse_loss(model(inputs), labels, reduction=reduction)

    def windows(self, data: Data) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each window as a list."""
        for start in range(0, len(data.micro_batches), self.num_micro_batches):
            data.at(start)
            yield data.micro_batches[start : start + self.num_micro_batches]

    @property
    def synced(self) -> list[bool]:
        """Return, for each micro-batch of a window, whether it is the last one."""
        return [index == self.num_micro_batches - 1 for index in range(self.num_micro_batches)]


Train = Callable[[Data], None]


def _spread(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


def by_hand(
    setting: Setting, *, listed: bool = False, measured: bool = False
) -> tuple[Train, nn.Module]:
    """Return a hand-written training loop, and its model.

    Args:
        setting: what to train.
        listed: whether windows are lists, and not iterators.
        measured: whether each window computes the loss over all micro-batches and ranks, and the
            gradient norm.
    """
    inner, optimizer = setting.make()
    model = _spread(inner)
    parameters = list(model.parameters())
    distributed = dist.is_initialized()

    def train(data: Data) -> None:
        windows: Iterable[Iterable[MicroBatch]] = setting.windows(data)
        if not listed:
            micro_batches = iter(data)
            windows = (
                itertools.islice(micro_batches, setting.num_micro_batches)
                for _ in range(len(data.micro_batches) // setting.num_micro_batches)
            )
        for window in windows:
            total = torch.zeros(())
            for micro_batch, synced in zip(window, setting.synced, strict=True):
                with model.no_sync() if distributed and not synced else nullcontext():
                    loss = setting.loss(model, micro_batch) / setting.num_micro_batches
                    loss.backward()
                if measured:
                    total += loss.detach()
            if setting.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(parameters, setting.clip_norm)
            elif measured:
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if measured:
                if distributed:
                    dist.all_reduce(total)
                torch.stack([total, norm]).tolist()
            optimizer.step()
            optimizer.zero_grad()

    return train, inner


def ours(
    setting: Setting, *, listed: bool = False, seed: int | None = None
) -> tuple[Train, nn.Module]:
    """Return a training loop with an Accumulator, and its model.

    Each window computes the loss, its denominator and the gradient norm over all ranks, and refuses
    NaN.
    """
    inner, optimizer = setting.make()
    objective = da.Objective(
        loss_sum=lambda model, micro_batch: setting.loss(model, micro_batch, "sum"),
        denominator=lambda micro_batch: micro_batch[1].numel(),
    )
    accumulator = da.Accumulator(
        _spread(inner), optimizer, objective, clip_norm=setting.clip_norm, seed=seed
    )

    def train(data: Data) -> None:
        for window in (
            setting.windows(data) if listed else da.windows(data, setting.num_micro_batches)
        ):
            accumulator.step(window)

    return train, inner

"""What a user brings to a loop: a model, micro-batches of many classes, loaders of many kinds, sums
and counts.

A sample is a row of nine numbers: four of input, three of target, whether it counts, whether the
layer `extra` is used.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from fuzz_cases import Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

NAMES = ("x", "y", "mask", "extra")
WIDTHS = (4, 3, 1, 1)


class Net(nn.Module):
    """Blocks in a row, a head, and a second head that a micro-batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 3)
        self.extra = nn.Linear(5, 3)

    def forward(self, x: Tensor, use_extra: bool) -> Tensor:
        hidden = torch.tanh(self.inlet(x))
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden) + self.extra(hidden) if use_extra else self.head(hidden)


def make_net(case: Case) -> Net:
    """The same weights on every rank, and torch's generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        return Net().double()


class Triple(NamedTuple):
    """A micro-batch as a named tuple."""

    x: Tensor
    y: Tensor
    mask: Tensor
    extra: Tensor


class Movable:
    """A micro-batch of a class of its own, with `.to` and without anything else that frameworks
    look for."""

    def __init__(self, columns: tuple[Tensor, ...]) -> None:
        self.columns = columns

    def to(self, device: Any, **options: Any) -> Movable:
        """A copy on a device."""
        return Movable(tuple(column.to(device, **options) for column in self.columns))


@dataclass
class Bundle:
    """A micro-batch of a class of its own that nobody can move."""

    columns: tuple[Tensor, ...]


def pack(case: Case, rows: Tensor) -> Any:
    """Rows [n, 9] as a micro-batch of the case's class."""
    columns = tuple(rows.split(WIDTHS, dim=1))
    named = dict(zip(NAMES, columns, strict=True))
    packers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: rows,
        "dict": lambda: named,
        "tuple": lambda: columns,
        "list": lambda: list(columns),
        "named_tuple": lambda: Triple(*columns),
        "user_dict": lambda: UserDict(named),
        "class_with_to": lambda: Movable(columns),
        "dataclass": lambda: Bundle(columns),
    }
    return packers[case.micro_batch]()


def unpack(case: Case, micro_batch: Any) -> tuple[Tensor, ...]:
    """x [n, 4], y [n, 3], mask [n, 1], extra [n, 1] of a micro-batch, which must still be of the
    case's class."""
    kinds: dict[str, tuple[type, Callable[[], Iterable[Tensor]]]] = {
        "tensor": (Tensor, lambda: micro_batch.split(WIDTHS, dim=1)),
        "dict": (dict, lambda: [micro_batch[name] for name in NAMES]),
        "tuple": (tuple, lambda: micro_batch),
        "list": (list, lambda: micro_batch),
        "named_tuple": (
            Triple,
            lambda: (micro_batch.x, micro_batch.y, micro_batch.mask, micro_batch.extra),
        ),
        "user_dict": (UserDict, lambda: [micro_batch.data[name] for name in NAMES]),
        "class_with_to": (Movable, lambda: micro_batch.columns),
        "dataclass": (Bundle, lambda: micro_batch.columns),
    }
    kind, columns = kinds[case.micro_batch]
    if type(micro_batch) is not kind:
        raise TypeError(f"a {kind.__name__} went in and a {type(micro_batch).__name__} arrived")
    return tuple(columns())


def make_rows(case: Case, rank: int, index: int) -> Tensor:
    """The samples [n, 9] of one micro-batch of a rank's epoch."""
    generator = torch.Generator().manual_seed(10_000 * case.seed + 100 * rank + index)
    size = 1 + (index + rank) % 3 if case.uneven_sizes else 2
    rows = torch.randn(size, 9, generator=generator, dtype=torch.float64)
    hollow = case.mask == "hollow_window" and case.sizes[0] <= index < sum(case.sizes[:2])
    counted = torch.rand(size, generator=generator) < (0.6 if case.mask == "some" else 1.0)
    rows[:, 7] = 0.0 if hollow else counted.double()
    rows[:, 8] = float(case.extra == "always" or (case.extra == "some" and (index + rank) % 2 == 0))
    return rows


def draw_rows(case: Case) -> Tensor:
    """Two samples [2, 9] from torch's own generator, as loops that draw random crops of a text
    do."""
    rows = torch.randn(2, 9, dtype=torch.float64)
    counted = torch.rand(2) < (0.6 if case.mask == "some" else 1.0)
    rows[:, 7] = counted.double()
    rows[:, 8] = 0.0 if case.extra == "never" else 1.0
    return rows


class Augmented(Dataset):  # type: ignore[type-arg]
    """Micro-batches with noise from torch's own generator, another one each time that they are
    read."""

    def __init__(self, case: Case, micro_batches: list[Tensor]) -> None:
        self._case = case
        self._micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __getitem__(self, index: int) -> Any:
        rows = self._micro_batches[index].clone()
        rows[:, :4] += 0.1 * torch.randn(len(rows), 4, dtype=torch.float64)
        return pack(self._case, rows)


class Reiterable:
    """A loader with neither length nor index, which begins anew each time."""

    def __init__(self, micro_batches: list[Any]) -> None:
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[Any]:
        yield from self._micro_batches


def make_loader(case: Case, rank: int) -> Iterable[Any]:
    """The loader of one rank; what it draws comes from torch's own generator."""
    rows = [make_rows(case, rank, index) for index in range(case.lengths[rank])]
    micro_batches = [pack(case, row) for row in rows]

    def whole(item: Any) -> Any:
        return item

    if case.loader == "reiterable":
        return Reiterable(micro_batches)
    if case.loader == "generator":
        return (micro_batch for micro_batch in micro_batches)
    if case.loader == "drawn":
        return (pack(case, draw_rows(case)) for _ in iter(int, 1))
    if case.loader in ("dataloader", "shuffled", "augmented") and micro_batches:
        data: Any = Augmented(case, rows) if case.loader == "augmented" else micro_batches
        return DataLoader(
            data, batch_size=None, collate_fn=whole, shuffle=case.loader == "shuffled"
        )
    return micro_batches


def loss_sums(case: Case, model: nn.Module, micro_batch: Any, criterion: Tensor | None) -> Any:
    """The sums of a micro-batch, by term where there are two."""
    x, y, mask, extra = unpack(case, micro_batch)
    output = model(x, bool(extra.any()))
    error = (mask * (output - y).square()).sum()
    if criterion is not None:
        error = error * criterion.exp()
    return error if case.terms == 1 else {"fit": error, "size": 0.1 * output.square().sum()}


def counts(case: Case, micro_batch: Any) -> Any:
    """How much is counted in a micro-batch, by term where there are two."""
    mask = unpack(case, micro_batch)[2]
    return int(mask.sum()) if case.terms == 1 else {"fit": int(mask.sum()), "size": len(mask)}


def evaluate(model: nn.Module) -> None:
    """Measure between two windows on samples from torch's own generator, as many loops do."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(torch.randn(3, 4, dtype=torch.float64), True)
    model.train(was_training)


def replace_extra(case: Case, net: Net) -> None:
    """Put a new layer in the place of `extra`, as one adds adapters."""
    net.extra = make_net(replace(case, seed=case.seed + 1)).extra


def make_optimizer(case: Case, net: Net, criterion: nn.Parameter | None) -> torch.optim.Optimizer:
    """The case's optimizer over what is trained from the beginning."""
    trunk = [*net.inlet.parameters(), *net.blocks.parameters()]
    heads = list(net.head.parameters())
    later = case.has("group_added") or case.optimizer == "part"
    heads += [] if later else list(net.extra.parameters())
    heads += [] if criterion is None else [criterion]
    if case.optimizer == "part":
        return torch.optim.SGD(heads, lr=0.1, momentum=0.5)
    if case.optimizer == "groups":
        groups = [{"params": trunk}, {"params": heads, "lr": 0.2, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    if case.optimizer == "adamw":
        return torch.optim.AdamW(trunk + heads, lr=0.05, weight_decay=0.1)
    return torch.optim.SGD(
        trunk + heads, lr=0.1, momentum=0.9 if case.optimizer == "momentum" else 0.0
    )


def make_scheduler(case: Case, optimizer: torch.optim.Optimizer) -> Any:
    """The case's scheduler, or None."""
    schedulers = torch.optim.lr_scheduler
    if case.mistake == "plateau_scheduler":
        return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    if case.mistake == "one_cycle_past_its_end":
        return schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=2)
    if case.scheduler == "lambda":
        return schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if case.scheduler == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=5)
    if case.scheduler == "one_cycle":
        return schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    return None


def change(case: Case, net: Net, optimizer: torch.optim.Optimizer) -> None:
    """Do what this loop does after its first window."""
    if case.mistake in ("thawed_later", "frozen_later"):
        net.extra.requires_grad_(case.mistake == "thawed_later")
    if case.has("group_added"):
        optimizer.add_param_group({"params": list(net.extra.parameters()), "lr": 0.05})

"""Micro-batches of any class are moved to a device and cut in two, and keep it. `meta` is the other
device."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding
from worlds import World

import distaccum as da
from distaccum.data.device import halved, halves, one_ahead, to_device

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = namedtuple("Pair", "x y")


class Typed(NamedTuple):
    x: Tensor
    y: Tensor


class Row(list[Any]):
    note = "of the class"


class Slides(tuple[Any, ...]):
    """A tuple that is made of something else than its items."""

    def __new__(cls, x: Tensor, y: Tensor) -> Slides:
        made = super().__new__(cls, (x, y))
        made.note = "kept"  # type: ignore[attr-defined]
        return made


class Named(dict[str, Any]):
    def __init__(self, note: str, **items: Any) -> None:
        super().__init__(**items)
        self.note = note


class Dotted(dict[str, Any]):
    """A dict whose attributes are its items."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Own(Mapping[str, Any]):
    """A Mapping class that is no dict."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclass
class Batch:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


class Returns:
    """An own class whose `to` returns a new object."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Returns:
        return Returns(self.x.to(device))


class InPlace:
    """An own class whose `to` changes it and returns nothing."""

    asked: Any = None

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, non_blocking: bool = False) -> None:
        self.x, self.asked = self.x.to(device), non_blocking


def xy() -> tuple[Tensor, Tensor]:
    return torch.arange(10.0).view(5, 2), torch.arange(5)


KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "defaultdict": lambda x, y: defaultdict(list, x=x, y=y),
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "BatchEncoding": lambda x, y: BatchEncoding({"x": x, "y": y}),
    "dict subclass": lambda x, y: Named("kept", x=x, y=y),
    "attribute dict": lambda x, y: Dotted(x=x, y=y),
    "own Mapping": lambda x, y: Own(x=x, y=y),
    "tuple": lambda x, y: (x, y),
    "namedtuple": Pair,
    "typed namedtuple": Typed,
    "tuple subclass": Slides,
    "list": lambda x, y: [x, y],
    "list subclass": lambda x, y: Row([x, y]),
    "dataclass": Batch,
    "frozen dataclass with slots": Frozen,
    "nested": lambda x, y: {"inputs": UserDict(x=x), "targets": [y], "split": "train"},
}


def held(micro_batch: Any) -> tuple[Tensor, Tensor]:
    """The tensors x and y of a micro-batch of any kind."""
    if isinstance(micro_batch, Mapping) and "inputs" in micro_batch:
        return micro_batch["inputs"]["x"], micro_batch["targets"][0]
    if isinstance(micro_batch, Mapping | UserDict):
        return micro_batch["x"], micro_batch["y"]
    return (
        (micro_batch[0], micro_batch[1])
        if isinstance(micro_batch, tuple | list)
        else (micro_batch.x, micro_batch.y)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batch_classes_keep_their_class_on_a_device(kind: str) -> None:
    x, y = xy()
    micro_batch = KINDS[kind](x, y)
    moved = to_device(micro_batch, META)
    assert type(moved) is type(micro_batch)
    assert [tensor.device for tensor in held(moved)] == [META, META]
    assert held(micro_batch)[0] is x  # what was read stays where it is
    assert held(micro_batch)[1] is y
    assert getattr(moved, "note", None) == getattr(micro_batch, "note", None)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_touched_where_the_device_is_right(kind: str) -> None:
    micro_batch = KINDS[kind](*xy())
    assert to_device(micro_batch, CPU) is micro_batch


def test_what_classes_hold_beside_their_items_is_kept() -> None:
    x, y = xy()
    moved = to_device(Dotted(x=x, y=y), META)
    assert moved.x is moved["x"]
    assert to_device(defaultdict(list, x=x), META)["missing"] == []
    assert list(to_device(OrderedDict(b=x, a=y), META)) == ["b", "a"]


def test_objects_move_themselves() -> None:
    x, _ = xy()
    returned = to_device(Returns(x), META)
    assert isinstance(returned, Returns)
    assert returned.x.device == META
    micro_batch = InPlace(x)
    changed = to_device({"batch": micro_batch}, META)["batch"]
    assert isinstance(changed, InPlace)
    assert (changed.x.device, changed.asked) == (META, True)
    assert (micro_batch.x.device, micro_batch.asked) == (CPU, None)  # as it was read
    for own in (Returns(x), InPlace(x)):
        assert to_device(own, CPU) is own


def test_packed_sequences_move_themselves() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    moved = to_device((packed, torch.ones(2)), META)[0]
    assert type(moved) is type(packed)
    assert moved.data.device == META
    assert moved.batch_sizes.device == CPU  # as torch wants it
    assert to_device(packed, CPU) is packed


def test_what_cannot_be_made_again_is_passed_through() -> None:
    class Unknown:
        x = torch.ones(2)

    for micro_batch in (
        Unknown(),
        MappingProxyType({"x": torch.ones(2)}),
        "text",
        None,
        3,
        range(3),
    ):
        assert to_device(micro_batch, META) is micro_batch


def test_micro_batches_ahead_keep_what_was_read() -> None:
    micro_batches = [BatchEncoding({"x": torch.ones(2)}), BatchEncoding({"x": torch.ones(3)})]
    for (read, moved), micro_batch in zip(
        one_ahead(micro_batches, META), micro_batches, strict=True
    ):
        assert read is micro_batch
        assert read["x"].device == CPU
        assert isinstance(moved, BatchEncoding)
        assert moved["x"].device == META


def steps_of_uneven_windows() -> list[float]:
    """On each rank: the weight after windows of a class of their own, of which rank 1 has one and
    then none."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    accumulator = da.Accumulator(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=1.0),
        da.Objective(
            lambda model, micro_batch: model(micro_batch.x).sum(),
            lambda micro_batch: len(micro_batch.x),
        ),
    )
    kinds: tuple[Callable[[Tensor], Any], ...] = (
        InPlace,
        lambda x: Named("kept", x=x),
        lambda x: UserDict(x=x),
    )
    found = []
    for make in kinds:
        micro_batches = [
            make(torch.tensor([[value]], dtype=torch.float64)) for value in (1.0, 2.0, 6.0)
        ]
        for micro_batch in micro_batches:
            micro_batch.x = micro_batch["x"] if isinstance(micro_batch, Mapping) else micro_batch.x
        for share in (
            (micro_batches[:2], micro_batches[2:])
            if dist.get_rank() == 0
            else (micro_batches[2:], [])
        ):
            before = float(model.weight.detach())
            accumulator.step(share)
            found.append(before - float(model.weight.detach()))
    return found


def test_ranks_with_padding_keep_batch_classes(two_ranks: World) -> None:
    assert two_ranks.run(steps_of_uneven_windows) == [[3.0, 6.0] * 3] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_halves_keep_classes_and_all_samples(kind: str) -> None:
    micro_batch = KINDS[kind](*xy())
    both = halves(micro_batch)
    assert both is not None
    assert [type(half) for half in both] == [type(micro_batch)] * 2
    for whole, parts in zip(held(micro_batch), zip(*map(held, both), strict=True), strict=True):
        assert [len(part) for part in parts] == [3, 2]
        assert torch.equal(torch.cat(parts), whole)
    assert type(halved(micro_batch)) is type(micro_batch)
    assert torch.equal(held(halved(micro_batch))[0], held(both[0])[0])


def test_halves_of_lists_of_samples() -> None:
    """As detection has it: images of several sizes and their targets; and text beside tensors."""
    images = [torch.zeros(3, size, size) for size in (4, 5, 6)]
    targets = [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 3)]
    for micro_batch in ((images, targets), [images, targets]):
        first, second = halves(micro_batch) or ((), ())
        assert [len(part) for part in (*first, *second)] == [2, 2, 1, 1]
    first, second = halves({"x": torch.zeros(3, 1), "texts": ["a", "b", "c"]}) or ({}, {})
    assert (first["texts"], second["texts"]) == (["a", "b"], ["c"])


@pytest.mark.parametrize(("why", "micro_batch"), [
    ("no tensors", {"x": [1, 2]}),
    ("one sample", {"x": torch.ones(1, 3)}),
    ("other first dimensions", {"x": torch.ones(4), "y": torch.ones(3)}),
    ("a scalar", {"x": torch.ones(4), "scale": torch.tensor(2.0)}),
    ("a number that may count the samples", {"x": torch.ones(4), "size": 4}),
    ("a shape or one number for each sample", {"x": torch.ones(2, 3), "shape": [32, 32]}),
    ("tensors of samples or one for each sample", {"x": torch.ones(2, 3), "views": [torch.ones(2),
    torch.ones(2)]}), ("rows or items", ([torch.ones(3, 4)] * 2, [torch.ones(3)] * 2)),
    ("a class that knows more", pack_sequence([torch.ones(3)])),
    ("an own class", Returns(torch.ones(4))),
    ("an own class beside a tensor", (torch.ones(4), Returns(torch.ones(4)))),
    ("a mapping that cannot be made again", {"x": torch.ones(4),
    "more": MappingProxyType({"y": torch.ones(4)})}), ("nested",
    torch.nested.as_nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)),
])  # fmt: skip
def test_what_cannot_be_cut_for_certain_is_whole(why: str, micro_batch: Any) -> None:
    assert halves(micro_batch) is None, why
    assert halved(micro_batch) is micro_batch

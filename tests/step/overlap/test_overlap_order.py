"""What the tail schedule is for: the order of backwards and reductions, the memory, refusals, and
faults inside it."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from chains import (
    Chain,
    accumulator,
    counted,
    cross_entropy,
    differences,
    hooks_left,
    state,
    windows,
    wrap,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import World

import distaccum as da
from distaccum.errors import ConfigError

BLOCKS = 4


class Reductions(TorchDispatchMode):
    """Tells of each reduction as it is issued; the small collective of float64 is not among
    them."""

    def __init__(self, issued: Callable[[], object]) -> None:
        super().__init__()
        self._issued = issued

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.replace("_", "")
        tensors = [
            t
            for arg in args[:2]
            for t in (arg if isinstance(arg, list) else [arg])
            if isinstance(t, Tensor)
        ]
        if ("allreduce" in name or "reducescatter" in name) and tensors[0].dtype is torch.float32:
            self._issued()
        return func(*args, **(kwargs or {}))


def events(kind: str, overlap_micro_batches: int, num_micro_batches: int) -> list[str]:
    """The backwards of blocks, as `block of micro-batch`, and reductions of a window after the
    first one."""
    written: list[str] = []
    model = Chain()
    micro_batch = -1

    def forward(block: int, module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal micro_batch
        micro_batch += block == 0
        out.register_hook(lambda gradient, at=f"{block} of {micro_batch}": written.append(at))

    for index, block in enumerate(model.blocks):
        block.linear.register_forward_hook(partial(forward, index))
    # Buckets as small as can be, so that each gradient travels as soon as it is complete.
    wrapped = (
        DistributedDataParallel(model, bucket_cap_mb=1e-5) if kind == "ddp" else wrap(model, kind)
    )
    made = accumulator(wrapped, kind, overlap_micro_batches)
    made.step(*windows((num_micro_batches,)))
    written.clear()
    micro_batch = -1
    with Reductions(partial(written.append, "reduction")):
        made.step(*windows((num_micro_batches,)))
    return written


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_block_is_reduced_before_the_first_micro_batch_reaches_the_block_before_it(
    two_ranks: World, kind: str
) -> None:
    for found in two_ranks.run(events, kind, 3, 4):
        tail = [f"{block} of {micro_batch}" for block in (3, 2, 1, 0) for micro_batch in (1, 2, 3)]
        assert [event for event in found if event != "reduction"] == [
            f"{b} of 0" for b in (3, 2, 1, 0)
        ] + tail
        before = found[: found.index("2 of 1")]  # the last block is complete then, and so on
        assert "reduction" in before[before.index("3 of 3") :]
        assert "reduction" in found[found.index("1 of 3") : found.index("0 of 1")]
        # and none in micro-batches that are not in the tail
        assert found.index("reduction") > found.index("0 of 0")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_in_the_plain_order_only_the_last_micro_batch_hides_reductions(
    two_ranks: World, kind: str
) -> None:
    for plain, tail in zip(
        two_ranks.run(events, kind, 1, 4), two_ranks.run(events, kind, 3, 4), strict=True
    ):
        assert plain.index("reduction") > plain.index("0 of 2")
        assert plain.count("reduction") == tail.count("reduction")


def alive(kind: str) -> list[Any]:
    """How many micro-batches' logits are alive at each forward of a window, and how many segments'
    tensors after it."""
    logits: list[Any] = []
    inputs: list[Any] = []
    counts: list[int] = []

    def sums(model: nn.Module, micro_batch: dict[str, Any]) -> Tensor:
        counts.append(sum(ref() is not None for ref in logits))
        out = model(micro_batch["ids"])
        wide = out.double()  # saved for the backward of the square
        logits.append(weakref.ref(wide))
        return wide.square().sum()

    model = Chain()
    for block in model.blocks:
        block.linear.register_forward_hook(
            lambda module, args, out: inputs.append(weakref.ref(out))
        )
    made = accumulator(wrap(model, kind), kind, 3, objective=da.Objective(sums, counted))
    gc.collect()
    gc.disable()  # nothing may wait for it
    try:
        for micro_batches in windows((4, 4)):
            made.step(micro_batches)
        left = sum(ref() is not None for ref in [*logits, *inputs])
    finally:
        gc.enable()
    return [max(counts), left, len(inputs) >= 4 * 4]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_heads_graph_is_freed_at_once_and_all_of_it_at_the_end(
    two_ranks: World, kind: str
) -> None:
    assert two_ranks.run(alive, kind) == [[0, 0, True]] * 2


def clean_after(kind: str, spoil: str) -> list[str]:
    """After a window that failed in the tail, the next one is as if nothing had been."""
    failing: dict[str, Any] = {}

    def sums(model: nn.Module, micro_batch: dict[str, Any]) -> Tensor:
        failing["forwards"] += 1
        loss = cross_entropy(model, micro_batch)
        if failing["in"] == "forward" and failing["forwards"] == 3:
            raise ValueError("spoilt")
        return loss

    def backward(gradient: Tensor) -> None:
        if failing["in"] == "backward" and failing["forwards"] == 4:
            raise ValueError("spoilt")

    def watched(out: Tensor) -> None:
        out.register_hook(backward)

    def run(spoilt: bool) -> Any:
        failing.update({"in": spoil if spoilt else "", "forwards": 0})
        model = Chain("tied")
        model.blocks[1].linear.register_forward_hook(lambda module, args, out: watched(out))
        wrapped = wrap(model, kind)
        # calls count
        made = accumulator(wrapped, kind, 3, objective=da.Objective(sums, counted), check_cut=False)
        first, second = windows((4, 4))
        full = first if len(first) == 4 else [*first, *first][:4]
        if spoilt:
            hooks = hooks_left(wrapped)
            before = state(wrapped)
            with pytest.raises(ValueError, match="spoilt"):
                made.step(full)
            assert all(parameter.grad is None for parameter in wrapped.parameters())
            assert all(torch.equal(value, before[name]) for name, value in state(wrapped).items())
            assert hooks_left(wrapped) == hooks
        failing["in"] = ""
        records = [made.step(micro_batches) for micro_batches in (second, full)]
        return [(record.losses, record.grad_norm) for record in records], state(wrapped)

    return differences(run(True), run(False))


@pytest.mark.parametrize("spoil", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_clean_window_after_a_failure_in_the_tail_is_exact(
    two_ranks: World, kind: str, spoil: str
) -> None:
    assert two_ranks.run(clean_after, kind, spoil) == [[]] * 2


def told(kind: str, what: str, options: dict[str, Any]) -> str:
    """The refusal; afterwards a window in the plain order is exact, and no hook is left."""
    options = dict(options)
    ddp = options.pop("ddp", {})
    dtype = options.pop("dtype", torch.float32)
    data = windows((3, 3))

    def run(refused: bool) -> Any:
        model = Chain(what, num_blocks=1 if what == "one block" else BLOCKS).to(dtype)
        if what == "hooks":
            model.norm.weight.register_hook(lambda gradient: gradient * 2)
        wrapped = DistributedDataParallel(model, **ddp) if ddp else wrap(model, kind)
        message = ""
        if refused:
            hooks = hooks_left(wrapped)
            try:
                accumulator(wrapped, kind, 2, **options).step(data[0])
            except ConfigError as error:
                message = str(error)
            assert hooks_left(wrapped) == hooks
            assert all(parameter.grad is None for parameter in wrapped.parameters())
        made = accumulator(wrapped, kind, 1, audit="never", **options)
        records = [made.step(micro_batches) for micro_batches in data]
        return message, ([(record.losses, record.grad_norm) for record in records], state(wrapped))

    (message, found), (_, expected) = run(True), run(False)
    assert differences(found, expected) == []
    return message


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    *((kind, what, {}, reason) for kind in ("ddp", "fsdp") for what, reason in [
        ("twice", "more than once"),
        ("skip 0", "bypassing"),
        ("skip 1", "bypassing|used after"),
        ("skip 2", "used after"),
        ("one block", "1 block"),
    ]),
    ("ddp", "shared", {}, "shares? a parameter"),
    ("ddp", "hooks", {}, "hook"),
    ("ddp", "", {"ddp": {"find_unused_parameters": True}}, "find_unused_parameters"),
    ("ddp", "", {"ddp": {"static_graph": True}}, "static_graph"),
    ("ddp", "", {"dtype": torch.bfloat16}, "another dtype"),
    ("ddp", "", {"sync": "every"}, "every"),
    ("fsdp", "", {"sync": "every"}, "every"),
    ("fsdp", "", {"sync": "boundary"}, "boundary"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified")
@pytest.mark.parametrize(
    ("kind", "what", "options", "reason"), REFUSED, ids=lambda value: str(value)
)
def test_refusals_give_the_reason(
    two_ranks: World, kind: str, what: str, options: dict[str, Any], reason: str
) -> None:
    for message in two_ranks.run(told, kind, what, options):
        assert re.search(reason, message), message
        assert "overlap_micro_batches=1" in message


def context_of_reductions(kind: str, overlap_micro_batches: int) -> tuple[set[bool], set[bool]]:
    """Whether torch keeps a Python object for the reductions: in a window of ours, and in a
    backward as a loop by hand runs it."""
    made = accumulator(wrap(Chain(), kind), kind, overlap_micro_batches)
    (window,) = windows([3])
    ours: set[bool] = set()
    with Reductions(lambda: ours.add(torch._C._is_key_in_tls("context"))):
        made.step(window)
    by_hand: set[bool] = set()
    model, ids = wrap(Chain(), kind), torch.ones(1, 4, dtype=torch.int64)
    with Reductions(lambda: by_hand.add(torch._C._is_key_in_tls("context"))):
        cross_entropy(model, {"ids": ids, "labels": ids}).backward()
    return ours, by_hand


@pytest.mark.parametrize("overlap_micro_batches", [1, 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_a_backward_sends_holds_no_python_object(
    two_ranks: World, kind: str, overlap_micro_batches: int
) -> None:
    """Gloo's own thread would drop it, and a process that ends at that moment is aborted."""
    found = two_ranks.run(context_of_reductions, kind, overlap_micro_batches)
    assert found == [({False}, {True})] * 2

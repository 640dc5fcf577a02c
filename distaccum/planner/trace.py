"""One micro, forward and backward, on tensors that have no memory: what is alive when, and how much is computed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from distaccum._torch import backward, weightless
from distaccum.core.loss import joined
from distaccum.planner.meter import Tracker
from distaccum.planner.shapes import ROOT

LOSS = -2  # the group of what is computed behind the model


@dataclass(frozen=True)
class Segment:
    """What a micro does between two cuts: in a block, around the blocks (ROOT) or behind the model (LOSS).

    Bytes are those of what operators made: neither parameters, buffers and the micro, nor gradients of parameters once
    they have arrived in `.grad`.
    """

    group: int
    backward: bool
    begins: int  # alive when it begins
    peaks: tuple[int, ...]  # the most until the first gradient arrives, then until the next one, ... until it ends
    arrivals: tuple[int, ...]  # whose gradients arrive, as numbers in `model.parameters()`; one less than `peaks`


@dataclass(frozen=True)
class MicroTrace:
    """One micro of so many samples."""

    samples: int
    segments: tuple[Segment, ...]  # in their order
    saved: int  # alive after the forward, for the backward
    handed_on: int  # what the last block returned
    micro_bytes: int  # of the samples themselves
    flops: int  # of matrix products, forward and backward, what checkpointing computes again included

    @property
    def to_head(self) -> int:
        """What a micro keeps that waits for the backward of its blocks; all of it where there are none."""
        behind = (segment.begins for segment in self.segments if segment.backward and segment.group >= 0)
        return next(behind, self.saved) + self.handed_on

    @property
    def ends(self) -> tuple[int, ...]:
        """What is alive at the end of each segment."""
        return (*(segment.begins for segment in self.segments[1:]), 0)

    @staticmethod
    def between(a: MicroTrace, b: MicroTrace, samples: int) -> MicroTrace:
        """A micro of another size, on the line through two that were traced.

        Raises:
            ValueError: where the two were not computed alike.
        """
        if [_form(s) for s in a.segments] != [_form(s) for s in b.segments]:
            raise ValueError(f"micros of {a.samples} and of {b.samples} samples are computed in different ways")
        share = (samples - a.samples) / (b.samples - a.samples) if a.samples != b.samples else 0.0

        def at(one: int, other: int) -> int:
            return max(0, math.ceil(one + (other - one) * share))

        return MicroTrace(
            samples,
            tuple(
                replace(s, begins=at(s.begins, t.begins), peaks=tuple(map(at, s.peaks, t.peaks)))
                for s, t in zip(a.segments, b.segments, strict=True)
            ),
            at(a.saved, b.saved),
            at(a.handed_on, b.handed_on),
            at(a.micro_bytes, b.micro_bytes),
            at(a.flops, b.flops),
        )


def trace(
    model: nn.Module,
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    loss_sum: Callable[[nn.Module, Any], Any],
    micro: Any,
    samples: int,
    device: str | torch.device = "cpu",
    compute: torch.dtype | None = None,
) -> MicroTrace:
    """Run a micro without computing anything. Takes about half a second for GPT-2.

    Tensors behave like those of `device`, autocast and fused attention included; a GPU has to be there to be asked.
    What a kernel takes and gives back within itself is not seen, nor what compiled code would do.

    Args:
        model: on any device, the meta device included, not wrapped and not compiled; stays as it is.
        blocks_of: finds its blocks, in their order.
        loss_sum: the objective's, with autocast where the training has it, for the type of `device`.
        micro: tensors in lists, tuples and dicts; only their shapes and dtypes matter.
        samples: how many it has.
        device: whose kernels are asked.
        compute: in which dtype parameters are given to the model, as FSDP2 gathers them; None: as they are.
    """
    twin, device = copy.deepcopy(model), torch.device(device)
    with weightless():

        def fake(tensor: Tensor) -> Tensor:
            chosen = compute if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=chosen or tensor.dtype, device=device)

        _fill(twin, fake)
        micro = tree_map(lambda leaf: fake(leaf) if isinstance(leaf, Tensor) else leaf, micro)
        given = [leaf for leaf in tree_leaves(micro) if isinstance(leaf, Tensor)]
        tracker = Tracker(kind=device.type, weightless=True)
        tracker.count([*twin.parameters(), *twin.buffers(), *given])
        course = _Course(tracker)
        course.watch(twin, blocks_of(twin))
        with _Flops() as flops, tracker:
            result = loss_sum(twin, micro)
            terms = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            loss = joined(terms)
            own = {id(storage): storage.nbytes() for storage in (t.untyped_storage() for t in [*terms, loss])}
            saved = course.alive - sum(own.values())
            course.cut(LOSS, True)
            backward(loss, torch.ones_like(loss))
            course.end()
    micro_bytes = sum(tensor.nbytes for tensor in given)
    return MicroTrace(samples, tuple(course.segments), saved, course.handed_on, micro_bytes, flops.total)


class _Course:
    """Cuts a micro into segments as it runs, and takes gradients away as they arrive."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._before = tracker.live
        self.segments: list[Segment] = []
        self._now: Segment = Segment(LOSS, False, 0, (), ())
        self.handed_on = 0  # bytes that the newest block returned
        self._known: list[int] = []  # these tensors

    @property
    def alive(self) -> int:
        return self._tracker.live - self._before

    def watch(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Hook in. The hooks stay, as the model is a copy."""
        model.register_forward_pre_hook(lambda *_: self.cut(ROOT, False))
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._entered, number), with_kwargs=True)
            block.register_forward_hook(partial(self._left, number))
        model.register_forward_hook(self._left_model)
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def cut(self, group: int, backward: bool, *_: Any) -> None:
        """Begin another segment. As a hook of a tensor: when its gradient is known."""
        self._measure()
        self.segments.append(self._now)
        self._now = Segment(group, backward, self.alive, (), ())

    def end(self) -> None:
        """The last segment is over."""
        self._measure()
        self.segments.append(self._now)

    def _measure(self) -> None:
        self._now = replace(self._now, peaks=(*self._now.peaks, self._tracker.peak - self._before))
        self._tracker.reset_peak()

    def _arrived(self, number: int, parameter: Tensor) -> None:
        parameter.grad = None
        self._measure()
        self._now = replace(self._now, arrivals=(*self._now.arrivals, number))

    def _entered(self, block: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.cut(block, False)
        for tensor in _with_graph((args, kwargs)):
            if id(tensor) not in self._known:  # else the block before it begins there
                tensor.register_hook(partial(self.cut, ROOT, True))

    def _left(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        self.cut(ROOT, False)
        returned = [*_with_graph(output)]
        self._known, self.handed_on = [id(tensor) for tensor in returned], sum(t.nbytes for t in returned)
        for tensor in returned:
            tensor.register_hook(partial(self.cut, block, True))

    def _left_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self.cut(LOSS, False)
        for tensor in _with_graph(output):
            tensor.register_hook(partial(self.cut, ROOT, True))


def _with_graph(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad)


def _form(segment: Segment) -> tuple[int, bool, tuple[int, ...]]:
    return segment.group, segment.backward, segment.arrivals


class _Flops(TorchDispatchMode):
    """Counts by the formulas of torch's own counter, which keeps recomputed activations alive by its hooks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += int(sdpa_flop(*args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += int(sdpa_backward_flop(*args[:4]))
        return result


def _fill(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace all parameters and buffers of a model, tied ones by one and the same."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*_own(module)]:
            if id(tensor) not in made:
                new = make(tensor)
                made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            setattr(module, name, made[id(tensor)])


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)

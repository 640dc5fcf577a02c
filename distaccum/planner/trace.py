"""Runs micro-batches and optimizer updates on fake tensors, and records what they take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from distaccum._torch import fake_tensors
from distaccum.core.loss import joined
from distaccum.planner.meter import Tracker
from distaccum.planner.segments import LOSS, MicroBatchTrace, Segment, Update
from distaccum.planner.shapes import ROOT


def trace(
    model: nn.Module,
    blocks_of: Callable[[nn.Module], Sequence[nn.Module]],
    loss_sum: Callable[[nn.Module, Any], Any],
    micro_batch: Any,
    samples: int,
    device: str | torch.device = "cpu",
    compute: torch.dtype | None = None,
) -> MicroBatchTrace:
    """Run a micro-batch on fake tensors, and return its memory over time and its FLOPs.

    Nothing is computed; GPT-2 takes about half a second. Fake tensors behave like tensors on
    `device`, including autocast and fused attention, so tracing for a GPU needs a GPU. Memory that
    a kernel allocates and frees internally is not seen, nor the effect of compilation.

    Args:
        model: the model on any device, including meta. It must be neither wrapped nor compiled, and
            is not changed.
        blocks_of: returns the blocks of a model in their order.
        loss_sum: the objective's `loss_sum`, with the autocast of the training, for the type of
            `device`.
        micro_batch: tensors in lists, tuples and dicts; only their shapes and dtypes matter.
        samples: the number of samples in `micro_batch`.
        device: the device whose behavior is simulated.
        compute: the dtype in which FSDP2 gathers floating-point parameters; None: their own dtype.
    """
    twin, device = copy.deepcopy(model), torch.device(device)
    with fake_tensors():

        def fake(tensor: Tensor) -> Tensor:
            chosen = (
                compute if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None
            )
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=chosen or tensor.dtype, device=device
            )

        _fill(twin, fake)
        micro_batch = tree_map(
            lambda leaf: fake(leaf) if isinstance(leaf, Tensor) else leaf, micro_batch
        )
        given = [leaf for leaf in tree_leaves(micro_batch) if isinstance(leaf, Tensor)]
        tracker = Tracker(kind=device.type, fake_tensors=True)
        tracker.count([*twin.parameters(), *twin.buffers(), *given])
        course = _Course(tracker)
        course.watch(twin, blocks_of(twin))
        with _Flops() as flops, tracker:
            result = loss_sum(twin, micro_batch)
            terms = _with_graph(result)
            loss = joined(terms)
            own = {
                id(storage): storage.nbytes()
                for storage in (t.untyped_storage() for t in [*terms, loss])
            }
            saved = course.alive - sum(own.values())
            course.cut(LOSS, True)
            backward(loss, torch.ones_like(loss))
            course.cut(LOSS, True)  # ends the last segment
    micro_batch_bytes = sum(tensor.nbytes for tensor in given)
    return MicroBatchTrace(
        samples, tuple(course.segments), saved, course.handed_on, micro_batch_bytes, flops.total
    )


def update(
    make: Callable[[nn.Module], Optimizer],
    shapes: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: str | torch.device = "cpu",
) -> Update:
    """Run two optimizer updates on fake parameters, and return the bytes that they take.

    Args:
        make: makes an optimizer for the parameters of a module.
        shapes: shape and dtype of this rank's part of each trained parameter.
        device: the device whose memory is counted. Counts of updates are on the host, except for
            those of a fused optimizer.
    """
    device = torch.device(device)
    without_memory = fake_tensors()
    with without_memory:
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        module = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
        for parameter in module:
            parameter.grad = torch.empty_like(parameter)
    optimizer = make(module)
    # Python reads the values of update counts on the host, so these tensors must be real. A fused
    # kernel reads its counts on the device, so they may be fake.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    tracker = Tracker(kind=device.type, fake_tensors=True)
    tracker.count([tensor for p in module for tensor in (p, p.grad) if tensor is not None])
    with without_memory if fused else nullcontext(), tracker:
        optimizer.step()
        tracker.reset_peak()
        before = tracker.live
        optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    kept = sum(value.nbytes for value in states if value.device.type == device.type)
    return Update(kept, tracker.peak - before)


class _Course:
    """Cuts a running micro-batch into segments, and frees parameter gradients as they arrive."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._before = tracker.live
        self.segments: list[Segment] = []
        self._now: Segment = Segment(LOSS, False, 0, (), ())
        self.handed_on = 0  # bytes that the latest block returned
        self._known: list[int] = []  # ids of the tensors that the latest block returned

    @property
    def alive(self) -> int:
        """Return the bytes alive now that this micro-batch has allocated."""
        return self._tracker.live - self._before

    def watch(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Register hooks on the model; they are never removed, since the model is a copy."""
        model.register_forward_pre_hook(lambda *_: self.cut(ROOT, False))
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._entered, number), with_kwargs=True)
            block.register_forward_hook(partial(self._left, number))
        model.register_forward_hook(self._left_model)
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def cut(self, group: int, backward: bool, *_: Any) -> None:
        """Begin another segment; a tensor's hook calls this when its gradient is known."""
        self._measure()
        self.segments.append(self._now)
        self._now = Segment(group, backward, self.alive, (), ())

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
            if id(tensor) not in self._known:  # otherwise the previous block's backward begins here
                tensor.register_hook(partial(self.cut, ROOT, True))

    def _left(self, block: int, module: nn.Module, args: Any, output: Any) -> None:
        self.cut(ROOT, False)
        returned = _with_graph(output)
        self._known = [id(tensor) for tensor in returned]
        self.handed_on = sum(t.nbytes for t in returned)
        for tensor in returned:
            tensor.register_hook(partial(self.cut, block, True))

    def _left_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self.cut(LOSS, False)
        for tensor in _with_graph(output):
            tensor.register_hook(partial(self.cut, ROOT, True))


def _with_graph(value: Any) -> list[Tensor]:
    """Return all tensors in a nested value that require gradients."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]


class _Flops(TorchDispatchMode):
    """Counts FLOPs by the formulas of torch's own counter.

    torch's counter itself is not used, because its hooks keep recomputed activations alive.
    """

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
    """Replace all parameters and buffers of a model by the tensors of `make`, and keep ties."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            if id(tensor) not in made:
                new = make(tensor)
                made[id(tensor)] = (
                    nn.Parameter(new, tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else new
                )
            setattr(module, name, made[id(tensor)])

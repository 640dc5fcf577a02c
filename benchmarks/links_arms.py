"""Defines the ways to train that links.py compares, each on a copy of one model.

Each makes optimizer steps of K micro-batches. The loss of a micro-batch is the mean over its
tokens, and all micro-batches have the same number of tokens. So every way computes the mean over
the window, and the ways differ in what they send, and when.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from links_names import COMPUTE, OVERLAP, REFERENCE, SMALL, Settings
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig

MicroBatch = tuple[Tensor, Tensor]
NUM_WINDOWS = 3  # different windows, which repeat


def first_model(settings: Settings) -> GPT:
    """Build the model, the same on every rank.

    It has no biases, because the gradient of the keys' biases is 0 and would be only noise.
    """
    torch.manual_seed(0)
    sizes = {
        "num_layers": settings.num_layers,
        "num_heads": settings.width // 32,
        "width": settings.width,
    }
    return GPT(
        GPTConfig(
            "gpt", vocab_size=256, max_seq_len=settings.seq_len, dropout=0.0, bias=False, **sizes
        )
    )


def random_micro_batches(settings: Settings) -> Iterator[MicroBatch]:
    """Return an endless iterator over this rank's micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shape = (
        NUM_WINDOWS * settings.num_micro_batches,
        settings.micro_batch_size,
        settings.seq_len + 1,
    )
    tokens = torch.randint(256, shape, generator=generator)
    return itertools.cycle([(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Make an AdamW whose eps is larger than the gradients.

    So an update is proportional to the gradient, not to its sign, and errors are visible.
    """
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=0.1)


def loss_of(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the mean cross entropy [] over the tokens of a micro-batch."""
    inputs, labels = micro_batch
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())


@dataclass
class Arm:
    """Holds one way to train."""

    step: Callable[[], None]  # makes one optimizer step on the next window
    model: nn.Module  # the model without wrappers, which holds the parameters
    windows: int = 0  # number of windows that it has trained on
    # For overlap_micro_batches=auto: discard the choice that was made at another rate.
    choose_again: Callable[[], None] = lambda: None
    chosen: Callable[[], str] = lambda: ""  # returns what auto chose, and why

    def parameters(self) -> list[Tensor]:
        """Return the unsharded parameters in the model's order; all ranks call this together."""
        whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return [parameter.detach() for parameter in whole]


def _window_loop(
    settings: Settings, model: nn.Module, backward: Callable[[MicroBatch, bool], None]
) -> Callable[[], None]:
    """Return a step of K micro-batches, each by `backward(micro_batch, last)`, and an update."""
    micro_batches, optimizer = random_micro_batches(settings), adamw(model)

    def step() -> None:
        for i in range(settings.num_micro_batches):
            backward(next(micro_batches), i == settings.num_micro_batches - 1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compute(settings: Settings, inner: nn.Module) -> Arm:
    """Train each rank alone, to measure a window without communication."""

    def backward(micro_batch: MicroBatch, last: bool) -> None:
        (loss_of(inner, micro_batch) / settings.num_micro_batches).backward()

    return Arm(_window_loop(settings, inner, backward), inner)


def naive_ddp(settings: Settings, inner: nn.Module) -> Arm:
    """Train with DDP in its simplest form, where every backward all-reduces the gradients."""
    model = DistributedDataParallel(inner)

    def backward(micro_batch: MicroBatch, last: bool) -> None:
        (loss_of(model, micro_batch) / settings.num_micro_batches).backward()

    return Arm(_window_loop(settings, model, backward), inner)


def no_sync(settings: Settings, inner: nn.Module, bucket_mb: int | None = None) -> Arm:
    """Train with DDP and `no_sync` in all micro-batches but the last, also in the forward."""
    model = DistributedDataParallel(inner, bucket_cap_mb=bucket_mb)

    def backward(micro_batch: MicroBatch, last: bool) -> None:
        with nullcontext() if last else model.no_sync():
            (loss_of(model, micro_batch) / settings.num_micro_batches).backward()

    return Arm(_window_loop(settings, model, backward), inner)


def accelerate(settings: Settings, inner: nn.Module) -> Arm:
    """Train with Accelerate as its guide says: `gradient_accumulation_steps` and `accumulate`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=settings.num_micro_batches)
    model, optimizer = accelerator.prepare(inner, adamw(inner))
    micro_batches = random_micro_batches(settings)

    def step() -> None:
        for micro_batch in itertools.islice(micro_batches, settings.num_micro_batches):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, micro_batch))
                optimizer.step()
                optimizer.zero_grad()

    return Arm(step, inner)


def fabric(settings: Settings, inner: nn.Module) -> Arm:
    """Train with Lightning Fabric as its guide says: `no_backward_sync`."""
    from lightning.fabric import Fabric

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    ranks = Fabric(accelerator="cpu", strategy="ddp", devices=1, num_nodes=dist.get_world_size())
    ranks.launch()
    model, optimizer = ranks.setup(inner, adamw(inner))
    micro_batches = random_micro_batches(settings)

    def step() -> None:
        for i, micro_batch in enumerate(
            itertools.islice(micro_batches, settings.num_micro_batches)
        ):
            with ranks.no_backward_sync(model, enabled=i < settings.num_micro_batches - 1):
                ranks.backward(loss_of(model, micro_batch) / settings.num_micro_batches)
        optimizer.step()
        optimizer.zero_grad()

    return Arm(step, inner)


def _sharded(inner: nn.Module) -> nn.Module:
    for block in inner.blocks:
        fully_shard(block)
    return fully_shard(inner)


def fsdp_each(settings: Settings, inner: nn.Module) -> Arm:
    """Train with `fully_shard` per block and root and a plain backward per micro-batch.

    torchtitan does the same.
    """
    model = _sharded(inner)

    def backward(micro_batch: MicroBatch, last: bool) -> None:
        (loss_of(model, micro_batch) / settings.num_micro_batches).backward()

    return Arm(_window_loop(settings, model, backward), model)


def fsdp_last(settings: Settings, inner: nn.Module) -> Arm:
    """Train with `fully_shard` and reduce at the last micro-batch: `set_requires_gradient_sync`."""
    model = _sharded(inner)

    def backward(micro_batch: MicroBatch, last: bool) -> None:
        model.set_requires_gradient_sync(last)
        (loss_of(model, micro_batch) / settings.num_micro_batches).backward()

    return Arm(_window_loop(settings, model, backward), model)


def ours(
    settings: Settings, inner: nn.Module, sync: str, overlap: int | str = 1, sharded: bool = False
) -> Arm:
    """Train with an Accumulator of distaccum over `da.windows`."""
    bucket_mb = None if overlap == 1 else settings.bucket_mb
    model = _sharded(inner) if sharded else DistributedDataParallel(inner, bucket_cap_mb=bucket_mb)
    options = {} if overlap == 1 else {"overlap_micro_batches": overlap}
    optimizer, objective = adamw(model), da.CausalLM(shift=False)
    accumulator = da.Accumulator(model, optimizer, objective, sync=sync, **options)
    windows = iter(
        da.windows(
            random_micro_batches(settings), gradient_accumulation_steps=settings.num_micro_batches
        )
    )

    def choose_again() -> None:
        nonlocal accumulator
        accumulator = da.Accumulator(model, optimizer, objective, sync=sync, **options)

    return Arm(
        lambda: accumulator.step(next(windows)) and None,
        inner,
        choose_again=choose_again if overlap == "auto" else lambda: None,
        chosen=lambda: str(accumulator.overlap),
    )


_WAYS: dict[str, Callable[[Settings, nn.Module], Arm]] = {
    COMPUTE: compute,
    REFERENCE: no_sync,
    SMALL: lambda settings, inner: no_sync(settings, inner, settings.bucket_mb),
    "DDP naive": naive_ddp,
    "Accelerate": accelerate,
    "Fabric": fabric,
    "ours DDP": lambda settings, inner: ours(settings, inner, "boundary"),
    "FSDP2 each micro-batch": fsdp_each,
    "FSDP2 last micro-batch": fsdp_last,
    "ours FSDP2 boundary": lambda settings, inner: ours(settings, inner, "boundary", sharded=True),
    "ours FSDP2 gather_once": lambda settings, inner: ours(
        settings, inner, "gather_once", sharded=True
    ),
}


def build(name: str, settings: Settings, model: nn.Module) -> Arm:
    """Build the arm with a name of links_names, on a copy of the model.

    Raises:
        ModuleNotFoundError: the arm is a peer that is not installed.
    """
    inner = copy.deepcopy(model)
    if name.startswith(OVERLAP):
        overlap = name.removeprefix(OVERLAP)
        return ours(settings, inner, "boundary", overlap if overlap == "auto" else int(overlap))
    return _WAYS[name](settings, inner)

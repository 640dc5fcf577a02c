"""The ways to train that are compared on slow links: one optimizer step of K micros each, on a copy of one model.

The loss of a micro is the mean over its tokens, and all micros have as many. So every way computes the mean over the
window, and the ways differ in what they send, and when.
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

Micro = tuple[Tensor, Tensor]
NUM_WINDOWS = 3  # different ones, over and over


def first_model(settings: Settings) -> GPT:
    """The same on every rank. Without biases: those of the keys have a gradient of 0, and so noise alone."""
    torch.manual_seed(0)
    sizes = {"num_layers": settings.num_layers, "num_heads": settings.width // 32, "width": settings.width}
    return GPT(GPTConfig("gpt", vocab_size=256, max_seq_len=settings.seq_len, dropout=0.0, bias=False, **sizes))


def random_micros(settings: Settings) -> Iterator[Micro]:
    """This rank's micros, window after window without end: random tokens."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shape = (NUM_WINDOWS * settings.num_micros, settings.micro_size, settings.seq_len + 1)
    tokens = torch.randint(256, shape, generator=generator)
    return itertools.cycle([(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose eps is above the gradients: then an update follows the gradient, not its sign, and errors show."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=0.1)


def loss_of(model: nn.Module, micro: Micro) -> Tensor:
    """The mean over a micro's tokens."""
    inputs, labels = micro
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())


@dataclass
class Arm:
    """One way. `step` makes one optimizer step on the next window."""

    step: Callable[[], None]
    model: nn.Module  # the one inside of any wrapper: holds the parameters
    windows: int = 0  # that it has trained on
    choose_again: Callable[[], None] = lambda: None  # for overlap_micros=auto: forget what was chosen at another rate
    chosen: Callable[[], str] = lambda: ""  # and why

    def parameters(self) -> list[Tensor]:
        """Whole ones, in the model's order. All ranks call this together."""
        whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return [parameter.detach() for parameter in whole]


def _window_loop(settings: Settings, model: nn.Module, backward: Callable[[Micro, bool], None]) -> Callable[[], None]:
    """K micros, each by `backward(micro, whether it is the last)`, and the optimizer's step."""
    micros, optimizer = random_micros(settings), adamw(model)

    def step() -> None:
        for i in range(settings.num_micros):
            backward(next(micros), i == settings.num_micros - 1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compute(settings: Settings, inner: nn.Module) -> Arm:
    """Each rank for itself: what a window takes where nothing is sent."""

    def backward(micro: Micro, last: bool) -> None:
        (loss_of(inner, micro) / settings.num_micros).backward()

    return Arm(_window_loop(settings, inner, backward), inner)


def naive_ddp(settings: Settings, inner: nn.Module) -> Arm:
    """DDP as one first writes it: every backward is followed by an all-reduce."""
    model = DistributedDataParallel(inner)

    def backward(micro: Micro, last: bool) -> None:
        (loss_of(model, micro) / settings.num_micros).backward()

    return Arm(_window_loop(settings, model, backward), inner)


def no_sync(settings: Settings, inner: nn.Module, bucket_mb: int | None = None) -> Arm:
    """DDP by hand, with care: `no_sync` around all micros but the last, forward included."""
    model = DistributedDataParallel(inner, bucket_cap_mb=bucket_mb)

    def backward(micro: Micro, last: bool) -> None:
        with nullcontext() if last else model.no_sync():
            (loss_of(model, micro) / settings.num_micros).backward()

    return Arm(_window_loop(settings, model, backward), inner)


def accelerate(settings: Settings, inner: nn.Module) -> Arm:
    """`gradient_accumulation_steps` and `accumulate`, as its guide has it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=settings.num_micros)
    model, optimizer = accelerator.prepare(inner, adamw(inner))
    micros = random_micros(settings)

    def step() -> None:
        for micro in itertools.islice(micros, settings.num_micros):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, micro))
                optimizer.step()
                optimizer.zero_grad()

    return Arm(step, inner)


def fabric(settings: Settings, inner: nn.Module) -> Arm:
    """Lightning Fabric's `no_backward_sync`, as its guide has it."""
    from lightning.fabric import Fabric

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    ranks = Fabric(accelerator="cpu", strategy="ddp", devices=1, num_nodes=dist.get_world_size())
    ranks.launch()
    model, optimizer = ranks.setup(inner, adamw(inner))
    micros = random_micros(settings)

    def step() -> None:
        for i, micro in enumerate(itertools.islice(micros, settings.num_micros)):
            with ranks.no_backward_sync(model, enabled=i < settings.num_micros - 1):
                ranks.backward(loss_of(model, micro) / settings.num_micros)
        optimizer.step()
        optimizer.zero_grad()

    return Arm(step, inner)


def _sharded(inner: nn.Module) -> nn.Module:
    for block in inner.blocks:
        fully_shard(block)
    return fully_shard(inner)


def fsdp_each(settings: Settings, inner: nn.Module) -> Arm:
    """Plain `fully_shard` per block and root, a backward per micro, nothing else: torchtitan's way."""
    model = _sharded(inner)

    def backward(micro: Micro, last: bool) -> None:
        (loss_of(model, micro) / settings.num_micros).backward()

    return Arm(_window_loop(settings, model, backward), model)


def fsdp_last(settings: Settings, inner: nn.Module) -> Arm:
    """The same, with gradients reduced at the last micro: `set_requires_gradient_sync`."""
    model = _sharded(inner)

    def backward(micro: Micro, last: bool) -> None:
        model.set_requires_gradient_sync(last)
        (loss_of(model, micro) / settings.num_micros).backward()

    return Arm(_window_loop(settings, model, backward), model)


def ours(settings: Settings, inner: nn.Module, sync: str, overlap: int | str = 1, sharded: bool = False) -> Arm:
    """An accumulator over `da.windows`."""
    bucket_mb = None if overlap == 1 else settings.bucket_mb
    model = _sharded(inner) if sharded else DistributedDataParallel(inner, bucket_cap_mb=bucket_mb)
    options = {} if overlap == 1 else {"overlap_micros": overlap}
    optimizer, objective = adamw(model), da.CausalLM(shift=False)
    accumulator = da.Accumulator(model, optimizer, objective, sync=sync, **options)
    windows = iter(da.windows(random_micros(settings), num_micros=settings.num_micros))

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
    "FSDP2 each micro": fsdp_each,
    "FSDP2 last micro": fsdp_last,
    "ours FSDP2 boundary": lambda settings, inner: ours(settings, inner, "boundary", sharded=True),
    "ours FSDP2 keep": lambda settings, inner: ours(settings, inner, "keep", sharded=True),
}


def build(name: str, settings: Settings, model: nn.Module) -> Arm:
    """One way, by its name in links_names, on a copy of the model.

    Raises:
        ModuleNotFoundError: for a peer that is not installed.
    """
    inner = copy.deepcopy(model)
    if name.startswith(OVERLAP):
        overlap = name.removeprefix(OVERLAP)
        return ours(settings, inner, "boundary", overlap if overlap == "auto" else int(overlap))
    return _WAYS[name](settings, inner)

"""A composed loop as its user would write it, on one rank."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from fuzz_cases import DDP, FSDP, Case
from fuzz_data import (
    change,
    counts,
    evaluate,
    loss_sums,
    make_loader,
    make_net,
    make_optimizer,
    make_scheduler,
    replace_extra,
)
from fuzz_reference import read
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distaccum as da

DDP_OPTIONS = {
    "ddp_find_unused": {"find_unused_parameters": True},
    "ddp_static_graph": {"static_graph": True},
    "ddp_bucket_view": {"gradient_as_bucket_view": True},
}


@dataclass
class Told:
    """What one rank tells of its loop, in plain numbers."""

    # of the windows that were completed
    records: list[dict[str, Any]] = field(default_factory=list)
    # after each, this rank's shard or all of them
    parameters: list[list[list[float]]] = field(default_factory=list)
    at_the_end: list[list[float]] = field(default_factory=list)  # likewise, whatever happened
    refused: str | None = None  # the ConfigError's message
    error: str | None = None  # the message of anything else
    traceback: str = ""


def run_case(case: Case) -> Told:
    """Run a case on this rank."""
    told = Told()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = Loop(case, told)
        try:
            loop.prepare()
            loop.run()
        except da.ConfigError as error:
            told.refused = str(error)
        except Exception as error:
            told.error = f"{type(error).__name__}: {error}".splitlines()[0]
            told.traceback = traceback.format_exc()
        told.at_the_end = loop.shards()
    return told


class Loop:
    """Composes the loop of a case, mistake included."""

    def __init__(self, case: Case, told: Told) -> None:
        self.case = case
        self.told = told
        self.rank = dist.get_rank()
        self.net = make_net(case)
        self.criterion = (
            nn.Parameter(torch.tensor(0.3).double())
            if case.mistake == "criterion_parameter"
            else None
        )
        self.windows_done = 0

    def prepare(self) -> None:
        """Make model, optimizer, scheduler and accumulator."""
        case, net = self.case, self.net
        net.extra.requires_grad_(
            not case.has("frozen") and case.mistake not in ("thawed", "thawed_later")
        )
        early = (
            make_optimizer(case, net, self.criterion)
            if case.mistake == "optimizer_before_wrapping"
            else None
        )
        self.model = self._wrap()
        if case.mistake in ("thawed", "frozen_after_wrapping"):
            net.extra.requires_grad_(case.mistake == "thawed")
        if case.mistake == "layer_replaced":
            replace_extra(case, net)
        trained = copy.deepcopy(make_net(case)) if case.mistake == "optimizer_of_a_copy" else net
        self.optimizer = early or make_optimizer(case, trained, self.criterion)
        if case.mistake == "lbfgs":
            self.optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)
        self.scheduler = make_scheduler(case, self.optimizer)
        torch.manual_seed(case.seed + self.rank)
        self.loader = make_loader(case, self.rank)
        handed: Any = [self.optimizer] if case.mistake == "list_of_optimizers" else self.optimizer
        self.accumulator = da.Accumulator(
            self.model,
            handed,
            da.Objective(self._loss_sum, self._count),
            sync=case.sync,
            clip_norm=0.5 if case.has("clip_norm") else None,
            scheduler=self.scheduler,
            seed=7 if case.has("seed") else None,
            audit="always" if case.has("audit") else "never",
            overlap_micro_batches=2 if case.has("overlap") else 1,
            agree_on_oom=case.has("agree_on_oom"),
        )

    def run(self) -> None:
        """Make all windows."""
        case = self.case
        with self._surroundings():
            if case.loader == "by_hand":
                for dealt in read(case):
                    self._step(dealt[self.rank])
                return
            stream = da.windows(self.loader, case.sizes[0])
            for last in (case.break_after or case.num_windows, case.num_windows):
                for window in stream:
                    self._step(window)
                    if self.windows_done < case.num_windows:
                        stream.gradient_accumulation_steps = case.sizes[self.windows_done]
                    if self.windows_done == last:
                        break
                if self.windows_done != case.break_after:
                    return

    def shards(self) -> list[list[float]]:
        """This rank's part of all parameters."""
        parameters = [*self.net.parameters(), *([] if self.criterion is None else [self.criterion])]
        return [_local(parameter).flatten().tolist() for parameter in parameters]

    def _step(self, window: Iterable[Any]) -> None:
        case = self.case
        handed: Any = (
            (micro_batch for micro_batch in window)
            if case.mistake == "generator_as_window"
            else window
        )
        with ExitStack() as stack:
            if case.has("no_sync"):
                stack.enter_context(self.model.no_sync())
            record = self.accumulator.step(handed)
        self.told.records.append(
            {
                "step": record.step,
                "skipped": record.skipped is not None,
                "loss": record.loss,
                "losses": dict(record.losses),
                "denominators": dict(record.denominators),
                "grad_norm": record.grad_norm,
                "lr": record.lr,
                "num_micro_batches": record.num_micro_batches,
            }
        )
        self.told.parameters.append(self.shards())
        self.windows_done += 1
        if case.has("evaluation"):
            evaluate(self.model)
        if self.windows_done == 1:
            change(case, self.net, self.optimizer)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.case.has("no_grad"):
                stack.enter_context(torch.no_grad())
            if self.case.has("inference_mode"):
                stack.enter_context(torch.inference_mode())
            if self.case.has("autocast"):
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    def _loss_sum(self, model: nn.Module, micro_batch: Any) -> Any:
        mistake = self.case.mistake
        sums = loss_sums(
            self.case,
            model.module if mistake == "past_the_wrapper" else model,
            micro_batch,
            self.criterion,
        )
        terms = sums if isinstance(sums, dict) else {"": sums}
        amounts = counts(self.case, micro_batch)
        amounts = amounts if isinstance(amounts, dict) else {"": amounts}
        if mistake == "mean_for_sum":
            terms = {name: value / max(1, amounts[name]) for name, value in terms.items()}
        if mistake == "vector_for_sum":
            terms = {name: value[None] for name, value in terms.items()}
        if mistake == "sum_without_graph":
            terms = {name: value.detach() for name, value in terms.items()}
        if mistake == "other_terms":
            return {f"{name} of another name": value for name, value in terms.items()}
        return terms if isinstance(sums, dict) else terms[""]

    def _count(self, micro_batch: Any) -> Any:
        mistake, right = self.case.mistake, counts(self.case, micro_batch)
        if mistake == "denominator_nan_on_one_rank":
            return (
                _spoiled(right, float("nan"))
                if self.rank == 0 and self.windows_done >= 1
                else right
            )
        wrong = {
            "denominator_none": None,
            "denominator_nan": float("nan"),
            "denominator_vector": torch.ones(2),
            "denominator_negative": -1,
        }
        return _spoiled(right, wrong[mistake]) if mistake in wrong else right

    def _wrap(self) -> nn.Module:
        case, net = self.case, self.net
        if case.mistake == "not_wrapped":
            return net
        if case.mistake == "part_wrapped":
            net.blocks[0] = self._wrapped(net.blocks[0])
            return net
        if case.mistake == "ignored_by_ddp":
            ignored = ["extra.weight", "extra.bias"]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
        if case.wrapper == "fsdp_layers":
            mesh = init_device_mesh("cpu", (case.ranks,))
            for layer in (net.inlet, *net.blocks, net.head, net.extra):
                fully_shard(layer, mesh=mesh)
        return self._wrapped(net)

    def _wrapped(self, module: nn.Module) -> nn.Module:
        wrapper = self.case.wrapper
        if wrapper in FSDP:
            return fully_shard(module, mesh=init_device_mesh("cpu", (self.case.ranks,)))
        if wrapper in ("compiled", "ddp_of_compiled"):
            module = torch.compile(module, backend="eager")
        if wrapper in DDP:
            module = DistributedDataParallel(module, **DDP_OPTIONS.get(wrapper, {}))
        return torch.compile(module, backend="eager") if wrapper == "compiled_ddp" else module


def _local(parameter: Tensor) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def _spoiled(right: Any, wrong: Any) -> Any:
    return dict.fromkeys(right, wrong) if isinstance(right, dict) else wrong

"""Which of many plans: by arithmetic on plans made by hand, and on a small GPT whose memory is
predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distaccum.app.auto.candidates import Candidate, Candidates, choose, pareto_front
from distaccum.app.auto.footprint import Footprint
from distaccum.app.auto.resolve import resolve_auto, resolved
from distaccum.app.auto.setups import setup_of
from distaccum.app.commands.check import check
from distaccum.app.config import Config, config_dir, typed
from distaccum.app.task import Task, build_task
from distaccum.core.strategies import StrategyName, Sync
from distaccum.parallel.world import World
from distaccum.planner.step_time import StepTime
from distaccum.planner.timeline import Peak

SMALL = (
    "data=path", "data.seq_len=32", "data.validation_fraction=0.2", "model.num_layers=4",
    "model.width=128", "model.num_heads=2", "accum.effective_batch_size=32",
    "accum.micro_batch_size=2", "optim.schedule.warmup=2", "train.steps=4",
    "device=cpu", "limits.margin=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(8000)))
    return [f"data.path={folder}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]


def configured(*overrides: str) -> Config:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        plain: Any = OmegaConf.to_container(
            compose("config", list(overrides)), resolve=True, enum_to_str=True
        )
    check(plain)
    return typed(plain)


@pytest.fixture(scope="module")
def task(text: list[str]) -> Task:
    return build_task(configured(*SMALL, *text))


@pytest.fixture(scope="module")
def by_hand(text: list[str]) -> Any:
    """A plan of which only memory and cost matter."""
    setup = setup_of(configured(*SMALL, *text), 2)

    def made(
        peak: int,
        flops: int = 0,
        sent: int = 0,
        seconds: float | None = None,
        micro_batches: int = 1,
    ) -> Candidate:
        time = (
            None
            if seconds is None
            else StepTime(compute_s=seconds, exposed_s=0.0, hidden_s=0.0, update_s=0.0)
        )
        return Candidate(
            setup, 1, micro_batches, 1, False, Peak(peak, "the update"), flops, sent, time
        )

    return made


def test_a_plan_that_costs_more_must_take_less_memory(by_hand: Any) -> None:
    """100 bytes in 1 s; 80 in 2 s; 75 in 3 s saves less than a tenth of 80; 40 in 4 s; 50 in 5 s is
    beaten."""
    plans = [
        by_hand(memory, seconds=seconds)
        for memory, seconds in ((50, 5), (40, 4), (75, 3), (80, 2), (100, 1))
    ]
    assert [one.peak.total for one in pareto_front(plans)] == [100, 80, 40]


def test_without_speeds_work_counts_before_messages_before_micro_batches(by_hand: Any) -> None:
    less_work = by_hand(100, flops=10, sent=500, micro_batches=9)
    less_sent = by_hand(100, flops=11, sent=100, micro_batches=9)
    fewer_micro_batches = by_hand(100, flops=10, sent=500, micro_batches=2)
    assert choose([less_work, less_sent, fewer_micro_batches], 100)[0] == fewer_micro_batches
    # 1 % more sent is padding, and does not outweigh the micro-batches.
    assert (
        choose(
            [by_hand(100, 10, 1000, micro_batches=9), by_hand(100, 10, 1010, micro_batches=2)], 100
        )[0].gradient_accumulation_steps
        == 2
    )


def test_the_fastest_that_fits(by_hand: Any) -> None:
    fast, slow, slower = by_hand(100, seconds=1), by_hand(60, seconds=2), by_hand(50, seconds=3)
    plans = [slower, fast, slow]
    assert choose(plans, 100) == (fast, "the fastest of all plans, and it fits (100 B of 100 B)")
    best, why = choose(plans, 99)
    assert best == slow
    assert why.startswith("the fastest of all plans that fit (60 B of 99 B); ")
    assert why.endswith(" would take 100 B")
    least, why = choose(plans, 49)
    assert least == slower
    assert (
        why == "no plan is predicted to fit 49 B: this one takes the least, 50 B during the update"
    )


def test_what_is_given_is_kept(task: Task, text: list[str]) -> None:
    small = (*SMALL, *text, "model.num_layers=1")
    footprint = Footprint(configured(*small), task)  # of one model, whatever is chosen

    def ways(*overrides: str, ranks: int = 4) -> set[tuple[str, str, int]]:
        found = Candidates(configured(*small, *overrides), task, ranks, None, footprint).open()
        return {(one.setup.strategy, one.setup.sync, one.micro_batch_size) for one in found}

    hsdp = {
        ("hsdp", policy, 2) for policy in ("boundary", "gather_once", "reduce_scatter", "every")
    }
    fsdp = {("fsdp", policy, 2) for policy in ("boundary", "gather_once", "every")}
    assert ways() == {("ddp", "boundary", 2)} | fsdp | hsdp
    assert ways(ranks=1) == ways("parallel=single", ranks=1) == {("single", "boundary", 2)}
    assert ways("parallel=fsdp", ranks=1) == fsdp  # one rank may be spread as if it were several
    assert ways("parallel=ddp", ranks=1) == {("ddp", "boundary", 2)}
    assert ways("parallel=ddp") == {("ddp", "boundary", 2)}
    assert ways("parallel=fsdp", "accum.sync=gather_once") == {("fsdp", "gather_once", 2)}
    assert ways("parallel=ddp", "accum.sync=every") == {("ddp", "every", 2)}
    assert ways("parallel=ddp", "accum.micro_batch_size=auto") == {
        ("ddp", "boundary", size) for size in (1, 2, 4, 8)
    }
    assert ways("parallel=ddp", "accum.micro_batch_size=auto", "accum.effective_batch_size=24") == {
        ("ddp", "boundary", size) for size in (1, 2, 4, 6)
    }


def test_auto_is_what_the_memory_allows(task: Task, text: list[str]) -> None:
    config = configured(*SMALL, *text)
    footprint = Footprint(config, task)

    def predicted(strategy: StrategyName, sync: Sync) -> int:
        parallel, accum = replace(config.parallel, name=strategy), replace(config.accum, sync=sync)
        return footprint.peak(
            setup_of(replace(config, parallel=parallel, accum=accum), 2), 2, 8
        ).total

    def chosen(usable: int | None) -> tuple[StrategyName, Sync, str]:
        found, told = resolved(config, task, 2, usable, None)
        return found.parallel.name, found.accum.sync, " ".join(told)

    ddp, keep, boundary, every = (
        predicted(*way)
        for way in (
            (StrategyName.ddp, Sync.boundary), (StrategyName.fsdp, Sync.gather_once),
            (StrategyName.fsdp, Sync.boundary),
            (StrategyName.fsdp, Sync.every),
        )
    )  # fmt: skip
    assert ddp > keep > boundary > every
    assert chosen(None) == (StrategyName.auto, Sync.auto, "")
    assert chosen(ddp)[:2] == (StrategyName.ddp, Sync.boundary)
    assert chosen(ddp - 1)[:2] == (StrategyName.fsdp, Sync.gather_once)
    assert chosen(keep - 1)[:2] == (StrategyName.fsdp, Sync.boundary)
    assert chosen(boundary - 1)[:2] == (StrategyName.fsdp, Sync.every)
    told = chosen(keep)[2]
    assert told.startswith(
        "parallel=auto: fsdp, accum.sync=auto: gather_once: the fewest FLOPs, then the fewest "
        "bytes sent, of all plans"
    )
    assert "ddp boundary" in told
    assert "no plan is predicted to fit" in chosen(every // 2)[2]


def test_what_cannot_be_predicted_is_told_and_runs_as_without_a_limit(
    task: Task, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(*_: Any) -> None:
        raise NotImplementedError("depends on data\nand more")

    monkeypatch.setattr(Footprint, "peak", untraceable)
    config = configured(*SMALL, *text, "parallel=fsdp", "limits.memory=1GiB")
    alone = World(0, 1, torch.device("cpu"), None)
    found, told = resolve_auto(config, task, alone)
    assert found == config
    assert told == [
        "auto ignores the memory limit, because the memory of this model cannot be predicted "
        "(NotImplementedError: depends on data)"
    ]

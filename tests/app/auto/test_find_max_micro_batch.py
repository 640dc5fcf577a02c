"""`accum.micro_batch_size=auto`: agreed on by all ranks, as large as the memory really allows, and
nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from worlds import World

from distaccum.app.assembly import batch_arithmetic, make_accumulator
from distaccum.app.auto.dry_run import dry_run
from distaccum.app.auto.finder import Found, find_max_micro_batch, largest
from distaccum.app.auto.resolve import resolve_auto
from distaccum.app.build import make_plan
from distaccum.app.commands.check import check
from distaccum.app.config import Config, config_dir, typed
from distaccum.app.task import build_task
from distaccum.data.loader import Loader
from distaccum.errors import ConfigError
from distaccum.parallel.world import World as Ranks
from distaccum.planner.meter import Meter

CPU = torch.device("cpu")
# 24 samples a window: 24, 12 or 6 for each rank of 1, 2 and 4. Samples differ in length, so that
# the longest matter.
TINY = [
    "data=path", "data.seq_len=32", "data.layout=ragged", "data.validation_fraction=0.2",
    "model.num_layers=1", "model.width=32", "model.num_heads=2", "model.dropout=0.1",
    "accum.effective_batch_size=24", "accum.micro_batch_size=auto",
    "limits.memory=1GiB", "limits.margin=0", "optim.schedule.warmup=2", "train.steps=4",
    "loader.workers=0", "device=cpu", "train.validation_samples=4", "precision=fp64",
]  # fmt: skip
SPREAD = [
    (1, ["parallel=single"]),
    (2, ["parallel=fsdp", "accum.sync=gather_once"]),
    (4, ["parallel=ddp"]),
    pytest.param(2, ["parallel=ddp"], marks=pytest.mark.nightly),
    pytest.param(2, ["parallel=fsdp"], marks=pytest.mark.nightly),
    pytest.param(4, ["parallel=hsdp"], marks=pytest.mark.nightly),
]
# by ranks, two sizes that micro-batches of 24 samples can have
NEIGHBOURS = {1: (8, 12), 2: (6, 8), 4: (3, 4)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Documents of 10 to 60 bytes."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(80):
        (folder / f"{number:02}.txt").write_text(
            "".join(chr(97 + (i * i + number) % 26) for i in range(10 + number))
        )
    return [f"data.path={folder}", f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]


def configured(*overrides: str) -> Config:
    """What the command line makes of them."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        plain: Any = OmegaConf.to_container(
            compose("config", [*TINY, *overrides]), resolve=True, enum_to_str=True
        )
    check(plain)
    return typed(plain)


def limited(config: Config, memory: int | str | None) -> Config:
    """The same with another limit."""
    return replace(config, limits=replace(config.limits, memory=memory))


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    """The same with a micro-batch size that is given."""
    return replace(config, accum=replace(config.accum, micro_batch_size=micro_batch))


def quiet() -> Ranks:
    """This rank; our models return no views of what FSDP2 wraps."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return Ranks.of(CPU)


def peaks(config: Config, sizes: list[int]) -> list[int]:
    """On each rank: what is rehearsed."""
    world, task = quiet(), build_task(config)
    micro_batches = [-(-24 // (size * world.size)) for size in sizes]
    return [
        dry_run(config, task, world, size, number, None).peak_bytes
        for size, number in zip(sizes, micro_batches, strict=True)
    ]


def found(config: Config, memory: list[int]) -> Found:
    """On each rank, with a limit of its own."""
    world = quiet()
    config = limited(config, memory[world.rank])
    return find_max_micro_batch(config, build_task(config), world)


def trained(config: Config) -> tuple[int, Tensor, Tensor]:
    """On each rank, two windows on the real group: the peak, and the parameters [n] before and
    afterwards.

    The peak is the least of three trainings: FSDP2's messages are copied by gloo, and freed on
        another thread, at times
    late.
    """
    world, task = quiet(), build_task(config)
    arithmetic = batch_arithmetic(config, task, world.size)
    plan = make_plan(config, task, arithmetic)
    assert arithmetic.effective_batch_size == plan.effective_batch_size == 24
    peaks = []
    for _ in range(3):
        with Meter(world.device) as meter:
            accumulator = make_accumulator(config, task, world)
            model = accumulator.strategy.evaluation_model
            for _, micro_batches in Loader(task.train, plan, world.rank, world.size).windows(
                0, 0, 2
            ):
                accumulator.step(micro_batches)
            peaks.append(meter.peak_bytes)
        after = flat(model)
        del accumulator, model
    return min(peaks), flat(make_accumulator(config, task, world).strategy.evaluation_model), after


def flat(model: nn.Module) -> Tensor:
    """All parameters in one, whole."""
    tensors = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def said(config: Config, memory: list[int]) -> str:
    """On each rank: the letter."""
    try:
        return f"found {found(config, memory)}"
    except ConfigError as error:
        return str(error)


def one_rank_fails(config: Config) -> str:
    """On each rank: rank 1 cannot read its data, which the others do not see."""
    from distaccum.app.auto import finder

    world = quiet()
    dry_run, failing = finder.dry_run, world.rank == 1

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a sample of this rank")

    finder.dry_run = broken if failing else dry_run
    try:
        find_max_micro_batch(config, build_task(config), world)
    except (RuntimeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        finder.dry_run = dry_run
    return "nothing"


def left_behind(config: Config) -> list[tuple[str, Any, Any]]:
    """On each rank: what a rehearsal must leave alone, before and after one that fits and one that
    does not."""

    def state() -> dict[str, Any]:
        group = dist.distributed_c10d
        return {
            "random": torch.get_rng_state().tolist(),
            "group": id(dist.group.WORLD),
            "groups": len(group._world.pg_map),
            "numbers": group._world.group_count,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        }

    world, task = quiet(), build_task(config)
    torch.manual_seed(7)
    before = state()
    assert dry_run(config, task, world, 2, 3, None).fits
    assert not dry_run(config, task, world, 2, 3, 1_000_000).fits
    after = state()
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 40])
def test_the_search_finds_every_threshold_with_few_trials(most: int) -> None:
    for threshold in range(most + 3):
        tried: list[int] = []

        def fits(number: int, threshold: int = threshold, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number <= threshold

        expected = max(
            (number for number in range(1, most + 1) if number <= threshold), default=None
        )
        assert largest(fits, most) == expected
        assert len(set(tried)) == len(tried)  # none twice
        assert set(tried) <= set(range(1, most + 1))
        # Doubled up to the first power of two above what is found, then halved as often.
        assert len(tried) <= 2 * ((expected or 0) + 1).bit_length()


@pytest.mark.parametrize(("ranks", "spread"), SPREAD)
def test_one_rank_short_of_memory_decides_for_all(
    worlds: Callable[[int], World], ranks: int, spread: list[str], text: list[str]
) -> None:
    """The last rank has room for a window of micro-batches of one size and not of the next one; the
    others have plenty.

    Updates in float64, with SGD and without dropout: other micro-batches round otherwise, 1e-16 for
        each of some
    thousand additions whose errors do not add up.
    """
    fitting, beyond = NEIGHBOURS[ranks]
    world = worlds(ranks)
    config = configured(*text, *spread, "limits.margin=0.05", "optim=sgd", "model.dropout=0")
    *_, (enough, more) = world.run(peaks, config, [fitting, beyond])
    memory = int(enough * 1.005 / 0.95)
    assert enough < memory * 0.95 < more, "the model is too small to tell two sizes apart"
    told = world.run(found, config, [2**30] * (ranks - 1) + [memory])
    assert {each.micro_batch_size for each in told} == {fitting}
    assert len({each.text for each in told}) == 1  # the same words on all ranks
    assert f"{fitting} samples fit" in told[0].text
    assert f"{beyond} did not" in told[0].text
    # It is true of the training itself, on the real group, and the update is that of the
    # micro-batches of 2 as planned.
    on_found, on_next, planned = (
        world.run(trained, with_micro_batch(config, size))
        for size in (told[0].micro_batch_size, beyond, 2)
    )
    assert on_found[-1][0] <= memory
    assert on_next[-1][0] > memory * 0.95
    for (_, start, expected), (_, _, got) in zip(planned, on_found, strict=True):
        assert float((expected - start).norm()) > 0
        assert float((got - expected).norm() / (expected - start).norm()) < 1e-12


def test_all_have_enough(two_ranks: World, text: list[str]) -> None:
    """Then no rank is idle: a larger micro-batch would leave one without work."""
    told = two_ranks.run(found, configured(*text, "parallel=ddp"), [2**30] * 2)
    assert [each.micro_batch_size for each in told] == [12, 12]
    assert "a larger size would leave a rank without work" in told[0].text


@pytest.mark.parametrize("overrides", [
    ["parallel=ddp", "precision=bf16-pure"],
    ["parallel=ddp", "accum.overlap_micro_batches=2", "model.num_layers=2"],
    ["parallel=ddp", "accum.on_oom=shrink"],
    ["parallel=fsdp", "accum.sync=every", "precision=bf16"],
    ["parallel=fsdp", "accum.sync=gather_once", "accum.overlap_micro_batches=4",
    "model.num_layers=2"], ["parallel=fsdp", "nn.checkpoint=true"],
    ["parallel=ddp", "data.layout=packed", "precision=fp16"],
    ["parallel=hsdp", "accum.sync=reduce_scatter"],
])  # fmt: skip
def test_what_is_rehearsed_is_what_is_trained(
    two_ranks: World, text: list[str], overrides: list[str]
) -> None:
    """To a percent: the longest samples are rehearsed, and windows of a training are of others
    too."""
    config = configured(*text, *overrides)
    dry_runs = two_ranks.run(peaks, config, [4])
    real = two_ranks.run(trained, with_micro_batch(config, 4))
    for (expected,), (measured, _, _) in zip(dry_runs, real, strict=True):
        assert expected * 0.99 <= measured <= expected * 1.01, (expected, measured)


@pytest.mark.parametrize("batchnorm", ["pooled", "sync"])
def test_images_with_batchnorm(two_ranks: World, batchnorm: str) -> None:
    images = ["model=resnet", "data=digits", "model.widths=[4,8]", "model.blocks_per_stage=1"]
    whole = [name for name in TINY if not name.startswith(("data", "model"))]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        made = compose("config", [*whole, *images, "parallel=ddp", f"nn.batchnorm={batchnorm}"])
        config = typed(OmegaConf.to_container(made, resolve=True, enum_to_str=True))  # type: ignore[arg-type]
    dry_runs = two_ranks.run(peaks, config, [4])
    real = two_ranks.run(trained, with_micro_batch(config, 4))
    for (expected,), (measured, _, _) in zip(dry_runs, real, strict=True):
        assert expected * 0.99 <= measured <= expected * 1.01, (expected, measured)


def test_not_even_one_sample_fits(two_ranks: World, text: list[str]) -> None:
    told = two_ranks.run(
        said, configured(*text, "parallel=ddp", "limits.margin=0.1"), [2**30, 1_000_000]
    )
    assert told[0] == told[1].replace("limits.memory=1000000", "limits.memory=1073741824")
    for words in (
        "not even 1 sample fits",
        "on rank 1:",
        "878.9 KiB",
        "nn.checkpoint=true",
        "parallel=fsdp",
    ):
        assert words in told[0]
    advised = two_ranks.run(
        said, configured(*text, "parallel=fsdp", "optim=sgd", "nn.checkpoint=true"), [100_000] * 2
    )
    assert not any(words in advised[0] for words in ("parallel=fsdp", "optim=sgd", "nn.checkpoint"))
    assert "precision=fp32" in advised[0]


def test_an_error_of_one_rank_ends_all(two_ranks: World, text: list[str]) -> None:
    told = two_ranks.run(one_rank_fails, configured(*text, "parallel=ddp"), timeout_s=30.0)
    assert told[1] == "ZeroDivisionError: a sample of this rank"
    assert "failed on rank 1: ZeroDivisionError: a sample of this rank" in told[0]


def test_only_sizes_that_divide_where_ragged_is_refused(two_ranks: World, text: list[str]) -> None:
    config = configured(*text, "parallel=ddp", "accum.ragged=refuse")
    # of 1, 2, 3, 4, 6 and 12, which divide 12, there is room for 4
    *_, (enough,) = two_ranks.run(peaks, config, [5])
    told = two_ranks.run(found, config, [2**30, enough])
    assert told[0].micro_batch_size == told[1].micro_batch_size == 4
    assert set(told[0].trials) <= {1, 2, 3, 4, 6, 12}
    assert "6 did not" in told[0].text


def test_a_schedule_keeps_all_ranks_busy_in_its_smallest_batch(
    two_ranks: World, text: list[str]
) -> None:
    schedule = (
        "accum.schedule=[{from: 0, effective_batch_size: 6}, {from: 2, effective_batch_size: 24}]"
    )
    config = configured(*text, "parallel=ddp", "accum.effective_batch_size=null", schedule)
    assert {each.micro_batch_size for each in two_ranks.run(found, config, [2**30] * 2)} == {3}
    ramp = replace(config, accum=replace(config.accum, ramp=type(config.accum.ramp)("linear")))
    assert "accum.ramp=linear" in two_ranks.run(said, ramp, [2**30] * 2)[0]


def test_nothing_is_left_behind(two_ranks: World, text: list[str]) -> None:
    for spread in ("ddp", "fsdp", "hsdp"):
        assert two_ranks.run(left_behind, configured(*text, f"parallel={spread}")) == [[], []]


ALONE = Ranks(0, 1, CPU, None)


@pytest.mark.parametrize(("overrides", "words"), [
    (["accum.effective_batch_size=null"], "no effective batch"),
    (["accum.gradient_accumulation_steps=2"], "leave accum.gradient_accumulation_steps null"),
    (
        ["accum.effective_batch_size=null", "accum.gradient_accumulation_steps=2"],
        "accum.gradient_accumulation_steps=2 and no effective batch",
    ),
    (["limits.memory=null"], "Set limits.memory, such as limits.memory=2GiB"),
    (["accum.effective_batch_size=0"], "must be at least 1"),
])  # fmt: skip
def test_letters(text: list[str], overrides: list[str], words: str) -> None:
    config = configured(*text, *overrides)
    with pytest.raises(ConfigError, match=words):
        find_max_micro_batch(config, build_task(config), ALONE)


def test_a_number_is_left_alone(text: list[str]) -> None:
    config = configured(*text, "accum.micro_batch_size=3")
    assert resolve_auto(config, build_task(config), ALONE) == (config, [])


def test_the_longest_samples(text: list[str]) -> None:
    train = build_task(configured(*text)).train
    lengths = [train.num_targets([sample]) for sample in range(len(train))]
    assert [train.num_targets([sample]) for sample in train.longest_samples(7)] == sorted(
        lengths, reverse=True
    )[:7]
    assert sorted(train.longest_samples(len(train))) == list(range(len(train)))


def short_at_every_limit(config: Config) -> list[bool]:
    """On each rank: wherever memory runs out, also while samples are read and before FSDP2 has
    begun."""
    world, task = quiet(), build_task(config)
    enough = dry_run(config, task, world, 4, 3, None).peak_bytes
    fits = [
        dry_run(config, task, world, 4, 3, enough * tenths // 10).fits
        for tenths in (0, 2, 4, 8, 9, 11)
    ]
    with mock.patch.object(
        type(task.train), "batch", side_effect=torch.OutOfMemoryError("while samples are read")
    ):
        return [*fits, dry_run(config, task, world, 4, 3, None).fits]


def test_memory_may_run_out_anywhere(two_ranks: World) -> None:
    images = [
        "model=resnet",
        "data=digits",
        "model.widths=[4,8]",
        "model.blocks_per_stage=1",
        "parallel=fsdp",
    ]
    whole = [name for name in TINY if not name.startswith(("data", "model"))]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        made = compose("config", [*whole, *images])
        config = typed(OmegaConf.to_container(made, resolve=True, enum_to_str=True))  # type: ignore[arg-type]
    for told in two_ranks.run(short_at_every_limit, config):
        assert told == [False] * 5 + [True, False]

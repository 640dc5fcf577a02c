"""Windows over anybody's loader: nothing is lost, seen twice or noticed early, on one process and
on two ranks.

Micro-batches are numbers x: y = w * x in float64, w0 = 0, SGD with lr 1 and a loss that is the sum
of outputs, so that a window's update is minus the mean of its x over all ranks.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from worlds import World

import distaccum as da


def column(x: float) -> Tensor:
    return torch.tensor([[x]], dtype=torch.float64)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def accumulator(**options: Any) -> da.Accumulator:
    model: nn.Module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    objective = da.Objective(lambda model, x: model(x).sum(), len)
    return da.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), objective, **options)


class Loop:
    """Steps windows, and keeps what this rank had in each, and the mean over all ranks."""

    def __init__(self, **options: Any) -> None:
        self.accumulator = accumulator(**options)
        (self.weight,) = self.accumulator.strategy.model.parameters()
        self.seen: list[list[int]] = []
        self.means: list[float] = []

    def step(self, window: da.MicroBatches) -> da.StepRecord:
        before = float(self.weight.detach())
        record = self.accumulator.step(window)
        self.seen.append([int(x) for x in window])
        self.means.append(round(before - float(self.weight.detach()), 9))
        return record

    def run(self, windows: Iterable[da.MicroBatches], at_most: int = 1000) -> Loop:
        for count, window in enumerate(windows, start=1):
            self.step(window)
            if count == at_most:
                break
        return self


class Reiterable:
    """A loader of a kind that nobody knows, without a length."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.numbers = list(numbers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([column(x) for x in self.numbers])


class WithState(Reiterable):
    """Knows how many micro-batches it has given in this epoch, as torchdata's
    StatefulDataLoader."""

    position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self.numbers):
            self.position += 1
            yield column(self.numbers[self.position - 1])
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def in_workers(numbers: Iterable[int]) -> DataLoader[Any]:
    context = None
    if dist.is_initialized():
        # Not forked from the rank itself, which has gloo's threads: in CPython before 3.11.10 the
        # child may wait for ever for a lock that one of them held (python/cpython#112275).
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.utils.data"])
        # A rank of the tests is a daemon, which may have no children.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return DataLoader(
        [column(x)[0] for x in numbers],
        batch_size=1,
        num_workers=1,
        multiprocessing_context=context,
    )


def alone(numbers: Iterable[int]) -> DataLoader[Any]:
    return DataLoader([column(x)[0] for x in numbers], batch_size=1)


KINDS: dict[str, Callable[[Iterable[int]], Iterable[Any]]] = {
    "list": lambda numbers: [column(x) for x in numbers],
    "generator": lambda numbers: (column(x) for x in numbers),
    "reiterable": Reiterable,
    "with state": WithState,
    "DataLoader": alone,
    "DataLoader with workers": in_workers,
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["one process", "two ranks"])
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Calls a function on one process, or on two ranks, and returns the answer of each rank."""
    if request.param == "two ranks":
        return request.getfixturevalue("two_ranks").run
    return lambda function, *args: [function(*args)]


# Rank functions stand beside the test that uses them.


def break_and_go_on() -> list[list[list[int]]]:
    """Two windows, a break, and the rest: in a new loop over the same windows, and over new
    ones."""
    found = []
    for same in (True, False):
        stream = iter([column(x) for x in range(12)])
        windows = da.windows(stream, gradient_accumulation_steps=3)
        loop = Loop().run(windows, at_most=2)
        loop.run(windows if same else da.windows(stream, gradient_accumulation_steps=2))
        found.append(loop.seen)
    return found


def test_break_loses_nothing(run: Callable[..., list[Any]]) -> None:
    same = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    other = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11]]
    for found in run(break_and_go_on):
        assert [[micro_batches for micro_batches in seen if micro_batches] for seen in found] == [
            same,
            other,
        ]


def positions() -> list[int]:
    loader, loop, found = WithState(range(7)), Loop(), []
    for window in da.windows(loader, gradient_accumulation_steps=3):
        loop.step(window)
        found.append(loader.state_dict()["position"])
    return found


def test_a_loader_tells_the_position_of_the_boundary(run: Callable[..., list[Any]]) -> None:
    for found in run(positions):
        # the last window was short, so that the loader was asked to its end
        assert found == [3, 6, 0]


def shared_generator(by_hand: bool) -> list[float]:
    """Training data and, after each window, evaluation data are drawn from one generator, as in
    nanoGPT."""
    generator = torch.Generator().manual_seed(3 + rank())

    def draw() -> Tensor:
        return torch.randn(2, 1, generator=generator, dtype=torch.float64)

    found, used = [], 0.0
    if by_hand:
        for _ in range(4):
            total = sum(float(draw().sum()) for _ in range(3))
            if dist.is_initialized():
                both = torch.tensor([total], dtype=torch.float64)
                dist.all_reduce(both)
                total = float(both)
            used -= total / (6.0 * (dist.get_world_size() if dist.is_initialized() else 1))
            found += [used, float(draw().sum())]
        return found
    loop = Loop()
    for window in da.windows((draw() for _ in range(12)), gradient_accumulation_steps=3):
        loop.accumulator.step(window)
        found += [float(loop.weight.detach()), float(draw().sum())]
    return found


def test_data_and_evaluation_from_one_generator(run: Callable[..., list[Any]]) -> None:
    for found, expected in zip(
        run(shared_generator, False), run(shared_generator, True), strict=True
    ):
        # sums of numbers of order 1, in another order
        assert found == pytest.approx(expected, rel=1e-12)
        assert found[1::2] == expected[1::2]  # the evaluation's to the bit


def side_effects() -> list[int]:
    progress = []

    def stream() -> Iterator[Tensor]:
        for x in range(6):
            progress.append(x)
            yield column(x)

    loop, found = Loop(), []
    for window in da.windows(stream(), gradient_accumulation_steps=2):
        loop.step(window)
        found.append(progress[-1])
    return found


def test_side_effects_of_a_generator_come_in_their_turn(run: Callable[..., list[Any]]) -> None:
    for found in run(side_effects):
        assert found == [1, 3, 5]


def num_micro_batches_changes(kind: str) -> tuple[list[list[int]], list[float]]:
    """Rank 0 has 0..2, rank 1 (or the only one) 0..9: windows of 2, 3, then of 1 from the third
    on."""
    last = 3 if dist.is_initialized() and rank() == 0 else 10
    windows, loop = da.windows(KINDS[kind](range(last)), gradient_accumulation_steps=2), Loop()
    for window in windows:
        loop.step(window)
        windows.gradient_accumulation_steps = 3 if len(loop.seen) == 1 else 1
    return loop.seen, loop.means


@kinds
def test_num_micro_batches_changes_while_ranks_are_uneven(
    run: Callable[..., list[Any]], kind: str
) -> None:
    long = [[0, 1], [2, 3, 4], [5], [6], [7], [8], [9]]
    *short, (seen, means) = run(num_micro_batches_changes, kind)
    assert seen == long
    assert means[2:] == [5, 6, 7, 8, 9]
    for seen, other in short:
        assert seen == [[0, 1], [2], [], [], [], [], []]
        assert other == means == [0.5, 2.75, 5, 6, 7, 8, 9]


def by_epoch(kind: str, last: str, lengths: tuple[int, int], count: int) -> list[Any]:
    windows = da.windows(KINDS[kind](range(lengths[rank()])), 3, last=last)
    loop = Loop(audit="always")
    found = []
    for _ in range(count):
        loop.seen = []
        found.append(loop.run(windows).seen)
    return [found, loop.means, loop.accumulator.steps]


REREAD = [kind for kind in KINDS if kind != "generator"]


@pytest.mark.parametrize("kind", REREAD)
def test_last_drop_and_carry(run: Callable[..., list[Any]], kind: str) -> None:
    """Eight micro-batches in windows of three, three epochs; the same on all ranks."""
    full = [[0, 1, 2], [3, 4, 5]]
    for found, _, steps in run(by_epoch, kind, "drop", (8, 8), 2):
        assert found == [full, full]
        assert steps == 4
    for found, _, steps in run(by_epoch, kind, "carry", (8, 8), 3):
        assert found == [full, [[6, 7, 0], [1, 2, 3], [4, 5, 6]], [[7, 0, 1], [2, 3, 4], [5, 6, 7]]]
        assert steps == 8
    for found, _, steps in run(by_epoch, kind, "keep", (8, 8), 1):
        assert found == [[*full, [6, 7]]]
        assert steps == 3


@kinds
def test_last_with_uneven_ranks(two_ranks: World, kind: str) -> None:
    drop = two_ranks.run(by_epoch, kind, "drop", (8, 5), 1)
    assert drop == [[[[[0, 1, 2]]], [1.0], 1]] * 2  # rank 1 has no second window
    carry = two_ranks.run(by_epoch, kind, "carry", (8, 4), 2 if kind != "generator" else 1)
    more = kind != "generator"
    assert [found[0] for found in carry] == [
        [[[0, 1, 2], [3, 4, 5]], *([[[6, 7, 0], [1, 2, 3], [4, 5, 6]]] if more else [])],
        [[[0, 1, 2], []], *([[[3, 0, 1], [], []]] if more else [])],
    ]
    # [6, 7, 0, 3, 0, 1], then rank 0's alone
    means = [1.0, 4.0, *([17 / 6, 2.0, 5.0] if more else [])]
    assert carry[0][1] == carry[1][1] == [round(mean, 9) for mean in means]


@kinds
def test_the_first_window_is_dropped_too(two_ranks: World, kind: str) -> None:
    """What is short on one rank is dropped on all before anything was ever agreed: no update is
    made."""
    for _, means, steps in two_ranks.run(by_epoch, kind, "drop", (8, 2), 1):
        assert steps == 0
        assert means == [0.0]


def test_last_of_another_name_is_refused() -> None:
    with pytest.raises(
        da.ConfigError, match=r"last='pad' is unknown. Use one of \['keep', 'drop', 'carry'\]"
    ):
        da.windows([], 1, last="pad")


def save_and_resume(kind: str, last: str, stop: int) -> tuple[list[list[int]], list[float]]:
    """Two epochs over 8 (rank 1: 7) micro-batches in windows of 3; after `stop` windows everything
    is made anew."""
    numbers = range(8 - rank())
    windows, loop = da.windows(KINDS[kind](numbers), 3, last=last), Loop()
    saved: dict[str, Any] | None = None
    for _ in range(2):
        for window in windows:
            loop.step(window)
            if len(loop.seen) == stop:
                saved = {
                    "windows": copy.deepcopy(windows.state_dict()),
                    "epochs": [2, 1][_],
                    "accumulator": loop.accumulator.state_dict(),
                }
                break
        if saved is not None:
            break
    if saved is not None:
        windows = da.windows(KINDS[kind](numbers), 3, last=last)
        windows.load_state_dict(saved["windows"])
        assert windows.state_dict() == saved["windows"]
        before, loop = loop, Loop()
        loop.accumulator.load_state_dict(saved["accumulator"])
        for _ in range(saved["epochs"]):
            loop.run(windows)
        both = [
            *zip(before.seen, before.means, strict=True),
            *zip(loop.seen, loop.means, strict=True),
        ]
        loop.seen, loop.means = [seen for seen, _ in both], [mean for _, mean in both]
    # A resumed epoch with nothing left hands over one empty window, which is skipped.
    kept = [(seen, mean) for seen, mean in zip(loop.seen, loop.means, strict=True) if seen or mean]
    assert loop.accumulator.num_windows == len(kept)
    return [seen for seen, _ in kept], [mean for _, mean in kept]


@pytest.mark.parametrize("last", ["keep", "drop", "carry"])
@kinds
def test_resume_sees_exactly_the_rest(run: Callable[..., list[Any]], kind: str, last: str) -> None:
    whole = run(save_and_resume, kind, last, 0)
    assert len(whole[0][0]) == (2 if last != "keep" else 3) + (
        0 if kind == "generator" else 2 if last == "drop" else 3
    )
    for stop in (1, 2, 3, 4):
        assert run(save_and_resume, kind, last, stop) == whole, stop


def break_before_the_step(kind: str) -> list[list[int]]:
    """The usual `if step == last: break` at the head of the loop: the window at hand was not
    stepped."""
    windows, loop = da.windows(KINDS[kind](range(8)), 3), Loop()
    for window in windows:
        if loop.accumulator.steps == 1:
            break
        loop.step(window)
    state = copy.deepcopy(windows.state_dict())
    windows = da.windows(KINDS[kind](range(8)), 3)
    windows.load_state_dict(state)
    return loop.run(windows).seen


@kinds
def test_a_window_that_was_not_stepped_comes_again_after_resume(
    run: Callable[..., list[Any]], kind: str
) -> None:
    for seen in run(break_before_the_step, kind):
        assert seen == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_resume_over_less_data_is_refused() -> None:
    windows = da.windows(Reiterable(range(8)), 3)
    Loop().run(windows, at_most=2)
    other = da.windows(Reiterable(range(4)), 3)
    other.load_state_dict(windows.state_dict())
    with pytest.raises(da.ConfigError, match="The loader has 4 micro-batches, but 6 had been used"):
        list(other)
    with pytest.raises(
        da.ConfigError, match=r"has no loader state, but this loader \(WithState\) supports"
    ):
        da.windows(WithState(range(8)), 3).load_state_dict(windows.state_dict())


def audited(kind: str, mixed: bool) -> tuple[list[float], list[bool], int]:
    """Rows per window that the ledger counts, over two epochs; with `mixed`, rank 1 has a list."""
    loop = Loop(audit="always")
    windows = da.windows(KINDS["list" if mixed and rank() == 1 else kind](range(1, 6)), 2)
    records = [
        loop.step(window) for _ in range(1 if kind == "generator" else 2) for window in windows
    ]
    control = loop.accumulator.control_traffic().counts["all_reduce"]
    verdicts = [record.verdict for record in records if record.verdict is not None]
    rows = [v.counted.counts["all_reduce"] == v.forecast.counts["all_reduce"] for v in verdicts]
    return loop.means, rows, control


@pytest.mark.parametrize("mixed", [False, True])
@kinds
def test_the_ledger_agrees(two_ranks: World, kind: str, mixed: bool) -> None:
    epochs = 1 if kind == "generator" else 2
    for means, agrees, control in two_ranks.run(audited, kind, mixed):
        assert means == [1.5, 3.5, 5.0] * epochs
        assert agrees == [True] * 3 * epochs
        assert control == 1


def collectives(kind: str) -> list[int]:
    """Small collectives before each step and in it, over two epochs."""
    loop, found = Loop(), []
    consensus = loop.accumulator._consensus
    windows, asked = da.windows(KINDS[kind](range(1, 6)), 2), 0
    for _ in range(2):
        for window in windows:
            found.append(consensus.rows_sent - asked)
            asked = consensus.rows_sent
            loop.step(window)
            found.append(consensus.rows_sent - asked)
            asked = consensus.rows_sent
    return found


def test_one_small_collective_announces_a_window(two_ranks: World) -> None:
    assert two_ranks.run(collectives, "list") == [[0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1]] * 2
    assert two_ranks.run(collectives, "reiterable") == [[0, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]] * 2


def uneven_and_mixed(kind: str, other: str) -> list[float]:
    numbers = range(1, 4) if rank() == 0 else range(1, 8)
    return (
        Loop(audit="always")
        .run(da.windows(KINDS[kind if rank() == 0 else other](numbers), 2))
        .means
    )


@pytest.mark.parametrize(
    ("kind", "other"), [("list", "generator"), ("reiterable", "list"), ("generator", "generator")]
)
def test_ranks_with_other_kinds_of_loaders_end_together(
    two_ranks: World, kind: str, other: str
) -> None:
    assert two_ranks.run(uneven_and_mixed, kind, other) == [[1.5, round(10 / 3, 9), 5.5, 7.0]] * 2


def skipped_by_weight(kind: str, other: str) -> list[float]:
    """No sample of the second window counts; what one rank knows of the third the other may not
    know."""
    loop = Loop()
    loop.accumulator.objective = objective = da.Objective(
        lambda m, x: m(x).sum(), lambda x: float(x.sum()) < 10
    )
    loop.accumulator._consensus._objective = objective
    numbers = [1, 2, 11, 12, 5, 6]
    return loop.run(da.windows(KINDS[kind if rank() == 0 else other](numbers), 2)).means


@pytest.mark.parametrize(
    ("kind", "other"), [("list", "list"), ("generator", "generator"), ("list", "reiterable")]
)
def test_a_window_without_weight_between_others(two_ranks: World, kind: str, other: str) -> None:
    assert two_ranks.run(skipped_by_weight, kind, other) == [[1.5, 0.0, 5.5]] * 2


def two_accumulators(kind: str, alternate: bool) -> list[list[float]]:
    """Both step each window, or take turns; rank 0 has less."""
    windows = da.windows(KINDS[kind](range(1, 6 if rank() == 0 else 8)), 2)
    loops = [Loop(audit="always"), Loop(audit="always")]
    for index, window in enumerate(windows):
        for loop in [loops[index % 2]] if alternate else loops:
            loop.step(window)
    return [loop.means for loop in loops]


@kinds
def test_two_accumulators_and_one_source(two_ranks: World, kind: str) -> None:
    means = [1.5, 3.5, round(16 / 3, 9), 7.0]
    assert two_ranks.run(two_accumulators, kind, False) == [[means, means]] * 2
    assert two_ranks.run(two_accumulators, kind, True) == [[means[::2], means[1::2]]] * 2


def two_sources(kind: str) -> list[float]:
    """One accumulator, and windows of two sources in turn."""
    loop = Loop(audit="always")
    sources = [da.windows(KINDS[kind](numbers), 2) for numbers in (range(1, 5), range(11, 15))]
    for pair in zip(*sources, strict=True):
        for window in pair:
            loop.step(window)
    return loop.means


@kinds
def test_windows_of_two_sources_in_turn(two_ranks: World, kind: str) -> None:
    assert two_ranks.run(two_sources, kind) == [[1.5, 11.5, 3.5, 13.5]] * 2


def passed_over(kind: str) -> list[list[int]]:
    """Every second window is not stepped on any rank; rank 0 has less, and an inner loop looks at
    the data."""
    numbers = range(1, 4 if rank() == 0 else 10)
    loop, windows = Loop(), da.windows(KINDS[kind](numbers), 2)
    for index, window in enumerate(windows):
        if index % 2 == 0:
            loop.step(window)
    return loop.seen


@kinds
def test_windows_that_are_not_stepped_end_together(two_ranks: World, kind: str) -> None:
    assert two_ranks.run(passed_over, kind) == [[[1, 2], [], []], [[1, 2], [5, 6], [9]]]


def looks_inside(kind: str) -> list[list[int]]:
    """Within the loop a second loop over the same windows looks at the first one."""
    windows, seen = da.windows(KINDS[kind](range(4)), 1), []
    for window in windows:
        seen.append([int(x) for x in window])
        for other in windows:
            assert [int(x) for x in other] == [0]
            break
    return seen


@pytest.mark.parametrize("kind", [kind for kind in REREAD if kind != "with state"])
def test_a_loop_inside_of_a_loop(kind: str) -> None:
    assert looks_inside(kind) == [[0], [1], [2], [3]]


def test_a_list_is_taken_as_it_is_when_the_loop_begins() -> None:
    numbers = [column(x) for x in range(4)]
    windows, loop = da.windows(numbers, 2), Loop()
    for window in windows:
        loop.step(window)
        numbers += [column(9)]
    assert loop.seen == [[0, 1], [2, 3]]
    assert loop.run(windows).seen[2:] == [[0, 1], [2, 3], [9, 9]]


def nothing_anywhere(kind: str) -> tuple[list[Any], int, int]:
    loop, windows = Loop(), da.windows(KINDS[kind]([]), 2)
    for _ in range(3):
        loop.run(windows)
    after = loop.step(da.windows([column(3.0)], 1).__iter__().__next__())
    return loop.means, after.step, loop.accumulator.num_windows


@kinds
def test_empty_loaders(run: Callable[..., list[Any]], kind: str) -> None:
    """Ranks meet in one window of nothing, which is not counted; one process has no window at
    all."""
    for means, steps, num_windows in run(nothing_anywhere, kind):
        assert means in ([3.0], [0.0, 3.0], [0.0, 0.0, 0.0, 3.0])
        assert (steps, num_windows) == (1, 1)


@pytest.mark.parametrize("num_micro_batches", [0, -1, 2.0, True, "4"])
def test_a_wrong_num_micro_batches_is_refused(num_micro_batches: Any) -> None:
    with pytest.raises(da.ConfigError, match="gradient_accumulation_steps is"):
        da.windows([], num_micro_batches)
    with pytest.raises(da.ConfigError, match="gradient_accumulation_steps is"):
        da.windows.split(torch.ones(4), num_micro_batches)


@pytest.mark.parametrize(
    "loader", [{"x": torch.ones(4, 1)}, UserDict(), torch.ones(4, 1), "abc", None, 3, iter]
)
def test_what_is_no_loader_is_refused(loader: Any) -> None:
    with pytest.raises(
        da.ConfigError, match=f"windows.. got a {type(loader).__name__} as its loader"
    ):
        da.windows(loader, 2)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Batch(UserDict[str, Any]):
    """As transformers' BatchEncoding."""


def test_split_keeps_classes_and_samples() -> None:
    x, y = torch.arange(14).view(7, 2), torch.arange(7)
    names = [f"file {i}" for i in range(7)]
    batch = Batch(
        pair=Pair(x, y),
        more=OrderedDict(z=[x, (y, 3)]),
        names=names,
        scale=0.5,
        text="a",
        nothing=None,
    )
    micro_batches = da.windows.split(batch, 3)
    assert [len(micro_batch["pair"].x) for micro_batch in micro_batches] == [3, 2, 2]
    for micro_batch in micro_batches:
        assert type(micro_batch) is Batch
        assert type(micro_batch["pair"]) is Pair
        assert type(micro_batch["more"]) is OrderedDict
        assert type(micro_batch["more"]["z"]) is list
        assert type(micro_batch["more"]["z"][1]) is tuple
        assert micro_batch["more"]["z"][1][1] == 3
        assert (micro_batch["scale"], micro_batch["text"], micro_batch["nothing"]) == (
            0.5,
            "a",
            None,
        )
        assert micro_batch["names"] == [f"file {int(i)}" for i in micro_batch["pair"].y]
    assert torch.equal(torch.cat([micro_batch["pair"].x for micro_batch in micro_batches]), x)
    assert torch.equal(
        torch.cat([micro_batch["more"]["z"][1][0] for micro_batch in micro_batches]), y
    )
    assert batch["pair"].x is x  # and nothing of the batch has changed


@pytest.mark.parametrize(
    ("samples", "num_micro_batches", "sizes"),
    [
        (8, 4, [2, 2, 2, 2]),
        (5, 8, [1] * 5),
        (1, 4, [1]),
        (0, 4, []),
        (10, 4, [3, 2, 3, 2]),
        (3, 1, [3]),
    ],
)
def test_split_is_even_and_never_empty(
    samples: int, num_micro_batches: int, sizes: list[int]
) -> None:
    micro_batches = da.windows.split(torch.arange(samples), num_micro_batches)
    assert [len(micro_batch) for micro_batch in micro_batches] == sizes
    assert [int(x) for micro_batch in micro_batches for x in micro_batch] == list(range(samples))


def step_of_a_split_batch() -> list[float]:
    """Rank 0 has 5 samples in at most 4 micro-batches, rank 1 has 2 samples."""
    loop, first = Loop(), rank() * 10
    samples = torch.arange(first, first + (2 if rank() else 5), dtype=torch.float64)[:, None]
    loop.accumulator.step(da.windows.split(samples, 4))
    return -float(loop.weight.detach())


def test_a_split_batch_is_one_big_batch(run: Callable[..., list[Any]]) -> None:
    found = run(step_of_a_split_batch)
    mean = (0 + 1 + 2 + 3 + 4) / 5 if len(found) == 1 else (0 + 1 + 2 + 3 + 4 + 10 + 11) / 7
    assert found == [pytest.approx(mean, rel=1e-14)] * len(found)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"x": torch.ones(4, 2), "y": torch.ones(3)},
            r"it is 4 \(tensor\['x'\]\), 3 \(tensor\['y'\]\)",
        ),
        ({"x": torch.ones(4, 2), "n": torch.tensor(1)}, r"the tensor\['n'\] of the batch has none"),
        (["a", "b"], "a list without any tensor"),
        (
            {"x": torch.ones(4, 2), "names": ["a", "b"]},
            r"batch\['names'\] is: a list of 2 entries without tensors",
        ),
        ((torch.ones(4), object()), r"batch\[1\] is a object"),
        (nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(2)]), "batch is a PackedSequence"),
    ],
)
def test_split_refuses_what_it_cannot_cut(batch: Any, message: str) -> None:
    with pytest.raises(da.ConfigError, match=message):
        da.windows.split(batch, 2)


class Held(MutableMapping[str, Any]):
    """A mapping of one's own that keeps its items in an inner dict."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_splitting_a_mapping_of_ones_own_leaves_the_batch_as_it_is() -> None:
    batch = Held(x=torch.arange(8.0), names=list("abcdefgh"), scale=2.0)
    parts = da.windows.split(batch, 4)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [part["names"] for part in parts] == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    assert {type(part) for part in parts} == {Held}
    assert len(batch["x"]) == 8
    assert parts[0]["scale"] == 2.0

"""README and docs: every block of ours runs on two ranks and makes the update of one big batch on
one process.

Blocks are marked `<!-- run: NAME -->`; all begin with what docs/migrating.md names `setup`.
Commands are composed and checked.

The reference is plain torch over all samples of both ranks, with a mean loss, clipping and
optimizers of torch. Tolerances: sums of 4e3 numbers in float64 (eps 1e-16) in another order differ
by 1e-12 at most. Gradients have elements of at most 1 and are off by 1e-14; Adam divides by |g| +
1e-8, so that an update of size lr is off by at most 1e-6 lr. Heads of transformers compute their
loss in float32 (eps 6e-8) whatever the model: random roundings of some 1e4 numbers leave at most
eps x sqrt(1e4) = 6e-6; no Adam there, which would enlarge them. A mean of means is off by 1e-2 and
more.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from worlds import World

import distaccum as da

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "migrating.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
MICRO_BATCH_SIZE, RANKS = 2, 2  # as on the page, and in the world
STATISTICS_TOLERANCE, UPDATE_TOLERANCE, HEAD_TOLERANCE = 1e-12, 1e-6, 1e-5

ADAMW = partial(torch.optim.AdamW, lr=1e-3)

Check = Callable[[dict[str, Any]], None]


def all_blocks(page: Path) -> list[tuple[str | None, str]]:
    """All python blocks of a page; the name of those that are run, None for what users have
    today."""
    found = re.findall(
        r"(?:<!-- run: (\w+) -->\n)?```python\n(.*?)```", page.read_text(), flags=re.DOTALL
    )
    return [(name or None, code) for name, code in found]


def our_blocks() -> dict[str, str]:
    """The blocks that are run, by their names; a name is used once in all pages."""
    named = [(name, code) for page in PAGES for name, code in all_blocks(page) if name is not None]
    assert len(named) == len(dict(named))
    return dict(named)


def relative(found: Tensor | float, expected: Tensor | float) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).norm() / expected.norm())


def flat(model: nn.Module) -> Tensor:
    """All parameters as one vector, gathered."""
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def micro_batches_of(page: dict[str, Any], rank: int) -> list[Any]:
    own = page["lines"][rank::RANKS]
    return [
        page["collate"](own[i : i + MICRO_BATCH_SIZE]) for i in range(0, len(own), MICRO_BATCH_SIZE)
    ]


def big_batches(page: dict[str, Any], num_micro_batches: int) -> list[list[str]]:
    """The lines of each window of one epoch: what both ranks hold of it."""
    size = num_micro_batches * MICRO_BATCH_SIZE
    own = [page["lines"][rank::RANKS] for rank in range(RANKS)]
    return [
        [line for mine in own for line in mine[i : i + size]]
        for i in range(0, max(map(len, own)), size)
    ]


def token_mean(model: nn.Module, batch: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing
    )


def head_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def one_big_batch(
    page: dict[str, Any],
    *,
    num_micro_batches: tuple[int, ...] = (4,),  # in each epoch
    make: str = "make_model",
    mean: Callable[[nn.Module, dict[str, Tensor]], Tensor] = token_mean,
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = ADAMW,
    tolerance: float = UPDATE_TOLERANCE,
    decays: bool = False,
) -> None:
    """Compare what the block has left behind with one process that has all samples."""
    model = page[make]()
    start = flat(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(trained)
    batches = [
        page["collate"](lines) for epoch in num_micro_batches for lines in big_batches(page, epoch)
    ]
    for i, batch in enumerate(batches):
        if decays:
            # linear from 1 to 0.1 in three updates
            optimizer.param_groups[0]["lr"] = 1e-3 * max(0.1, 1 - 0.3 * i)
        optimizer.zero_grad()
        loss = mean(model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    record = page["record"]
    assert (record.step, record.skipped) == (len(batches), None)
    assert relative(record.loss, loss.detach()) <= tolerance
    # clipping is at work, but for the few weights of LoRA
    assert float(norm) > 1.0 or make == "make_lora"
    assert relative(record.grad_norm, norm) <= tolerance
    assert relative(flat(page["model"]) - start, flat(model) - start) <= tolerance


def check_batchnorm(page: dict[str, Any]) -> None:
    """The first layer sees the images themselves, and its running statistics those of all 60 at
    once."""
    images, layer = page["images"], page["cnn"][0]
    assert page["record"].denominator == 60
    assert relative(layer.running_mean, 0.1 * images.mean().reshape(1)) <= STATISTICS_TOLERANCE
    assert (
        relative(layer.running_var, (0.9 + 0.1 * images.var()).reshape(1)) <= STATISTICS_TOLERANCE
    )


def check_precision(page: dict[str, Any]) -> None:
    """The same forwards one by one, their sums in float32, divided once.

    They differ in the order of float32 sums, 1e-5. DDP's share of the scale is 2 as well, which
    moves some gradients of fp16 across its smallest normal number; these differ by its rounding,
    2^-11 = 5e-4, and twice that in a difference.
    """
    for dtype, tolerance in ((torch.bfloat16, 1e-5), (torch.float16, 1e-3)):
        model = page["make_model"]()
        start = flat(model)
        for first in range(0, 12, 4):
            micro_batches = [
                micro_batch
                for rank in range(RANKS)
                for micro_batch in micro_batches_of(page, rank)[first : first + 4]
            ]
            count = sum(
                int((micro_batch["labels"][:, 1:] != -100).sum()) for micro_batch in micro_batches
            )
            gradient = torch.zeros_like(start)
            for micro_batch in micro_batches:
                with torch.autocast("cpu", dtype):
                    logits = model(micro_batch["input_ids"]).logits[:, :-1]
                    labels = micro_batch["labels"][:, 1:].flatten()
                    loss = (
                        F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
                        / count
                    )
                gradients = torch.autograd.grad(loss * 2.0**16, list(model.parameters()))
                gradient += torch.cat([g.flatten() for g in gradients]) / 2.0**16
            with torch.no_grad():
                nn.utils.vector_to_parameters(flat(model) - 0.1 * gradient, model.parameters())
        assert [record.skipped for record in page["records"][dtype]] == [None] * 3
        assert relative(flat(page["models"][dtype]) - start, flat(model) - start) <= tolerance


def check_trainer(page: dict[str, Any]) -> None:
    """The page's short command and the overrides of its arguments say the same, in words that conf/
    knows."""
    carried = page["converted"]
    assert list(carried.not_carried) == ["warmup_steps"]
    written = re.findall(
        r"^torchrun .*-m distaccum train (.*)$",
        PAGE.read_text().replace("\\\n", ""),
        flags=re.MULTILINE,
    )
    assert len(written) == 1
    short = dict(word.split("=") for word in written[0].split())
    full = dict(override.split("=") for override in carried.overrides)
    own = {"model", "model.config", "model.weights", "data", "data.path"}
    assert own <= short.keys()
    assert {
        key: float(value) if value[0].isdigit() else value
        for key, value in short.items()
        if key not in own
    } == {
        key: float(full[key]) if full[key][0].isdigit() else full[key] for key in short.keys() - own
    }
    compose(written[0].split())
    compose(page["command"].split()[6:])


def compose(overrides: list[str]) -> None:
    """Hydra refuses keys that do not exist; the types are checked after it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from distaccum.app.config import config_dir, typed

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed: Any = OmegaConf.to_container(
            hydra_compose("config", overrides=overrides), resolve=False
        )
    typed({key: value for key, value in composed.items() if key != "hydra"})


def check_verify(page: dict[str, Any]) -> None:
    """Proven, and the training that continues is as if nothing had been proven."""
    assert {"gradient", "loss", "update"} <= {line.name for line in page["proof"].lines}
    assert page["proof"].holds
    one_big_batch(page)


def check_resume(page: dict[str, Any]) -> None:
    """Killed at the third step and started again, the loop ends with the bits of the undisturbed
    one."""
    undisturbed, steps = flat(page["model"]), page["accumulator"].steps
    assert steps == 6
    blocks, path = our_blocks(), Path(page["path"])
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        path.unlink()
    torch.distributed.barrier()
    step = da.Accumulator.step

    def killed(self: da.Accumulator, window: Any) -> da.StepRecord:
        if self.steps == 3:
            raise KeyboardInterrupt
        return step(self, window)

    for kills in (True, False):
        again: dict[str, Any] = {"__name__": "again", "path": str(path)}
        with (
            mock.patch.object(da.Accumulator, "step", killed if kills else step),
            suppress(KeyboardInterrupt),
        ):
            for part in (blocks["setup"], BEFORE, blocks["resume"]):
                exec(compile(part, "resume", "exec"), again)
    assert again["accumulator"].steps == 6
    assert torch.equal(flat(again["model"]), undisturbed)


def check_dtypes(page: dict[str, Any]) -> None:
    assert (page["record"].step, page["record"].skipped) == (3, None)


head_against_big_batch = partial(
    one_big_batch,
    mean=head_mean,
    optimizer_of=partial(torch.optim.SGD, lr=0.1),
    tolerance=HEAD_TOLERANCE,
)
CHECKS: dict[str, Check] = {
    "ddp": partial(one_big_batch, decays=True),
    "fsdp": one_big_batch,
    "accelerate": head_against_big_batch,
    "fabric": partial(one_big_batch, mean=partial(token_mean, smoothing=0.1)),
    "lightning": partial(one_big_batch, num_micro_batches=(4, 2)),
    "trainer": check_trainer,
    "lora": partial(head_against_big_batch, make="make_lora"),
    "batchnorm": check_batchnorm,
    "precision": check_precision,
    "verify": check_verify,
    "readme": partial(one_big_batch, num_micro_batches=(8,), decays=True),
    "loop": partial(one_big_batch, num_micro_batches=(4, 4), decays=True),
    "objective": partial(one_big_batch, mean=partial(token_mean, smoothing=0.1)),
    "prove": check_verify,
    "dtypes": check_dtypes,
    "resume": check_resume,
}
BEFORE = (
    "scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3); objective "
    "= da.CausalLM()"
)
IN_FLOAT32 = ("precision", "dtypes")  # autocast leaves float64 alone


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What models are made in: the page says nothing of it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_block(name: str, path: str) -> None:
    """On each rank: the page's beginning, the block in its names, and what it has left behind,
    judged."""
    # What peft, transformers and FSDP2 say of each other; nothing that the page could write
    # otherwise.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    blocks = our_blocks()
    page: dict[str, Any] = {"__name__": "migrating", "print": lambda *words: None, "path": path}
    with default_dtype(torch.float32 if name in IN_FLOAT32 else torch.float64):
        for part in (blocks["setup"], BEFORE, blocks[name]):
            exec(compile(part, name, "exec"), page)
        CHECKS[name](page)


@pytest.mark.parametrize("name", CHECKS)
def test_our_block(two_ranks: World, name: str, tmp_path: Path) -> None:
    two_ranks.run(run_block, name, str(tmp_path / "checkpoint.pt"))


def test_every_block_of_ours_is_run() -> None:
    assert our_blocks().keys() - {"setup"} == CHECKS.keys()
    for page in PAGES:
        for name, code in all_blocks(page):
            # tests/benchmarks has it
            assert name is not None or "import distaccum" not in code or page.name == "why.md"
    for name, code in all_blocks(PAGE):
        assert code.startswith("# distaccum") == (name is not None)


def test_what_users_have_today_is_python() -> None:
    theirs = [code for name, code in all_blocks(PAGE) if name is None]
    assert len(theirs) == 5
    for code in theirs:
        compile(code, PAGE.name, "exec")


def test_every_name_of_ours_exists() -> None:
    import distaccum

    names = {name for page in PAGES for name in re.findall(r"\bda\.(\w+)", page.read_text())}
    assert len(names) > 8
    assert all(hasattr(distaccum, name) for name in names), names


COMMANDS = [
    (page.name, line.partition(" # ")[0].strip())
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"(-m distaccum|^distaccum|train\.sbatch) ", line)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_of_the_pages_is_composed_and_checked(page: str, command: str) -> None:
    """Hydra refuses keys that do not exist; types and contradictions are checked without data and
    ranks."""
    from distaccum.app.commands.check import check_words

    after = re.split(r"-m distaccum|^distaccum|train\.sbatch", command)[1]
    words = [word for word in shlex.split(after) if word != "..."]
    words = (
        words[1:]
        if words and words[0] in ("train", "verify", "plan", "profile", "export")
        else words
    )
    if "export" in after:
        return
    assert all("=" in word or word in ("--multirun", "--cfg", "job") for word in words), words
    check_words(words)
    swept = "--multirun" in words
    overrides = [word for word in words if "=" in word and not word.startswith("hydra/")]
    compose(
        [
            re.sub(r"=(?:choice\(|range\()?([^,\[]+?)(?:,.*)$", r"=\1", word) if swept else word
            for word in overrides
        ]
    )


def test_every_link_of_the_pages_leads_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "claims.md"]
        for target in re.findall(r"\]\(([^)#]+)", page.read_text())
        if not target.startswith("https://") and not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_file_that_the_pages_name_exists() -> None:
    named = {
        f"{page.name}: {path}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "claims.md"]
        for path in re.findall(
            r"\b((?:tests|docs|benchmarks(?!/results)|examples|scripts)/[\w/.-]+\.\w+)",
            page.read_text(),
        )
        if not (ROOT / path).exists()
    }
    assert named == set()

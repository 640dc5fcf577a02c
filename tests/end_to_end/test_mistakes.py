"""Configurations that cannot be: each gets a letter that says what, got, why and what to write
instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MAIN, command_line
from disks import fill, small_disk
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distaccum.app.build import build
from distaccum.app.commands.check import check, check_words
from distaccum.app.config import config_dir, missing, typed
from distaccum.app.names import ELSEWHERE, RENAMED, RENAMED_VALUES
from distaccum.app.preemption import Preemption
from distaccum.errors import ConfigError
from distaccum.launch import Job
from distaccum.parallel.world import World


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text of its own, so that nothing large is read."""
    made = tmp_path_factory.mktemp("text")
    for number in range(12):
        (made / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return made


@pytest.mark.parametrize(
    ("overrides", "letter"),
    [
        (
            ["+accum.micro_size=4"],
            r"There is no key accum\.micro_size\. Did you mean accum\.micro_batch_size\?",
        ),
        (
            ["+accum.micro=4"],
            r"There is no key accum\.micro\. It is now called accum\.micro_batch_size\.",
        ),
        (["+model.layers=4"], r"There is no key model\.layers\. Did you mean model\.num_layers\?"),
        (["+optim.schedule.steps=4"], r"There is no key optim\.schedule\.steps"),
        (
            ["accum.micro_batch_size=four"],
            r"accum\.micro_batch_size is 'four'; give a number of samples, auto",
        ),
        (["accum.micro_batch_size=2.5"], r"accum\.micro_batch"),
        (
            ["accum.ragged=maybe"],
            r"accum\.ragged: Invalid value 'maybe', expected one of \[allow, refuse\]",
        ),
        (["accum.sync=sometimes"], r"accum\.sync: Invalid value 'sometimes'"),
        (["train.steps=null"], r"train\.steps=None and train\.epochs=None: give one of them"),
        (["train.epochs=2"], r"give one of them and set the other to null"),
        (["train.log_every_steps=0"], r"train\.log_every_steps is 0"),
        (["accum.effective_batch_size=8", "accum.effective_batch_tokens=8"], r"are both given"),
        (["model.name=gbt"], r"model\.name is 'gbt'\. Known: gpt"),
        (["data.layout=loose"], r"data\.layout: Invalid value 'loose'"),
        (
            ["accum.overlap_micro_batches=0"],
            (
                r"accum\.overlap_micro_batches is 0; give a number of micro-batches of at least 1,"
                r" or auto"
            ),
        ),
        (["accum.overlap_micro_batches=often"], r"accum\.overlap_micro_batches is 'often'"),
        (["optim.schedule.warmup=soon"], r"optim\.schedule\.warmup is 'soon'; give a whole number"),
        (["optim.schedule.warmup=2.5"], r"optim\.schedule\.warmup is 2\.5; give a whole number"),
        (["optim.schedule.warmup=true"], r"optim\.schedule\.warmup is True; give a whole number"),
        (["accum.overlap_memory_mb=-1"], r"accum\.overlap_memory_mb is -1"),
    ],
)
def test_what_is_seen_before_any_rank_works(overrides: list[str], letter: str) -> None:
    with pytest.raises(ConfigError, match=letter):
        check(composed(*overrides))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "gradient_accumulation_steps=4",
            (
                "Write accum.gradient_accumulation_steps=4; that name is from Accelerate, the "
                "Hugging Face Trainer and DeepSpeed."
            ),
        ),
        (
            "trainer.accumulate_grad_batches=4",
            "accum.gradient_accumulation_steps=4; that name is from Lightning.",
        ),
        ("+training.local_batch_size=4", "accum.micro_batch_size=4; that name is from torchtitan."),
        (
            "--micro-batch-size",
            (
                "There is no key micro_batch_size. Write accum.micro_batch_size; that name is from "
                "Megatron"
            ),
        ),
        ("bf16=true", "There is no key bf16. Write precision=bf16;"),
        ("accum.num_micros=2", "It is now called accum.gradient_accumulation_steps=2."),
        (
            "--batch-size",
            (
                "There is no key batch_size. Write accum.micro_batch_size; that name is from "
                "torch's DataLoader"
            ),
        ),
        (
            "accum.micro_batchsize=4",
            "There is no key accum.micro_batchsize. Did you mean accum.micro_batch_size?",
        ),
        ("optimizer=sgd", "There is no key optimizer. Did you mean optim?"),
        ("train.colour=red", "There is no key train.colour. Known: steps, epochs, seed,"),
        ("accum.sync=keep", "accum.sync=keep is now written accum.sync=gather_once."),
    ],
)
def test_names_from_elsewhere_are_refused_with_ours(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_words(
            ["accum.micro_batch_size=4", "model=gpt", "hydra.run.dir=x", "model.num_layers=1", word]
        )


def test_words_that_may_exist_are_left_to_hydra() -> None:
    words = [
        "--cfg",
        "job",
        "-m",
        "+mine=one",
        "mine@model=gpt",
        "hydra/sweeper=optuna",
        "~experiment",
    ]
    words += [
        "model.options.a=1",
        "accum.micro_batch_size=1,2",
        "data.size_px=8",
        "launch.time=1:00:00",
    ]
    check_words(words)
    check_words(["--config-dir=conf", "mine=one"])


def test_every_name_from_elsewhere_has_one_here() -> None:
    assert [here for here in RENAMED.values() if missing(here) is not None] == []
    assert [
        here for here, _ in ELSEWHERE.values() if missing(here.partition("=")[0]) is not None
    ] == []
    assert [name for name in [*RENAMED, *ELSEWHERE] if missing(name) is None] == []
    for word in RENAMED_VALUES.values():
        check(composed(word, "launch.nproc_per_node=2", "parallel=hsdp"))


@pytest.mark.parametrize(
    ("overrides", "letter"),
    [
        (
            [
                "accum.effective_batch_size=48",
                "accum.micro_batch_size=8",
                "accum.gradient_accumulation_steps=4",
            ],
            "accum.gradient_accumulation_steps=4 contradicts",
        ),
        (
            ["accum.effective_batch_size=100", "accum.micro_batch_size=8", "accum.ragged=refuse"],
            "96 or 104",
        ),
        (["accum.effective_batch_tokens=100"], "3.125 samples of 32 tokens. Use 96 or 128"),
        (["accum.effective_batch_tokens=96", "data.layout=ragged"], "samples of one length"),
        (["accum.effective_batch_size=0"], "must be at least 1"),
        (["accum.effective_batch_size=100000", "accum.last_window=drop"], "leaves nothing"),
        (["data.path=nowhere"], "nowhere"),
        (["model.max_seq_len=16"], "16 positions; the data needs"),
        (["model.vocab_size=100"], "100 token ids"),
        (["model.width=30"], "width"),
        (["train.steps=5", "optim.schedule.warmup=20"], "warmup of at most 4"),
        (["optim.lr=-1"], "optim.lr"),
        (["optim.clip_norm=0"], "clip_norm"),
        (["parallel=ddp"], "parallel=ddp needs ranks"),
        (["parallel=fsdp"], "parallel=fsdp needs ranks"),
    ],
)
def test_what_is_seen_with_the_data_at_hand(
    folder: Path, tmp_path: Path, overrides: list[str], letter: str
) -> None:
    text = [f"data.path={folder}", "data=path", "data.seq_len=32", f"data.cache_dir={tmp_path}"]
    config = composed(*text, *overrides)
    job = Job(config, tmp_path, overrides, 0, None, 0, 1, 0, 1, 0, None)
    with pytest.raises(ConfigError, match=letter):
        build(typed(config), job, World(0, 1, torch.device("cpu"), None), Preemption(None))


GROUPS = ("model", "data", "accum", "parallel", "optim", "precision", "logger", "launch")


def choices_of(group: str) -> list[str]:
    found = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    assert found
    return found


def test_every_choice_of_conf_composes_and_is_typed() -> None:
    """No group of conf/ has a choice that does not compose, a missing value or an unknown key.

    The first choices of all groups together, then the second ones, and so on; a short group begins
    again.
    """
    choices = {group: choices_of(group) for group in GROUPS}
    for number in range(max(map(len, choices.values()))):
        check(
            composed(*(f"{group}={names[number % len(names)]}" for group, names in choices.items()))
        )
    for experiment in choices_of("experiment"):
        check(composed(f"experiment={experiment}"))


def test_a_folder_that_cannot_be_written_is_a_letter(tmp_path: Path) -> None:
    """Before anything starts: folders that cannot be made, a full disk."""
    letter = (
        r"^error: Cannot write to the run folder {} \({}\)\. Free some space, fix its permissions,"
        r" or choose another"
    )
    with small_disk(tmp_path / "full", 1 << 16) as disk:
        cases = [(["run_dir=/proc/no"], "/proc/no", "No such file or directory", tmp_path)]
        cases += [([], r"/proc/\d+/runs", "No such file or directory", Path("/proc/self"))]
        sweep = ["--multirun", "train.seed=1,2", "hydra.sweep.dir=/proc/no"]
        cases += [(sweep, "/proc/no", "No such file .*", tmp_path)]
        if disk is not None:
            (disk / "run").mkdir()
            fill(disk)
            cases += [
                (
                    [f"run_dir={disk / 'run'}"],
                    str(disk / "run"),
                    "No space left on device",
                    tmp_path,
                )
            ]
        for number, (words, folder, reason, place) in enumerate(cases):
            (tmp_path / str(number)).mkdir()
            program = f"import os; os.chdir({str(place)!r})\n{MAIN}"
            ended = command_line(["train", "data=path", *words], tmp_path / str(number), program)
            assert ended.returncode == 2, ended.stderr
            assert re.search(letter.format(folder, reason), ended.stderr), ended.stderr
            assert len(ended.stderr.splitlines()) == 1

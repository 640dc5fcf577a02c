"""`verify`: proves every combination that conf/ offers, and refutes what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World

import distaccum as da

CONF = Path(__file__).resolve().parents[2] / "conf"
PRECISIONS = sorted(path.stem for path in (CONF / "precision").glob("*.yaml"))
POLICIES = [
    ("ddp", "boundary"), ("ddp", "every"),
    ("fsdp", "boundary"), ("fsdp", "keep"), ("fsdp", "every"),
    ("hsdp", "boundary"), ("hsdp", "keep"), ("hsdp", "shard"), ("hsdp", "every"),
]  # fmt: skip
# One of each architecture, in a test's size; benchmarks/verify_all.py takes all models of conf/ as they are.
SIZES = {
    "gpt": ["model.num_layers=1", "model.num_heads=2", "model.width=16", "data.seq_len=16"],
    "resnet": ["data=digits", "model.widths=[4,8]", "model.blocks_per_stage=1"],
    "hf": [
        "data.seq_len=16", "model.options.hidden_size=16", "model.options.num_hidden_layers=1",
        "model.options.num_attention_heads=2",
    ],
}  # fmt: skip


def sizes_of(model: str) -> list[str]:
    return SIZES[model]


def prove(overrides: list[str]) -> da.Proof:
    """On each rank: compose the configuration as the command line does, and prove it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from distaccum.commands.check import check
    from distaccum.commands.verify import prove_configuration
    from distaccum.config import typed
    from distaccum.parallel.world import World as Ranks

    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose("config", overrides), resolve=True, enum_to_str=True)
    check(composed)
    return prove_configuration(typed(composed), Ranks.of(torch.device("cpu")))


def proven(world: World, overrides: list[str]) -> da.Proof:
    first, *others = world.run(prove, ["accum.micro=2", "accum.num_micros=2", *overrides])
    assert all(other.facts() == first.facts() for other in others)
    return first


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", SIZES)
def test_every_combination_is_proven(two_ranks: World, model: str, precision: str) -> None:
    for strategy, sync in POLICIES:
        choice = [f"model={model}", f"precision={precision}", f"parallel={strategy}", f"accum.sync={sync}"]
        proof = proven(two_ranks, [*choice, *sizes_of(model)])
        assert proof.holds, (choice, proof)
        assert proof.network_agrees
        assert {line.name for line in proof.lines} >= {"gradient", "loss", "gradient norm", "update"}
        if precision == "fp64":
            assert max(line.error for line in proof.lines if line.tolerance is not None) < 1e-12


def prove_compiled(overrides: list[str]) -> tuple[da.Proof, int]:
    """The same, and how many frames torch has compiled meanwhile."""
    import warnings

    # What torch's own compiler says of itself when it is imported and at work.
    warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from torch._dynamo.utils import counters

    counters.clear()
    return prove(overrides), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("choice", [
    ["model=gpt", "parallel=ddp"],
    ["model=gpt", "parallel=fsdp", "accum.sync=keep", "nn.checkpoint=true"],
    ["model=resnet", "parallel=fsdp"],
])  # fmt: skip
def test_compiled_blocks_are_exact(two_ranks: World, choice: list[str]) -> None:
    overrides = ["accum.micro=2", "accum.num_micros=3", "nn.compile=true", "precision=fp64", *choice]
    for proof, graphs in two_ranks.run(prove_compiled, [*overrides, *sizes_of(choice[0].split("=")[1])]):
        assert proof.holds, proof
        assert graphs > 0  # compiled, also under the ledger

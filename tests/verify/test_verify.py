"""`verify`: proves every combination that conf/ offers, and refutes what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from worlds import World

import distaccum as da
from distaccum.app.commands.check import check
from distaccum.app.commands.verify import prove_configuration
from distaccum.app.config import Config, typed
from distaccum.parallel.world import World as Ranks

CONF = Path(__file__).resolve().parents[2] / "conf"
PRECISIONS = sorted(path.stem for path in (CONF / "precision").glob("*.yaml"))
POLICIES = [
    ("ddp", "boundary"), ("ddp", "every"),
    ("fsdp", "boundary"), ("fsdp", "gather_once"), ("fsdp", "every"),
    ("hsdp", "boundary"), ("hsdp", "gather_once"), ("hsdp", "reduce_scatter"), ("hsdp", "every"),
]  # fmt: skip
# One of each architecture, in a test's size; benchmarks/verify_all.py takes all models of conf/ as
# they are.
SIZES = {
    "gpt": ["model.num_layers=1", "model.num_heads=2", "model.width=16", "data.seq_len=16"],
    "resnet": ["data=digits", "model.widths=[4,8]", "model.blocks_per_stage=1"],
    "hf": [
        "data.seq_len=16", "model.options.hidden_size=16", "model.options.num_hidden_layers=1",
        "model.options.num_attention_heads=2",
    ],
}  # fmt: skip


def composed(overrides: list[str]) -> dict[str, Any]:
    """The configuration as the command line composes it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made: Any = OmegaConf.to_container(
            compose("config", overrides), resolve=True, enum_to_str=True
        )
    return made


def prove(config: Config) -> da.Proof:
    """On each rank."""
    return prove_configuration(config, Ranks.of(torch.device("cpu")))


@pytest.fixture(scope="module")
def parallel() -> dict[str, Any]:
    """What each choice of conf/parallel makes of its node; it touches no other, see the next
    test."""
    return {
        strategy: composed([f"parallel={strategy}"])["parallel"]
        for strategy in ("ddp", "fsdp", "hsdp")
    }


def test_a_choice_of_parallel_sets_its_node_only(parallel: dict[str, Any]) -> None:
    # by itself it is named after the clock
    chosen = ["model=resnet", "data=digits", "run_dir=runs/here"]
    whole = composed(chosen)
    for strategy, node in parallel.items():
        accum = {**whole["accum"], "sync": "every"}
        assert composed([*chosen, f"parallel={strategy}", "accum.sync=every"]) == {
            **whole, "parallel": node, "accum": accum,
        }  # fmt: skip


@pytest.mark.parametrize(
    "third", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))]
)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", SIZES)
def test_every_combination_is_proven(
    two_ranks: World, parallel: dict[str, Any], model: str, precision: str, third: int
) -> None:
    """Together all combinations; the first third has every pair of model, precision and policy."""
    small = ["accum.micro_batch_size=2", "accum.gradient_accumulation_steps=2", *SIZES[model]]
    whole = composed([f"model={model}", f"precision={precision}", *small])
    check(whole)
    begin = (third + list(SIZES).index(model) + PRECISIONS.index(precision)) % 3
    for strategy, sync in POLICIES[begin::3]:
        choice = {"parallel": parallel[strategy], "accum": {**whole["accum"], "sync": sync}}
        proof, other = two_ranks.run(prove, typed({**whole, **choice}))
        assert proof.facts() == other.facts()
        assert proof.holds, (strategy, sync, proof)
        assert proof.network_agrees
        assert {line.name for line in proof.lines} >= {
            "gradient",
            "loss",
            "gradient norm",
            "update",
        }
        if precision == "fp64":
            assert max(line.error for line in proof.lines if line.tolerance is not None) < 1e-12


def prove_compiled(config: Config) -> tuple[da.Proof, int]:
    """The same, and how many frames torch has compiled meanwhile."""
    import warnings

    # What torch's own compiler says of itself when it is imported and at work.
    warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    from torch._dynamo.utils import counters

    counters.clear()
    return prove(config), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("choice", [
    ["model=resnet", "parallel=fsdp"],
    pytest.param(["model=gpt", "parallel=ddp"], marks=pytest.mark.nightly),
    pytest.param(
        ["model=gpt", "parallel=fsdp", "accum.sync=gather_once", "nn.checkpoint=true"],
        marks=pytest.mark.nightly,
    ),
])  # fmt: skip
def test_compiled_blocks_are_exact(two_ranks: World, choice: list[str]) -> None:
    overrides = [
        "accum.micro_batch_size=2",
        "accum.gradient_accumulation_steps=3",
        "nn.compile=true",
        "precision=fp64",
        *choice,
    ]
    config = typed(composed([*overrides, *SIZES[choice[0].split("=")[1]]]))
    for proof, graphs in two_ranks.run(prove_compiled, config):
        assert proof.holds, proof
        assert graphs > 0  # compiled, also under the ledger

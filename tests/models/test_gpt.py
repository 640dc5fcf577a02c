"""The GPT against arithmetic: sizes, causality, initialisation, and each way in which it is built
and run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from distaccum.errors import ConfigError
from distaccum.models.gpt import GPT, GPTConfig

CONF = Path(__file__).parents[2] / "conf"
SMALL = GPTConfig(
    name="gpt",
    vocab_size=61,
    max_seq_len=16,
    num_layers=3,
    num_heads=2,
    width=32,
    dropout=0.0,
    bias=True,
)


def small(**changes: object) -> GPTConfig:
    return dataclasses.replace(SMALL, **changes)


def build(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def tokens(*shape: int, vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def composed(name: str) -> GPTConfig:
    """The configuration of conf/model/NAME.yaml, checked against the dataclass: no key missing and
    none unknown."""
    with initialize_config_dir(str(CONF / "model"), version_base="1.3"):
        raw = compose(name)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GPTConfig), raw))
    assert isinstance(config, GPTConfig)
    return config


def count(vocab_size: int, max_seq_len: int, num_layers: int, width: int, bias: bool) -> int:
    """Parameters by arithmetic: 12 w^2 of matrices in a block; 4 w + 5 w of linear biases; two
    norms of w (+ w)."""
    norm = width * (1 + bias)
    block = 12 * width**2 + bias * (3 + 1 + 4 + 1) * width + 2 * norm
    return (vocab_size + max_seq_len) * width + num_layers * block + norm


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt", 858_880),
        ("gpt_10m", 10_844_160),
        ("gpt2_124m", 124_439_808),
        ("gpt2_350m", 354_823_168),
    ],
)
def test_conf_has_the_parameters_that_it_says(name: str, parameters: int) -> None:
    config = composed(name)
    config = dataclasses.replace(
        config, vocab_size=config.vocab_size or 256, max_seq_len=config.max_seq_len or 256
    )
    with torch.device("meta"):
        model = GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert parameters == count(
        config.vocab_size, config.max_seq_len, config.num_layers, config.width, config.bias
    )
    assert f"{parameters:,}" in (CONF / "model" / f"{name}.yaml").read_text()


def test_parameters_without_bias() -> None:
    model = build(small(bias=False))
    assert sum(parameter.numel() for parameter in model.parameters()) == count(61, 16, 3, 32, False)
    assert all(
        parameter.ndim == 2 or name.endswith("norm.weight")
        for name, parameter in model.named_parameters()
    )


def test_embedding_and_head_are_one_matrix_outside_the_blocks() -> None:
    model = build()
    shape = (61, 32)
    assert [name for name, parameter in model.named_parameters() if parameter.shape == shape] == [
        "wte.weight"
    ]
    assert not list(model.buffers())
    assert len(model.blocks) == 3
    # A token that occurs only as a target reaches the matrix through the head.
    logits = model(torch.zeros(1, 2, dtype=torch.int64))
    logits[0, 0, 7].backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad[7].abs().sum() > 0
    assert model.wte.weight.grad[0].abs().sum() > 0
    assert model.wte.weight.grad[8].abs().sum() == 0


def test_a_later_token_never_changes_earlier_logits() -> None:
    model = build().double()
    before = tokens(2, 10)
    after = before.clone()
    after[:, 6] = (after[:, 6] + 1) % 61
    first, second = model(before), model(after)
    assert torch.equal(first[:, :6], second[:, :6])
    changed = (first - second).abs().amax(dim=2)
    assert (changed[:, 6:] > 1e-6).all()  # it does reach its own and all later positions
    # Nor does the length of the sequence: padding at the end is harmless. Sums may be split
    # differently, hence 1e-12.
    torch.testing.assert_close(model(before[:, :6]), first[:, :6], rtol=0, atol=1e-12)


def test_positions_matter() -> None:
    logits = build()(torch.full((1, 4), 5))
    assert (logits[0, 0] - logits[0, 1]).abs().max() > 1e-6


def test_float64_agrees_with_attention_by_hand() -> None:
    model = build(small(num_layers=1)).double()
    ids = tokens(2, 7)
    block = model.blocks[0]
    x = model.wte.weight[ids] + model.wpe.weight[torch.arange(7)]
    q, k, v = block.attention.qkv(block.attention_norm(x)).split(32, dim=2)
    heads = []
    for columns in (slice(0, 16), slice(16, 32)):
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(16)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=2) @ v[..., columns])
    x = x + block.attention.project(torch.cat(heads, dim=2))
    hidden = block.mlp.expand(block.mlp_norm(x))
    hidden = (
        hidden * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    )
    x = x + block.mlp.project(hidden)
    expected = model.norm(x) @ model.wte.weight.T
    logits = model(ids)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_initial_loss_is_near_ln_vocab() -> None:
    model = build(small(vocab_size=1000, max_seq_len=64, width=64))
    ids = tokens(8, 65, vocab_size=1000)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    # Logits have a std of 0.02 * sqrt(64) = 0.16, which adds half its square, 0.013; the mean of
    # 512 has noise 0.007.
    assert abs(loss.item() - math.log(1000)) < 0.05


def test_initialisation() -> None:
    model = build(small(width=128, vocab_size=512))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * 3) if ".project." in name else 0.02
        # The std of n draws has a relative error of 1 / sqrt(2 n); six of them.
        assert abs(parameter.std().item() / std - 1) < 6 / math.sqrt(2 * parameter.numel()), name
        assert abs(parameter.mean().item()) < 6 * std / math.sqrt(parameter.numel()), name


def test_meta_then_to_empty_gives_the_same_weights_and_consumes_the_same_randomness() -> None:
    direct = build(seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with torch.device("meta"):
        model = GPT(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two in zip(direct.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert torch.equal(direct(tokens(2, 5)), model(tokens(2, 5)))


def test_float64_starts_at_the_same_weights() -> None:
    torch.manual_seed(3)
    with torch.device("meta"):
        model = GPT(SMALL).double()
    model.to_empty(device="cpu").init_weights()
    for one, two in zip(build(seed=3).parameters(), model.parameters(), strict=True):
        assert two.dtype == torch.float64
        assert torch.equal(one.double(), two)


def test_init_weights_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = GPT(SMALL)
    with pytest.raises(ConfigError, match=r"wte.weight is on the meta device; call to_empty"):
        model.init_weights()


def test_autocast_gives_bf16_logits_and_float32_gradients() -> None:
    model = build()
    ids = tokens(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32
        for parameter in model.parameters()
    )
    # bfloat16 has 8 bits; logits are of the order of 0.1, a few roundings deep.
    torch.testing.assert_close(logits.float(), model(ids), rtol=0, atol=0.02)


def test_dropout_is_off_in_evaluation_and_follows_the_seed_in_training() -> None:
    model = build(small(dropout=0.5))
    ids = tokens(2, 9)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids)

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    model.eval()
    assert torch.equal(logits(0), logits(1))
    assert torch.equal(logits(0), build().eval()(ids))


@pytest.fixture
def one_rank() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("half", [False, True])
def test_fully_shard_from_meta(one_rank: object, half: bool) -> None:
    direct = build(seed=5)
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if half
        else None
    )
    options = {"mesh": one_rank} | ({"mp_policy": policy} if policy else {})
    torch.manual_seed(5)
    with torch.device("meta"):
        model = GPT(SMALL)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu")
    model.init_weights()
    ids = tokens(2, 9)
    logits = model(ids)
    torch.testing.assert_close(logits.float(), direct(ids), rtol=0, atol=0.02 if half else 1e-6)
    logits.float().square().sum().backward()
    direct(ids).square().sum().backward()
    for (name, one), two in zip(direct.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two.full_tensor()), name
        if not half:
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(61, 32), (5, 3), (1, 4)])
def test_a_shard_is_its_part_of_the_whole(shape: tuple[int, int]) -> None:
    """Each of three ranks (imitated in turn) keeps its rows of the same draw, also when they are
    uneven."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from distaccum.models.weights import write

    full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    parts = []
    for rank in range(3):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        try:
            mesh = init_device_mesh("cpu", (3,))
            parameter = distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)
            write(parameter, full)
            parts.append(parameter.to_local().clone())
        finally:
            dist.destroy_process_group()
    rows = math.ceil(shape[0] / 3)
    assert [part.shape[0] for part in parts] == [
        max(0, min(rows, shape[0] - rank * rows)) for rank in range(3)
    ]
    assert torch.equal(torch.cat(parts), full)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100, "num_heads": 12}, r"width \(100\).*num_heads \(12\).*width=96 or 108"),
        ({"width": 3, "num_heads": 4}, r"width \(3\).*width=4"),
        ({"vocab_size": None}, r"vocab_size=None, model.max_seq_len=16.*from the data"),
        ({"max_seq_len": None}, r"vocab_size=61, model.max_seq_len=None"),
        ({"num_layers": 0}, r"num_layers \(0\) must be at least 1"),
        ({"num_heads": -2}, r"num_heads \(-2\) must be at least 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
    ],
)
def test_impossible_sizes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(small(**changes))


def test_wrong_inputs() -> None:
    model = build()
    with pytest.raises(ConfigError, match=r"17 tokens.*max_seq_len is 16.*max_seq_len=17"):
        model(tokens(1, 17))
    with pytest.raises(ConfigError, match=r"torch.int32 \[1, 4\], not torch.int64 \[B, T\]"):
        model(tokens(1, 4).int())
    with pytest.raises(ConfigError, match=r"torch.int64 \[4\], not torch.int64 \[B, T\]"):
        model(tokens(4))
    assert model(tokens(1, 16)).shape == (1, 16, 61)

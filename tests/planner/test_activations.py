"""What a forward keeps for its backward: predicted without memory, and counted on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spread import OBJECTIVE, TOKENS, VOCABULARY, make_micro_batch, make_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import distaccum as da
from distaccum.models.gpt import GPT, GPTConfig
from distaccum.nn.blocks import blocks_of, checkpoint_blocks
from distaccum.planner.trace import trace


def meta_micro_batch(size: int) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in make_micro_batch(size).items()}


def in_bf16(model: nn.Module, micro_batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return OBJECTIVE.loss_sum(model, micro_batch)


def saved_bytes(model: nn.Module, loss_sum: Any, micro_batch: Any) -> int:
    """What a traced micro-batch keeps for its backward."""
    return trace(model, blocks_of, loss_sum, micro_batch, 1).saved


def counted(model: nn.Module, loss_sum: Any, micro_batch: Any) -> int:
    """Bytes of the distinct storages that autograd saves on real tensors, without the model's and
    the micro-batch's."""
    given = [*model.parameters(), *model.buffers(), *micro_batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum(model, micro_batch)
    saved.pop(loss.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def test_by_hand() -> None:
    """tanh(tanh(x W)) with x [3, 5], W [5, 7]: both tanh keep their result; the product keeps x,
    which is the micro-batch."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Tanh())
        x = torch.zeros(3, 5)
    assert (
        saved_bytes(model, lambda module, micro_batch: module(micro_batch[0]).sum(), [x])
        == 2 * 3 * 7 * 4
    )


def gpt(dropout: float) -> nn.Module:
    return GPT(GPTConfig("gpt", VOCABULARY, TOKENS, 2, 2, 16, dropout, True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("loss_sum", [OBJECTIVE.loss_sum, in_bf16], ids=["fp32", "bf16"])
def test_as_on_real_tensors(loss_sum: Any, dropout: float) -> None:
    with torch.device("meta"):
        shapes = gpt(dropout)
    assert saved_bytes(shapes, loss_sum, meta_micro_batch(3)) == counted(
        gpt(dropout), loss_sum, make_micro_batch(3)
    )


def test_odd_shapes_with_frozen_parameters() -> None:
    with torch.device("meta"):
        shapes = make_model("odd")
    expected = counted(make_model("odd"), OBJECTIVE.loss_sum, make_micro_batch(3))
    assert saved_bytes(shapes, OBJECTIVE.loss_sum, meta_micro_batch(3)) == expected > 0


def test_linear_in_the_micro_batch() -> None:
    """Each sample adds the same; autocast's copies of the weights are there once."""
    with torch.device("meta"):
        shapes = gpt(0.0)
    one, two, four = (saved_bytes(shapes, in_bf16, meta_micro_batch(size)) for size in (1, 2, 4))
    assert four - two == 2 * (two - one)
    weights = sum(
        p.numel() for name, p in shapes.named_parameters() if p.ndim == 2 and "wpe" not in name
    )
    # copies in bf16, and one number of the cross entropy's; no backward needs a bias
    assert one - (two - one) == 2 * weights + 4


def test_checkpointed_blocks_keep_their_inputs_only() -> None:
    with torch.device("meta"):
        plain, checkpointed = gpt(0.0), gpt(0.0)
    checkpoint_blocks(checkpointed.blocks)
    kept, less = (
        saved_bytes(model, OBJECTIVE.loss_sum, meta_micro_batch(4))
        for model in (plain, checkpointed)
    )
    for block in plain.blocks:
        inputs = torch.zeros(4, TOKENS, 16, device="meta", requires_grad=True)
        inside = saved_bytes(block, lambda module, micro_batch: module(micro_batch[0]), [inputs])
        kept -= inside
    # What is left of the plain model is outside its blocks, and their inputs, which their norms
    # keep there too.
    assert less <= kept
    assert less < 0.5 * saved_bytes(plain, OBJECTIVE.loss_sum, meta_micro_batch(4))


def test_the_model_stays_as_it_is() -> None:
    model = gpt(0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    saved_bytes(model, OBJECTIVE.loss_sum, make_micro_batch(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        shapes = transformers.GPT2LMHeadModel(config)
    real = transformers.GPT2LMHeadModel(config)
    objective = da.CausalLM()
    expected = counted(real.train(), objective.loss_sum, make_micro_batch(3))
    assert saved_bytes(shapes.train(), objective.loss_sum, meta_micro_batch(3)) == expected

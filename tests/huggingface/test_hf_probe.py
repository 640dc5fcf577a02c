"""The denominator of a head's mean is measured: on tiny heads of transformers, and on heads with
known means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import HEADS, MIXTURES, make, make_micro_batch
from torch import Tensor, nn

from distaccum.errors import ConfigError
from distaccum.huggingface import HuggingFace


class Head(nn.Module):
    """Logits [B, T, 3] of `x` [B, T, 4], and the mean that a test asks for."""

    def __init__(self, mean: Any, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 3)
        self.dropout = nn.Dropout(dropout)
        self.mean = mean

    def forward(self, x: Tensor, labels: Tensor, **_: Any) -> Any:
        return SimpleNamespace(loss=self.mean(self.dropout(self.layer(x)), labels))


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def mean_of_means(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's mean, then the mean over samples: long samples count no more than short
    ones."""
    return torch.stack(
        [F.cross_entropy(row, own) for row, own in zip(logits, labels, strict=True)]
    ).mean()


def every_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Does not know -100: such a label is an error."""
    if (labels < 0).any():
        raise IndexError("Target -100 is out of bounds.")
    return tokens(logits, labels)


def short_of_memory(logits: Tensor, labels: Tensor) -> Tensor:
    """Has no memory for the copy with ignored labels."""
    if (labels < 0).any():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return tokens(logits, labels)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), weight=torch.tensor([1.0, 5.0, 25.0])
    )


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def micro_batch(ragged: bool, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (size, 6), generator=generator)
    if ragged:
        for row in range(size):
            labels[row, 2 + row :] = -100
    return {"x": 3 * torch.randn(size, 6, 4, generator=generator), "labels": labels}


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("mean", "name"), [(shifted, "shifted_tokens"), (tokens, "tokens")])
def test_a_known_mean_is_found(mean: Any, name: str, ragged: bool) -> None:
    model = Head(mean, dropout=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    assert HuggingFace.find(model, micro_batch(ragged)).mean_over.value == name
    assert model.training
    assert model.dropout.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_labels_that_begin_ignored_do_not_mislead() -> None:
    """Prompts whose first label is ignored count alike with and without the shift; other data need
    not."""
    batch = micro_batch(ragged=False)
    batch["labels"][:, 0] = -100
    assert HuggingFace.find(Head(tokens), batch).mean_over.value == "tokens"
    assert HuggingFace.find(Head(shifted), batch).mean_over.value == "shifted_tokens"


def test_a_head_that_ignores_nothing_counts_numbers_and_says_so() -> None:
    found = HuggingFace.find(Head(every_label), micro_batch(ragged=False))
    assert found.mean_over.value == "numbers"
    assert "accepts no label -100" in found.reason
    assert "another number" in found.reason


@pytest.mark.parametrize("mean", [weighted, summed])
def test_what_is_no_mean_of_these_is_refused_with_numbers(mean: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"no denominator.*tokens: [\d.]+ together, [\d.]+ alone.*\.logits"
    ):
        HuggingFace.find(Head(mean), micro_batch(ragged=True))


def test_samples_of_one_loss_cannot_be_told_apart() -> None:
    batch = micro_batch(ragged=False)
    batch["x"], batch["labels"] = torch.zeros_like(batch["x"]), torch.zeros_like(batch["labels"])
    with pytest.raises(
        ConfigError, match="cannot tell shifted_tokens and tokens and samples and numbers apart"
    ):
        HuggingFace.find(
            Head(lambda logits, labels: tokens(logits, labels.clamp(min=-1).abs() * 0)), batch
        )


@pytest.mark.parametrize("ragged", [False, True])
def test_a_mean_of_means_is_not_taken_for_a_mean_over_numbers(ragged: bool) -> None:
    """On samples of one length both fit; on micro-batches of several lengths they are two
    things."""
    with pytest.raises(ConfigError, match="cannot tell samples and numbers apart"):
        HuggingFace.find(Head(mean_of_means), micro_batch(ragged))


@pytest.mark.parametrize(("mean", "name"), [(shifted, "shifted_tokens"), (tokens, "tokens")])
@pytest.mark.parametrize("ignored", [0, 2])
def test_one_row_is_enough_where_its_positions_have_labels(
    mean: Any, name: str, ignored: int
) -> None:
    batch = micro_batch(ragged=False, size=1)
    batch["labels"][0, 6 - ignored :] = -100
    before = batch["labels"].clone()
    assert HuggingFace.find(Head(mean), batch).mean_over.value == name
    assert torch.equal(batch["labels"], before)


@pytest.mark.parametrize("mean", [weighted, summed, mean_of_means])
def test_one_row_is_no_excuse_for_a_wrong_denominator(mean: Any) -> None:
    with pytest.raises(ConfigError, match=r"no denominator|cannot tell"):
        HuggingFace.find(Head(mean), micro_batch(ragged=False, size=1))


@pytest.mark.parametrize(("mean", "labels", "why"), [
    (every_label, torch.tensor([[0, 1, 2, 0, 1, 2]]), "fails on a copy with ignored labels"),
    (tokens, torch.tensor([[0, 1, 2, -100, -100, -100]]),
    r"shape \[1, 6\] .* cannot be turned into a second"), (lambda logits,
    labels: F.cross_entropy(logits[:, 0], labels), torch.tensor([1]), r"labels of shape \[1\]"),
    (lambda logits, labels: F.mse_loss(logits[..., 0], labels), torch.ones(1, 6), "torch.float32"),
])  # fmt: skip
def test_one_row_that_compares_with_nothing_says_what_to_hand_over(
    mean: Any, labels: Tensor, why: str
) -> None:
    batch = {**micro_batch(ragged=False, size=1), "labels": labels}
    with pytest.raises(
        ConfigError, match=rf"{why}.*find\(model, collate\(\[row1, row2\]\)\).*mean_over="
    ):
        HuggingFace.find(Head(mean), batch)


@pytest.mark.parametrize("size", [1, 4])
def test_memory_that_runs_out_says_nothing_about_the_head(size: int) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        HuggingFace.find(Head(short_of_memory), micro_batch(ragged=False, size=size))


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.labels == "tokens"])
def test_one_row_of_heads_of_transformers(name: str) -> None:
    assert (
        HuggingFace.find(make(name), make_micro_batch("tokens", 5, 1, 8)).mean_over.value
        == HEADS[name].denominator
    )


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("counted", ["all", "some"])
def test_heads_of_transformers(name: str, counted: str) -> None:
    head = HEADS[name]
    found = HuggingFace.find(make(name), make_micro_batch(head.labels, 5, 4, 8, counted))
    assert found.mean_over.value == head.denominator
    assert found.aux_coef == (0.02 if name in MIXTURES else 0.0)
    assert "fit" in found.reason


def test_a_sum_over_a_lattice_is_refused() -> None:
    """CTC losses of transformers are sums unless they are told otherwise."""
    import transformers

    config = transformers.Wav2Vec2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = {"input_values": torch.randn(3, 400), "labels": torch.randint(1, 20, (3, 5))}
    with pytest.raises(ConfigError, match="no denominator"):
        HuggingFace.find(transformers.Wav2Vec2ForCTC(config), batch)


def test_a_factor_that_the_loss_does_not_contain_is_refused() -> None:
    model: Any = make("mixtral")
    model.config.router_aux_loss_coef = 0.5  # the model was built with 0.02
    with pytest.raises(ConfigError, match=r"\.aux_loss of .* factor 0\.5"):
        HuggingFace.find(model, make_micro_batch("tokens", 5, 4, 8))

"""What the objective sums, counts and refuses, on one process; what is expected comes from
logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import FAR, HEADS, MIXTURES, make, make_micro_batch
from torch import Tensor, nn

import distaccum as da
from distaccum.errors import ConfigError
from distaccum.huggingface import HuggingFace, HuggingFaceCausalLM

EPS = 2.0**-23  # of float32


def objective(name: str) -> HuggingFace:
    return HuggingFace(HEADS[name].denominator, aux_coef=0.02 if name in MIXTURES else 0.0)


@pytest.mark.parametrize(
    "name", [name for name, head in HEADS.items() if head.labels not in ("number", "multi_label")]
)
def test_a_micro_batch_in_which_nothing_counts_adds_exactly_0_with_a_graph(name: str) -> None:
    model, micro_batch = make(name), make_micro_batch(HEADS[name].labels, 1, 2, 6, counted="none")
    sums = objective(name).loss_sum(model, micro_batch)
    weight = objective(name).denominator(micro_batch)
    terms = dict(sums) if isinstance(sums, dict) else {"loss": sums}
    assert list((weight if isinstance(weight, dict) else {"loss": weight}).values()) == [0] * len(
        terms
    )
    for term in terms.values():
        assert float(term.detach()) == 0.0
        assert term.requires_grad
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())  # NaN would be any


def test_a_head_that_divides_by_hand_gets_labels_to_divide_by() -> None:
    """Its own 0 / 0 would be NaN in the backward, even where its loss is left out."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, labels: Tensor) -> Any:
            mask = labels != -100
            return SimpleNamespace(loss=(self.scale * mask).sum() / mask.sum())

    model = Head()
    total = HuggingFace("tokens").loss_sum(model, {"labels": torch.full((2, 3), -100)})
    total.backward()
    assert (float(total.detach()), float(model.scale.grad)) == (0.0, 0.0)  # type: ignore[arg-type]


def test_sequences_of_one_token_predict_nothing() -> None:
    model, micro_batch = make("gpt2"), make_micro_batch("tokens", 1, 2, 3, counted="all")
    micro_batch = {key: value[:, :1] for key, value in micro_batch.items()}
    total = objective("gpt2").loss_sum(model, micro_batch)
    assert (objective("gpt2").denominator(micro_batch), float(total.detach())) == (0, 0.0)
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_mean_in_bf16_becomes_a_sum_in_float32() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))

        def forward(self, labels: Tensor) -> Any:
            return SimpleNamespace(loss=1.0 * self.mean)

    # 1001 has no bf16: it would be 1000
    micro_batch = {"labels": torch.zeros(1, 1001, dtype=torch.int64)}
    total = HuggingFace("tokens").loss_sum(Half(), micro_batch)
    assert (total.dtype, float(total.detach())) == (torch.float32, 1001.0)


def test_a_tuple_begins_with_the_loss() -> None:
    model, micro_batch = make("bert_classes"), make_micro_batch("class", 1, 3, 6, counted="all")
    as_object = objective("bert_classes").loss_sum(model, micro_batch)
    model.config.return_dict = False
    assert isinstance(model(**micro_batch), tuple)
    assert torch.equal(objective("bert_classes").loss_sum(model, micro_batch), as_object)


def test_the_count_of_the_batch_is_never_passed() -> None:
    """A head that is given num_items_in_batch divides by it, or returns its mean all the same: a
    factor of 8."""
    seen: dict[str, Any] = {}

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, **inputs: Any) -> Any:
            seen.update(inputs)
            return SimpleNamespace(loss=self.scale * inputs["x"].mean())

    micro_batch = {"x": torch.tensor([1.0, 3.0]), "labels": torch.tensor([0, 1])}
    model = Head()
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), HuggingFace("tokens")
    )
    record = accumulator.step(
        [micro_batch, {"x": torch.tensor([11.0]), "labels": torch.tensor([0])}]
    )
    assert sorted(seen) == ["labels", "x"]
    assert (record.loss, record.denominator) == (5.0, 3)  # (2 x 2 + 11 x 1) / 3
    assert float(model.scale.detach()) == -4.0
    with pytest.raises(ConfigError, match="num_items_in_batch"):
        accumulator.step([{**micro_batch, "num_items_in_batch": torch.tensor(2)}])


def test_question_answering_counts_positions_in_range() -> None:
    model, micro_batch = make("bert_answers"), make_micro_batch("positions", 3, 4, 8, counted="all")
    micro_batch["start_positions"][1] = micro_batch["end_positions"][1] = FAR
    assert objective("bert_answers").denominator(micro_batch) == 3
    output = model(**micro_batch)
    rows = torch.tensor([0, 2, 3])
    pairs = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
    sums = [
        F.cross_entropy(logits[rows], micro_batch[key][rows], reduction="sum")
        for logits, key in pairs
    ]
    expected = sum(sums) / 2
    assert abs(objective("bert_answers").loss_sum(model, micro_batch) / expected - 1) <= 8 * EPS
    micro_batch["end_positions"][2] = FAR
    with pytest.raises(ConfigError, match="3 start_positions and 2 end_positions"):
        objective("bert_answers").denominator(micro_batch)


def test_the_auxiliary_term() -> None:
    model, micro_batch = make("mixtral"), make_micro_batch("tokens", 3, 3, 8)
    sums = objective("mixtral").loss_sum(model, micro_batch)
    weight = objective("mixtral").denominator(micro_batch)
    output = model(**micro_batch)
    count = int((micro_batch["labels"][:, 1:] != -100).sum())
    assert weight == {"loss": count, "aux": 1}
    # The token part is a difference of two numbers of which the smaller is a hundredth: no digit is
    # lost.
    tokens = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), micro_batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert abs(sums["loss"] / tokens - 1) <= 8 * EPS
    assert float(sums["aux"].detach()) == pytest.approx(
        0.02 * float(output.aux_loss.detach()), rel=EPS
    )
    with pytest.raises(ConfigError, match=r"returned an \.aux_loss"):
        HuggingFace("shifted_tokens").loss_sum(model, micro_batch)
    model.config.output_router_logits = False
    with pytest.raises(ConfigError, match=r"returned no \.aux_loss"):
        objective("mixtral").loss_sum(model, micro_batch)


def test_a_window_without_labels_is_skipped_with_its_auxiliary_term() -> None:
    model = make("mixtral")
    before = [p.detach().clone() for p in model.parameters()]
    accumulator = da.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=1.0), objective("mixtral")
    )
    record = accumulator.step(
        [make_micro_batch("tokens", i, 2, 5, counted="none") for i in range(2)]
    )
    assert record.skipped == "denominator 0"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_labels_that_are_shifted_already(name: str) -> None:
    model, micro_batch = make(name), make_micro_batch("tokens", 3, 3, 8)
    micro_batch["attention_mask"].fill_(1)
    shifted = {
        "input_ids": micro_batch["input_ids"],
        "labels": F.pad(micro_batch["labels"][:, 1:], (0, 1), value=-100),
    }
    ours = HuggingFaceCausalLM.of(model)
    assert (
        ours
        == HuggingFaceCausalLM.of(model.config)
        == HuggingFaceCausalLM(0.02 if name in MIXTURES else 0.0)
    )
    assert ours.denominator(shifted) == objective(name).denominator(micro_batch)
    sums, expected = ours.loss_sum(model, shifted), objective(name).loss_sum(model, micro_batch)
    for term in sums if isinstance(sums, dict) else [None]:
        found, right = (sums, expected) if term is None else (sums[term], expected[term])
        assert abs(found / right - 1) <= 8 * EPS
    alone = HuggingFaceCausalLM().loss_sum(model, shifted)  # as validation samples are judged
    assert torch.equal(alone, sums["loss"] if isinstance(sums, dict) else sums)


LABELS = torch.tensor([[1, -100], [2, 3]])


@pytest.mark.parametrize(
    ("mean_over", "micro_batch", "message"),
    [
        ("tokens", [LABELS], "mappings of model inputs, got list"),
        ("tokens", {"x": LABELS}, r"has \['x'\], but no tensor 'labels'"),
        ("tokens", {"labels": LABELS.float()}, "cannot count labels of shape"),
        ("shifted_tokens", {"labels": LABELS[:, 1]}, "cannot count labels of shape"),
        ("samples", {"labels": LABELS}, "1 of 4 labels are -100"),
        ("tokens", {"labels": LABELS, "shift_labels": LABELS}, "shift_labels"),
    ],
)
def test_micro_batches_that_would_be_counted_wrongly_are_refused(
    mean_over: str, micro_batch: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HuggingFace(mean_over).denominator(micro_batch)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (SimpleNamespace(loss=None), "no loss in SimpleNamespace"),
        (SimpleNamespace(loss=torch.zeros(2)), r"a loss of shape \[2\]"),
        ((), "no loss in tuple"),
        (SimpleNamespace(loss=torch.zeros(()), encoder_z_loss=torch.zeros(())), "encoder_z_loss"),
    ],
)
def test_outputs_whose_loss_is_no_mean_are_refused(output: Any, message: str) -> None:
    class Head(nn.Module):
        def forward(self, **_: Any) -> Any:
            return output

    with pytest.raises(ConfigError, match=message):
        HuggingFace("tokens").loss_sum(Head(), {"labels": LABELS})


def test_an_unknown_denominator_is_refused() -> None:
    with pytest.raises(ConfigError, match="'token'"):
        HuggingFace("token")

"""Models of transformers by configuration: sizes, seeds, blocks, folders, and users' mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from heads import make
from torch import nn

from distaccum.app.config import config_dir
from distaccum.errors import ConfigError
from distaccum.huggingface.models import HFConfig, build_hf
from distaccum.nn.blocks import blocks_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(
    name: str | None = "GPT2Config",
    head: str = "causal_lm",
    weights: Path | None = None,
    **options: Any,
) -> Any:
    return HFConfig(
        "hf", name, head, None if weights is None else str(weights), {**SMALL, **options}
    )


def built(*args: Any, **options: Any) -> Any:
    return build_hf(config(*args, **options), vocab_size=256, seq_len=32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2Config", {}),
        ("LlamaConfig", {"intermediate_size": 32}),
        ("Qwen2Config", {"intermediate_size": 32, "num_key_value_heads": 1}),
        ("OPTConfig", {"word_embed_proj_dim": 16, "ffn_dim": 32, "max_position_embeddings": 32}),
    ],
)
def test_any_architecture_from_its_class(name: str, options: dict[str, Any]) -> None:
    model = built(name, **options)
    assert (model.config.vocab_size, model.config.use_cache, model.training) == (256, False, True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    output = model(torch.zeros(2, 32, dtype=torch.int64))
    assert output.logits.shape == (2, 32, 256)
    assert output.get("past_key_values") is None
    blocks = blocks_of(model)
    assert len(blocks) == 2
    assert len({type(block) for block in blocks}) == 1


def test_weights_follow_the_seed_of_the_caller() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.detach().flatten() for p in built().parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_default_configuration_builds() -> None:
    """The values that conf/model/hf.yaml has, with 256 token ids: like model=gpt but for the
    positions."""
    model: Any = build_hf(
        HFConfig(**yaml.safe_load((config_dir() / "model" / "hf.yaml").read_text())), 256, 128
    )
    assert (
        sum(p.numel() for p in model.parameters())
        == 256 * 128 + 1024 * 128 + 4 * (12 * 128**2 + 13 * 128) + 256
    )
    assert model.lm_head.weight is model.transformer.wte.weight
    folder = HFConfig(**yaml.safe_load((config_dir() / "model" / "hf_folder.yaml").read_text()))
    with pytest.raises(ConfigError, match=r"model\.config is null"):
        build_hf(folder)


@pytest.mark.parametrize(
    ("name", "count"), [("bert_masked", 2), ("t5", 2), ("bart", 2), ("mixtral", 2)]
)
def test_blocks_are_the_layers_and_nothing_inside_them(name: str, count: int) -> None:
    """T5 and Bart have one layer in the encoder and one in the decoder."""
    model = make(name)
    blocks = blocks_of(model)
    assert len(blocks) == count
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [n for n, p in model.named_parameters() if id(p) not in inside]
    assert all(
        "embed" in n or "norm" in n or "shared" in n or "head" in n or "cls" in n for n in outside
    )


def test_a_module_without_blocks() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList())) == []


def test_a_folder_gives_configuration_and_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = built()
    saved.save_pretrained(tmp_path)
    again = HFConfig("hf", str(tmp_path), "causal_lm", str(tmp_path), {})
    loaded = build_hf(again, vocab_size=256, seq_len=32)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
    )
    assert loaded.training
    with torch.device("meta"):
        assert next(build_hf(again, vocab_size=256, seq_len=32).parameters()).is_meta
    again.weights = None
    drawn = build_hf(again, vocab_size=256, seq_len=32)
    assert not torch.equal(next(drawn.parameters()), next(saved.parameters()))
    with pytest.raises(ConfigError, match="256 token ids, but the data has 300"):
        build_hf(again, vocab_size=300)


def test_pickled_weights_and_names_of_a_hub_are_not_read(tmp_path: Path) -> None:
    saved = built()
    saved.config.save_pretrained(tmp_path)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"there is no \*\.safetensors in"):
        build_hf(HFConfig("hf", str(tmp_path), "causal_lm", str(tmp_path), {}))
    with pytest.raises(ConfigError, match="there is no folder someone/model"):
        build_hf(HFConfig("hf", "someone/model", "causal_lm", None, {}))


@pytest.mark.parametrize(
    "foreign",
    [
        {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"text_config": {"experts_implementation": "someone/kernel"}},
    ],
)
def test_a_folder_cannot_bring_code(tmp_path: Path, foreign: dict[str, Any]) -> None:
    plain = json.loads(built().config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**plain, **foreign}))
    (tmp_path / "code.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ConfigError, match=r"custom code|code on a hub"):
        build_hf(HFConfig("hf", str(tmp_path), "causal_lm", None, {}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (config("GPT3Config"), "Did you mean .*GPT2Config"),
        (config("os"), "neither a configuration class"),
        (config(None), r"model\.config is null"),
        (
            config(n_layerz=3),
            r"model\.options\.n_layerz: GPT2Config has no such field\. Did you mean n_layer",
        ),
        (config(head="causal"), "Did you mean causal_lm"),
        (config("BertConfig", "seq2seq_lm"), r"cannot be built with model\.head=seq2seq_lm"),
        (config(vocab_size=100), "100 token ids, but the data has 256"),
        (config(n_positions=16), "16 positions, but samples have 32 tokens"),
        (config(attn_implementation="someone/kernel"), "code on a hub"),
    ],
)
def test_mistakes_are_told(wrong: HFConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_hf(wrong, vocab_size=256, seq_len=32)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install distaccum\[hf\]"):
        built()

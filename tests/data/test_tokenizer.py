"""Both tokenizers: round trips, ids, and errors."""

import importlib.resources
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idattn.data.tokenizer import load_tokenizer

TEXT = "  Emma\n\nWoodhouse,\tnaïve 😀 <s> "


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    pytest.importorskip("mistral_common")
    path = tmp_path_factory.mktemp("tokenizer") / "mistral.model"
    shutil.copy(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"), path)
    return str(path)


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_special_ids():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    assert tokenizer.decode([256, 72, 256, 105]) == "Hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_sentencepiece(model_path):
    tokenizer = load_tokenizer(model_path)
    ids = tokenizer.encode(TEXT)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (32_000, 1)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.bos_id not in ids  # the text's own "<s>" is text
    assert len(tokenizer.encode("the of and")) == 3
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([1, *ids]) == TEXT
    assert tokenizer.decode(np.zeros(0, np.int32)) == ""
    assert tokenizer.encode("").shape == (0,)


@pytest.mark.parametrize("offset", [-1, 257])
def test_bytes_id_outside_vocabulary(offset):
    with pytest.raises(ValueError, match=f"id {offset} is outside the vocabulary, 0 to 256"):
        load_tokenizer("bytes").decode([65, offset])


def test_sentencepiece_id_outside_vocabulary(model_path):
    with pytest.raises(ValueError, match="id 32000 is outside the vocabulary, 0 to 31999"):
        load_tokenizer(model_path).decode([65, 32_000])


def test_name_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'byte' must be 'bytes', the path of a SentencePiece file"):
        load_tokenizer("byte")
    with pytest.raises(FileNotFoundError, match=r"missing\.model' does not exist; give the path"):
        load_tokenizer(str(tmp_path / "missing.model"))


def test_sentencepiece_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "some.model").touch()
    with pytest.raises(ImportError, match=r"pip install idattn\[data\]"):
        load_tokenizer(str(tmp_path / "some.model"))


def test_not_a_model(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "bad.model").write_text("hello")
    with pytest.raises(ValueError, match=r"bad\.model' is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))


def test_model_without_bos(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path / "nobos"
    text = iter(["some words to train on", "and some more words"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(prefix), vocab_size=17, bos_id=-1, minloglevel=2
    )
    with pytest.raises(ValueError, match="has no BOS piece"):
        load_tokenizer(f"{prefix}.model")

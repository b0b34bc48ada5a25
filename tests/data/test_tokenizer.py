"""Tokenizers of every kind: round trips, ids, training, and errors."""

import importlib.resources
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from idattn.data.corpus import load_documents
from idattn.data.tokenizer import encode_document, load_tokenizer, save_tokenizer, train_tokenizer

TEXT = "  Emma\n\nWoodhouse,\tnaïve 😀 <s> "


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    pytest.importorskip("mistral_common")
    path = tmp_path_factory.mktemp("tokenizer") / "mistral.model"
    shutil.copy(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"), path)
    return str(path)


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A byte-level BPE as GPT-2's, whose file asks to cut texts short and to add tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([document.text[:20_000] for document in load_documents("austen")], trainer)
    model.enable_truncation(5)
    model.enable_padding(length=8)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    model.save(str(path))
    return str(path)


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


def test_json(json_path):
    tokenizer = load_tokenizer(json_path)
    text = TEXT + " <|endoftext|> It is a truth universally acknowledged"
    ids = tokenizer.encode(text)
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (600, 1)
    assert ids.dtype == np.int32 and 5 < len(ids) < len(text.encode())
    assert not np.isin(ids, [0, 1]).any()  # no padding; the text's own "<|endoftext|>" is text
    assert tokenizer.decode([1, *ids]) == text
    assert tokenizer.encode("").shape == (0,)
    with pytest.raises(ValueError, match="id 600 is outside the vocabulary, 0 to 599"):
        tokenizer.decode([600])


def test_json_errors(json_path, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json' is not a file of the package tokenizers"):
        load_tokenizer(str(tmp_path / "bad.json"))
    text = Path(json_path).read_text().replace("<|endoftext|>", "<|end|>")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(
        ValueError, match="has no special token to start documents; its special tokens are <pad>, <|end|>,"
    ):
        load_tokenizer(str(tmp_path / "other.json"))


def test_training(tmp_path):
    texts = [document.text[:60_000] for document in load_documents("austen")]
    lines = "".join(texts)
    for name, parts in (("a", texts), ("again", texts), ("joined", [lines.replace("\n", " ")])):
        train_tokenizer(parts, 1000, tmp_path / f"{name}.model")
    tokenizer, again, joined = (load_tokenizer(str(tmp_path / f"{name}.model")) for name in ("a", "again", "joined"))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (1000, 1)
    assert tokenizer.fingerprint == again.fingerprint != joined.fingerprint
    for text in (TEXT, lines, " \r\n\n  x  1234 ", "\ufeff\u00a0\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(lines)) < 0.45 * len(lines)
    # A line of 360,000 characters is learned from, where SentencePiece by itself would leave it out.
    assert len(joined.encode(lines)) < 0.45 * len(lines)
    with pytest.raises(ValueError, match="training a tokenizer of 100000 pieces failed"):
        train_tokenizer(["a few words"], 100_000, tmp_path / "large.model")


def test_documents_start_with_bos():
    tokenizer = load_tokenizer("bytes")
    assert encode_document("hi", tokenizer, "x").tolist() == [256, 104, 105]
    assert encode_document("", tokenizer, "x").tolist() == [256]
    for ids, message in (([3, 257], "document 'x' has ids 3 to 257; they must be 0 to 256"), ([1, 256], "256 inside")):
        tokenizer.encode = lambda text, ids=ids: np.array(ids)
        with pytest.raises(ValueError, match=message):
            encode_document("hi", tokenizer, "x")


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


def test_not_a_model(tmp_path):
    (tmp_path / "bad.model").write_text("hello")
    with pytest.raises(ValueError, match=r"bad\.model' is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))


def test_model_without_bos(tmp_path):
    prefix = tmp_path / "nobos"
    text = iter(["some words to train on", "and some more words"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(prefix), vocab_size=17, bos_id=-1, minloglevel=2
    )
    with pytest.raises(ValueError, match="has no BOS piece"):
        load_tokenizer(f"{prefix}.model")


@settings(max_examples=200)
@given(st.lists(st.text(max_size=3) | st.sampled_from([" ", "\u2581", "\u2585", "\ufdd0", "some", "<s>"])))
def test_trained_round_trip(trained, parts):
    text = "".join(parts)
    assert trained.decode(trained.encode(text)) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "t.model"
    train_tokenizer(["some words, some more words\n" * 50], 290, path)
    return load_tokenizer(path)


@pytest.mark.parametrize("separator", ["|", "\t", "\0", "\u2585"])
def test_training_learns_from_every_line(tmp_path, separator):
    """SentencePiece leaves lines with U+2585 out, and says so nowhere."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), 5)) for _ in range(50)]
    text = "plain words\n" * 20 + "".join(separator.join(rng.choice(words, 6)) + "\n" for _ in range(300))
    train_tokenizer([text], 400, tmp_path / "t.model")
    tokenizer = load_tokenizer(tmp_path / "t.model")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 6500  # 300 lines of 6 words and 6 separators make 3600 where words are learned, 10,800 where not


def test_ordinary_piece_spelt_like_a_special_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = "<s> 12 <s> 9"
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"], show_progress=False)
    model.train_from_iterator([text] * 50, trainer)
    model.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert model.token_to_id("<s>") is not None
    assert tokenizer.bos_id == model.token_to_id("<|endoftext|>")
    assert encode_document(text, tokenizer, "page").tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("kind", ["bytes", "model_path", "json_path"])
def test_saved_in_a_folder(kind, request, tmp_path):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else request.getfixturevalue(kind))
    save_tokenizer(tokenizer, tmp_path / "with space" / "tokenizer")
    again = load_tokenizer(tmp_path / "with space" / "tokenizer")
    assert (again.fingerprint, again.files) == (tokenizer.fingerprint, tokenizer.files)
    assert (again.vocab_size, again.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_fingerprint_is_of_what_was_loaded(model_path, tmp_path):
    path = tmp_path / "t.model"
    shutil.copy(model_path, path)
    tokenizer = load_tokenizer(path)
    path.write_bytes(b"")  # replaced after it was loaded
    assert tokenizer.fingerprint == load_tokenizer(model_path).fingerprint
    assert tokenizer.files["tokenizer.model"] == Path(model_path).read_bytes()


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder without tokenizer\.model, tokenizer\.json, tokenizer\.b"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.bytes").touch()
    with pytest.raises(ValueError, match="is damaged: it must be b'Ids 0 to 255"):
        load_tokenizer(tmp_path)

"""N-gram losses against a dictionary implementation, the axioms of probability, and the figures for real text."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idattn.data import load_documents, load_tokenizer, split, train_tokenizer
from idattn.data.tokenizer import ByteTokenizer, encode_document
from idattn.evals.ngram import count_bytes, longest_copy, ngram_nats, ngram_table

V = 3
streams = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)


def witten_bell(train, validation, order):
    """The docstring's recursion, one token at a time."""
    counts = defaultdict(Counter)
    for length in range(order):
        for end in range(length, len(train)):
            counts[tuple(train[end - length : end])][train[end]] += 1

    def probability(word, context):
        lower = probability(word, context[1:]) if context else 1 / V
        after = counts[context]
        if not after:
            return lower
        return (after[word] + len(after) * lower) / (after.total() + len(after))

    contexts = [tuple(validation[max(0, i - order + 1) : i]) for i in range(1, len(validation))]
    return -np.mean([math.log(probability(w, h)) for w, h in zip(validation[1:], contexts, strict=True)])


@given(streams, st.lists(st.integers(0, V - 1), min_size=2, max_size=12))
def test_equals_dictionary_implementation(train, validation):
    expected = [witten_bell(train, validation, order) for order in range(1, 6)]
    np.testing.assert_allclose(ngram_nats(np.array(train), np.array(validation), V, 5), expected, rtol=1e-12)


@settings(max_examples=40)
@given(streams, st.integers(0, V - 1))
def test_probabilities_sum_to_one(train, first):
    """Over all continuations of length 4, at every order: also after contexts that training lacks."""
    losses = [
        ngram_nats(np.array(train), np.array([first, *rest]), V, 4) for rest in itertools.product(range(V), repeat=4)
    ]
    np.testing.assert_allclose(np.exp(-4 * np.array(losses)).sum(0), 1, rtol=1e-12)


def test_streams_of_unsigned_types():
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 200, 500), rng.integers(0, 200, 100)
    expected = ngram_nats(train, validation, 200, 3)
    for dtype in (np.uint8, np.uint16, np.uint64):
        assert ngram_nats(train.astype(dtype), validation.astype(dtype), 200, 3) == expected


def test_large_vocabulary_and_order():
    """32,000^12 exceeds 64 bits; a repeated sequence becomes nearly certain once the context tells where it is."""
    sequence = np.random.default_rng(0).integers(0, 32_000, 50)
    nats = ngram_nats(np.tile(sequence, 20), sequence, 32_000, 12)
    assert len(nats) == 12
    assert nats[0] == pytest.approx(math.log(50), rel=0.05)
    assert nats[11] < 0.01
    assert all(later <= earlier for earlier, later in itertools.pairwise(nats))


def test_austen():
    """The three shortest orders on bytes; orders 4 and 5 give 1.570 and 1.400 (5 s)."""
    parts = split(load_documents("austen"), ("persuasion",))
    train, validation = (
        np.frombuffer("".join(document.text for document in part).encode(), np.uint8) for part in parts
    )
    assert ngram_nats(train, validation, 257, 3) == pytest.approx([3.037, 2.387, 1.923], abs=2e-3)


class Spaced(ByteTokenizer):
    """Like Llama 2's, which puts a space before every text, and removes that of the first one that it decodes."""

    def encode(self, text):
        return super().encode(f" {text}")

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def test_table_in_nats_per_byte(tmp_path):
    """Of pieces and of bytes, also where a document holds more than ASCII; a tokenizer of bytes has one row."""
    texts = ["Ah, the café was closed.\n" * 9, "They opened the café again, \u2581 and closed it.\n" * 7]
    train_tokenizer(texts, 290, tmp_path / "t.model")
    pieces, in_bytes = load_tokenizer(tmp_path / "t.model"), load_tokenizer("bytes")
    held_out = ["the café opened", "é again"]

    def stream(documents, tokenizer):
        return np.concatenate([encode_document(text, tokenizer, "") for text in documents])

    size = len("".join(held_out).encode())
    assert [count_bytes(stream(held_out, x), x) for x in (pieces, in_bytes, Spaced())] == [size] * 3
    table = ngram_table(stream(texts, pieces), stream(held_out, pieces), pieces, 3, size)
    assert list(table) == ["bytes", "tokens"]
    for name, tokenizer in {"bytes": in_bytes, "tokens": pieces}.items():
        train, validation = stream(texts, tokenizer), stream(held_out, tokenizer)
        sums = np.array(ngram_nats(train, validation, tokenizer.vocab_size, 3)) * (len(validation) - 1)
        np.testing.assert_allclose(table[name], sums / size, rtol=1e-12)
    alone = ngram_table(stream(texts, in_bytes), stream(held_out, in_bytes), in_bytes, 3, size)
    assert alone == {"bytes": table["bytes"]}


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_longest_copy(text, source):
    passages = (text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1))
    longest = max(len(passage) for passage in ("", *passages) if passage in source)
    copy = longest_copy(text, source)
    assert len(copy) == longest and copy in text and copy in source


@pytest.mark.parametrize(
    ("train", "validation", "max_order", "message"),
    [
        ([0], [0, 1], 0, "max_order=0 must be at least 1"),
        ([], [0, 1], 1, r"train has shape \(0,\); it must be one stream of at least 1"),
        ([0], [1], 1, r"validation has shape \(1,\); it must be one stream of at least 2"),
        ([[0, 1]], [0, 1], 1, r"train has shape \(1, 2\)"),
        ([0, 3], [0, 1], 1, "train holds ids 0 to 3; with vocab_size=3 they must be 0 to 2"),
        ([0], [-1, 1], 1, "validation holds ids -1 to 1"),
    ],
)
def test_errors(train, validation, max_order, message):
    with pytest.raises(ValueError, match=message):
        ngram_nats(np.array(train), np.array(validation), V, max_order)

"""Text as it comes: whole characters, stop strings however they are divided, rows that end by themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import make_model

from idattn.data.tokenizer import ByteTokenizer
from idattn.inference import Decoder, generate, generate_text
from idattn.inference.text import TextStream

BYTES = ByteTokenizer()


class Pieces:
    """A tokenizer like SentencePiece's: the space that a piece starts with is lost where it comes first."""

    bos_id, vocab_size, pieces = 0, 6, ("", "▁It", "▁was", "▁a", "truth", "▁")

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")


@given(
    text=st.text("aé漢🙂 \n", max_size=12),
    stop=st.lists(st.text("aé漢 ", min_size=1, max_size=3), max_size=3),
    data=st.data(),
)
def test_streams_end_before_the_first_stop_string(text, stop, data):
    tokens = BYTES.encode(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)))))
    stream, shown = TextStream(BYTES, stop), ""
    for part in np.split(tokens, cuts):
        shown += stream.add(part)
        assert "\ufffd" not in shown
        assert not any(s in shown for s in stop)
    shown += stream.end()
    first = min(((text.find(s) + len(s), text.find(s)) for s in stop if s in text), default=(0, -1))[1]
    assert (stream.stopped, shown, stream.text) == (first >= 0, text if first < 0 else text[:first], shown)
    if stream.stopped:
        assert any(BYTES.decode(tokens[: stream.used]).endswith(s) for s in stop)


def test_streams_show_what_cannot_change_any_more():
    stream = TextStream(BYTES, ["stop"])
    assert [stream.add(BYTES.encode(x)) for x in ("a s", "to", "o", "stop it")] == ["a ", "", "stoo", ""]
    assert (stream.text, stream.stopped, stream.end()) == ("a stoo", True, "")
    unfinished = TextStream(BYTES)
    assert unfinished.add("é".encode()[:1]) == "" and unfinished.end() == "\ufffd"


def test_a_piece_keeps_its_space():
    stream = TextStream(Pieces(), ["\n"], before=[1])
    assert [stream.add([token]) for token in (2, 3, 5, 4)] == [" was", " a", " ", "truth"]
    assert stream.text == " was a truth"


@pytest.fixture(scope="module")
def decoder():
    return Decoder(make_model("s4d", vocab_size=257), chunk_size=16, block_size=8)


def test_generate(decoder):
    prompts = [np.array([1, 2, 3]), np.array([4])]
    blocks = []
    rows = generate(decoder, prompts, 20, temperature=0, on_block=lambda block: blocks.append(block))
    assert [len(row) for row in rows] == [20, 20]
    assert [block.shape for block in blocks] == [(2, 8), (2, 8), (2, 4)]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), rows)
    alone = [generate(decoder, [prompt], 20, temperature=0)[0] for prompt in prompts]
    np.testing.assert_array_equal(rows, alone)
    # What comes from a context is what comes from the prompt, and the context can be used again.
    context = decoder.prefill(np.array([[1, 2]]))
    for _ in range(2):
        np.testing.assert_array_equal(generate(decoder, [np.array([3])], 20, context=context, temperature=0), rows[:1])
    whole = decoder.prefill(np.array([[1, 2, 3]]))
    sampled = generate(decoder, [[], []], 9, context=whole, seed=4)
    np.testing.assert_array_equal(sampled[1], generate(decoder, prompts[:1], 9, seed=5)[0])
    assert not np.array_equal(*sampled)
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        generate(decoder, prompts, 0)
    with pytest.raises(ValueError, match="a prompt cannot be empty"):
        generate(decoder, [[]], 3)


def test_generate_text(decoder):
    shown = {0: "", 1: ""}
    options = dict(temperature=0.0)
    free = generate_text(decoder, BYTES, ["ab", ""], 24, **options)
    assert [(len(c.tokens), c.finish) for c in free] == [(24, "length")] * 2
    assert free[0].text == BYTES.decode(free[0].tokens)
    stop = free[0].text[5:8]  # two or three bytes in the middle, not at a border of blocks
    at = free[0].text.find(stop)

    def on_text(row, text):
        shown[row] += text

    ended = generate_text(decoder, BYTES, ["ab", ""], 24, stop=[stop], on_text=on_text, **options)
    assert (ended[0].text, ended[0].finish) == (free[0].text[:at], "stop")
    assert list(shown.values()) == [c.text for c in ended]
    np.testing.assert_array_equal(ended[0].tokens, free[0].tokens[: len(ended[0].tokens)])
    with pytest.raises(ValueError, match="must not hold an empty text"):
        generate_text(decoder, BYTES, ["a"], 3, stop=[""])

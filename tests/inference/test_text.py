"""Text as it comes: whole characters, stop strings however they are divided, rows that end by themselves."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import make_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from idattn.data import load_tokenizer
from idattn.data.tokenizer import ByteTokenizer
from idattn.inference import Decoder, generate, generate_text
from idattn.inference.text import TextStream, encode_prompt

BYTES = ByteTokenizer()
TEXT = "the cat sat on the mat , and it 's the end ! do n't stop ; 12 été 中文 \U0001f600 ok"
KINDS = ("bytes", "sentencepiece", "byte fallback", "metaspace", "prepended", "bytelevel", "prefix space", "wordpiece")
EXACT = [kind for kind in KINDS if kind != "wordpiece"]  # whose decoder gives back any text


def make_tokenizer(kind, folder):
    """A small tokenizer of each kind; all but "bytes" and "bytelevel" put a space before every text."""
    if kind == "bytes":
        return BYTES
    if kind in ("sentencepiece", "byte fallback"):
        fallback = dict(byte_fallback=True, vocab_size=320) if kind == "byte fallback" else dict(vocab_size=60)
        with (folder / "t.model").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([TEXT] * 9), model_writer=file, model_type="bpe", minloglevel=2, bos_id=1,
                eos_id=2, remove_extra_whitespaces=False, normalization_rule_name="identity", **fallback,
            )  # fmt: skip
        return load_tokenizer(str(folder / "t.model"))
    specials, alphabet = ["<unk>", "<s>"], []
    if kind == "wordpiece":
        made, trainer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
        made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=True)
    else:
        made, trainer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "prepended":  # as the converted file of Llama 2
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    if kind in ("bytelevel", "prefix space"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix space")
        made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet))
    made.save(str(folder / "t.json"))
    return load_tokenizer(str(folder / "t.json"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return {kind: make_tokenizer(kind, tmp_path_factory.mktemp("tokenizer")) for kind in KINDS}


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


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_streamed_text_is_decoded_text(kinds, kind, data):
    """For random tokens, text, and invalid bytes, released in any parts after any tokens."""
    tokenizer = kinds[kind]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    real = list(map(int, tokenizer.encode(TEXT)))
    tokens = st.lists(ids, max_size=12) | st.integers(0, len(real)).map(lambda start: real[start:])
    before, after = data.draw(st.lists(ids, min_size=1, max_size=12) | st.just(real[:9])), data.draw(tokens)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(after)))))
    stream = TextStream(tokenizer, (), before)
    shown = "".join(stream.add(part) for part in np.split(np.array(after, int), cuts)) + stream.end()
    assert shown == stream.text == tokenizer.decode([*before, *after])[len(tokenizer.decode(before)) :]


@pytest.mark.parametrize("kind", EXACT)
def test_a_continuation_is_encoded_as_such(kinds, kind):
    """No space comes to a text that is encoded in two parts, none is lost, and BOS is where a document starts."""
    tokenizer = kinds[kind]
    for at in range(len(TEXT) + 1):
        first, rest = TEXT[:at], TEXT[at:]
        ids = [*encode_prompt(tokenizer, first), *encode_prompt(tokenizer, rest, continues=True)]
        whole = tokenizer.decode([*encode_prompt(tokenizer, TEXT)])
        assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids) == (whole if first else whole.lstrip(" ")), rest


class OneToken(ByteTokenizer):
    """Every text is one token."""

    def encode(self, text):
        return np.array([len(text)])


def test_a_continuation_that_cannot_be_told_apart_is_refused():
    assert encode_prompt(OneToken(), "", continues=True).size == 0
    with pytest.raises(ValueError, match="' and' cannot be encoded as a continuation; give all of the text"):
        encode_prompt(OneToken(), " and", continues=True)


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


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_a_context_stands_for_its_text(kinds, kind):
    """The first space is that of the text, and ids that the tokenizer does not have are not written."""
    tokenizer = kinds[kind]
    decoder = Decoder(make_model("s4d", vocab_size=tokenizer.vocab_size + 200), chunk_size=16, block_size=8)
    ids = encode_prompt(tokenizer, "the cat")
    context = decoder.prefill(ids[None])
    seeds = dict(seed=3, temperature=3.0)
    prompted = generate_text(decoder, tokenizer, ["the cat"] * 24, 8, **seeds)
    resumed = generate_text(decoder, tokenizer, [""] * 24, 8, context=context, **seeds)
    for ours, theirs in zip(resumed, prompted, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert ours.text == theirs.text == tokenizer.decode([*ids, *ours.tokens])[len("the cat") :]
        assert ours.tokens.max() < tokenizer.vocab_size
    assert any(c.text.startswith(" ") for c in resumed) and not all(c.text.startswith(" ") for c in resumed)
    raw = generate(decoder, [ids] * 24, 8, **seeds)
    assert max(row.max() for row in raw) >= tokenizer.vocab_size  # a negative control
    with pytest.raises(ValueError, match="a tokenizer must not have more ids than its model"):
        generate_text(Decoder(make_model("s4d", vocab_size=20)), tokenizer, [""], 1)


def test_threads_share_a_decoder(decoder):
    """Each writes what it writes alone: the decoder stores nothing of a call."""
    context = decoder.prefill(np.array([[1, 2]]))

    def write(seed):
        return generate_text(decoder, BYTES, ["ab", "c" * seed], 24, seed=seed, context=context if seed % 2 else None)

    alone = [write(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(write, [*range(8)] * 4), alone * 4, strict=True):
            assert [c.text for c in ours] == [c.text for c in theirs]

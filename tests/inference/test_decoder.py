"""Reading and writing in pieces is one pass over the whole, for every mixer, ragged batch and way to cut it."""

import functools

import jax
import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import assert_close
from support.models import HYBRID, MIXERS, V, make_model, next_log_probs, next_logits

from idattn.config import SSMConfig
from idattn.inference import Decoder, right_pad

T, D = 21, 16
LENGTHS = (21, 6, 13)
TOKENS = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)
RAGGED = [row[:n] for row, n in zip(TOKENS, LENGTHS, strict=True)]
N = 9  # tokens to write: more than a block of 4


def make_decoder(mixers, **options):
    return Decoder(make_model(*mixers), **({"chunk_size": 8, "block_size": 4} | options))


PATTERNS = [HYBRID, *(pytest.param(mixers, marks=pytest.mark.slow) for mixers in MIXERS)]


@functools.cache
def model_and_decoder(mixers):
    """They are the same for every test, which share its programs."""
    model = make_model(*mixers)
    return model, Decoder(model, chunk_size=8, block_size=4)


@pytest.fixture(scope="module", params=PATTERNS, ids="+".join)
def both(request):
    """A model, and its decoder."""
    return model_and_decoder(request.param)


def write(decoder, context, num_tokens, **sampling):
    """Tokens (B, num_tokens) in blocks, and the context after them."""
    parts, settings = [], decoder.sampling(context.length.shape[0], **({"temperature": 0} | sampling))
    for start in range(0, num_tokens, decoder.block_size):
        count = min(decoder.block_size, num_tokens - start)
        tokens, context, active = decoder.decode(context, settings, num_tokens=count)
        assert active.all() and tokens.shape == (len(tokens), count)
        parts.append(tokens)
    return np.concatenate(parts, axis=1), context


def logits(decoder, context):
    return np.asarray(decoder._logits(decoder.params, context.hidden[:, None]))[:, 0]


def test_pieces_are_the_whole(both):
    """Chunks of a ragged batch, then tokens one by one, from a fork and from its original: all as one pass."""
    model, decoder = both
    log_probs, is_best, context = decoder.score(*right_pad(RAGGED))
    kept = decoder.fork(context, [0, 1, 2])
    written, context = write(decoder, context, N)
    for b, n in enumerate(LENGTHS):
        whole = next_log_probs(model, np.concatenate([RAGGED[b], written[b]]))
        assert_close(log_probs[b, 1:n], whole[np.arange(n - 1), RAGGED[b][1:]], "float32", reduction=T * D)
        np.testing.assert_array_equal(is_best[b, 1:n], whole[: n - 1].argmax(axis=-1) == RAGGED[b][1:])
        best = np.sort(whole[n - 1 : -1], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4  # so that rounding cannot decide
        np.testing.assert_array_equal(written[b], whole[n - 1 : -1].argmax(axis=-1))
        after = jax.nn.log_softmax(logits(decoder, context)[b])
        assert_close(after, whole[-1], "float32", reduction=(T + N) * D)
        assert not log_probs[b, n:].any() and log_probs[b, 0] == 0 and not is_best[b, n:].any()
    np.testing.assert_array_equal(context.length, np.array(LENGTHS) + N)
    assert len({tuple(row) for row in written.tolist()}) == 3  # a negative control: the rows differ
    again, _ = write(decoder, decoder.fork(kept, [2, 0, 0]), N)
    np.testing.assert_array_equal(again, written[[2, 0, 0]])
    other, _ = write(decoder, decoder.prefill((TOKENS + 1) % V, LENGTHS), N)
    assert (other != written).any(axis=1).all()


def test_a_penalty_is_for_all_that_a_row_has_held():
    """Tokens of its prompt and those it wrote, in this block and before, and none of other rows."""
    model, decoder = model_and_decoder(HYBRID)
    written, context = write(decoder, decoder.prefill(*right_pad(RAGGED)), N, repetition_penalty=3.0)
    for b, prompt in enumerate(RAGGED):
        row = np.concatenate([prompt, written[b]])
        np.testing.assert_array_equal(context.seen[b], np.isin(np.arange(V), row))
        for t, logits in enumerate(next_logits(model, row)[len(prompt) - 1 : -1], start=len(prompt)):
            seen = np.isin(np.arange(V), row[:t])
            penalised = np.where(seen, np.where(logits > 0, logits / 3.0, logits * 3.0), logits)
            assert penalised[row[t]] > penalised.max() - 1e-4


LESS = dict(conv_width=0, input_norms=False, feature_map="none")
DIVIDED = dict(denominator=True, readout="hermitian", c="identity", feature_map="positive")


ADAPTIVE = dict(core="clock", write="damped", readout="hermitian")  # decodes token by token, in no block


@pytest.mark.parametrize("options", [LESS, DIVIDED, ADAPTIVE], ids=str)
def test_options_of_the_layer_in_a_block(options):
    """Tokens that are decoded in blocks have the log-probabilities of one pass."""
    ssm = SSMConfig(num_modes=5, c_init_scale=16.0, delta_min=0.5, delta_max=1.0, **options)
    model = make_model("interdomain", ssm=ssm)
    decoder = Decoder(model, chunk_size=8, block_size=4)
    written, context = write(decoder, decoder.prefill(*right_pad(RAGGED)), N)
    for b in range(len(RAGGED)):
        whole = next_log_probs(model, np.concatenate([RAGGED[b], written[b]]))
        assert_close(jax.nn.log_softmax(logits(decoder, context)[b]), whole[-1], "float32", reduction=(T + N) * D)


@pytest.fixture(scope="module")
def hybrid():
    _, decoder = model_and_decoder(HYBRID)
    whole = decoder.prefill(*right_pad(RAGGED), max_tokens=32)
    return decoder, logits(decoder, whole)


@settings(max_examples=25)
@given(cuts=st.tuples(*(st.sets(st.integers(1, n - 1)) for n in LENGTHS)))
def test_any_cuts_give_the_same(hybrid, cuts):
    """Rows that come in pieces, each cut where it likes and done when it likes, end as the whole does."""
    decoder, expected = hybrid
    pieces = [np.split(row, sorted(at)) for row, at in zip(RAGGED, cuts, strict=True)]
    context = decoder.start(3, 32)
    for i in range(max(map(len, pieces))):
        tokens, lengths = right_pad([row[i] if i < len(row) else row[0][:0] for row in pieces])
        context = decoder.prefill(tokens, lengths, context)
    np.testing.assert_array_equal(context.length, LENGTHS)
    assert_close(logits(decoder, context), expected, "float32", reduction=T * D)


def test_one_program_serves_every_length():
    decoder = make_decoder(("interdomain",))
    for length in (9, 21, 40):
        write(decoder, decoder.prefill(np.zeros((2, length), int)), 3, temperature=length, seed=length)
    assert (decoder._read._cache_size(), decoder._decode._cache_size(), decoder._start._cache_size()) == (1, 1, 1)
    write(decoder, decoder.prefill(np.zeros((1, 9), int)), 3)
    assert (decoder._read._cache_size(), decoder._decode._cache_size()) == (2, 2)  # another batch is another program


def prefill(chunk_size, max_tokens):
    return make_decoder(("interdomain",), chunk_size=chunk_size).lower(1, max_tokens)["prefill"]


def test_memory_of_a_prompt_does_not_depend_on_its_length():
    short, long = prefill(64, 64), prefill(64, 2**20)
    assert short.as_text() == long.as_text()
    parts, whole = (x.compile().memory_analysis().temp_size_in_bytes for x in (short, prefill(512, 512)))
    assert 3 * parts < whole


def test_caches_grow_and_stay_what_they_are():
    """A cache that is too small gets more room; what it holds of other rows or of no row at all is never seen."""
    decoder = make_decoder(("softmax",))
    roomy, tight = (decoder.prefill(*right_pad(RAGGED), max_tokens=n) for n in (64, 0))
    assert tuple(context.state.memories[0].capacity() for context in (roomy, tight)) == (64, 32)
    (cache,) = roomy.state.memories
    stale = cache.replace(k=cache.k.at[..., T:, :].set(9e3), v=cache.v.at[..., T:, :].set(9e3))
    written, context = write(decoder, roomy._replace(state=roomy.state._replace(memories=[stale])), 32)
    ours, tight = write(decoder, tight, 32)
    np.testing.assert_array_equal(ours, written)
    assert tight.state.memories[0].capacity() == 64


def test_softmax_compiles_once_for_lengths_below_a_power_of_two():
    decoder = make_decoder(("softmax",))
    for length in (17, 20, 21, 28):
        write(decoder, decoder.prefill(np.zeros((1, length), int)), 4)
    programs = (decoder._start, decoder._read, decoder._decode, decoder._resize)
    assert [program._cache_size() for program in programs] == [1, 1, 1, 0]
    decoder.score(np.zeros((1, 30), int))
    assert decoder._start._cache_size() == 1


def test_bfloat16_states_take_half_and_change_little():
    exact, rounded = (make_decoder(("interdomain",), state_dtype=dtype) for dtype in ("float32", "bfloat16"))
    results = [decoder.score(TOKENS) for decoder in (exact, rounded)]
    assert [c.state.memories[0].state.dtype for *_, c in results] == ["float32", "bfloat16"]
    error = np.sqrt(np.mean((results[0][0] - results[1][0]) ** 2) / np.mean(results[0][0] ** 2))
    assert 1e-5 < error < 0.02
    assert write(rounded, results[1][2], 2)[1].state.memories[0].state.dtype == "bfloat16"


def test_weights_are_cast_once():
    model = make_model("interdomain")
    model.compute = type(model.compute)(dtype="bfloat16")
    params = Decoder(model).params
    assert params["groups"]["block_0"]["mlp"]["up"]["weight"].dtype == params["embedding"].dtype == "bfloat16"
    assert params["groups"]["block_0"]["mixer"]["core"]["basis"]["c"].dtype == "float32"


def test_stop_tokens_end_a_row_alone():
    decoder = make_decoder(("s4d",), block_size=8)
    free, _ = write(decoder, decoder.prefill(*right_pad(RAGGED)), 8)
    stop = int(free[0, 2])
    first = [list(row).index(stop) + 1 if stop in row else 8 for row in free]
    tokens, _, active = decoder.decode(
        decoder.prefill(*right_pad(RAGGED)), decoder.sampling(3, temperature=0), stop_tokens=[stop]
    )
    for row, (ours, theirs, n) in enumerate(zip(tokens, free, first, strict=True)):
        np.testing.assert_array_equal(ours, np.where(np.arange(8) < n, theirs, -1), f"row {row}")
    np.testing.assert_array_equal(active, [stop not in row for row in free])
    tokens, _, _ = decoder.decode(
        decoder.prefill(*right_pad(RAGGED)), decoder.sampling(3), active=np.array([False, True, False])
    )
    assert (tokens[[0, 2]] == -1).all() and (tokens[1] >= 0).all()


def test_warns_beyond_the_trained_length(caplog, monkeypatch):
    # A process warns once, and an earlier test may have generated as much.
    monkeypatch.setattr(logging, "_get_next_log_count_per_token", lambda token: 0)
    logging.get_absl_logger().propagate = True
    decoder = make_decoder(("softmax",), trained_length=16)
    decoder.prefill(TOKENS[:1, :16])
    assert not caplog.records
    decoder.prefill(TOKENS[:1])
    assert "21 tokens exceed the 16 that softmax" in caplog.text


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (TOKENS[0], None, r"tokens of shape \(21,\) .* axes B T"),
        (TOKENS[:, :0], None, r"tokens of shape \(3, 0\) .* a prompt cannot be empty"),
        (TOKENS * 1.0, None, "dtype float64 must be integers"),
        (TOKENS, [0, 1, 2], r"lengths=\[0, 1, 2\] must be 3 numbers from 1 to 21"),
        (TOKENS, [1, 22, 2], r"lengths=\[1, 22, 2\]"),
        (TOKENS, [1], r"lengths=\[1\] must be 3 numbers"),
        (TOKENS * 0 + V, None, rf"tokens from {V} to {V} must lie in \[0, vocab_size={V}\)"),
        (TOKENS * 0 - 1, None, r"tokens from -1 to -1"),
    ],
)
def test_bad_prompts(hybrid, tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        hybrid[0].prefill(tokens, lengths)


def test_other_errors(hybrid):
    decoder, _ = hybrid
    context = decoder.start(2)
    with pytest.raises(ValueError, match="tokens of 3 rows cannot follow a context of 2"):
        decoder.prefill(TOKENS, context=context)
    with pytest.raises(ValueError, match=r"rows=\[0, 2\] must be one or more numbers of the 2 rows"):
        decoder.fork(context, [0, 2])
    with pytest.raises(ValueError, match=r"num_tokens=5 must lie in \[1, block_size=4\]"):
        decoder.decode(context, decoder.sampling(2), num_tokens=5)
    with pytest.raises(ValueError, match="chunk_size=0"):
        make_decoder(("softmax",), chunk_size=0)
    with pytest.raises(ValueError, match="state_dtype='float16'"):
        make_decoder(("softmax",), state_dtype="float16")

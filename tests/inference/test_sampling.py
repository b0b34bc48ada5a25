"""What is drawn follows the distribution that the settings say, by the seed and length of a row."""

import jax
import numpy as np
import pytest

from idattn.inference import make_sampling
from idattn.inference.sampling import sample

V, B = 37, 3000
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=V).astype(np.float32) * 2
SEEN = RNG.random(V) < 0.5
draw = jax.jit(sample)


def frequencies(**settings):
    """Of B draws with B seeds."""
    rows = [np.broadcast_to(x, (B, V)) for x in (LOGITS, SEEN)]
    drawn = np.asarray(draw(rows[0], make_sampling(B, V, **settings), rows[1], np.zeros(B, np.int32)))
    assert drawn.dtype == np.int32
    return np.bincount(drawn, minlength=V) / B


def expected(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """Probabilities by the settings' definitions, written out."""
    logits = LOGITS.astype(float)
    logits = np.where(SEEN, np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    p = np.exp(logits / temperature)
    order = np.argsort(-p)
    candidates = order[: top_k or V]
    cumulative = np.cumsum(p[candidates] / p[candidates].sum())
    candidates = candidates[: np.searchsorted(cumulative, top_p) + 1]
    candidates = candidates[p[candidates] >= min_p * p.max()]
    result = np.zeros(V)
    result[candidates] = p[candidates] / p[candidates].sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 3.0},
        {"temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_frequencies(settings):
    frequency, p = frequencies(**settings, seed=5), expected(**settings)
    assert np.abs(frequency - p).max() < 4 * np.sqrt(0.25 / B)
    assert not frequency[p == 0].any()
    assert p.max() < 0.95  # there is something to sample
    if settings:
        assert np.abs(frequency - frequencies(seed=5)).max() > 0.02  # the setting matters


def test_penalties_by_hand():
    """A logit of a token that the row has held is divided where it is positive, and multiplied where it is not."""
    rows = [  # logits, seen, penalty, the most likely token then
        ([2.0, 1.5, -9.0], [1, 0, 0], 2.0, 1),
        ([-2.0, -3.0, -9.0], [1, 0, 0], 2.0, 1),
        ([2.0, 1.5, -9.0], [0, 1, 0], 2.0, 0),
        ([2.0, 1.5, -9.0], [1, 0, 0], 1.0, 0),
        ([1.5, 2.0, -9.0], [1, 0, 0], 0.5, 0),
        ([-3.0, -2.0, -9.0], [1, 0, 0], 0.5, 0),
    ]
    logits, seen, penalty, best = map(np.array, zip(*rows, strict=True))
    settings = make_sampling(len(rows), 3, temperature=0, repetition_penalty=penalty)
    drawn = draw(logits.astype(np.float32), settings, seen.astype(bool), np.zeros(len(rows), np.int32))
    np.testing.assert_array_equal(drawn, best)


def test_rows_have_separate_settings_and_ignore_their_neighbours():
    per_row = dict(
        temperature=np.array([0.0, 1.0, 3.0]), top_k=np.array([0, 5, 0]), top_p=np.array([1, 1, 0.9]),
        seed=np.array([7, 7, 2]),
    )  # fmt: skip
    logits, seen = RNG.normal(size=(3, V)).astype(np.float32), np.zeros((3, V), bool)
    length = np.array([0, 4, 9], np.int32)
    together = draw(logits, make_sampling(3, V, **per_row), seen, length)
    for b in range(3):
        alone = make_sampling(1, V, **{name: x[b] for name, x in per_row.items()})
        assert draw(logits[b : b + 1], alone, seen[:1], length[b : b + 1])[0] == together[b]
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}], ids=str)
def test_low_temperatures_take_the_most_likely_token(cut):
    """Also where a quotient overflows or the temperature is subnormal; for large, small and penalised logits."""
    extreme = np.full(V, -3e38)
    extreme[LOGITS.argmax()] = 3e38
    rows = [LOGITS, 1e-3 * LOGITS, 1e30 * LOGITS, -1e30 - 1e29 * LOGITS, extreme]
    logits = np.stack(rows).astype(np.float32)
    best, length = logits.argmax(axis=1), np.zeros(len(rows), np.int32)
    for temperature in (1e-7, 1e-20, 1e-37, 2e-38, 1.2e-38, 1e-39, 1e-45):
        drawn = draw(logits, make_sampling(len(rows), V, temperature=temperature, **cut), logits > np.inf, length)
        np.testing.assert_array_equal(drawn, best, err_msg=str(temperature))
    overflowing = np.where(np.arange(V) == 5, 9.0, 1e-9).astype(np.float32)[None]
    settings = make_sampling(1, V, repetition_penalty=1e-38, **cut)
    assert draw(overflowing, settings, overflowing > 1, length[:1])[0] == 5


def test_ids_without_text_are_not_sampled():
    """A model's vocabulary may exceed the tokenizer's: not even the most likely token is one of those ids."""
    logits = np.broadcast_to(np.where(np.arange(V) < 9, 0, 50).astype(np.float32), (B, V))
    for temperature in (0, 1e-30, 1, 1e30):
        for cut in ({}, {"top_k": 30, "top_p": 0.99, "repetition_penalty": 1e-3}):
            settings = make_sampling(B, V, num_ids=9, temperature=temperature, **cut)
            drawn = np.asarray(draw(logits, settings, logits > 1, np.zeros(B, np.int32)))
            assert {*drawn} == {*range(9 if temperature else 1)}


def test_draws_depend_on_seed_and_length_alone():
    logits = np.zeros((1000, V), np.float32)

    def one(seed, length):
        settings = make_sampling(1000, V, seed=np.full(1000, seed))
        return np.asarray(draw(logits, settings, logits > 0, np.asarray(length, np.int32)))

    positions = np.arange(1000)
    first, again, other = one(3, positions), one(3, positions), one(4, positions)
    np.testing.assert_array_equal(first, again)
    for x, y in ((first, other), (first, np.roll(first, 1)), (first, np.roll(first, 2))):
        assert abs(np.mean(x == y) - 1 / V) < 4 * np.sqrt(1 / V / 1000)
    np.testing.assert_array_equal(make_sampling(3, V, seed=2**31 - 2).seed, [2**31 - 2, 2**31 - 1, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, r"temperature=-0\.5 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": [1.0, 2.0]}, r"temperature of shape \(2,\) must be one number, or one for each of 3 rows"),
        ({"top_k": -1}, r"top_k=-1 must be in \[0, vocab_size=37\]"),
        ({"top_k": V + 1}, rf"top_k={V + 1}"),
        ({"top_p": 0}, "top_p=0 must be greater than 0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"min_p": 1.1}, r"min_p=1\.1 must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be greater than 0"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 2\*\*31\)"),
        ({"seed": 1.5}, r"seed=1\.5 must be a whole number in \[0, 2\*\*31\)"),
        ({"temperature": 1e39}, r"temperature=1e\+39 must be at least 0 and finite"),
        ({"temperature": "hot"}, "temperature='hot' must be a number at least 0"),
        ({"num_ids": V + 1}, rf"num_ids={V + 1} must be in \[1, vocab_size=37\]: a tokenizer must not have more"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(3, V, **settings)

"""Generation from the carried state agrees with full forward passes, and samples what it says."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from idattn.config import ComputeConfig, ModelConfig, SSMConfig
from idattn.inference import generate
from idattn.nn import LanguageModel

V, N = 37, 9
PROMPT = np.random.default_rng(0).integers(0, V, (3, 7)).astype(np.int32)
HYBRID = ("interdomain", "softmax", "s4d")


def make_model(*mixers):
    """A random model whose next token depends strongly on what came before."""
    config = ModelConfig.tiny(
        *mixers, init_std=1.0, ssm=SSMConfig(num_modes=5, c_init_scale=16.0, delta_min=0.5, delta_max=1.0)
    )
    return LanguageModel(config, ComputeConfig(dtype="float32", chunk_size=4), rngs=nnx.Rngs(3))


def next_logits(model, tokens, length):
    """The logits after the first `length` of the tokens; those after are zeros, which causality hides."""
    padded = np.zeros((len(tokens), 32), np.int32)
    padded[:, :length] = tokens[:, :length]
    return np.asarray(FORWARD(model, padded)[:, length - 1])


FORWARD = nnx.jit(lambda model, tokens: model(tokens)[0])


@pytest.fixture(scope="module")
def model():
    """How tokens are sampled does not depend on the mixer; this one compiles fast."""
    return make_model("softmax")


@pytest.mark.parametrize("mixers", [("interdomain",), ("softmax",), ("s4d",), HYBRID], ids="+".join)
def test_greedy_is_the_argmax_of_full_forwards(mixers):
    model = make_model(*mixers)
    generated = generate(model, PROMPT, N, temperature=0)
    assert (generated.shape, generated.dtype) == ((3, N), jnp.int32)
    tokens = PROMPT
    for _ in range(N):
        logits = next_logits(model, tokens, tokens.shape[1])
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4  # so that rounding cannot decide
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(generated, tokens[:, 7:])
    # Negative controls: the rows differ, and so does the continuation of a prompt with another first token.
    assert len({tuple(row) for row in np.asarray(generated).tolist()}) == 3
    other = np.concatenate([(PROMPT[:, :1] + 1) % V, PROMPT[:, 1:]], axis=1)
    assert not np.array_equal(generate(model, other, N, temperature=0), generated)


def test_top_1_is_greedy_at_any_temperature(model):
    greedy = generate(model, PROMPT, N, temperature=0)
    np.testing.assert_array_equal(generate(model, PROMPT, N, temperature=5.0, top_k=1, seed=4), greedy)
    assert not np.array_equal(generate(model, PROMPT, N, temperature=5.0, top_k=2, seed=4), greedy)


def test_seeds(model):
    one, again, other = (np.asarray(generate(model, PROMPT, N, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.min() >= 0 and one.max() < V
    # Rows of one prompt are different samples.
    same = np.asarray(generate(model, np.repeat(PROMPT[:1], 3, axis=0), N, seed=1, temperature=2.0))
    assert len({tuple(row) for row in same.tolist()}) == 3


def test_frequencies_are_those_of_the_logits(model):
    """3,000 first tokens: temperature divides the logits, and top_k cuts the rest away."""
    prompt = np.repeat(PROMPT[:1], 3000, axis=0)
    logits = next_logits(model, PROMPT[:1], 7)[0]
    for temperature, top_k in ((1.0, 0), (2.0, 0), (1.0, 3)):
        kept = np.argsort(logits)[-top_k:] if top_k else np.arange(V)
        p = np.zeros(V)
        p[kept] = np.exp((logits[kept] - logits.max()) / temperature)
        p /= p.sum()
        sample = np.asarray(generate(model, prompt, 1, temperature=temperature, top_k=top_k, seed=9))[:, 0]
        frequency = np.bincount(sample, minlength=V) / 3000
        assert np.abs(frequency - p).max() < 4 * np.sqrt(0.25 / 3000)
        assert not frequency[p == 0].any()
    assert p.max() < 0.9  # there is something to sample


def test_positions_are_sampled_independently(model):
    """Where every token is as likely, tokens one or two positions apart agree in 1 of 37 cases."""
    prompt = np.repeat(PROMPT[:1], 1000, axis=0)
    sample = np.asarray(generate(model, prompt, 3, temperature=1e6, seed=2))
    assert len(np.unique(sample)) == V
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.mean(sample[:, first] == sample[:, second]) - 1 / V) < 4 * np.sqrt(1 / V / 1000)


def test_more_tokens_begin_with_the_same_greedy_ones(model):
    np.testing.assert_array_equal(
        generate(model, PROMPT, 1, temperature=0), generate(model, PROMPT, N, temperature=0)[:, :1]
    )


def test_compiles_once_for_each_shape(model):
    compiled = sys.modules["idattn.inference.generate"]._generate
    generate(model, PROMPT, 2, seed=1)
    before = compiled._cache_size()
    generate(model, PROMPT, 2, seed=2)
    generate(make_model("softmax"), PROMPT[::-1], 2, seed=3)  # the weights are arguments
    assert compiled._cache_size() == before
    generate(model, PROMPT[:2], 2, seed=2)
    assert compiled._cache_size() == before + 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[0], {}, r"prompt of shape \(7,\) must have the axes B T"),
        (PROMPT[:, :0], {}, r"prompt of shape \(3, 0\) .* at least one token"),
        (np.array([[0, V]]), {}, rf"tokens from 0 to {V} must lie in \[0, vocab_size={V}\)"),
        (np.array([[0, -1]]), {}, r"tokens from -1 to 0 must lie in"),
        (PROMPT, {"num_tokens": 0}, r"num_tokens=0 must be at least 1"),
        (PROMPT, {"temperature": -0.5}, r"temperature=-0\.5 must be at least 0"),
        (PROMPT, {"temperature": float("nan")}, r"temperature=nan must be at least 0"),
        (PROMPT, {"top_k": -1}, r"top_k=-1 must lie in \[0, vocab_size=37\]"),
        (PROMPT, {"top_k": V + 1}, rf"top_k={V + 1} must lie in"),
    ],
)
def test_errors(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **({"num_tokens": N} | options))

"""The ideal layer: exact projections online, whole or in pieces, its safeguard, and features of the Gaussian kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads
from support import oracles
from support.helpers import assert_close, random_segments

from idattn.ops import IdealState, draw_frequencies, ideal_attention, ideal_step, random_features
from idattn.ops.ideal import legs_change

B, T, H, R, E = 3, 29, 2, 4, 3
attend = jax.jit(ideal_attention, static_argnums=3, static_argnames="floor")


def make_case(T=T, seed=0):
    """Features, of which most products are positive, and values, float64."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(0.4, 1, (2, B, T, H, R))
    return q, k, rng.normal(size=(B, T, H, E))


def matrix(M):
    """A of HiPPO-LegS and B, as published."""
    n = np.arange(M)
    root = np.sqrt(2 * n + 1)
    return np.tril(np.outer(root, root), -1) + np.diag(n + 1.0), root


@pytest.mark.parametrize("M", [1, 8, 64])
def test_the_change_is_the_zero_order_hold(M):
    """Against the matrix exponential, and the held input by a second exponential: (I - E) e_0 = A^-1 (I - E) B."""
    A, b = matrix(M)
    t = np.array([2, 3, 10, 1000])
    with jax.enable_x64(True):
        change = np.asarray(legs_change(jnp.asarray(t - 1), M, jnp.float64))
        first = legs_change(jnp.zeros(2, int), M, jnp.float64)
    for change_t, tokens in zip(change, t, strict=True):
        generator = np.block([[-A, b[:, None]], [np.zeros((1, M + 1))]])
        exponential = scipy.linalg.expm(generator * np.log(tokens / (tokens - 1)))
        assert_close(change_t + np.eye(M), exponential[:M, :M], "float64", reduction=M)
        assert_close(-change_t[:, 0], exponential[:M, M], "float64", reduction=M)
    np.testing.assert_array_equal(first, np.tile(-np.eye(M), (2, 1, 1)))


@pytest.mark.parametrize(("M", "segmented"), [(1, False), (6, True), (33, True)])
def test_equals_direct_projection(M, segmented):
    """Outputs and coefficients; padding holds NaN."""
    q, k, v = make_case()
    rng = np.random.default_rng(1)
    ids = np.stack([random_segments(rng, T) for _ in range(B)]) if segmented else None
    expected, last = oracles.ideal_forward(q, k, v, M, 0.2, ids)
    if segmented:
        q, k, v = (np.where(ids[..., None, None] == oracles.PADDING, np.nan, x) for x in (q, k, v))
    with jax.enable_x64(True):
        o, state = attend(q, k, v, M, segment_ids=ids, floor=0.2)
    assert o.dtype == state.coefficients.dtype == np.float64
    assert_close(o, expected, "float64", reduction=T * M)
    assert_close(state.coefficients, last, "float64", reduction=4)
    if segmented:
        lengths = []
        for row in ids:
            end = np.flatnonzero(row != oracles.PADDING)[-1]
            lengths.append(np.argmin(np.append(row[end::-1] == row[end], False)))
        np.testing.assert_array_equal(state.position, lengths)
    else:
        np.testing.assert_array_equal(state.position, [T] * B)


@pytest.mark.parametrize(("dtype", "M", "reduction"), [("float64", 64, 4), ("float32", 32, 32)])
def test_errors_do_not_add_up(dtype, M, reduction):
    """A thousand tokens err by 2e-13 of the largest coefficient in float64; eta, the signal 1, stays e_0."""
    length = 1000
    rng = np.random.default_rng(0)
    v = np.concatenate([rng.normal(size=(1, length, 1, E)), np.ones((1, length, 1, 1))], axis=-1)
    nodes, weights = np.polynomial.legendre.leggauss(M // 2 + 1)
    times = (np.arange(length)[:, None] + (nodes + 1) / 2) / length  # within each token's part of [0, 1]
    basis = np.polynomial.legendre.legvander(2 * times - 1, M - 1) * np.sqrt(2 * np.arange(M) + 1)
    projection = np.einsum("i,sim->ms", weights / (2 * length), basis)
    with jax.enable_x64(dtype == "float64"):
        v = v.astype(dtype)
        _, state = attend(v, v, v, M)
    gamma = np.asarray(state.coefficients)[0, 0, :, -E - 1 :]
    assert gamma.dtype == dtype
    assert_close(gamma[:, :E], projection @ v[0, :, 0, :E], dtype, reduction=reduction)
    assert_close(gamma[:, E], np.eye(M)[0], dtype)


def test_pieces_and_steps_are_the_whole():
    q, k, v = make_case()
    ids = np.stack([random_segments(np.random.default_rng(2), T) for _ in range(B)])
    with jax.enable_x64(True):
        whole, end = attend(q, k, v, 6, segment_ids=ids)
        first, state = attend(*(x[:, :11] for x in (q, k, v)), 6, segment_ids=ids[:, :11])
        # Where the border lies between two documents, position 0 makes the second one start anew.
        state = state._replace(position=jnp.where(ids[:, 11] == ids[:, 10], state.position, 0))
        second, state = attend(*(x[:, 11:] for x in (q, k, v)), 6, segment_ids=ids[:, 11:], initial_state=state)
        assert_close(np.concatenate([first, second], axis=1), whole, "float64", reduction=T)
        for ours, theirs in zip(state, end, strict=True):
            assert_close(ours, theirs, "float64", reduction=T)

        whole, end = attend(q, k, v, 6)
        state = IdealState(jnp.zeros((B, H, 6, R + E)), jnp.zeros(B, jnp.int32))
        step = jax.jit(ideal_step)
        for t in range(T):
            o, state = step(q[:, t], k[:, t], v[:, t], state)
            assert_close(o, whole[:, t], "float64", reduction=T)
        for ours, theirs in zip(state, end, strict=True):
            assert_close(ours, theirs, "float64", reduction=T)


def test_gradients():
    """Of outputs and coefficients for all inputs and the state, by finite differences."""
    q, k, v = (np.abs(x[:1, :5]) for x in make_case())
    ids = np.array([[0, 0, 1, 1, -1]])

    def function(q, k, v, coefficients):
        state = IdealState(coefficients, jnp.full(1, 4, jnp.int32))
        o, state = ideal_attention(q, k, v, 3, segment_ids=ids, initial_state=state)
        return o, state.coefficients

    with jax.enable_x64(True):
        coefficients = np.abs(np.random.default_rng(3).normal(size=(1, H, 3, R + E)))
        check_grads(jax.jit(function), (q, k, v, coefficients), order=1, modes=("rev",), rtol=1e-6, atol=1e-6)


def test_the_safeguard():
    """Where the denominator is not above the floor the output is the mean of the values, and so are its gradients."""
    q, k, v = make_case()
    k = np.abs(k)
    q = np.abs(q) * np.where(np.arange(T) % 2, -1, 1)[:, None, None]  # denominators of either sign
    q[:, 4] = 0
    mean = np.cumsum(v, axis=1) / np.arange(1, T + 1)[:, None, None]
    unsafe = np.flatnonzero((np.arange(T) % 2 == 1) | (np.arange(T) == 4))
    with jax.enable_x64(True):
        o, _ = attend(q, k, v, 6)
        assert_close(o[:, unsafe], mean[:, unsafe], "float64", reduction=T)
        assert np.abs(o[:, ::2] - mean[:, ::2])[:, 3:].min() > 1e-6
        g_q, g_v = jax.jit(jax.grad(lambda q, v: jnp.sum(attend(q, k, v, 6)[0][:, 5]), argnums=(0, 1)))(q, v)
        g_k = jax.jit(jax.grad(lambda k: jnp.sum(attend(q, k, v, 6)[0][:, 4:6])))(k)
    assert (np.asarray(g_q) == 0).all() and (np.asarray(g_k) == 0).all()
    assert_close(
        g_v, np.broadcast_to(np.where(np.arange(T) < 6, 1 / 6, 0)[:, None, None], v.shape), "float64", reduction=T
    )
    # A floor above every denominator.
    o, _ = attend(*(x.astype(np.float32) for x in (q, k, v)), 6, floor=1e6)
    assert_close(o, mean, "float32", reduction=T)


@pytest.mark.parametrize("kind", ["positive", "fourier", "softmax"])
def test_features_estimate_the_kernel(kind):
    """Without bias, each head from different frequencies; positive products are, and a cosine and a sine make 1."""
    rng = np.random.default_rng(0)
    q, k = 0.7 * rng.normal(size=(2, 50, 2, 3))
    frequencies = draw_frequencies(5, kind, 40_000, (2, 3))
    assert frequencies.shape == (2, 3, 40_000 // (2 if kind == "fourier" else 1))
    np.testing.assert_array_equal(frequencies, draw_frequencies(5, kind, 40_000, (2, 3)))
    assert not np.allclose(frequencies[0], frequencies[1])
    with jax.enable_x64(True):
        xi_q, xi_k = (np.asarray(random_features(jnp.asarray(x), frequencies, kind)) for x in (q, k))
    assert xi_q.shape == (50, 2, 40_000)
    terms = xi_q * xi_k * frequencies.shape[-1]
    if kind == "fourier":
        terms = terms.reshape(50, 2, 2, -1).sum(axis=2)
        assert_close((xi_q**2).sum(axis=-1), np.ones((50, 2)), "float64", reduction=100)
    else:
        assert (terms > 0).all()
    kernel = np.exp(np.sum(q * k if kind == "softmax" else -((q - k) ** 2) / 2, axis=-1))
    deviation = (terms.mean(axis=-1) - kernel) / (terms.std(axis=-1) / np.sqrt(terms.shape[-1]))
    assert 0.7 < deviation.std() < 1.4  # as of independent normal terms around the kernel
    assert np.abs(deviation).max() < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: ideal_attention(q, k[:, 1:], v, 2), r"k of shape \(3, 28, 2, 4\) must have the shape \(3, 29"),
        (
            lambda q, k, v: ideal_attention(q, k, v, 2, segment_ids=jnp.zeros((3, 29))),
            "segment_ids of dtype float32 must be integers",
        ),
        (lambda q, k, v: ideal_attention(q, k, v, 0), "num_modes=0 must be at least 1"),
        (lambda q, k, v: ideal_attention(q, k, v, 2, floor=0.0), r"floor=0\.0 greater than 0"),
        (
            lambda q, k, v: ideal_attention(q, k, v, 2, initial_state=IdealState(jnp.zeros((3, 2, 4, 7)), None)),
            r"\(3, 2, 4, 7\) must have the shape \(3, 2, 2, 7\)",
        ),
        (lambda q, k, v: random_features(q, jnp.zeros((4, 8)), "cosine"), "kind='cosine' is not known"),
        (lambda q, k, v: draw_frequencies(0, "fourier", 7, (4,)), "num_features=7 .* even"),
        (lambda q, k, v: draw_frequencies(0, "positive", 0, (4,)), "num_features=0 .* at least 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*(x.astype(np.float32) for x in make_case()))

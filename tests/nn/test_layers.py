"""The shared parts of the modules against formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from support.helpers import assert_close
from support.models import make_model

from idattn.config import SSMConfig
from idattn.nn.layers import RMSNorm, ShortConv, StateBasis, silu_gate
from idattn.ops import find_segments
from idattn.ops.prepare import feature_map, rotary_table, rotate, short_convolution
from idattn.ops.segments import document_positions


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_feature_map_is_normalised_silu(rng):
    x = rng.normal(size=(2, 3, 4, 5))
    silu = x / (1 + np.exp(-x))
    expected = silu / np.sqrt((silu**2).sum(-1, keepdims=True) + 1e-6)
    assert_close(feature_map(jnp.asarray(x, jnp.float32)), expected, "float32", reduction=5)
    gradient = jax.grad(lambda x: feature_map(x).sum())(jnp.zeros(5))
    assert np.isfinite(gradient).all()
    assert (gradient != 0).all()


def test_derivatives_of_the_gate(rng):
    with jax.enable_x64(True):
        gate, x = (jnp.asarray(rng.normal(size=(3, 5))) for _ in range(2))
        assert_close(silu_gate(gate, x), gate * x / (1 + jnp.exp(-gate)), "float64")
        check_grads(silu_gate, (gate, x), order=2)


def test_norms(rng):
    x = 3 * rng.normal(size=(2, 4, 3, 6))
    root = np.sqrt((x**2).mean(-1, keepdims=True) + 0.1)
    norm = RMSNorm(6, eps=0.1)
    norm.scale[...] = jnp.arange(6.0)
    assert_close(norm(jnp.asarray(x, jnp.float32)), x / root * np.arange(6), "float32", reduction=6)


def test_rotation_is_that_of_complex_numbers(rng):
    x = rng.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 1000]])
    frequency = 100.0 ** (-np.arange(4) / 4)
    rotated = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * frequency)
    expected = np.concatenate([rotated.real, rotated.imag], -1)
    actual = rotate(jnp.asarray(x, jnp.float32), rotary_table(jnp.asarray(positions), 8, 100.0))
    assert_close(actual, expected, "float32", reduction=1000)  # float32 rounds the angle of position 1000


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_convolution_stops_at_borders(rng, width):
    B, T, C = 2, 11, 3
    conv = ShortConv(C, width, "G", rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(3.0)
    x = rng.normal(size=(B, T, C)).astype(np.float32)
    tail = rng.normal(size=(B, width - 1, C)).astype(np.float32)
    ids = np.array([[0, 0, 1, 1, 1, 0, 0, -1, -1, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, -1, -1]])
    taps, bias = np.asarray(conv.taps[...], np.float64), np.arange(3.0)
    expected = np.zeros((B, T, C))
    for b in range(B):
        for t in range(T):
            expected[b, t] = bias
            for back in range(width):
                s = t - back
                document = ids[b, min(max(s, 0), t) : t + 1]
                if (document == ids[b, t]).all():
                    source = x[b, s] if s >= 0 else tail[b, s + width - 1]
                    expected[b, t] += taps[width - 1 - back] * source
    segments = find_segments(jnp.asarray(ids))
    positions, _ = document_positions(segments, jnp.full(B, width - 1))
    y = short_convolution(jnp.asarray(x), conv.taps[...], conv.bias[...], jnp.asarray(tail), positions)
    new_tail = conv.next_tail(jnp.asarray(x), jnp.asarray(tail), segments)
    real = ids >= 0
    assert_close(np.asarray(y)[real], expected[real], "float32", reduction=width)
    # Row 0 ends after two tokens of document 2, row 1 in padding after token 8.
    for b, history in enumerate(([np.zeros(C)] * 5 + [x[0, 9], x[0, 10]], list(x[1, :9]))):
        np.testing.assert_array_equal(new_tail[b], np.asarray(history[len(history) - width + 1 :]).reshape(-1, C))


def test_short_convolution_carries_its_tail(rng):
    conv = ShortConv(3, 4, "G", rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 9, 3)), jnp.float32)
    whole = short_convolution(x, conv.taps[...], conv.bias[...], None, None)
    parts, tail = [], None
    for piece in (x[:, :1], x[:, 1:3], x[:, 3:]):
        parts.append(short_convolution(piece, conv.taps[...], conv.bias[...], tail, None))
        tail = conv.next_tail(piece, tail, None)
    np.testing.assert_array_equal(jnp.concatenate(parts, 1), whole)
    np.testing.assert_array_equal(tail, x[:, -3:])


@pytest.mark.parametrize("has_tail", [True, False])
def test_the_tail_after_fewer_tokens_than_taps(rng, has_tail):
    """Of a document that goes on, of padding alone, of a token before padding, and of a document that begins."""
    ids = jnp.asarray([[0, 0], [-1, -1], [0, -1], [0, 1]])
    x = rng.normal(size=(4, 2, 3)).astype(np.float32)
    tail = rng.normal(size=(4, 3, 3)).astype(np.float32) * has_tail
    actual = ShortConv(3, 4, "G", rngs=nnx.Rngs(0)).next_tail(
        jnp.asarray(x), jnp.asarray(tail) if has_tail else None, find_segments(ids)
    )
    expected = [[tail[0, 2], *x[0]], tail[1], [*tail[2, 1:], x[2, 0]], [np.zeros(3), np.zeros(3), x[3, 1]]]
    np.testing.assert_array_equal(actual, np.asarray(expected))


def test_convolutions_start_uniform_by_fan_in():
    conv = ShortConv(4096, 4, "channels", rngs=nnx.Rngs(0))
    taps = np.asarray(conv.taps[...])
    assert taps.shape == (4, 4096) and np.abs(taps).max() <= 0.5 and not np.asarray(conv.bias[...]).any()
    np.testing.assert_allclose(
        np.quantile(taps, [0.01, 0.25, 0.5, 0.75, 0.99]), [-0.49, -0.25, 0, 0.25, 0.49], atol=0.02
    )


def test_the_linear_readout_starts_normal_by_modes():
    model = make_model("s4d", num_heads=8, ssm=SSMConfig(num_modes=64))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    (c_out,) = (np.asarray(x) for path, x in leaves if "c_out" in jax.tree_util.keystr(path))
    assert c_out.std() == pytest.approx(1 / 8, rel=0.06) and abs(c_out.mean()) < 0.02


def test_basis_starts_as_s4d_inv():
    M = 64
    basis = StateBasis(200, SSMConfig(num_modes=M), rngs=nnx.Rngs(0))()
    np.testing.assert_allclose(np.exp(basis.a_log), 0.5, rtol=1e-6)
    n = np.arange(M)
    np.testing.assert_allclose(basis.a_imag[7], M / np.pi * (M / (2 * n + 1) - 1), rtol=1e-5, atol=1e-5)
    delta = np.exp(basis.log_delta)
    assert 1e-3 <= delta.min() < 2e-3
    assert 5e-2 < delta.max() <= 1e-1
    assert abs(np.mean(np.log(delta)) - np.log(1e-2)) < 0.3
    variance = np.var(basis.c[0]) + np.var(basis.c[1])
    assert abs(variance * 16 * M - 1) < 0.05


def test_frequencies_can_start_elsewhere():
    """S4D-Lin is pi n; uniform frequencies sum to a Dirichlet kernel of the lag, whatever Delta a head has."""
    M = 5
    linear = StateBasis(2, SSMConfig(num_modes=M, a_init="s4d_lin"), rngs=nnx.Rngs(0))()
    np.testing.assert_allclose(linear.a_imag, np.pi * np.tile(np.arange(M), (2, 1)), rtol=1e-6)
    uniform = StateBasis(2, SSMConfig(num_modes=M, a_init="uniform"), rngs=nnx.Rngs(0))()
    phases = np.exp(uniform.log_delta)[:, None] * uniform.a_imag
    assert not np.allclose(uniform.a_imag[0], uniform.a_imag[1], rtol=0.01)
    lags = np.arange(2 * M + 1)
    kernel = np.exp(1j * lags[:, None, None] * np.asarray(phases, np.float64)).sum(-1)
    np.testing.assert_allclose(kernel, np.where(lags % M == 0, M, 0)[:, None] * np.ones(2), atol=1e-4)


@pytest.mark.parametrize("c", ["full", "diagonal"])
def test_basis_can_start_as_a_multiple_of_the_identity(c):
    config = SSMConfig(num_modes=3, c=c, c_init="eye")
    c_re, c_im = StateBasis(2, config, rngs=nnx.Rngs(0))().c
    expected = np.eye(3) / 4 if c == "full" else np.ones(3) / 4
    np.testing.assert_array_equal(c_re, np.broadcast_to(expected, c_re.shape))
    np.testing.assert_array_equal(c_im, 0)
    assert StateBasis(2, SSMConfig(c="identity"), rngs=nnx.Rngs(0))().c is None

"""The oracles judge the ops, so they are judged first: by finite differences, and by a formula without a state."""

import numpy as np
import pytest
from support import helpers, oracles

SIZES = dict(B=2, T=9, H=4, G=2, R=3, E=2, M=3)
SEGMENTS = np.array([[5, 5, 5, -1, 5, 5, 2, 5, 5], [-1, 1, 1, 1, 0, 0, 1, -1, -1]], np.int32)


def difference(loss, case, name, direction, size=1e-5):
    """Central difference of loss along a direction of one input."""
    plus, minus = (loss({**case, name: case[name] + sign * size * direction}) for sign in (1, -1))
    return (plus - minus) / (2 * size)


def check_cotangents(case, loss, expected, rng):
    """Every input's cotangent, projected on two random directions, against central differences."""
    assert expected.keys() == case.keys()
    for name, g in expected.items():
        assert g.shape == case[name].shape
        for _ in range(2):
            direction = rng.normal(size=g.shape)
            error = abs(difference(loss, case, name, direction) - np.vdot(g, direction))
            assert error <= 1e-6 * np.linalg.norm(g), f"{name}: {error=}, norm {np.linalg.norm(g)}"


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["unsegmented", "segmented"])
@pytest.mark.parametrize("c", ["full", "diagonal", "identity"])
@pytest.mark.parametrize("readout", ["transpose", "hermitian", "real"])
def test_cotangents_are_finite_differences(readout, c, segments):
    rng = np.random.default_rng(0)
    case = helpers.random_case(rng, **SIZES, c=c)
    o, state = oracles.forward(case, readout, segments)
    g_o, g_state = rng.normal(size=o.shape), rng.normal(size=state.shape)

    def loss(case):
        o, state = oracles.forward(case, readout, segments)
        return np.vdot(g_o, o) + np.vdot(g_state, state)

    check_cotangents(case, loss, oracles.cotangents(case, readout, g_o, g_state, segments), rng)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["unsegmented", "segmented"])
@pytest.mark.parametrize("c", ["full", "diagonal", "identity"])
def test_linear_cotangents_are_finite_differences(c, segments):
    rng = np.random.default_rng(1)
    case = helpers.random_linear_case(rng, B=2, T=9, H=2, W=4, M=3, c=c)
    y, state = oracles.linear_forward(case, segments)
    g_y, g_state = rng.normal(size=y.shape), rng.normal(size=state.shape)

    def loss(case):
        y, state = oracles.linear_forward(case, segments)
        return np.vdot(g_y, y) + np.vdot(g_state, state)

    check_cotangents(case, loss, oracles.linear_cotangents(case, g_y, g_state, segments), rng)


@pytest.mark.parametrize("readout", ["transpose", "hermitian", "real"])
def test_forward_is_attention_with_a_blurred_delta(readout):
    """o_t = sum_{s, s' <= t} (q_t . k_s) w(t - s, t - s') v_{s'}, without any state."""
    case = helpers.random_case(np.random.default_rng(2), **SIZES, initial_state=False)
    o, _ = oracles.forward(case, readout)
    a = -np.exp(case["a_log"]) + 1j * case["a_imag"]
    step = np.exp(case["log_delta"])[:, None] * a
    beta = (np.exp(step) - 1) / a
    c = case["c_re"] + 1j * case["c_im"]
    B, T, H, E = o.shape
    expected = np.zeros_like(o)
    for b, t, h in np.ndindex(B, T, H):
        g = h // 2
        lag = t - np.arange(t + 1)
        weights = beta[g] * np.exp(step[g] * lag[:, None])  # (t + 1, M)
        read = weights @ c[g].T
        transpose, hermitian = (read @ read.T).real, (read.conj() @ read.T).real
        w = {"transpose": transpose, "hermitian": hermitian, "real": (transpose + hermitian) / 2}[readout]
        scores = case["k"][b, : t + 1, g] @ case["q"][b, t, h]
        expected[b, t, h] = scores @ w @ case["v"][b, : t + 1, g]
    helpers.assert_close(o, expected, "float64", reduction=T)


def test_discretize_where_beta_cancels():
    """Both ends of the parameters' range, where (lambda - 1) / a in float64 has lost every digit or overflowed."""
    corner = np.array([[-30.0, 30.0]])
    lam, beta = oracles.discretize({"log_delta": np.array([-30.0]), "a_log": corner, "a_imag": np.zeros((1, 2))})
    np.testing.assert_allclose(beta[0], np.exp(-30.0) * np.array([1.0, 1 - np.exp(-1.0)]), rtol=1e-14)
    np.testing.assert_allclose(lam[0], [1.0, np.exp(-1.0)], rtol=1e-14)


def test_segments_of_a_row_written_out():
    """One row by hand: a document, padding, the same id again (which starts anew) and an id that comes back."""
    case = helpers.random_linear_case(np.random.default_rng(3), B=1, T=7, H=1, W=2, M=2, c="identity")
    ids = np.array([[3, 3, -1, 3, 8, 8, -1]])
    lam, beta = oracles.discretize(case)
    z = case["z"][0, :, 0]
    start = (case["initial_state"][0, 0, :, :2] + 1j * case["initial_state"][0, 0, :, 2:]).T
    lam, beta = lam[0][:, None], beta[0][:, None]
    x = [lam * start + beta * z[0]]
    x += [lam * x[0] + beta * z[1], None, beta * z[3], beta * z[4], lam * (beta * z[4]) + beta * z[5], None]
    y = [np.zeros(2) if state is None else (case["c_out"][0] @ state).real for state in x]
    actual, state = oracles.linear_forward(helpers.with_nan_padding(case, ids), ids)
    helpers.assert_close(actual[0, :, 0], np.stack(y), "float64")
    helpers.assert_close(state[0, 0], np.concatenate([x[5].real, x[5].imag]).T, "float64")


def test_initial_state_survives_nothing_but_padding():
    case = helpers.random_linear_case(np.random.default_rng(4), B=1, T=3, H=1, W=2, M=2)
    y, state = oracles.linear_forward(case, np.full((1, 3), -1))
    assert not y.any()
    np.testing.assert_array_equal(state, case["initial_state"])

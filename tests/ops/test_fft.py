"""The fft backend: numbers against the float64 oracle, causality to tolerance, finite extremes, and its refusal."""

import contextlib
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from idattn.ops import fft
from idattn.ops.discretize import Basis

SIZES = dict(H=4, G=2, R=4, E=3, M=6)
LINEAR_SIZES = dict(H=2, W=7, M=6)
INPUTS = ("q", "k", "v", "z")
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time


def random_case(readout, rng, **options):
    """A case of interdomain attention or, readout None, of the linear readout."""
    if readout is None:
        return helpers.random_linear_case(rng, **LINEAR_SIZES, **options)
    return helpers.random_case(rng, **SIZES, **options)


@functools.cache
def op(readout):
    """case -> (outputs, state) of interdomain attention or, readout None, of the linear readout."""

    def function(case):
        c = None if "c_re" not in case else (case["c_re"], case["c_im"])
        basis = Basis(case["log_delta"], case["a_log"], case["a_imag"], c)
        inputs = [case[name] for name in INPUTS if name in case]
        B, _, G = inputs[-1].shape[:3]
        width = sum(x.shape[-1] for x in inputs[-2:])  # of [k, v], or of z alone
        state = case.get("initial_state", jnp.zeros((B, G, 2, basis.a_log.shape[1], width), basis.a_log.dtype))
        if readout is None:
            return fft.linear(*inputs, basis, case["c_out"], state, None)
        return fft.interdomain(*inputs, basis, state, None, readout=readout)

    return function


@functools.cache
def with_cotangents(readout):
    """Jitted (case, (g_outputs, g_state)) -> ((outputs, state), cotangents of the case)."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(case, g):
        outputs, pullback = jax.vjp(op(readout), case)
        return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), g, outputs))[0]

    return both


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def cast(case, dtype):
    """The case as jax arrays: inputs in dtype, parameters and state in float32 or better; needs x64 for float64."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.asarray(x, dtype if name in INPUTS else wide) for name, x in case.items()}


def judge(readout, case, dtype, rng, check):
    """Hand outputs, state and every cotangent beside the oracle's to check(name, actual, expected, gradient)."""
    with precision(dtype):
        arrays = cast(case, dtype)
        seen = {name: np.asarray(x).astype(np.float64) for name, x in arrays.items()}
        expected = oracles.linear_forward(seen) if readout is None else oracles.forward(seen, readout)
        # Random bits that every dtype holds exactly, so that the oracle and the op start from the same cotangents.
        g = tuple(rng.integers(-64, 65, x.shape).astype(np.float32) / 64 for x in expected)
        adjoint = oracles.linear_cotangents(seen, *g) if readout is None else oracles.cotangents(seen, readout, *g)
        outputs, actual = with_cotangents(readout)(arrays, jax.tree.map(jnp.asarray, g))
    assert outputs[0].dtype == dtype
    assert outputs[1].dtype == np.promote_types(np.float32, outputs[0].dtype)
    assert adjoint.keys() == actual.keys() == case.keys()
    check("outputs", outputs[0], expected[0], False)
    check("state", outputs[1], expected[1], False)
    for name in adjoint:
        assert actual[name].dtype == arrays[name].dtype
        check(name, actual[name], adjoint[name], True)


def close(dtype, reduction=1):
    """A check by the tolerance table."""

    def check(name, actual, expected, gradient):
        helpers.assert_close(actual, expected, dtype, reduction=reduction, gradient=gradient, name=name)

    return check


# 16 tokens fill their FFT of length 32 but for one place, 17 need 64.
@pytest.mark.parametrize(
    ("T", "B", "readout", "options"),
    [
        (1, 3, "hermitian", dict(c="identity", initial_state=False)),
        (16, 1, "real", dict()),
        (17, 3, "transpose", dict()),
    ],
)
def test_interdomain_float64(T, B, readout, options):
    rng = np.random.default_rng(T)
    judge(readout, random_case(readout, rng, B=B, T=T, **options), "float64", rng, close("float64"))


@pytest.mark.parametrize(
    ("T", "B", "options"),
    [
        (1, 3, dict(c="identity", initial_state=False)),
        (16, 1, dict(c="diagonal")),
        (17, 3, dict()),
    ],
)
def test_linear_float64(T, B, options):
    rng = np.random.default_rng(T)
    judge(None, random_case(None, rng, B=B, T=T, **options), "float64", rng, close("float64"))


@pytest.mark.parametrize("readout", ["transpose", None])
def test_float32(readout):
    """With phases up to pi, since float32 rounds a phase and every step repeats the error."""
    T, rng = 17, np.random.default_rng(7)
    case = random_case(readout, rng, B=1, T=T, fast_phase=np.pi)
    judge(readout, case, "float32", rng, close("float32", T * SIZES["M"]))


@pytest.mark.parametrize("readout", ["transpose", None])
def test_bfloat16_inputs(readout):
    """Root mean square errors of at most 1 % in every head, for Delta from 1e-5 to 1.

    Over all heads for log_delta, of which a head has only one.
    """
    rng = np.random.default_rng(0)
    delta = np.array([1e-5, 1e-3, 1e-2, 1e-1, 1])
    G, M = len(delta), 16
    if readout is None:
        case = helpers.random_linear_case(rng, B=2, T=40, H=G, W=12, M=M)
    else:
        case = helpers.random_case(rng, B=2, T=40, H=G, G=G, R=16, E=12, M=M)
    n = np.arange(M)
    case |= {"log_delta": np.log(delta), "a_log": np.full((G, M), np.log(0.5))}
    case |= {"a_imag": np.tile(M / np.pi * (M / (2 * n + 1) - 1), (G, 1))}  # S4D-Inv, as layers start
    heads = dict.fromkeys(("outputs", *INPUTS), 2) | {"state": 1, "initial_state": 1, "log_delta": None}

    def check(name, actual, expected, gradient):
        axes = tuple(axis for axis in range(expected.ndim) if axis != heads.get(name, 0))
        error = np.asarray(actual).astype(np.float64) - expected
        ratio = np.sqrt(np.mean(error**2, axis=axes) / np.mean(expected**2, axis=axes))
        assert np.all(ratio <= 0.01), f"{name}: root mean square error ratio {ratio}"

    judge(readout, case, "bfloat16", rng, check)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("readout", ["transpose", None])
def test_causal_to_tolerance(readout, dtype):
    """Tokens 1000 times as large leave earlier outputs as they are, but for the rounding of such large values."""
    T, late, scale, rng = 17, 11, 1000, np.random.default_rng(3)
    case = random_case(readout, rng, B=1, T=T)
    large = np.where(np.arange(T) < late, 1, scale)[:, None, None]
    with precision(dtype):
        run = jax.jit(op(readout), compiler_options=QUICK)
        y, _ = run(cast(case, dtype))
        y_large, _ = run(cast({name: x * large if name in INPUTS else x for name, x in case.items()}, dtype))
    y, y_large = np.asarray(y, np.float64), np.asarray(y_large, np.float64)
    assert np.max(np.abs(y_large[:, late:])) > scale / 10 * np.max(np.abs(y[:, late:]))
    leak = np.max(np.abs(y_large - y)[:, :late])
    # Not of the largest output, which is cubic in what is large: an error enters the states and is read once.
    bound = helpers.TOLERANCE[dtype] * scale * np.max(np.abs(y))
    assert leak <= bound, f"{leak=:.3e} exceeds {bound=:.3e}"


@pytest.mark.parametrize("readout", ["transpose", None])
def test_extreme_parameters_stay_finite(readout):
    a_log, a_imag = (x.ravel() for x in np.meshgrid([-30.0, 30.0], [0.0, 1e6, -1e6]))
    case = random_case(readout, np.random.default_rng(9), B=1, T=17)  # the shapes of another test: one compilation
    case |= {"log_delta": np.array([-30.0, 30.0]), "a_log": np.tile(a_log, (2, 1)), "a_imag": np.tile(a_imag, (2, 1))}
    case = cast(case, "float32")
    # Of this size, since some cotangents for ones are more than float32 can hold.
    g = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), jax.eval_shape(op(readout), case))
    outputs, cotangents = with_cotangents(readout)(case, g)
    for name, x in {"outputs": outputs[0], "state": outputs[1], **cotangents}.items():
        assert np.isfinite(np.asarray(x)).all(), name


def test_segment_ids_are_refused():
    ids = jnp.zeros((1, 3), jnp.int32)
    basis = Basis(jnp.zeros(2), jnp.zeros((2, 5)), jnp.zeros((2, 5)), None)
    q, k, v, state = (jnp.zeros(shape) for shape in ((1, 3, 4, 4), (1, 3, 2, 4), (1, 3, 2, 3), (1, 2, 2, 5, 7)))
    with pytest.raises(NotImplementedError, match="fft.*segment_ids.*chunkwise"):
        fft.interdomain(q, k, v, basis, state, ids, readout="transpose")
    with pytest.raises(NotImplementedError, match="fft.*segment_ids.*chunkwise"):
        fft.linear(jnp.zeros((1, 3, 2, 7)), basis, jnp.zeros((2, 5)), state, ids)

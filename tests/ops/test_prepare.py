"""The preparation of heads, by every way to do it, against formulas written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from support import helpers

from idattn.ops import pallas_tpu, prepare_heads, prepare_tpu
from idattn.ops.prepare import COMPOSED, HeadInputs, Preparation, prepare, rotary_table

BASE = 100.0
EPS = 0.1
# Interpreted, with NaN wherever the kernels have not written.
KERNELS = pallas_tpu.interpreted(pltpu.InterpretParams(uninitialized_memory="nan"))
RULES = {"composed": "chunkwise", "kernels": KERNELS}
# name -> B, T, width, channels, taps, documents, tail, activate, rotate_first (None: no rotation), norm
CASES = {
    "key": (2, 150, 64, 256, 4, True, True, True, True, True),  # blocks of tokens, tiles of heads, a ragged end
    "query": (1, 128, 64, 128, 4, False, False, True, True, False),
    "value": (2, 20, 64, 128, 0, False, False, False, None, True),
    "generic input": (1, 40, 96, 384, 3, True, True, False, True, True),  # heads across tiles
    "rotated last": (2, 33, 128, 128, 2, True, False, True, False, True),
    "one tap": (1, 16, 32, 128, 1, True, True, True, None, False),
    "tokens of a border only": (2, 17, 64, 128, 4, True, True, True, True, True),
}


def make_case(name):
    """Float64 arrays of a case, its ids, and what is done."""
    B, T, width, C, taps, documents, tail, activate, first, norm = CASES[name]
    rng = np.random.default_rng(T)
    ids = (
        np.cumsum(rng.random((B, T)) < (0.9 if "border" in name else 0.1), axis=1)
        if documents
        else np.zeros((B, T), int)
    )
    positions = np.zeros((B, T), int)
    for t in range(T):  # the document of token 0 began five tokens before, where there is a tail
        before = positions[:, t - 1] if t else np.full(B, 4 if tail else -1)
        continues = (ids[:, t] == ids[:, t - 1]) | (t == 0)
        positions[:, t] = np.where(continues, before + 1, 0)
    arrays = {
        "x": rng.normal(size=(B, T, C)),
        "taps": rng.normal(size=(taps, C)) if taps else None,
        "conv_bias": rng.normal(size=C) if taps else None,
        "tail": rng.normal(size=(B, taps - 1, C)) if taps and tail else None,
        "scale": rng.normal(size=width) if norm else None,
        "bias": rng.normal(size=C) if norm else None,
    }
    done = Preparation(width, activate, first is not False, EPS if norm else 0.0)
    return arrays, positions, ids, first is not None, done


def oracle(arrays, positions, ids, rotated, done):
    """The preparation by ids, not positions, and complex numbers; differentiable by JAX."""
    x, (B, T, C) = arrays["x"], arrays["x"].shape
    if arrays["taps"] is not None:
        width = len(arrays["taps"])
        tail = jnp.zeros((B, width - 1, C)) if arrays["tail"] is None else arrays["tail"]
        padded, x = jnp.concatenate([tail, x], axis=1), arrays["conv_bias"][None, None]
        for back in range(width):
            seen = np.array([(ids[:, max(t - back, 0) : t + 1] == ids[:, t : t + 1]).all(1) for t in range(T)]).T
            source = padded[:, np.arange(T) + width - 1 - back]
            x = x + jnp.where(seen[..., None], source * arrays["taps"][width - 1 - back][None, None], 0)
    x = x.reshape(B, T, -1, done.width)

    def rotate(x):
        half = done.width // 2
        angle = positions[..., None, None] * BASE ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return jnp.concatenate([z.real, z.imag], axis=-1)

    x = rotate(x) if rotated and done.rotate_first else x
    if done.activate:
        x = x / (1 + jnp.exp(-x))
        x = x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)
    x = rotate(x) if rotated and not done.rotate_first else x
    if arrays["scale"] is not None:
        x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + done.eps)
        x = x * arrays["scale"][None, None, None] + arrays["bias"].reshape(1, 1, -1, done.width)
    return x.reshape(B, T, C)


def with_cotangents(function, arrays, g):
    """The outputs, and the cotangents by name."""
    given = {name: x for name, x in arrays.items() if x is not None}
    y, pullback = jax.vjp(lambda given: function(arrays | given), given)
    return y, pullback(g)[0]


@functools.cache
def given_and_expected(name, dtype):
    """The arrays of a case and cotangents of its outputs, in dtype, and what the oracle makes of them."""
    arrays, positions, ids, rotated, done = make_case(name)
    # Parameters stay float32: as layers hold them.
    kinds = {x: dtype if x in ("x", "tail") else "float64" if dtype == "float64" else "float32" for x in arrays}
    cast = {x: None if y is None else jnp.asarray(y, kinds[x]) for x, y in arrays.items()}
    g = jnp.asarray(np.random.default_rng(1).normal(size=arrays["x"].shape), dtype)
    with jax.enable_x64(True):
        wide = {x: None if y is None else jnp.asarray(y, "float64") for x, y in cast.items()}
        program = jax.jit(lambda x, g: with_cotangents(lambda x: oracle(x, positions, ids, rotated, done), x, g))
        return cast, g, program(wide, jnp.asarray(g, "float64"))


def judge(rule, name, dtype):
    arrays, positions, _, rotated, done = make_case(name)
    cast, g, expected = given_and_expected(name, dtype)
    table = rotary_table(jnp.asarray(positions, jnp.int32), done.width, BASE) if rotated else None
    borders = jnp.asarray(positions, jnp.int32) if CASES[name][5] else None

    def function(arrays):
        return prepare_heads(HeadInputs(**arrays, rotary=table, positions=borders), done, backend=rule)

    actual = jax.jit(lambda arrays, g: with_cotangents(function, arrays, g))(cast, g)
    tokens = arrays["x"].shape[0] * arrays["x"].shape[1]
    helpers.assert_close(actual[0], expected[0], dtype, reduction=done.width, name="outputs")
    for field, d in expected[1].items():
        assert actual[1][field].dtype == cast[field].dtype
        kind = dtype if field in ("x", "tail") else str(actual[1][field].dtype)
        reduction = done.width if field in ("x", "tail") else tokens
        helpers.assert_close(actual[1][field], d, kind, reduction=reduction, gradient=True, name=field)


@pytest.mark.parametrize("name", CASES)
def test_composed(name):
    judge("chunkwise", name, "float32")


@pytest.mark.parametrize("name", ["key", "rotated last"])
def test_composed_in_float64(name):
    with jax.enable_x64(True):
        arrays, positions, ids, rotated, done = make_case(name)
        arrays = {x: None if y is None else jnp.asarray(y) for x, y in arrays.items()}
        expected = jax.jit(lambda x: oracle(x, positions, ids, rotated, done))(arrays)
        table = rotary_table(jnp.asarray(positions), done.width, BASE)  # whose angles are float32
        actual = prepare_heads(HeadInputs(**arrays, rotary=table, positions=jnp.asarray(positions)), done)
    helpers.assert_close(actual, expected, "float32", reduction=150)


@pytest.mark.parametrize("backend", ["auto", "recurrent", KERNELS], ids=["auto", "recurrent", "kernels"])
def test_nothing_to_do_is_no_pass(backend):
    x = jnp.ones((1, 16, 128))
    assert not jax.make_jaxpr(lambda x: prepare_heads(HeadInputs(x), Preparation(64), backend=backend))(x).eqns


@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    judge(KERNELS, name, "float32")


@pytest.mark.parametrize("name", ["key", "generic input"])
@pytest.mark.parametrize("rule", RULES)
def test_bfloat16(rule, name):
    judge(RULES[rule], name, "bfloat16")


def test_the_oracle_has_the_right_derivative():
    """By central differences in a random direction."""
    with jax.enable_x64(True):
        case = make_case("tokens of a border only")
        arrays = {name: jnp.asarray(x) for name, x in case[0].items()}
        rng = np.random.default_rng(2)
        g, direction = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), x) for x in (arrays["x"], arrays))
        program = jax.jit(lambda x: oracle(x, *case[1:]))
        _, gradient = jax.jit(lambda x, g: with_cotangents(program, x, g))(arrays, g)
        slope = sum(np.vdot(d, direction[name]) for name, d in gradient.items())

        def at(step):
            moved = {name: x + step * direction[name] for name, x in arrays.items()}
            return np.vdot(g, program(moved))

        np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-6)


def test_padding_of_nan_does_not_reach_other_tokens():
    arrays, positions, ids, _, done = make_case("key")
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    x = np.array(arrays["x"])
    x[ids == 3] = np.nan
    table = rotary_table(jnp.asarray(positions, jnp.int32), done.width, BASE)
    for rule in RULES.values():
        inputs = HeadInputs(**arrays | {"x": jnp.asarray(x)}, rotary=table, positions=jnp.asarray(positions, jnp.int32))
        y = np.asarray(prepare_heads(inputs, done, backend=rule))
        assert np.isfinite(y[ids != 3]).all() and np.isnan(y[ids == 3]).all()


def test_what_kernels_cannot_do_is_composed():
    def inputs(T=64, C=128, taps=4, dtype=jnp.float32):
        return HeadInputs(jnp.ones((1, T, C), dtype), jnp.ones((taps, C)), jnp.zeros(C))

    done = Preparation(64, activate=True)
    assert prepare_tpu.requirement(inputs(), done) is None
    for case, message in (
        (inputs(T=1), "at least 16 tokens, not 1"),
        (inputs(C=192), "a multiple of 128 channels for heads of 64, not 192"),
        (inputs(taps=10), "at most 9 taps, not 10"),
        (inputs(dtype=jnp.float16), "not float16"),
    ):
        assert message in prepare_tpu.requirement(case, done)
        composed = prepare(case, *(functools.partial(f, done) for f in COMPOSED[:2]))
        np.testing.assert_array_equal(prepare_heads(case, done, backend=KERNELS), composed)
    unfit = inputs(C=192)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: prepare_heads(x, done, backend="auto"))(unfit))
    assert "pallas_call" in str(jax.make_jaxpr(lambda x: prepare_heads(x, done, backend="auto"))(inputs()))


@pytest.mark.parametrize("backend", ["recurrent", "fft"])
def test_forward_mode_where_the_op_has_it(backend):
    inputs, done = HeadInputs(jnp.linspace(-1, 1, 640).reshape(1, 5, 128)), Preparation(64, activate=True)
    _, d = jax.jvp(lambda x: prepare_heads(x, done, backend=backend), (inputs,), (inputs,))
    assert np.isfinite(d).all() and np.any(d)

"""The op with a clock and corrective writes: the literal recurrence against the oracle, chunks against the literal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import helpers, oracles

from idattn.ops import Basis, adaptive_attention, adaptive_step, damped_tpu, interdomain_attention
from idattn.ops.adaptive_chunks import Inputs
from idattn.ops.arguments import SERIAL
from idattn.ops.segments import find_segments
from idattn.ops.tree import solve, unit_inverse

SIZES = dict(H=4, G=2, R=4, E=3, M=5)
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of this file's time
CORES = {
    "clock": ("log_steps",), "delta": ("gains",), "clock and delta": ("log_steps", "gains"),
    "damped": ("log_steps", "gains"),
}  # fmt: skip
READOUTS = {"clock": "transpose", "delta": "real", "clock and delta": "hermitian", "damped": "hermitian"}


def make_case(rng, core, B, T, **options):
    """A case of the oracle: every step within a factor of e, most gains away from 0 and 1."""
    case = helpers.random_case(rng, B=B, T=T, **(SIZES | options))
    G = case["log_delta"].shape[0]
    extra = {"log_steps": rng.uniform(-1, 1, (B, T, G)), "gains": rng.uniform(0, 1, (B, T, G))}
    return case | {name: extra[name] for name in CORES[core]}


@functools.cache
def op(backend, chunk_size, readout, write="delta"):
    def function(case, segment_ids=None):
        c = (case["c_re"], case["c_im"])
        return adaptive_attention(
            case["q"], case["k"], case["v"], Basis(case["log_delta"], case["a_log"], case["a_imag"], c),
            log_steps=case.get("log_steps"), gains=case.get("gains"), backend=backend, chunk_size=chunk_size,
            segment_ids=segment_ids, initial_state=case["initial_state"], readout=readout,
            write=write,
        )  # fmt: skip

    return function


@functools.cache
def with_cotangents(function):
    def both(case, segment_ids, g):
        outputs, pullback = jax.vjp(lambda case: function(case, segment_ids), case)
        return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), g, outputs))[0]

    return jax.jit(both, compiler_options=QUICK)


def with_nan_padding(case, segment_ids):
    case = helpers.with_nan_padding(case, segment_ids)
    padding = (segment_ids == helpers.PADDING)[:, :, None]
    return {name: np.where(padding, np.nan, x) if name in ("log_steps", "gains") else x for name, x in case.items()}


@pytest.mark.parametrize(("core", "readout"), READOUTS.items())
def test_float64(core, readout):
    """The literal recurrence equals the oracle, and chunks the literal, cotangents too, whatever the segments.

    Both at once also in float32.
    """
    rng, B, T, K = np.random.default_rng(7), 3, 37, 2 if core == "delta" else 16  # 19 chunks are two groups
    case, write = make_case(rng, core, B, T, fast_phase=np.pi), "damped" if core == "damped" else "delta"
    case = {name: x.astype(np.float32).astype(np.float64) for name, x in case.items()}
    with jax.enable_x64(True):
        for segment_ids in (np.zeros((B, T), np.int32), *helpers.segment_batches(T, K, B)):
            o, state = oracles.adaptive_forward(case, readout, segment_ids, write)
            g = jax.tree.map(lambda x: rng.normal(size=x.shape), (o, state))
            poisoned = {name: jnp.asarray(x) for name, x in with_nan_padding(case, segment_ids).items()}
            literal, expected = with_cotangents(op("recurrent", None, readout, write))(poisoned, segment_ids, g)
            outputs, actual = with_cotangents(op("chunkwise", K, readout, write))(poisoned, segment_ids, g)
            for name, x, y in zip(("outputs", "state"), literal, (o, state), strict=True):
                helpers.assert_close(x, y, "float64", reduction=T, name=f"literal {name}")
            for name, x, y in zip(("outputs", "state"), outputs, (o, state), strict=True):
                helpers.assert_close(x, y, "float64", reduction=T, name=name)
            for name in case:
                helpers.assert_close(actual[name], expected[name], "float64", reduction=T, gradient=True, name=name)
    if core != "clock and delta":
        return
    single = {name: jnp.asarray(x, jnp.float32) for name, x in with_nan_padding(case, segment_ids).items()}
    outputs, actual = with_cotangents(op("chunkwise", K, readout))(single, segment_ids, g)
    lengths = T * SIZES["R"] * SIZES["M"]  # scores, sums over modes, and the solution of the corrections
    for name, x, y in zip(("outputs", "state"), outputs, (o, state), strict=True):
        assert x.dtype == jnp.float32
        helpers.assert_close(x, y, "float32", reduction=lengths, name=name)
    for name in case:
        helpers.assert_close(actual[name], expected[name], "float32", reduction=lengths, gradient=True, name=name)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_tpu_kernels(dtype):
    """Interpreted: damped corrections of three chunks with a state, in float32 also with documents."""
    rng, B, T = np.random.default_rng(5), 2, 300
    case = make_case(rng, "delta", B, T, R=16, E=16, fast_phase=np.pi)
    case = {name: x.astype(np.float32) for name, x in case.items()}
    rows = helpers.segment_rows(T, 128)
    ids = np.stack([rows["padding over a chunk border"], rows["ids that come back"]]).astype(np.int32)
    if dtype == "bfloat16":
        ids, rounded = None, ("q", "k", "v")
        case = {name: jnp.asarray(x, dtype if name in rounded else None) for name, x in case.items()}
    else:
        case = {name: jnp.asarray(x) for name, x in with_nan_padding(case, ids).items()}
    outputs = jax.eval_shape(op("chunkwise", None, "hermitian", "damped"), case, ids)
    g = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), outputs)
    with jax.enable_x64(True):
        wide = {name: x.astype(np.float64) for name, x in case.items()}
        expected, cotangents = with_cotangents(op("recurrent", None, "hermitian", "damped"))(wide, ids, g)

    def kernels(case, ids):
        basis = Basis(case["log_delta"], case["a_log"], case["a_imag"], (case["c_re"], case["c_im"]))
        inputs = Inputs(case["q"], case["k"], case["v"], None, case["gains"][..., None])
        return damped_tpu.attend(
            inputs, basis, case["initial_state"], None if ids is None else find_segments(ids), readout="hermitian",
            interpret=True,
        )  # fmt: skip

    # Two programs: XLA crashes while it compiles one.
    forward = jax.jit(lambda case, ids: jax.vjp(lambda case: kernels(case, ids), case), compiler_options=QUICK)
    actual, pullback = forward(case, ids)
    (back,) = jax.jit(lambda pullback, g: pullback(g), compiler_options=QUICK)(pullback, g)
    lengths = T * 16 * SIZES["M"]  # as in `test_float64`
    for name, x, y in zip(("outputs", "state"), actual, expected, strict=True):
        helpers.assert_close(x, y, dtype, reduction=lengths, name=name)
    for name in case:
        helpers.assert_close(back[name], cotangents[name], dtype, reduction=lengths, gradient=True, name=name)


def test_a_clock_that_stands_at_zero_is_the_paper_bit_for_bit():
    """Outputs and state are equal; the steps still get a gradient, by which they leave zero."""
    rng = np.random.default_rng(1)
    case = {name: jnp.asarray(x, jnp.float32) for name, x in make_case(rng, "clock", 2, 21).items()}
    case["log_steps"] = jnp.zeros_like(case["log_steps"])
    basis = Basis(case["log_delta"], case["a_log"], case["a_imag"], (case["c_re"], case["c_im"]))
    paper = functools.partial(interdomain_attention, return_state=True, chunk_size=8)
    expected = jax.jit(paper, compiler_options=QUICK)(
        case["q"], case["k"], case["v"], basis, initial_state=case["initial_state"]
    )
    g = jax.tree.map(jnp.ones_like, expected)
    function = with_cotangents(op("chunkwise", 8, "transpose"))
    outputs, cotangents = function(case, None, g)
    for x, y in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (np.abs(cotangents["log_steps"]) > 0).all()
    moved, _ = function(case | {"log_steps": case["log_steps"].at[0, 3, 0].set(1e-4)}, None, g)
    assert (moved[0] != expected[0]).any()
    helpers.assert_close(moved[0], expected[0], "float32", reduction=10**6)


def test_a_clock_takes_the_backend_that_is_named():
    """Also where it stands, and the paper's op has a kernel for TPUs."""
    case = make_case(np.random.default_rng(0), "clock", 1, 128, H=2, R=64, E=64, M=64)
    case = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in case.items()}
    kernels = {name: "pallas_call" in str(jax.make_jaxpr(op(name, None, "transpose"))(case)) for name in SERIAL}
    assert kernels == {"auto": True, "chunkwise": False, "recurrent": False}


KEYS = {"the same key": lambda t: 0 * t, "two keys in turn": lambda t: t % 2, "keys that never return": lambda t: t}


@pytest.mark.parametrize("write", ["delta", "damped"])
@pytest.mark.parametrize("keys", KEYS)
def test_states_stay_bounded_under_corrections(keys, write):
    """10,000 tokens whose modes hardly decay, b = 1: what is read stays near the size of the values."""
    T, R, M = 10_000, 8, 16
    delta, rng = 0.01, np.random.default_rng(0)
    index = KEYS[keys](np.arange(T))
    k = rng.normal(size=(T, R))
    k = (k / np.linalg.norm(k, axis=1, keepdims=True))[index]
    v = rng.normal(size=(T, R))
    basis = Basis(
        jnp.log(jnp.array([delta])), jnp.full((1, M), np.log(1e-4 / delta)),
        jnp.asarray(2 * np.pi * np.arange(M)[None] / (M * delta)), None,
    )  # fmt: skip
    basis = jax.tree.map(lambda x: x.astype(jnp.float32), basis)
    one = jnp.ones((1, 1))

    def advance(state, token):
        k, v = token
        o, state = adaptive_step(k, k, v, basis, state, gains=one, readout="hermitian", write=write)
        return state, (jnp.abs(state[:, :, R:]).max(), jnp.abs(o).max())

    tokens = (jnp.asarray(x[:, None, None], jnp.float32) for x in (k, v))
    _, (size, read) = jax.jit(lambda *x: jax.lax.scan(advance, jnp.zeros((1, 1, 2 * R, 2 * M)), x))(*tokens)
    assert read.max() < (2 if write == "delta" else 10) * np.abs(v).max()
    assert size[T // 2 :].max() < 2 * size[: T // 2].max()


def test_inverse_of_alike_keys():
    """L of ones, as of equal keys with b = 1: products of powers of L would overflow."""
    K = 128
    lower = jnp.tril(jnp.ones((K, K)), -1)
    inverse = jax.jit(unit_inverse, compiler_options=QUICK)(lower)
    np.testing.assert_array_equal(inverse, np.eye(K) - np.eye(K, k=-1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(K, 3)), jnp.float32)
    helpers.assert_close(lower @ solve(inverse, lower, x) + solve(inverse, lower, x), x, "float32", reduction=K * K)


def test_bad_arguments_are_named():
    case = make_case(np.random.default_rng(0), "clock and delta", 2, 3)
    function = op("chunkwise", 4, "transpose")
    with pytest.raises(ValueError, match=r"gains of shape \(2, 4, 2\) must have the shape \(2, 3, 2\)"):
        function(case | {"gains": np.zeros((2, 4, 2))})
    with pytest.raises(ValueError, match="interdomain_attention"):
        function({name: x for name, x in case.items() if name not in ("gains", "log_steps")})
    with pytest.raises(ValueError, match="'pallas_tpu'.*chunkwise"):
        op("pallas_tpu", 4, "transpose")(case)
    with pytest.raises(ValueError, match="write='damped' needs readout='hermitian', not 'real'"):
        op("chunkwise", 4, "real", "damped")(case)
    with pytest.raises(ValueError, match="chunk_size=0"):
        op("chunkwise", 0, "transpose")(case)
    token = [case[name][:, 0] for name in ("q", "k", "v")]
    rest = Basis(case["log_delta"], case["a_log"], case["a_imag"], None), case["initial_state"]
    with pytest.raises(ValueError, match="write='dampd' is not known"):
        adaptive_step(*token, *rest, gains=case["gains"][:, 0], write="dampd", readout="hermitian")
    with pytest.raises(ValueError, match="write='damped' needs readout='hermitian', not 'transpose'"):
        adaptive_step(*token, *rest, gains=case["gains"][:, 0], write="damped")
    with pytest.raises(ValueError, match=r"gains of shape \(2, 3\) must have the shape \(2, 2\)"):
        adaptive_step(*token, *rest, gains=np.zeros((2, 3)))

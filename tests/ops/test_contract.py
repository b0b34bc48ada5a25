"""The contract of the core ops, for every backend: numbers against the float64 oracle, algebra, and refusals."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from support import helpers, oracles
from support.gpu import interpreter

from idattn.ops import (
    Basis,
    chunkwise,
    interdomain_attention,
    linear_readout,
    linear_step,
    pallas_gpu,
    pallas_tpu,
    step,
)
from idattn.ops.backend import Backend
from idattn.ops.chunks import shorter
from idattn.ops.einsum import einsum_f32

XLA_BACKENDS = ("recurrent", "associative", "chunkwise")
KERNELS = ("pallas_tpu", "pallas_gpu")
# All with documents and states. The interpreter of the GPU kernels takes 0.1 s a chunk and query head.
BACKENDS = (*XLA_BACKENDS, "pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.slow))
SIZES = dict(H=4, G=2, R=4, E=3, M=5)
PADDING = helpers.PADDING
# Compiling takes nearly all of this file's time, and half of it so.
QUICK = {"xla_backend_optimization_level": 0}


# Those that no name chooses on a CPU. The kernels are interpreted, with NaN wherever they have not written. The
# interpreter of a TPU's memory takes several times as long as XLA takes for the kernel as one program.
INTERPRETED = {
    "chunkwise on GPUs": chunkwise.ON_GPUS,
    "chunkwise in halves": Backend(name="chunkwise in halves", rule=shorter(chunkwise.BACKEND.rule, 2)),
    "pallas_tpu": pallas_tpu.interpreted(True),
    "pallas_tpu in memory": pallas_tpu.interpreted(pltpu.InterpretParams(uninitialized_memory="nan")),
    "pallas_gpu": pallas_gpu.interpreted(interpreter()),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compilation of the op and its cotangents; every pattern of segments runs through it."""

    T: int
    K: int
    B: int
    readout: str
    c: str  # "full", "diagonal" or "identity"
    planes: bool  # c as a pair of real planes rather than a complex array
    given: bool  # whether segment ids and an initial state are passed at all

    def __str__(self):
        kind = self.c + ("_planes" if self.planes else "")
        return f"T{self.T}-K{self.K}-B{self.B}-{self.readout}-{kind}-{'segments' if self.given else 'plain'}"


SHAPES = [
    Shape(1, 4, 3, "hermitian", "diagonal", True, False),
    Shape(3, 4, 1, "transpose", "identity", True, True),
    Shape(4, 4, 3, "real", "full", False, True),
    Shape(5, 4, 1, "hermitian", "full", False, True),
    Shape(17, 4, 3, "transpose", "full", True, True),
    Shape(9, 8, 3, "transpose", "diagonal", False, False),
]
# Chunks of one token (a scan over tokens), and more chunks than the chunkwise backend works on at a time.
TOKENS, GROUPS = Shape(9, 1, 3, "transpose", "full", True, True), Shape(39, 2, 3, "hermitian", "full", True, True)
NESTED = Shape(75, 2, 2, "transpose", "full", True, True)  # blocks of blocks of blocks of `scans.BLOCK` chunks
FLOAT64 = [
    *(("chunkwise on GPUs", shape) for shape in (SHAPES[0], GROUPS, NESTED)),
    *(("chunkwise", shape) for shape in [*SHAPES, GROUPS]),
    *(("chunkwise in halves", shape) for shape in (SHAPES[1], SHAPES[4])),
    *(("associative", shape) for shape in [*SHAPES[3:], TOKENS]),
    *(("recurrent", shape) for shape in SHAPES[2:5]),
    *(("fft", shape) for shape in SHAPES[3:]),
]
# The kernels know no float64; their five chunks of 17 tokens do not divide among the programs of four.
FLOAT32 = [
    *((backend, Shape(29, 8, 1, "real", "full", True, True)) for backend in (*XLA_BACKENDS, "fft")),
    *(("pallas_tpu", shape) for shape in (*SHAPES[:3], SHAPES[5])),
    ("pallas_tpu in memory", SHAPES[4]),
    ("pallas_gpu", SHAPES[0]),
    *(pytest.param("pallas_gpu", shape, marks=pytest.mark.slow) for shape in SHAPES[1:]),
]


def cast(case, dtype):
    """The case as jax arrays: inputs in dtype, parameters and state in float32 or better; needs x64 for float64."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.asarray(x, dtype if name in ("q", "k", "v", "z") else wide) for name, x in case.items()}


def rounded(case, dtype):
    """The case as the op sees it, back in float64 for the oracle."""
    return {name: np.asarray(x).astype(np.float64) for name, x in cast(case, dtype).items()}


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def basis_of(case, planes=True):
    c = None
    if "c_re" in case:
        c = (case["c_re"], case["c_im"]) if planes else case["c_re"] + 1j * case["c_im"]
    return Basis(log_delta=case["log_delta"], a_log=case["a_log"], a_imag=case["a_imag"], c=c)


@functools.cache
def attention(backend, chunk_size, readout, planes=True):
    """(case, segment_ids) -> (o, state)."""

    def function(case, segment_ids=None):
        return interdomain_attention(
            case["q"],
            case["k"],
            case["v"],
            basis_of(case, planes),
            backend=INTERPRETED.get(backend, backend),
            chunk_size=chunk_size,
            segment_ids=segment_ids,
            initial_state=case.get("initial_state"),
            return_state=True,
            readout=readout,
        )

    return function


@functools.cache
def linear(backend, chunk_size, planes=True):
    """(case, segment_ids) -> (y, state) of the linear readout."""

    def function(case, segment_ids=None):
        return linear_readout(
            case["z"],
            basis_of(case, planes),
            case["c_out"],
            backend=backend,
            chunk_size=chunk_size,
            segment_ids=segment_ids,
            initial_state=case.get("initial_state"),
            return_state=True,
        )

    return function


@functools.cache
def quick(function):
    return jax.jit(function, compiler_options=QUICK)


@functools.cache
def with_cotangents(function):
    """Jitted (case, segment_ids, (g_o, g_state)) -> ((o, state), cotangents of the case)."""

    def both(case, segment_ids, g):
        outputs, pullback = jax.vjp(lambda case: function(case, segment_ids), case)
        return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), g, outputs))[0]

    return quick(both)


def compare(function, case, dtype, segment_ids, expected, g, adjoint, check):
    """Run function and its cotangents in dtype and hand every array with the oracle's to check(name, ...)."""
    with precision(dtype):
        poisoned = case if segment_ids is None else helpers.with_nan_padding(case, segment_ids)
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        outputs, actual = with_cotangents(function)(cast(poisoned, dtype), ids, jax.tree.map(jnp.asarray, g))
    o, state = outputs
    assert o.dtype == dtype
    assert state.dtype == np.promote_types(np.float32, o.dtype)
    assert adjoint.keys() == actual.keys()
    check("outputs", o, expected[0], False)
    check("state", state, expected[1], False)
    for name in adjoint:
        check(name, actual[name], adjoint[name], True)
    if segment_ids is not None:
        for name, x in {
            "outputs": o,
            **{name: actual[name] for name in actual if name in ("q", "k", "v", "z")},
        }.items():
            assert not np.asarray(x)[segment_ids == PADDING].any(), f"{name} is not zero at padding"


def judge(function, case, readout, dtype, segment_ids, rng, check):
    """Compare a function of an interdomain case (or, readout None, of a linear one) with the oracle."""
    case = rounded(case, dtype) if dtype != "float64" else case
    forward, adjoint = oracles.linear_forward, oracles.linear_cotangents
    if readout is not None:
        forward, adjoint = (functools.partial(f, readout=readout) for f in (oracles.forward, oracles.cotangents))
    expected = forward(case, segment_ids=segment_ids)
    # Random bits that every dtype holds exactly, so that the oracle and the op start from the same cotangents.
    g = tuple(rng.integers(-64, 65, x.shape).astype(np.float32) / 64 for x in expected)
    adjoint = adjoint(case, g_state=g[1], segment_ids=segment_ids, **{"g_o" if readout else "g_y": g[0]})
    compare(function, case, dtype, segment_ids, expected, g, adjoint, check)


def close(dtype, reduction):
    """A check of `compare` by the tolerance table."""

    def check(name, actual, expected, gradient):
        helpers.assert_close(actual, expected, dtype, reduction=reduction, gradient=gradient, name=name)

    return check


def segments_of(backend, shape):
    return helpers.segment_batches(shape.T, shape.K, shape.B) if shape.given and backend != "fft" else [None]


@pytest.mark.parametrize(("backend", "shape"), FLOAT64, ids=str)
def test_float64(backend, shape):
    """Outputs, final state and every cotangent, as if every element were one rounding: far below 1e-12."""
    rng = np.random.default_rng(shape.T)
    case = helpers.random_case(rng, B=shape.B, T=shape.T, c=shape.c, initial_state=shape.given, **SIZES)
    function = attention(backend, shape.K, shape.readout, shape.planes)
    for segment_ids in segments_of(backend, shape):
        judge(function, case, shape.readout, "float64", segment_ids, rng, close("float64", 1))


@pytest.mark.parametrize(("backend", "shape"), FLOAT32, ids=str)
def test_float32(backend, shape):
    """With phases up to pi, since float32 rounds a phase and every step repeats the error."""
    rng = np.random.default_rng(shape.T)
    options = dict(c=shape.c, initial_state=shape.given, fast_phase=np.pi)
    case = helpers.random_case(rng, B=shape.B, T=shape.T, **options, **SIZES)
    function, check = attention(backend, shape.K, shape.readout, shape.planes), close("float32", shape.T * SIZES["M"])
    for segment_ids in segments_of(backend, shape):
        judge(function, case, shape.readout, "float32", segment_ids, rng, check)


def test_kernels_with_heads_across_tiles():
    """Two blocks of four heads, whose keys cross the tiles of 128 lanes; more modes than a tile; a ragged T."""
    rng = np.random.default_rng(11)
    T, K = 21, 8
    case = helpers.random_case(rng, B=1, T=T, H=8, G=8, R=96, E=32, M=70, fast_phase=np.pi)
    check, ids = close("float32", T * 70), helpers.random_segments(rng, T)[None]
    judge(attention("pallas_tpu", K, "transpose"), case, "transpose", "float32", ids, rng, check)


def test_gpu_kernels_over_chunks():
    rng = np.random.default_rng(12)
    T, K = 9, 4
    case = helpers.random_case(rng, B=2, T=T, H=2, G=2, R=4, E=3, M=5, fast_phase=np.pi)
    check, ids = close("float32", T * 5), np.stack([helpers.random_segments(rng, T) for _ in range(2)])
    judge(attention("pallas_gpu", K, "hermitian"), case, "hermitian", "float32", ids, rng, check)


def test_gpu_kernels_with_several_tiles():
    """Two chunks of two tiles of 64 tokens, whose documents cross tiles, and two query heads for a state."""
    rng = np.random.default_rng(13)
    T, K = 150, 128
    case = helpers.random_case(rng, B=1, T=T, H=2, G=1, R=4, E=3, M=5, fast_phase=np.pi)
    ids = np.repeat([0, 1, PADDING, 1], [50, 40, 10, 50])[None].astype(np.int32)
    judge(attention("pallas_gpu", K, "transpose"), case, "transpose", "float32", ids, rng, close("float32", T * 5))


@pytest.mark.parametrize("backend", [*XLA_BACKENDS, *KERNELS, "fft"])
def test_bfloat16_inputs(backend):
    """Root mean square errors at most 1 % of every head's output and gradients, for Delta from 1e-5 to 1.

    Root mean squares, since a single product rounded to bfloat16 may be far off; over all heads of all cases for
    log_delta, of which a head has only one. Where Delta is larger still, an output is v_t times one number,
    (q_t . k_t) Re(beta^T C^T C beta), which a random C may make as small as it likes.
    """
    delta = np.array([1e-5, 1e-3, 1e-2, 1e-1, 1])
    G, M = len(delta), 16
    n = np.arange(M)
    log_deltas = []

    def mean_square(x, axes=None):
        return np.mean(np.square(x), axis=axes)

    def check(name, actual, expected, gradient):
        error = np.asarray(actual).astype(np.float64) - expected
        if name == "log_delta":
            log_deltas.append((error, expected))
            return
        heads = {"outputs": 2, "q": 2, "k": 2, "v": 2, "state": 1, "initial_state": 1}.get(name, 0)
        axes = tuple(axis for axis in range(expected.ndim) if axis != heads)
        ratio = np.sqrt(mean_square(error, axes) / mean_square(expected, axes))
        assert np.all(ratio <= 0.01), f"{name}: root mean square error ratio {ratio}"

    chunk_size, cases = (36, 1) if backend == "pallas_gpu" else (16, 3)
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        case = helpers.random_case(rng, B=1 if backend == "pallas_gpu" else 2, T=72, H=G, G=G, R=16, E=12, M=M)
        case |= {"log_delta": np.log(delta), "a_log": np.full((G, M), np.log(0.5))}
        case |= {"a_imag": np.tile(M / np.pi * (M / (2 * n + 1) - 1), (G, 1))}  # S4D-Inv, as layers start
        judge(attention(backend, chunk_size, "transpose"), case, "transpose", "bfloat16", None, rng, check)
    ratio = np.sqrt(np.divide(*(mean_square(x) for x in zip(*log_deltas, strict=True))))
    assert ratio <= 0.01, f"log_delta: root mean square error ratio {ratio}"


@pytest.mark.parametrize("backend", [*XLA_BACKENDS, "fft"])
def test_sums_of_float16_do_not_overflow(backend):
    """Gradients of parameters past 65504, the largest float16, to 1 % in root mean squares: sums are in float32."""
    rng = np.random.default_rng(0)
    case = helpers.random_case(rng, B=1, T=128, H=2, G=2, R=8, E=6, M=8, initial_state=False)
    case |= {name: 10 * np.abs(case[name]) for name in ("q", "k", "v")}
    case |= {"log_delta": np.log([1e-2, 1e-1]), "a_log": np.full((2, 8), np.log(0.5))}
    case = rounded(case, "float16")
    expected = oracles.forward(case, "transpose")
    g = np.full(expected[0].shape, 4, np.float32), np.zeros(expected[1].shape, np.float32)
    adjoint = oracles.cotangents(case, g_o=g[0], g_state=g[1], readout="transpose")
    assert max(np.abs(x).max() for x in adjoint.values()) > 1e5

    def check(name, actual, expected, gradient):
        error = np.asarray(actual).astype(np.float64) - expected
        assert np.sqrt(np.mean(error**2)) <= 0.01 * np.sqrt(np.mean(expected**2)), name

    compare(attention(backend, 32, "transpose"), case, "float16", None, expected, g, adjoint, check)


def test_products_of_half_precision_are_summed_in_float32():
    for dtype in ("float16", "bfloat16"):
        ones = jnp.ones(2**17, dtype)
        total = jax.jit(lambda x: einsum_f32("i,i->", x, x, x.dtype))(ones)
        assert (float(total), total.dtype) == (2**17, jnp.float32)


def test_keys_and_values_are_computed_with_in_the_dtype_of_queries():
    arguments = valid_arguments(segment_ids=None, return_state=True, chunk_size=2)
    arguments |= {name: jnp.asarray(arguments[name], "bfloat16") / 3 for name in ("k", "v")}
    wide = {name: arguments[name].astype("float32") for name in ("k", "v")}
    for ours, theirs in zip(*(interdomain_attention(**(arguments | x)) for x in ({}, wide)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


LINEAR_SHAPES = [
    ("chunkwise", 17, 4, 3, "full", True),
    ("associative", 17, 4, 1, "full", True),
    ("recurrent", 5, 4, 1, "diagonal", False),
    ("fft", 17, 4, 3, "full", True),
]


@pytest.mark.parametrize(("backend", "T", "K", "B", "c", "planes"), LINEAR_SHAPES)
def test_linear_readout_float64(backend, T, K, B, c, planes):
    rng = np.random.default_rng(T)
    case = helpers.random_linear_case(rng, B=B, T=T, H=2, W=7, M=6, c=c)
    for segment_ids in helpers.segment_batches(T, K, B) if backend != "fft" else [None]:
        judge(linear(backend, K, planes), case, None, "float64", segment_ids, rng, close("float64", 1))


def test_linear_readout_float32():
    rng = np.random.default_rng(7)
    case = helpers.random_linear_case(rng, B=1, T=17, H=2, W=7, M=6, initial_state=False, fast_phase=np.pi)
    judge(linear("chunkwise", 8), case, None, "float32", None, rng, close("float32", 17 * 6))


@pytest.mark.parametrize(("readout", "c"), [("transpose", "full"), ("hermitian", "identity"), ("real", "full")])
def test_step_repeated_is_the_whole(readout, c):
    case = helpers.random_case(np.random.default_rng(1), B=3, T=7, c=c, **SIZES)
    o, final = oracles.forward(case, readout)
    with jax.enable_x64(True):
        one = quick(functools.partial(step, readout=readout))
        case = cast(case, "float64")
        state = case["initial_state"]
        for t in range(7):
            actual, state = one(case["q"][:, t], case["k"][:, t], case["v"][:, t], basis_of(case), state)
            helpers.assert_close(actual, o[:, t], "float64", reduction=7, name=f"output {t}")
        helpers.assert_close(state, final, "float64", reduction=7, name="state")


def test_linear_step_repeated_is_the_whole():
    case = helpers.random_linear_case(np.random.default_rng(2), B=3, T=7, H=2, W=5, M=6)
    y, final = oracles.linear_forward(case)
    with jax.enable_x64(True):
        case = cast(case, "float64")
        state = case["initial_state"]
        for t in range(7):
            actual, state = quick(linear_step)(case["z"][:, t], basis_of(case, planes=False), case["c_out"], state)
            helpers.assert_close(actual, y[:, t], "float64", reduction=7, name=f"output {t}")
        helpers.assert_close(state, final, "float64", reduction=7, name="state")


def test_step_keeps_the_dtypes():
    case = cast(helpers.random_case(np.random.default_rng(3), B=1, T=1, **SIZES), "bfloat16")
    q, k, v = (case[name][:, 0] for name in ("q", "k", "v"))
    o, state = jax.eval_shape(step, q, k, v, basis_of(case), case["initial_state"])
    assert (o.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    z = jnp.concatenate([k, v], axis=-1)
    y, state = jax.eval_shape(linear_step, z, basis_of(case), case["a_imag"], case["initial_state"])
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def right_padded(x, start, stop):
    """Tokens start to stop of x (B, T, ...), moved to the left end; the rest is NaN."""
    tail = np.full((x.shape[0], x.shape[1] - (stop - start), *x.shape[2:]), np.nan)
    return np.concatenate([x[:, start:stop], tail], axis=1)


PROPERTY_T, PROPERTY_K = 12, 4
seeds = st.integers(0, 2**32 - 1)


def property_case(seed, **changes):
    rng = np.random.default_rng(seed)
    case = helpers.random_case(rng, B=3, T=PROPERTY_T, **SIZES)
    return rng, case, np.stack([helpers.random_segments(rng, PROPERTY_T) for _ in range(3)])


def dtype_of(backend):
    return "float32" if backend in KERNELS else "float64"


def run_property(backend, case, segment_ids):
    with precision(dtype_of(backend)):
        function = quick(attention(backend, PROPERTY_K, "transpose"))
        o, state = function(cast(case, dtype_of(backend)), jnp.asarray(segment_ids, jnp.int32))
    return np.asarray(o), np.asarray(state)


def holds(**strategies):
    """A test that a property holds for every backend: in 50 examples, in 3 of the GPU's kernels."""

    def decorate(property_):
        @pytest.mark.parametrize("backend", BACKENDS)
        def test(backend):
            @settings(max_examples=3 if backend == "pallas_gpu" else 50)
            @given(**strategies)
            def example(**values):
                property_(backend, **values)

            example()

        return test

    return decorate


@holds(seed=seeds, split=st.integers(1, PROPERTY_T - 1))
def test_two_halves_are_the_whole(backend, seed, split):
    """f([a; b]) = f(b, state = f(a)), whenever b does not begin a new document."""
    _, case, segment_ids = property_case(seed)
    continues = segment_ids[:, split - 1] == segment_ids[:, split]
    o, state = run_property(backend, case, segment_ids)
    halves = []
    for start, stop in ((0, split), (split, PROPERTY_T)):
        part = case | {name: right_padded(case[name], start, stop) for name in ("q", "k", "v")}
        ids = np.full_like(segment_ids, PADDING)
        ids[:, : stop - start] = segment_ids[:, start:stop]
        half, last = run_property(backend, part, ids)
        halves.append(half[:, : stop - start])
        case = case | {"initial_state": last}
    # Only rows that continue: the second half cannot know that its first token starts anew.
    for b in np.flatnonzero(continues):
        helpers.assert_close(
            np.concatenate(halves, axis=1)[b], o[b], dtype_of(backend), reduction=PROPERTY_T, name="outputs"
        )
        helpers.assert_close(last[b], state[b], dtype_of(backend), reduction=PROPERTY_T, name="state")


@holds(seed=seeds, split=st.integers(1, PROPERTY_T - 1))
def test_a_reset_is_a_split(backend, seed, split):
    """Two documents in a row are the first with the initial state and the second from zeros."""
    _, case, _ = property_case(seed)
    segment_ids = np.tile((np.arange(PROPERTY_T) >= split).astype(np.int32), (3, 1))
    o, state = run_property(backend, case, segment_ids)
    ids = np.where(np.arange(PROPERTY_T) < PROPERTY_T - split, 0, PADDING) + np.zeros((3, 1), np.int32)
    part = {name: right_padded(case[name], split, PROPERTY_T) for name in ("q", "k", "v")}
    part["initial_state"] = np.zeros_like(case["initial_state"])
    second, final = run_property(backend, case | part, ids)
    helpers.assert_close(
        o[:, split:], second[:, : PROPERTY_T - split], dtype_of(backend), reduction=PROPERTY_T, name="outputs"
    )
    helpers.assert_close(state, final, dtype_of(backend), reduction=PROPERTY_T, name="state")


@holds(seed=seeds)
def test_linear_in_v_from_a_zero_state(backend, seed):
    rng, case, segment_ids = property_case(seed)
    case["initial_state"] = np.zeros_like(case["initial_state"])
    other, scale = rng.normal(size=case["v"].shape), rng.normal()
    o, _ = run_property(backend, case, segment_ids)
    o_other, _ = run_property(backend, case | {"v": other}, segment_ids)
    o_sum, _ = run_property(backend, case | {"v": case["v"] + scale * other}, segment_ids)
    helpers.assert_close(o_sum, o + scale * o_other, dtype_of(backend), reduction=PROPERTY_T, name="outputs")


@holds(seed=seeds)
def test_rows_and_states_may_be_permuted(backend, seed):
    """Neither the rows of a batch nor the key-value heads (each with its query heads) know of each other."""
    rng, case, segment_ids = property_case(seed)
    o, state = run_property(backend, case, segment_ids)
    rows, heads = rng.permutation(3), np.array([1, 0])
    query_heads = np.array([2, 3, 0, 1])
    moved = {name: case[name][heads] for name in ("log_delta", "a_log", "a_imag", "c_re", "c_im")}
    moved |= {name: case[name][rows][:, :, heads] for name in ("k", "v")}
    moved |= {"q": case["q"][rows][:, :, query_heads], "initial_state": case["initial_state"][rows][:, heads]}
    o_moved, state_moved = run_property(backend, moved, segment_ids[rows])
    helpers.assert_close(o_moved, o[rows][:, :, query_heads], dtype_of(backend), name="outputs")
    helpers.assert_close(state_moved, state[rows][:, heads], dtype_of(backend), name="state")


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_the_future_nor_another_document_is_read(backend):
    """Bitwise: later tokens cannot change an output, nor can the documents before a reset."""
    rng, case, _ = property_case(5)
    segment_ids = np.tile(np.repeat([0, 1], [5, 7]), (3, 1))
    o, state = run_property(backend, case, segment_ids)
    other = helpers.random_case(rng, B=3, T=PROPERTY_T, **SIZES)

    def changed(tokens):
        return case | {name: np.where(tokens[:, None, None], other[name], case[name]) for name in ("q", "k", "v")}

    o_first, state_first = run_property(
        backend, changed(np.arange(PROPERTY_T) < 5) | {"initial_state": other["initial_state"]}, segment_ids
    )
    np.testing.assert_array_equal(o_first[:, 5:], o[:, 5:])
    np.testing.assert_array_equal(state_first, state)
    for t in range(1, PROPERTY_T):
        o_late, _ = run_property(backend, changed(np.arange(PROPERTY_T) >= t), segment_ids)
        np.testing.assert_array_equal(o_late[:, :t], o[:, :t])
        assert (o_late[:, t:] != o[:, t:]).any()


@pytest.mark.parametrize("backend", ["recurrent", "fft"])
def test_forward_mode(backend):
    """The directional derivative is that of the backward pass; chunked backends refuse, as documented."""
    _, case, _ = property_case(5)
    with jax.enable_x64(True):
        case = cast(case, "float64")
        direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), case)
        op = attention(backend, None, "transpose")

        def function(case):
            return jnp.sum(jnp.sin(op(case)[0]))

        _, derivative = quick(lambda case, direction: jax.jvp(function, (case,), (direction,)))(case, direction)
        gradient = quick(jax.grad(function))(case)
        expected = sum(jnp.vdot(gradient[name], direction[name]) for name in case)
        helpers.assert_close(derivative, expected, "float64", reduction=PROPERTY_T * 100)
        chunked = jax.jit(lambda case: attention("chunkwise", 4, "transpose")(case)[0])
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(chunked, (case,), (direction,))


def test_fft_is_causal_to_tolerance():
    """Later tokens reach earlier outputs by rounding alone, relative to the largest value of the row."""
    _, case, _ = property_case(5)
    large = case | {name: case[name] * np.where(np.arange(PROPERTY_T) < 6, 1, 100)[:, None, None] for name in "qkv"}
    with jax.enable_x64(True):
        function = quick(attention("fft", None, "transpose"))
        (o, _), (o_large, _) = (function(cast(x, "float64")) for x in (case, large))
    assert not np.array_equal(o[:, :6], o_large[:, :6])
    leak = np.max(np.abs(o[:, :6] - o_large[:, :6])) / np.max(np.abs(o_large))
    assert leak <= helpers.TOLERANCE["float64"]


def extreme_case(a_imag, **sizes):
    """Two key-value heads with log_delta = -30 and 30, whose modes are every pair of a_log = +-30 and a_imag."""
    a_log, a_imag = (x.ravel() for x in np.meshgrid([-30.0, 30.0], a_imag))
    case = helpers.random_case(np.random.default_rng(9), H=4, G=2, R=4, E=3, M=len(a_log), **sizes)
    return case | {
        "log_delta": np.array([-30.0, 30.0]),
        "a_log": np.tile(a_log, (2, 1)),
        "a_imag": np.tile(a_imag, (2, 1)),
    }


@pytest.mark.parametrize(
    ("backend", "readout"),
    [("chunkwise", "hermitian"), *((backend, "transpose") for backend in (*XLA_BACKENDS, "pallas_tpu", "fft"))],
)
def test_extreme_parameters_stay_finite(backend, readout):
    case = extreme_case([0.0, 1e6, -1e6], B=1, T=9)
    case = cast(case, "float32")
    function = attention(backend, 4, readout)
    # Of this size, since some cotangents for ones, 4e38, are more than float32 can hold.
    g = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), jax.eval_shape(function, case))
    outputs, cotangents = with_cotangents(function)(case, None, g)
    for name, x in {"outputs": outputs[0], "state": outputs[1], **cotangents}.items():
        bad = np.argwhere(~np.isfinite(np.asarray(x)))
        assert not bad.size, f"{name} has {len(bad)} values of {x.size} that are not finite, first at {bad[0]}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_parameters_without_rotation_are_accurate(backend):
    """Without a phase the extremes are well conditioned: every mode of the state is right relative to itself."""
    case = rounded(extreme_case([0.0], B=1, T=9), "float32")
    _, expected = oracles.forward(case, "transpose")
    _, state = quick(attention(backend, 4, "transpose"))(cast(case, "float32"))
    for g, m in np.ndindex(2, 2):
        helpers.assert_close(state[:, g, :, m::2], expected[:, g, :, m::2], "float32", reduction=9, name=f"{g=} {m=}")


def test_small_steps_lose_no_digits():
    """(lambda - 1) / a and its derivatives cancel at small Delta a: naive ones lose up to every float32 digit."""
    rng = np.random.default_rng(8)
    sizes = dict(T=9, H=4, R=4, E=3)
    case = helpers.random_case(rng, B=1, G=4, M=3, initial_state=False, **sizes)
    case |= {"log_delta": np.log([1e-6, 1e-4, 1e-2, 0.3]), "a_log": np.full((4, 3), np.log(0.5))}
    case |= {"a_imag": np.tile([0.0, 0.3, 3.0], (4, 1))}

    def check(name, actual, expected, gradient):
        heads = {"outputs": 2, "q": 2, "k": 2, "v": 2, "state": 1}.get(name, 0)
        for g in range(4):  # each head relative to itself: they differ by powers of Delta
            actual_g, expected_g = (np.take(np.asarray(x), g, axis=heads) for x in (actual, expected))
            options = dict(reduction=sizes["T"] * (sizes["R"] + sizes["E"]), gradient=gradient)
            helpers.assert_close(actual_g, expected_g, "float32", name=f"{name} of head {g}", **options)

    judge(attention("chunkwise", 4, "transpose"), case, "transpose", "float32", None, rng, check)


def test_options_change_the_program_and_the_defaults_are_chunkwise():
    case = cast(helpers.random_case(np.random.default_rng(4), B=1, T=9, initial_state=False, **SIZES), "float32")
    arguments = case["q"], case["k"], case["v"], basis_of(case)
    text = {options: jax.jit(attention(*options, "transpose")).lower(case).as_text() for options in _OPTIONS}
    assert text["auto", 4] == text["chunkwise", 4]  # chunks of 4 are no tiles
    assert len({text[options] for options in _OPTIONS}) == len(_OPTIONS) - 1
    o = quick(interdomain_attention)(*arguments)
    expected, _ = oracles.forward(rounded(case, "float32"), "transpose")
    helpers.assert_close(o, expected, "float32", reduction=9 * 5)


def test_chunks_are_shorter_on_cpus_unless_a_number_is_asked_for():
    """By the platform that is compiled for: scores and answers of a chunk are K x (K + 2M)."""
    case = cast(helpers.random_case(np.random.default_rng(4), B=1, T=256, initial_state=False, **SIZES), "float32")
    for chunk_size, platform, size in ((None, "cpu", 64), (128, "cpu", 128), (None, "tpu", 128), (None, "cuda", 128)):
        traced = jax.jit(attention("auto", chunk_size, "transpose")).trace(case)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert [K for K in (64, 128) if f"x{K}x{K + 10}x" in text] == [size], platform


_OPTIONS = [("auto", 4), ("fft", None), ("chunkwise", 4), ("chunkwise", 8), ("associative", 4), ("recurrent", 4)]


def valid_arguments(**changes):
    """Arguments of the op, some replaced; names of a basis' fields replace those."""
    case = cast(helpers.random_case(np.random.default_rng(6), B=2, T=3, **SIZES), "float32")
    c = changes.pop("c", (case["c_re"], case["c_im"]))
    fields = {name: changes.pop(name, case[name]) for name in ("log_delta", "a_log", "a_imag")}
    arguments = {name: case[name] for name in ("q", "k", "v", "initial_state")}
    return arguments | {"basis": Basis(**fields, c=c), "segment_ids": jnp.zeros((2, 3), jnp.int32)} | changes


def zeros(*shape):
    return np.zeros(shape, np.float32)


# What is wrong, and the words that the message must hold: the offending values and the rule's.
REFUSALS = {
    "H not a multiple of G": ({"q": zeros(2, 3, 5, 4)}, ["5", "2"]),
    "T of k": ({"k": zeros(2, 7, 2, 4)}, ["k", "7", "3"]),
    "R of k": ({"k": zeros(2, 3, 2, 9)}, ["k", "9", "4"]),
    "G of v": ({"v": zeros(2, 3, 1, 3)}, ["v", "(2, 3, 1, 3)"]),
    "rank of q": ({"q": zeros(2, 3, 4)}, ["q", "(2, 3, 4)"]),
    "dtype of q": ({"q": np.zeros((2, 3, 4, 4), np.int32)}, ["q", "int32"]),
    "G of the basis": ({"log_delta": zeros(4)}, ["log_delta", "4", "2"]),
    "M of the basis": ({"a_imag": zeros(2, 6)}, ["a_imag", "(2, 6)", "(2, 5)"]),
    "shape of c": ({"c": np.zeros((2, 5, 6), np.complex64)}, ["c", "(2, 5, 6)", "(2, 5, 5)"]),
    "planes of c": ({"c": (zeros(2, 5), zeros(2, 5, 5))}, ["c", "(2, 5)", "(2, 5, 5)"]),
    "shape of the state": ({"initial_state": zeros(2, 2, 6, 10)}, ["state", "(2, 2, 6, 10)", "(2, 2, 7, 10)"]),
    "unknown backend": ({"backend": "chunkwize"}, ["backend", "'chunkwize'", "'chunkwise'"]),
    "unknown readout": ({"readout": "hermitan"}, ["readout", "'hermitan'", "'hermitian'"]),
    "chunk size": ({"chunk_size": 0}, ["chunk_size", "0", "1"]),
    "shape of segment ids": ({"segment_ids": np.zeros((2, 4), np.int32)}, ["segment_ids", "(2, 4)", "(2, 3)"]),
    "dtype of segment ids": ({"segment_ids": zeros(2, 3)}, ["segment_ids", "float32", "integer"]),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_bad_arguments_are_named(change):
    changes, words = REFUSALS[change]
    with pytest.raises(ValueError) as error:
        interdomain_attention(**valid_arguments(**changes))
    for word in words:
        assert word in str(error.value)


def test_backends_name_one_that_can():
    good = valid_arguments()
    with pytest.raises(NotImplementedError, match="'fft'.*segment_ids.*'chunkwise'"):
        interdomain_attention(**good, backend="fft")
    with pytest.raises(NotImplementedError, match="'fft'.*segment_ids.*'chunkwise'"):
        linear_readout(good["k"], good["basis"], jnp.ones((2, 5)), backend="fft", segment_ids=good["segment_ids"])
    with pytest.raises(NotImplementedError, match="'pallas_tpu'.*linear.*'chunkwise'"):
        linear_readout(good["k"], good["basis"], jnp.ones((2, 5)), backend="pallas_tpu")


def test_recurrent_stores_few_states():
    """The backward pass holds the states of about 2 sqrt(T) tokens, not of T."""
    case = helpers.random_case(np.random.default_rng(0), B=1, T=1024, H=1, G=1, R=16, E=16, M=16)
    case = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in case.items()}
    g = jax.eval_shape(attention("recurrent", None, "transpose"), case)
    compiled = with_cotangents(attention("recurrent", None, "transpose")).lower(case, None, g).compile()
    state = 16 * 32 * 8  # M (R + E) complex numbers
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 32 * state  # a token stores U, Gamma and more


def test_step_and_linear_readout_refuse_too():
    good = valid_arguments()
    token = {name: good[name][:, 0] for name in ("q", "k", "v")} | {"basis": good["basis"]}
    with pytest.raises(ValueError, match=r"state.*\(2, 2, 6, 10\).*\(2, 2, 7, 10\)"):
        step(**token, state=jnp.ones((2, 2, 6, 10)))
    with pytest.raises(ValueError, match="'reel'.*'real'"):
        step(**token, state=good["initial_state"], readout="reel")
    with pytest.raises(ValueError, match=r"c_out.*\(2, 6\).*\(2, 5\)"):
        linear_readout(good["k"], good["basis"], jnp.ones((2, 6)))
    with pytest.raises(ValueError, match=r"log_delta.*\(2,\).*\(4,\)|a_log.*\(2, 5\).*\(4, 5\)"):
        linear_readout(good["q"], good["basis"], jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="'recurent'.*'recurrent'"):
        linear_readout(good["k"], good["basis"], jnp.ones((2, 5)), backend="recurent")
    with pytest.raises(ValueError, match=r"c_out.*\(2, 6\).*\(2, 5\)"):
        linear_step(good["k"][:, 0], good["basis"], jnp.ones((2, 6)), good["initial_state"])

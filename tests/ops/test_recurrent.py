"""The literal recurrence in segments of sqrt(T) tokens: it is the oracle's, and its backward keeps few states."""

import functools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from idattn.ops import recurrent
from idattn.ops.discretize import Basis

PADDING = helpers.PADDING
INPUTS = ("q", "k", "v", "z")


def op(readout, case, segment_ids):
    """(outputs, state) of interdomain attention or, readout None, of the linear readout."""
    basis = Basis(case["log_delta"], case["a_log"], case["a_imag"], (case["c_re"], case["c_im"]))
    inputs = [case[name] for name in INPUTS if name in case]
    if readout is None:
        return recurrent.linear(*inputs, basis, case["c_out"], case["initial_state"], segment_ids)
    return recurrent.interdomain(*inputs, basis, case["initial_state"], segment_ids, readout=readout)


@functools.cache
def with_cotangents(readout, quick):
    """Jitted (case, segment_ids, (g_outputs, g_state)) -> ((outputs, state), cotangents of the case)."""
    options = {"xla_backend_optimization_level": 0} if quick else None

    @functools.partial(jax.jit, compiler_options=options)
    def both(case, segment_ids, g):
        outputs, pullback = jax.vjp(lambda case: op(readout, case, segment_ids), case)
        return outputs, pullback(g)[0]

    return both


def random_case(readout, rng, **sizes):
    """A case of M modes, 8 features in the state."""
    if readout is None:
        return helpers.random_linear_case(rng, W=8, **sizes)
    return helpers.random_case(rng, G=sizes["H"], R=4, E=4, **sizes)


def oracle(readout, case, g, segment_ids=None):
    """((outputs, state), cotangents of the case)."""
    if readout is None:
        return oracles.linear_forward(case, segment_ids), oracles.linear_cotangents(case, *g, segment_ids)
    return oracles.forward(case, readout, segment_ids), oracles.cotangents(case, readout, *g, segment_ids)


def random_cotangents(rng, readout, case):
    inputs = case["z"] if readout is None else case["v"]
    return rng.normal(size=inputs.shape), rng.normal(size=case["initial_state"].shape)


def assert_equal_to_oracle(actual, expected, reduction):
    (outputs, state), cotangents = actual
    (expected_outputs, expected_state), expected_cotangents = expected
    close = functools.partial(helpers.assert_close, dtype="float64", reduction=reduction)
    close(outputs, expected_outputs, name="outputs")
    close(state, expected_state, name="state")
    assert cotangents.keys() == expected_cotangents.keys()
    for name, x in expected_cotangents.items():
        close(cotangents[name], x, name=name, gradient=True)


@pytest.mark.parametrize(("readout", "T"), [("transpose", 1), ("hermitian", 17), (None, 7)])
def test_segments_that_do_not_divide(readout, T):
    """Segments of 1, 5 and 3 tokens, the last one filled up: neither that nor padding moves the state."""
    rng = np.random.default_rng(T)
    case = random_case(readout, rng, B=3, T=T, H=2, M=5)
    g = random_cotangents(rng, readout, case)
    for segment_ids in helpers.segment_batches(T, 4, 3):
        with jax.enable_x64(True):
            poisoned = helpers.with_nan_padding(case, segment_ids)
            arrays, ids, g_arrays = jax.tree.map(jnp.asarray, (poisoned, segment_ids, g))
            actual = with_cotangents(readout, quick=True)(arrays, ids, g_arrays)
        assert_equal_to_oracle(actual, oracle(readout, case, g, segment_ids), T)
        for x in (actual[0][0], *(actual[1][name] for name in INPUTS if name in case)):
            assert not np.asarray(x)[segment_ids == PADDING].any()


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("readout", ["transpose", None])
def test_the_backward_keeps_few_states(readout):
    """Between the passes 4 sqrt(T) states at most, at the peak 8, where a scan of T tokens kept more than T.

    The states of a segment are recomputed together with what reading them keeps, U and Gamma among it; what does not
    grow with T, copies of C above all, is as large as 40 states.
    """
    T, M = 1000, 64
    rng = np.random.default_rng(T)
    case = random_case(readout, rng, B=1, T=T, H=1, M=M)
    g = random_cotangents(rng, readout, case)
    state = 16 * M * 8  # bytes of M x 8 complex numbers
    with jax.enable_x64(True):
        arrays, g_arrays = jax.tree.map(jnp.asarray, (case, g))
        pullback = jax.eval_shape(lambda case: jax.vjp(lambda case: op(readout, case, None), case)[1], arrays)
        compiled = with_cotangents(readout, quick=False).lower(arrays, None, g_arrays).compile()
        actual = compiled(arrays, None, g_arrays)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback)) / state
    peak = compiled.memory_analysis().temp_size_in_bytes / state
    assert math.sqrt(T) <= kept <= 4 * math.sqrt(T)
    assert peak <= 8 * math.sqrt(T) + 40
    assert_equal_to_oracle(actual, oracle(readout, case, g), T)

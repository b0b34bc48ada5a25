"""Decoding in blocks: the outputs and the state of the recurrence, wherever a block ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.helpers import assert_close, random_case, random_linear_case

from idattn.ops import Basis, blockwise

T, K = 11, 4


def in_blocks(case, read, width):
    """Outputs of every token and the last state, in blocks of K tokens, of which the last is not filled."""
    c = (case["c_re"], case["c_im"]) if "c_re" in case else None
    basis = Basis(case["log_delta"], case["a_log"], case["a_imag"], c)
    z = case["z"] if "z" in case else jnp.concatenate([case["k"], case["v"]], axis=-1)
    state = case["initial_state"]
    states = jnp.stack([jnp.full_like(state, np.nan), state])  # layer 1 of two
    outputs = []
    for start in range(0, T, K):
        block = blockwise.open_block(basis, len(z), K, width, z.dtype)
        for t in range(start, min(start + K, T)):
            block = blockwise.add_token(block, z[:, t])
            outputs.append(read(t, basis, states, 1, block))
        states = states.at[1].set(blockwise.close_block(states[1], block))
    return jnp.stack(outputs, axis=1), states[1]


@pytest.mark.parametrize(("readout", "c"), [("transpose", "full"), ("hermitian", "diagonal"), ("real", "identity")])
def test_queries(readout, c):
    case = random_case(np.random.default_rng(0), B=3, T=T, H=4, G=2, R=4, E=3, M=5, c=c)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in case.items()}
        read = lambda t, *block: blockwise.interdomain(arrays["q"][:, t], *block, readout=readout)  # noqa: E731
        o, state = jax.jit(lambda: in_blocks(arrays, read, 7))()
        expected, expected_state = oracles.forward(case, readout)
        assert_close(o, expected, "float64", reduction=T * 5)
        assert_close(state, expected_state, "float64", reduction=T)


def test_linear_readout():
    case = random_linear_case(np.random.default_rng(1), B=3, T=T, H=2, W=6, M=5)
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in case.items()}
        read = lambda t, *block: blockwise.linear(block[0], arrays["c_out"], *block[1:])  # noqa: E731
        y, state = jax.jit(lambda: in_blocks(arrays, read, 6))()
        expected, expected_state = oracles.linear_forward(case)
        assert_close(y, expected, "float64", reduction=T * 5)
        assert_close(state, expected_state, "float64", reduction=T)


def test_a_block_without_tokens_changes_nothing():
    case = random_case(np.random.default_rng(2), B=1, T=1, H=2, G=2, R=4, E=3, M=5, c="identity")
    block = blockwise.open_block(Basis(case["log_delta"], case["a_log"], case["a_imag"], None), 1, K, 7, jnp.float32)
    state = jnp.asarray(case["initial_state"], jnp.float32)
    np.testing.assert_array_equal(blockwise.close_block(state, block), state)

"""Decoding in blocks: the outputs and the state of the recurrence, wherever a block ends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.helpers import assert_close, random_case, random_linear_case

from idattn.ops import Basis, blockwise, blockwise_tpu
from idattn.plan.compiler import tpu_devices

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
        states = blockwise.close_blocks(states, jax.tree.map(lambda x: jnp.stack([x, x]), block))
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
    states = jnp.asarray(case["initial_state"], jnp.float32)[None]
    np.testing.assert_array_equal(blockwise.close_blocks(states, jax.tree.map(lambda x: x[None], block)), states)


@pytest.mark.parametrize(("dtype", "state_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_kernel_that_ends_blocks(dtype, state_dtype):
    L, B, K, G, W, M = 2, 16, 5, 3, 192, 64
    rng = np.random.default_rng(3)
    states = jnp.asarray(rng.normal(size=(L, B, G, W, 2 * M)), state_dtype)
    tokens = jnp.asarray(rng.normal(size=(L, B, K, G, W)), dtype)
    decay, lags = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((L, G, 2, M), (L, K, G, 2 * M)))
    assert blockwise_tpu.fits(states)
    actual = blockwise_tpu.close(states, tokens, decay, lags, interpret=True)
    assert actual.dtype == states.dtype
    x, z, d, c = (np.asarray(x.astype(jnp.float32), np.float64) for x in (states, tokens, decay, lags))
    x = (x[..., :M] + 1j * x[..., M:]) * (d[:, :, 0] + 1j * d[:, :, 1])[:, None, :, None]
    x += np.einsum("lbkgw,lkgm->lbgwm", z, c[..., :M] + 1j * c[..., M:])
    assert_close(actual, np.concatenate([x.real, x.imag], axis=-1), state_dtype, reduction=K + 2)


def test_shapes_that_the_kernel_leaves_to_xla():
    for shape in ((1, 4, 8, 128, 128), (1, 8, 8, 128, 64), (1, 8, 8, 100, 128), (1, 8, 8, 1024, 128)):
        assert not blockwise_tpu.fits(jnp.zeros(shape))


@pytest.mark.parametrize(("B", "G", "W", "M", "K"), [(64, 32, 128, 64, 32), (8, 3, 192, 128, 5)])
def test_the_kernel_that_ends_blocks_compiles(libtpu, B, G, W, M, K):
    """In the states' memory, at the size of the 1.3B model and at an odd one."""
    sizes = {"states": (2, B, G, W, 2 * M), "tokens": (2, B, K, G, W), "decay": (2, G, 2, M), "lags": (2, K, G, 2 * M)}
    dtypes = {"tokens": jnp.bfloat16}
    device = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    arrays = [
        jax.ShapeDtypeStruct(size, dtypes.get(name, jnp.float32), sharding=device) for name, size in sizes.items()
    ]
    compiled = jax.jit(blockwise_tpu.close, donate_argnums=0).lower(*arrays).compile()
    assert (
        "close_block" in compiled.as_text()
        and compiled.memory_analysis().alias_size_in_bytes == math.prod(sizes["states"]) * 4
    )

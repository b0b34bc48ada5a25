"""Gated linear attention: the literal recurrence against the papers' equations, chunks against the literal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import helpers, oracles

from idattn.ops import gated_attention, gated_step

QUICK = {"xla_backend_optimization_level": 0}
PEERS = {"gla": {"features": 4}, "mamba2": {"features": 1}, "gated_deltanet": {"features": 1, "gains": True}}
B, H, R, E = 3, 2, 4, 3


def make_case(rng, peer, T):
    """Decays of a step from 1e-4 to 50; unit keys."""
    k = rng.normal(size=(B, T, H, R))
    case = {
        "q": rng.normal(size=(B, T, H, R)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, T, H, E)),
        "log_decays": -np.exp(rng.uniform(np.log(1e-4), np.log(50), (B, T, H, PEERS[peer]["features"]))),
        "initial_state": rng.normal(size=(B, H, E, R)),
    }
    return case | ({"gains": rng.uniform(0, 1, (B, T, H))} if "gains" in PEERS[peer] else {})


@functools.cache
def op(backend, chunk_size):
    def both(case, segment_ids, g):
        def function(case):
            return gated_attention(
                case["q"], case["k"], case["v"], case["log_decays"], gains=case.get("gains"), backend=backend,
                chunk_size=chunk_size, segment_ids=segment_ids, initial_state=case["initial_state"],
            )  # fmt: skip

        outputs, pullback = jax.vjp(function, case)
        return outputs, pullback(jax.tree.map(lambda g, x: g.astype(x.dtype), g, outputs))[0]

    return jax.jit(both, compiler_options=QUICK)


def with_nan_padding(case, segment_ids):
    padding = (segment_ids == helpers.PADDING)[:, :, None, None]
    return {
        name: x if name == "initial_state" else np.where(padding if x.ndim == 4 else padding[..., 0], np.nan, x)
        for name, x in case.items()
    }


@pytest.mark.parametrize("peer", PEERS)
def test_against_the_papers_equations(peer):
    """Outputs, state and all cotangents, whatever the segments: in float64, and of chunks in float32."""
    rng, T, K = np.random.default_rng(7), 37, 16
    case = {name: x.astype(np.float32).astype(np.float64) for name, x in make_case(rng, peer, T).items()}
    with jax.enable_x64(True):
        for segment_ids in (np.zeros((B, T), np.int32), *helpers.segment_batches(T, K, B)):
            expected = oracles.gated_forward(case, segment_ids)
            g = jax.tree.map(lambda x: rng.normal(size=x.shape), expected)
            poisoned = {name: jnp.asarray(x) for name, x in with_nan_padding(case, segment_ids).items()}
            literal, gradients = op("recurrent", None)(poisoned, segment_ids, g)
            outputs, actual = op("chunkwise", K)(poisoned, segment_ids, g)
            for name, *pair, y in zip(("outputs", "state"), literal, outputs, expected, strict=True):
                for x in pair:
                    helpers.assert_close(x, y, "float64", reduction=T * R, name=name)
            for name in case:
                helpers.assert_close(
                    actual[name], gradients[name], "float64", reduction=T * R, gradient=True, name=name
                )
    single = {name: jnp.asarray(x, jnp.float32) for name, x in with_nan_padding(case, segment_ids).items()}
    outputs, actual = op("chunkwise", K)(single, segment_ids, g)
    for name, x, y in zip(("outputs", "state"), outputs, expected, strict=True):
        assert x.dtype == jnp.float32
        helpers.assert_close(x, y, "float32", reduction=T * R, name=name)
    for name in case:
        helpers.assert_close(actual[name], gradients[name], "float32", reduction=T * R, gradient=True, name=name)


def test_gradients_of_a_literal_recurrence_by_differences():
    """What chunks are compared with above is right: the cotangents are those of small changes of the oracle."""
    rng = np.random.default_rng(2)
    case = make_case(rng, "gated_deltanet", 5)
    o, state = oracles.gated_forward(case)
    g = (rng.normal(size=o.shape), rng.normal(size=state.shape))
    with jax.enable_x64(True):
        _, cotangents = op("recurrent", None)(jax.tree.map(jnp.asarray, case), None, g)
        cotangents = jax.tree.map(np.asarray, cotangents)
    for name in case:
        direction, step = rng.normal(size=case[name].shape), 1e-5
        values = []
        for sign in (step, -step):
            outputs = oracles.gated_forward(case | {name: case[name] + sign * direction})
            values.append(sum((x * y).sum() for x, y in zip(outputs, g, strict=True)))
        expected = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose((cotangents[name] * direction).sum(), expected, rtol=1e-6, err_msg=name)


def test_states_of_unit_keys_stay_bounded():
    """10,000 tokens without decay, b = 1: what a key reads is its value, and the state does not grow."""
    T, rng = 10_000, np.random.default_rng(0)
    k = rng.normal(size=(T, 8)).astype(np.float32)
    k, v = k / np.linalg.norm(k, axis=1, keepdims=True), rng.normal(size=(T, 8)).astype(np.float32)
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1, 1))

    def advance(state, token):
        k, v = (x[None, None] for x in token)
        o, state = gated_step(k, k, v, zero, state, gains=one)
        return state, (jnp.abs(o - v).max(), jnp.abs(state).max())

    _, (error, size) = jax.jit(lambda *x: jax.lax.scan(advance, jnp.zeros((1, 1, 8, 8)), x))(k, v)
    assert error.max() < 1e-5
    assert size[T // 2 :].max() < 2 * size[: T // 2].max()


def test_backward_keeps_no_states(optimised):
    """Memory for the gradient of 64 chunks is far below that of their states, at 16 times the tokens not 16 times."""
    R = 64

    def temporary(T):
        def loss(q):
            o, _ = gated_attention(q, q, q, jnp.full((1, T, 1, R), -0.1, jnp.float32), chunk_size=16)
            return jnp.sum(o**2)

        compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, T, 1, R), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    T = 4096
    assert temporary(T) < 4 * R * R * T / 16 / 2 + 16 * 4 * T * R


def test_bad_arguments_are_named():
    case = make_case(np.random.default_rng(0), "gated_deltanet", 3)
    arrays = [case[name] for name in ("q", "k", "v", "log_decays")]
    with pytest.raises(ValueError, match=r"gains of shape \(3, 4, 2\) must have the shape \(3, 3, 2\)"):
        gated_attention(*arrays, gains=np.zeros((3, 4, 2)))
    with pytest.raises(ValueError, match=r"log_decays of shape \(3, 3, 2, 3\) must have the shape \(3, 3, 2, 4\)"):
        gated_attention(*arrays[:3], np.zeros((3, 3, 2, 3)))
    with pytest.raises(ValueError, match="'pallas_tpu'.*chunkwise"):
        gated_attention(*arrays, backend="pallas_tpu")
    with pytest.raises(ValueError, match="chunk_size=0"):
        gated_attention(*arrays, chunk_size=0)
    with pytest.raises(ValueError, match=r"the state of shape \(3, 2, 4, 3\) must have the shape \(3, 2, 3, 4\)"):
        gated_step(*(x[:, 0] for x in arrays), np.zeros((3, 2, 4, 3)))

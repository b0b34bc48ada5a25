"""Softmax attention, as everywhere and as on TPUs, against the formula in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from support.helpers import assert_close, segment_rows

from idattn.ops import softmax_attention
from idattn.ops.segments import find_segments
from idattn.ops.softmax import splash

B, T, H, R = 2, 256, 2, 64


def formula(q, k, v, runs, g):
    """The outputs, and the gradients of q, k and v for the cotangents g."""
    scores = np.einsum("bthr,bshr->bhts", q, k) / np.sqrt(R)
    mask = (runs[:, :, None] == runs[:, None, :]) & np.tri(q.shape[1], dtype=bool)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None]
    weights /= weights.sum(-1, keepdims=True)
    g_weights = np.einsum("bthr,bshr->bhts", g, v)
    g_scores = weights * (g_weights - np.sum(weights * g_weights, axis=-1, keepdims=True)) / np.sqrt(R)
    return (
        np.einsum("bhts,bshr->bthr", weights, v),
        np.einsum("bhts,bshr->bthr", g_scores, k),
        np.einsum("bhts,bthr->bshr", g_scores, q),
        np.einsum("bhts,bthr->bshr", weights, g),
    )


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_outputs_and_gradients(segments, kernel, monkeypatch):
    name = "make_splash_mha_single_device"
    make = getattr(splash_attention_kernel, name)
    monkeypatch.setattr(splash_attention_kernel, name, partial(make, interpret=True))
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.normal(size=(B, T, H, R)).astype(np.float32) for _ in range(4))
    rows = segment_rows(T, 64)
    ids = jnp.asarray(np.stack([rows["ids that come back"], rows["padding over a chunk border"]]), jnp.int32)
    runs = find_segments(ids).run if segments else jnp.zeros((B, T), jnp.int32)

    def function(q, k, v):
        if kernel:
            return splash(q, k, v, runs if segments else None)
        return softmax_attention(q, k, v, ids if segments else None)

    @jax.jit
    def both(q, k, v, g):
        o, pull = jax.vjp(function, q, k, v)
        return o, *pull(g)

    actual = both(q, k, v, g)
    expected = formula(*(x.astype(np.float64) for x in (q, k, v)), np.asarray(runs), g.astype(np.float64))
    for name, ours, theirs in zip(("o", "q", "k", "v"), actual, expected, strict=True):
        assert_close(ours, theirs, "float32", reduction=T, gradient=name != "o", name=name)


def test_segment_ids_must_be_integers():
    x = jnp.zeros((B, T, H, R))
    with pytest.raises(ValueError, match="segment_ids of dtype float32 must be integers"):
        softmax_attention(x, x, x, -jnp.ones((B, T)))


def test_the_kernel_is_chosen_for_tpus_and_whole_tiles():
    def kernels(length):
        x = jax.ShapeDtypeStruct((B, length, H, R), jnp.bfloat16)
        return str(jax.make_jaxpr(softmax_attention)(x, x, x)).count("splash")

    assert kernels(T) > 0 and kernels(T + 1) == 0

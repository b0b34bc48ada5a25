"""The controls against their definitions in NumPy, and where options of the layer end."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.helpers import assert_close

from idattn.choices import find_mixer
from idattn.config import ComputeConfig, ModelConfig
from idattn.nn import InterdomainAttention

B, T, D, H, R = 2, 11, 12, 2, 6


def test_softmax_of_convolved_heads_equals_its_definition():
    """Parameters away from their start, documents, RoPE after the convolution."""
    compute = ComputeConfig(dtype="float32")
    config = ModelConfig.tiny("softmax_conv", init_std=0.5, rope_base=50.0)
    mixer = find_mixer("softmax_conv")(config, residual_std=0.5, compute=compute, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(5)
    for _, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        variable[...] = variable[...] + 0.3 * rng.normal(size=variable.shape).astype(np.float32)
    state = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    x, border = rng.normal(size=(B, T, D)).astype(np.float32), 5
    document = np.where(np.arange(T) < border, 0, 1)
    positions = np.arange(T) - border * document
    turn = np.exp(1j * positions[:, None, None] * 50.0 ** (-np.arange(R // 2) / (R // 2)))

    def heads(name, rotated):
        y, conv = x.astype(np.float64) @ state[name]["weight"], state["core"][f"{name}_conv"]
        convolved = np.zeros_like(y) + conv["bias"]
        for t in range(T):
            for back in range(min(4, positions[t] + 1)):
                convolved[:, t] += conv["taps"][3 - back] * y[:, t - back]
        y = convolved.reshape(B, T, H, R)
        if rotated:
            z = (y[..., : R // 2] + 1j * y[..., R // 2 :]) * turn
            y = np.concatenate([z.real, z.imag], axis=-1)
        return y

    q, k, v = heads("query", True), heads("key", True), heads("value", False)
    weights = np.exp(np.einsum("bthr,bshr->bhts", q, k) / np.sqrt(R))
    weights *= (document[:, None] == document) & (np.arange(T)[:, None] >= np.arange(T))
    o = np.einsum("bhts,bshr->bthr", weights / weights.sum(axis=-1, keepdims=True), v)
    expected = o.reshape(B, T, D) @ state["output"]["weight"]
    y, _ = mixer(jnp.asarray(x), segment_ids=jnp.asarray([document] * B))
    assert_close(y, expected, "float32", reduction=T * D)


def test_a_denominator_of_zero_is_replaced():
    """Queries of 0 read 0 / 0, for which the outputs are 0 and the gradients finite."""
    layer = InterdomainAttention(D, H, rngs=nnx.Rngs(0), num_modes=5, denominator=True)
    layer.query.weight[...] = jnp.zeros_like(layer.query.weight[...])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    total, gradients = nnx.jit(nnx.value_and_grad(lambda layer, x: layer(x)[0].sum()))(layer, x)
    assert total == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))

"""The ideal mixer: its definition, and features that are constants of the program."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import oracles
from support.helpers import assert_close

from idattn.config import ComputeConfig, IdealConfig, ModelConfig, SSMConfig
from idattn.nn import IdealAttention

B, T, D, H, M = 2, 9, 12, 2, 5


def make(dtype="float32", **ideal):
    options = dict(init_std=0.5, ssm=SSMConfig(num_modes=M), ideal=IdealConfig(num_features=8, **ideal))
    config = ModelConfig.tiny("ideal", model_dim=D, num_heads=H, **options)
    layer = IdealAttention(config, residual_std=0.5, compute=ComputeConfig(), rngs=nnx.Rngs(1))
    return layer, jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), dtype)


@nnx.jit
def run(layer, x):
    return layer(x)


@pytest.mark.parametrize("features", ["positive", "fourier", "softmax"])
def test_equals_its_definition(features):
    layer, x = make(features=features, seed=7, floor=0.3)
    y, state = run(layer, x)
    weights = {name: np.asarray(getattr(layer, name).weight[...], np.float64) for name in ("query", "key", "value")}
    q, k, v = ((np.asarray(x, np.float64) @ w).reshape(B, T, H, D // H) for w in weights.values())
    frequencies = np.random.default_rng(7).standard_normal((H, D // H, 4 if features == "fourier" else 8))

    def xi(x):
        x = x / (D // H) ** 0.25
        angle = np.einsum("bthd,hdn->bthn", x, frequencies)
        if features == "fourier":
            return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / np.sqrt(4)
        return np.exp(angle - (x**2).sum(axis=-1, keepdims=True) / (2 if features == "softmax" else 1)) / np.sqrt(8)

    o, coefficients = oracles.ideal_forward(xi(q), xi(k), v, M, 0.3)
    expected = o.reshape(B, T, D) @ np.asarray(layer.output.weight[...], np.float64)
    assert_close(y, expected, "float32", reduction=T * D)
    assert_close(state.memory.coefficients, coefficients, "float32", reduction=T * D)
    np.testing.assert_array_equal(state.position, [T] * B)


def test_features_are_drawn_from_the_seed_and_no_parameters():
    layer, x = make()
    state = nnx.to_flat_state(nnx.state(layer))
    assert {".".join(map(str, path)) for path, _ in state} == {
        f"{n}.weight" for n in ("query", "key", "value", "output")
    }
    y, _ = run(layer, x)
    other = nnx.merge(nnx.graphdef(layer), nnx.state(layer))
    np.testing.assert_array_equal(run(other, x)[0], y)  # as a checkpoint would bring it back
    ideal = dataclasses.replace(layer.config.ideal, seed=1)
    other.config = dataclasses.replace(layer.config, ideal=ideal)
    assert not np.allclose(run(other, x)[0], y, rtol=1e-2)


def test_bfloat16_computes_features_and_state_in_float32():
    layer, x = make()
    exact, _ = run(layer, x)
    y, state = run(layer, x.astype(jnp.bfloat16))
    assert (y.dtype, state.memory.coefficients.dtype) == (jnp.bfloat16, jnp.float32)
    assert 1e-4 < np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 0.02

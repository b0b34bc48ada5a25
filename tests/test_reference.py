"""The float64 reference that ships: the recurrence against the oracle of the tests, the heads against the package."""

import jax
import jax.numpy as jnp
import numpy as np
from support import helpers, oracles

from idattn import reference
from idattn.ops import prepare_heads
from idattn.ops.prepare import HeadInputs, Preparation, rotary_table


def test_attention():
    rng = np.random.default_rng(0)
    case = helpers.random_case(rng, B=3, T=19, H=4, G=2, R=4, E=3, M=5)
    ids = np.stack([helpers.random_segments(rng, 19), np.zeros(19, int), np.repeat([2, 3], [1, 18])])
    expected = oracles.forward(case, "transpose", ids)
    d = {name: rng.normal(size=x.shape) for name, x in zip(("o", "state"), expected, strict=True)}
    actual = reference.attention(case | {"segment_ids": ids}, d)
    for name, x in zip(("o", "state"), expected, strict=True):
        helpers.assert_close(actual.pop(name), x, "float64", name=name)
    cotangents = oracles.cotangents(case, "transpose", d["o"], d["state"], ids)
    assert actual.keys() == {f"d_{name}" for name in cotangents}
    for name, x in cotangents.items():
        assert np.any(x)
        helpers.assert_close(actual[f"d_{name}"], x, "float64", gradient=True, name=name)


def test_attention_of_a_document_from_zeros():
    case = helpers.random_case(np.random.default_rng(1), B=1, T=5, H=2, G=2, R=4, E=3, M=5, initial_state=False)
    o, state = oracles.forward(case, "transpose")
    actual = reference.attention(case, {"o": np.ones_like(o), "state": np.zeros_like(state)})
    helpers.assert_close(actual["o"], o, "float64")
    helpers.assert_close(actual["state"], state, "float64")


def test_heads():
    rng = np.random.default_rng(2)
    B, T, C, W, width, base, eps = 2, 13, 32, 4, 8, 100.0, 0.1
    sizes = dict(x=(B, T, C), tail=(B, W - 1, C), taps=(W, C), conv_bias=(C,), scale=(width,), bias=(C,))
    x = {name: rng.normal(size=size) for name, size in sizes.items()}
    positions, d_y = np.stack([np.arange(T) % 6 + 2 * (np.arange(T) < 6), np.arange(T) % 5]), rng.normal(size=(B, T, C))
    actual = reference.heads(x | {"positions": positions}, {"y": d_y}, width, base, eps)
    with jax.enable_x64(True):
        # Not by `rotary_table`, whose angles are float32.
        angle = positions[..., None] * base ** (-np.arange(width // 2) / (width // 2))
        table = jnp.asarray(np.concatenate([np.cos(angle)] * 2 + [-np.sin(angle), np.sin(angle)], axis=-1))
        np.testing.assert_allclose(table, rotary_table(jnp.asarray(positions), width, base), atol=1e-6)

        def package(x):
            inputs = HeadInputs(**x, rotary=table, positions=jnp.asarray(positions))
            return prepare_heads(inputs, Preparation(width, activate=True, eps=eps), backend="recurrent")

        y, pull = jax.vjp(package, {name: jnp.asarray(value) for name, value in x.items()})
        cotangents = pull(jnp.asarray(d_y))[0]
    helpers.assert_close(actual.pop("y"), y, "float64", reduction=width)
    assert actual.keys() == {f"d_{name}" for name in cotangents}
    for name, value in cotangents.items():
        helpers.assert_close(actual[f"d_{name}"], value, "float64", reduction=B * T, gradient=True, name=name)

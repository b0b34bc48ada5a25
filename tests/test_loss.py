"""Chunked cross-entropy against a plain log-softmax, and the memory that it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.helpers import assert_close

from idattn.loss import cross_entropy

D, V = 7, 11


def make_case(seed, B, T, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.normal(size=(B, T, D)).astype(dtype),
        "head": rng.normal(size=(D, V)).astype(dtype),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "mask": (rng.random((B, T)) < 0.6).astype(np.float32),
    }


def plain(hidden, head, targets, mask):
    """Sum, count, and gradients of hidden and head, in float64 numpy, all logits at once."""
    hidden, head, mask = (np.asarray(x, np.float64) for x in (hidden, head, mask))
    logits = hidden @ head
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    one_hot = np.eye(V)[targets]
    back = (np.exp(log_p) - one_hot) * mask[..., None]
    return (
        -((log_p * one_hot).sum(axis=-1) * mask).sum(),
        mask.sum(),
        back @ head.T,
        np.einsum("btd,btv->dv", hidden, back),
    )


def run(case, chunk):
    def total(hidden, head):
        loss, count = cross_entropy(hidden, head, case["targets"], case["mask"], chunk=chunk)
        return loss, count

    arrays = (jnp.asarray(case["hidden"]), jnp.asarray(case["head"]))
    (loss, count), (d_hidden, d_head) = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(*arrays)
    return loss, count, d_hidden, d_head


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 15, 100])
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_values_and_gradients(chunk, x64):
    """15 tokens in chunks that divide them or not."""
    dtype = "float64" if x64 else "float32"
    with jax.enable_x64(x64):
        case = make_case(chunk, 3, 5, dtype)
        actual = run(case, chunk)
        assert [x.dtype for x in actual] == [dtype] * 4
        loss, count, d_hidden, d_head = actual
        expected = plain(**case)
        assert 0 < expected[1] < 15
        assert_close(loss, expected[0], dtype, reduction=15 * V, name="loss")
        assert float(count) == expected[1]
        assert_close(d_hidden, expected[2], dtype, reduction=V, gradient=True, name="hidden")
        assert_close(d_head, expected[3], dtype, reduction=15, gradient=True, name="head")


def test_gradients_against_finite_differences():
    case = make_case(0, 2, 3, np.float64)
    rng = np.random.default_rng(1)
    directions = {name: rng.normal(size=case[name].shape) for name in ("hidden", "head")}

    def along(epsilon):
        moved = {name: case[name] + epsilon * direction for name, direction in directions.items()}
        return float(cross_entropy(**(case | moved), chunk=4)[0])

    with jax.enable_x64(True):
        _, _, d_hidden, d_head = run(case, 4)
        slope = float(np.sum(d_hidden * directions["hidden"]) + np.sum(d_head * directions["head"]))
        assert slope == pytest.approx((along(1e-5) - along(-1e-5)) / 2e-5, rel=1e-7)
    assert abs(slope) > 0.1


def test_mask_is_a_weight():
    case = make_case(3, 2, 9)
    loss, count, d_hidden, d_head = run(case | {"mask": np.zeros((2, 9), np.float32)}, 4)
    assert (float(loss), float(count)) == (0, 0)
    assert not np.any(np.asarray(d_hidden)) and not np.any(np.asarray(d_head))

    ones = case | {"mask": np.ones((2, 9), np.float32)}
    assert float(run(ones, 4)[1]) == 18
    halves = run(case | {"mask": np.full((2, 9), 0.5, np.float32)}, 4)
    assert float(halves[1]) == 9
    assert_close(halves[0], plain(**ones)[0] / 2, "float32", reduction=18)
    masked = case["mask"] == 0
    _, _, d_hidden, _ = run(case, 4)
    assert not np.any(np.asarray(d_hidden)[masked])
    assert np.all(np.any(np.asarray(d_hidden)[~masked], axis=-1))


def test_large_logits_and_bfloat16():
    """The softmax is in float32 whatever the products are in, and does not overflow."""
    case = make_case(5, 1, 8)
    loss, *_ = run(case | {"hidden": 200 * case["hidden"]}, 3)
    assert_close(loss, plain(**(case | {"hidden": 200 * case["hidden"]}))[0], "float32", reduction=8 * V)
    rounded = case | {name: jnp.asarray(case[name], jnp.bfloat16) for name in ("hidden", "head")}
    head32 = {"head": np.asarray(rounded["head"], np.float32)}  # parameters are float32
    loss, count, d_hidden, d_head = run(rounded | head32, 3)
    assert (loss.dtype, count.dtype, d_hidden.dtype, d_head.dtype) == ("float32", "float32", "bfloat16", "float32")
    expected = plain(**(rounded | head32))
    assert_close(loss, expected[0], "float32", reduction=8 * V)  # products of bfloat16 are exact in float32
    assert_close(d_hidden, expected[2], "bfloat16", reduction=V, gradient=True)
    assert_close(d_head, expected[3], "bfloat16", reduction=8, gradient=True)


def test_memory(optimised):
    """4,096 tokens, 32,000 pieces: never as much as one copy of all logits; without chunks it is."""
    B, T, width, vocabulary = 4, 1024, 64, 32_000
    shapes = [((B, T, width), np.float32), ((width, vocabulary), np.float32), ((B, T), np.int32), ((B, T), np.float32)]

    def temporary(chunk):
        def loss(hidden, head, targets, mask):
            return cross_entropy(hidden, head, targets, mask, chunk=chunk)[0]

        arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * vocabulary
    assert 0 < temporary(256) < logits / 4
    assert temporary(4096) >= logits

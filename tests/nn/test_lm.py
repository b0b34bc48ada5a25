"""The decoder: stacking, hybrids, rematerialisation, state between calls, precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.helpers import assert_close

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn import LanguageModel
from idattn.nn.documents import find_documents
from idattn.nn.lm import Block

COMPUTE = ComputeConfig(dtype="float32", chunk_size=4)
HYBRID = ("interdomain", "softmax", "s4d")


def make(*mixers, compute=COMPUTE, **changes):
    return nnx.jit(lambda: LanguageModel(ModelConfig.tiny(*mixers, **changes), compute, rngs=nnx.Rngs(0)))()


@nnx.jit
def run(model, tokens, state=None):
    return model(tokens, state=state)


def tokens(T=11):
    return jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, T)))


def test_a_softmax_model_equals_its_definition():
    """All of it in numpy, with numbers of rotation and normalisation that are not the defaults."""
    H, R, eps, base = 2, 6, 0.2, 50.0
    model, ids = make("softmax", num_layers=1, init_std=0.7, norm_eps=eps, rope_base=base), tokens()
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    block = jax.tree.map(lambda p: p[0], params["groups"]["block_0"])
    mixer, mlp = ({name: p["weight"] for name, p in block[part].items()} for part in ("mixer", "mlp"))
    T = ids.shape[1]
    turn = np.exp(1j * np.arange(T)[:, None, None] * base ** (-np.arange(R // 2) / (R // 2)))

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def heads(name, rotated):
        y = (norm(x) @ mixer[name]).reshape(-1, T, H, R)
        z = (y[..., : R // 2] + 1j * y[..., R // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1) if rotated else y

    x = params["embedding"][ids]
    q, k, v = heads("query", True), heads("key", True), heads("value", False)
    weights = np.exp(np.einsum("bthr,bshr->bhts", q, k) / np.sqrt(R)) * np.tri(T)
    o = np.einsum("bhts,bshr->bthr", weights / weights.sum(axis=-1, keepdims=True), v)
    x = x + o.reshape(x.shape) @ mixer["output"]
    gate = norm(x) @ mlp["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (norm(x) @ mlp["up"])) @ mlp["down"]
    assert_close(run(model, ids)[0], norm(x) @ params["head"]["weight"], "float32", reduction=12 * T)


def test_scanned_layers_equal_a_loop_over_them():
    model = make(*HYBRID, num_layers=6)
    x = model.embedding[...][tokens()]
    graphdef, params = nnx.split(model.groups)
    for i in range(2):
        group = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))
        assert [type(b) for b in group.blocks] == [Block] * 3
        for block in group.blocks:
            documents, _ = find_documents(None, jnp.zeros(2, jnp.int32), (2, 11), model.config)
            x, _ = nnx.jit(lambda block, x, documents: block(x, documents, None))(block, x, documents)
    expected = model.final_norm(x) @ model.head.weight[...]
    assert_close(run(model, tokens())[0], expected, "float32", reduction=12)
    first, second = (jax.tree.map(lambda p, i=i: p[i], params) for i in range(2))
    weights = (g["block_0"]["mixer"]["key"]["weight"][...] for g in (first, second))
    assert not np.array_equal(*weights)  # every repetition has different parameters


@pytest.mark.parametrize("mixers", [("interdomain",), ("softmax",), HYBRID])
def test_random_splits_carry_the_state(mixers):
    model, ids = make(*mixers), tokens()
    whole, _ = run(model, ids)
    for cuts in ((1,), (4, 5), (3, 7, 8)):
        state, parts = model.init_state(2, 11), []
        for piece in jnp.split(ids, cuts, axis=1):
            logits, state = run(model, piece, state)
            parts.append(logits)
        assert_close(jnp.concatenate(parts, axis=1), whole, "float32", reduction=12 * 11)


def test_init_follows_the_recipe():
    config = ModelConfig(vocab_size=500, model_dim=128, num_layers=8, num_heads=4, mlp_dim=256)
    model = LanguageModel(config, COMPUTE, rngs=nnx.Rngs(0))
    block = model.groups.block_0
    for weight, std in (
        (model.embedding, 0.02),
        (model.head.weight, 0.02),
        (block.mixer.key.weight, 0.02),
        (block.mlp.up.weight, 0.02),
        (block.mixer.output.weight, 0.02 / 4),  # sqrt(2 L) = 4
        (block.mlp.down.weight, 0.02 / 4),
    ):
        assert abs(np.std(weight[...]) / std - 1) < 0.02
        assert weight.dtype == jnp.float32


def test_bfloat16_computes_close_to_float32():
    ids = tokens(40)
    exact, _ = run(make(*HYBRID), ids)
    model = make(*HYBRID, compute=dataclasses.replace(COMPUTE, dtype="bfloat16"))
    hidden, state = model.hidden(ids, state=model.init_state(2, 40))
    assert hidden.dtype == jnp.bfloat16
    assert state.memories[0].state.dtype == jnp.float32
    logits, _ = run(model, ids)
    assert logits.dtype == jnp.float32

    def error(logits):
        return np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2))

    assert 1e-5 < error(logits) < 0.02
    # The sums of the layers' outputs are most of it.
    model = make(*HYBRID, compute=dataclasses.replace(COMPUTE, dtype="bfloat16", residual_in_float32=True))
    assert model.hidden(ids)[0].dtype == jnp.bfloat16
    better, _ = run(model, ids)
    assert better.dtype == jnp.float32 and 1e-5 < error(better) < 0.8 * error(logits)

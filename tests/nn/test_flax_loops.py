"""The layer in training loops of a user, in nnx and in linen: every parameter learns, at the rate of its group."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from idattn.nn import InterdomainAttention

VOCAB, DIM, STEPS = 8, 16, 8
RATES = {"matrix": 1e-2, "other": 1e-2, "ssm": 1e-3}


def recipe(groups):
    """AdamW by groups, a tree of names: the state's parameters learn more slowly, and only matrices decay."""
    decay = {"matrix": 0.1, "other": 0.0, "ssm": 0.0}
    by_group = {name: optax.adamw(rate, weight_decay=decay[name]) for name, rate in RATES.items()}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(by_group, groups))


def batches():
    """Rows whose target is the token three places earlier."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCAB, (16, 12))
        yield jnp.asarray(tokens), jnp.asarray(np.roll(tokens, 3, axis=1))


def loss_of(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)[:, 3:].mean()


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.mixer = InterdomainAttention(DIM, 2, num_modes=4, rngs=rngs)
        self.head = nnx.Linear(DIM, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        y, _ = self.mixer(x)
        return self.head(x + y)


def nnx_loop():
    model = nnx.jit(Model)(nnx.Rngs(0))
    groups = jax.tree.map(
        lambda p: p.get_metadata().get("group") or ("matrix" if p.ndim > 1 else "other"),
        nnx.state(model, nnx.Param),
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    optimizer = nnx.Optimizer(model, recipe(groups), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, targets):
        loss, gradients = nnx.value_and_grad(lambda model: loss_of(model(tokens), targets))(model)
        optimizer.update(model, gradients)
        return loss

    for tokens, targets in batches():
        before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        loss = step(model, optimizer, tokens, targets)
        yield loss, nnx.to_pure_dict(groups), before, nnx.to_pure_dict(nnx.state(model, nnx.Param))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, DIM)(tokens)
        y, _ = nnx.bridge.to_linen(InterdomainAttention, DIM, 2, num_modes=4, name="mixer")(x)
        return nn.Dense(VOCAB)(x + y)


def linen_loop():
    model = LinenModel()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12), int))
    assert set(variables) == {"params"}
    boxed = variables["params"]
    groups = jax.tree.map(
        lambda p: p.metadata["group"] if isinstance(p, nnx.bridge.NNXMeta) else "matrix" if p.ndim > 1 else "other",
        boxed,
        is_leaf=lambda x: isinstance(x, nnx.bridge.NNXMeta),
    )
    params = nn.meta.unbox(boxed)
    optimizer = recipe(groups)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, tokens, targets):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(model.apply({"params": p}, tokens), targets))(params)
        updates, state = optimizer.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), state

    for tokens, targets in batches():
        before = params
        loss, params, state = step(params, state, tokens, targets)
        yield loss, groups, before, params


@pytest.mark.parametrize("loop", [nnx_loop, linen_loop])
def test_every_parameter_learns(loop):
    steps = list(loop())
    losses = [float(loss) for loss, *_ in steps]
    assert losses[-1] < losses[0]
    _, groups, start, first = steps[0]
    end = steps[-1][-1]
    assert jax.tree.structure(start) == jax.tree.structure(groups)
    largest = dict.fromkeys(RATES, 0.0)
    for (path, group), *values in zip(
        jax.tree.leaves_with_path(groups), *map(jax.tree.leaves, (start, first, end)), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert np.any(values[0] != values[2]), name
        # The group of a parameter of the layer can also be read off its name.
        assert (group == "ssm") == (".basis." in name or "_norm." in name), name
        largest[group] = max(largest[group], float(np.abs(values[1] - values[0]).max()))
    # The first step of Adam is the rate; weight decay adds a little to matrices.
    assert largest == pytest.approx(RATES, rel=0.2)

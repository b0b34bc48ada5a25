"""The recipe: learning rates at points worked out by hand, the groups by name, and a step of AdamW in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.helpers import assert_close

from configs.paper import get_config
from idattn.choices import MIXERS
from idattn.config import ComputeConfig, ModelConfig, OptimConfig, from_config_dict, quickstart
from idattn.costs import describe
from idattn.nn import LanguageModel
from idattn.train.optim import learning_rate, make_optimizer

RECIPE = OptimConfig(peak_lr=3e-3, warmup_steps=10, final_lr=1e-5)


@pytest.mark.parametrize(
    ("update", "other", "ssm"),
    [
        (0, 3e-4, 1e-4),  # a tenth of the way up
        (4, 1.5e-3, 5e-4),
        (9, 3e-3, 1e-3),  # the peak, at the last update of the warm-up
        (34, 1e-5 + 2.99e-3 * (1 + math.sqrt(0.5)) / 2, 1e-5 + 9.9e-4 * (1 + math.sqrt(0.5)) / 2),  # cos(pi / 4)
        (59, (3e-3 + 1e-5) / 2, (1e-3 + 1e-5) / 2),  # halfway down
        (109, 1e-5, 1e-5),  # the last update
    ],
)
def test_learning_rate_by_hand(update, other, ssm):
    assert float(learning_rate(RECIPE, 110)(update)) == pytest.approx(other, rel=1e-5)
    assert float(learning_rate(RECIPE, 110, ssm=True)(update)) == pytest.approx(ssm, rel=1e-5)


def test_learning_rate_rises_then_falls():
    rates = np.array([float(learning_rate(RECIPE, 110)(i)) for i in range(110)])
    assert (np.diff(rates[:10]) > 0).all()
    assert (np.diff(rates[9:]) < 0).all()
    assert rates.min() == rates[-1]


def test_ssm_cap_does_nothing_below_it():
    low = OptimConfig(peak_lr=5e-4, warmup_steps=10)
    for update in (0, 9, 50, 109):
        assert float(learning_rate(low, 110, ssm=True)(update)) == float(learning_rate(low, 110)(update))
    assert float(learning_rate(low, 110)(9)) == pytest.approx(5e-4)


def test_no_warmup_and_a_peak_below_the_final_rate():
    assert float(learning_rate(OptimConfig(peak_lr=1e-2, warmup_steps=0), 2)(0)) == pytest.approx(5.005e-3)
    flat = learning_rate(OptimConfig(peak_lr=1e-6, warmup_steps=2), 10)  # final_lr is 1e-5: never above the peak
    assert [float(flat(i)) for i in (1, 5, 9)] == pytest.approx([1e-6] * 3)


BACKBONE_MATRICES = {"embedding", "head.weight"}
BLOCK_MATRICES = {"mlp.gate.weight", "mlp.up.weight", "mlp.down.weight", "mixer.output.weight"}
BLOCK_PLAIN = {"mixer_norm.scale", "mlp_norm.scale"}
SSM = {
    "mixer.core.basis.log_delta", "mixer.core.basis.a_log", "mixer.core.basis.a_imag", "mixer.core.basis.c",
    "mixer.core.key_norm.scale", "mixer.core.key_norm.bias",
    "mixer.core.value_norm.scale", "mixer.core.value_norm.bias",
}  # fmt: skip


def convolution(name):
    return {f"mixer.core.{name}_conv.taps", f"mixer.core.{name}_conv.bias"}


def matrices(*names):
    return {f"mixer.{name}.weight" for name in names}


C_OUT = {"mixer.core.c_out"}
QUERY_SSM = matrices("key", "value", "query"), convolution("key") | convolution("query")
GATED = (
    matrices("query", "key", "value"),
    convolution("query") | convolution("key") | convolution("value") | {"mixer.core.norm.scale"},
)
STEPS = {"mixer.core.step_bias", "mixer.core.a_log"}
# mixer: the mixer's matrices, what is neither a matrix nor of the SSM group, the SSM group
GROUPS = {
    "interdomain": (*QUERY_SSM, SSM),
    "interdomain_norope": (*QUERY_SSM, SSM),
    "softmax": (matrices("query", "key", "value"), set(), set()),
    "ideal": (matrices("query", "key", "value"), set(), set()),
    "single_query": (QUERY_SSM[0], QUERY_SSM[1] | convolution("value"), SSM),
    "s4d": (matrices("key", "value"), convolution("key") | convolution("value"), SSM | C_OUT),
    "s4d_rope": (matrices("key", "value"), convolution("key") | convolution("value"), SSM | C_OUT),
    "dual_linear": (matrices("key", "value"), convolution("key"), SSM | C_OUT),
    "gla": (GATED[0] | matrices("decay_rank", "decay"), GATED[1] | {"mixer.core.decay_bias"}, set()),
    "mamba2": (GATED[0] | matrices("step"), GATED[1] | STEPS | {"mixer.core.skip"}, set()),
    "gated_deltanet": (GATED[0] | matrices("decay", "gain"), GATED[1] | STEPS, set()),
    "linear": (*GATED, set()),
    "softmax_conv": (GATED[0], GATED[1] - {"mixer.core.norm.scale"}, set()),
}
for name in ("dual_linear", "single_query"):
    GROUPS[f"{name}_norope"] = GROUPS[name]


def abstract_model(*mixers, **changes):
    config = ModelConfig.tiny(*mixers, **changes)
    return LanguageModel.abstract(config, ComputeConfig(dtype="float32"))


def named(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)}


def full(model, value):
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def first_update(optimizer, grads, params):
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])(grads, params)


def test_every_mixer_has_an_expectation():
    assert set(GROUPS) == set(MIXERS)


@pytest.mark.parametrize("mixer", GROUPS)
def test_groups_by_name(mixer):
    model = abstract_model(mixer)
    block_matrices, plain, ssm = (
        {f"groups.block_0.{name}" for name in names}
        for names in (GROUPS[mixer][0] | BLOCK_MATRICES, GROUPS[mixer][1] | BLOCK_PLAIN, GROUPS[mixer][2])
    )
    all_matrices, plain = block_matrices | BACKBONE_MATRICES, plain | {"final_norm.scale"}
    params = full(model, 1.0)
    assert set(named(params)) == all_matrices | plain | ssm

    # Without gradients only the decay moves a parameter: by lr * 0.1 * 1.
    optimizer = make_optimizer(RECIPE, 110, model)
    updates = first_update(optimizer, full(model, 0.0), params)
    decayed = {name: x for name, x in named(updates).items() if np.any(np.asarray(x) != 0)}
    assert set(decayed) == all_matrices
    for x in decayed.values():
        np.testing.assert_allclose(x, -3e-4 * 0.1, rtol=1e-5)

    # Without decay, Adam's first step has the size of the learning rate, which tells the groups apart.
    optimizer = make_optimizer(OptimConfig(peak_lr=3e-3, warmup_steps=10, weight_decay=0.0), 110, model)
    updates = first_update(optimizer, full(model, 1e-4), params)
    for name, x in named(updates).items():
        np.testing.assert_allclose(x, -1e-4 if name in ssm else -3e-4, rtol=1e-3, err_msg=name)


def adamw_step(params, grads, mu, nu, count, rates, decayed, b1, b2, eps):
    """One step in float64 numpy on dicts by name: clip at 1, Adam, decay, two learning rates; changes mu and nu."""
    norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
    new = {}
    for name, p in params.items():
        g = grads[name] * min(1.0, 1.0 / norm)
        mu[name] = b1 * mu[name] + (1 - b1) * g
        nu[name] = b2 * nu[name] + (1 - b2) * g**2
        direction = (mu[name] / (1 - b1**count)) / (np.sqrt(nu[name] / (1 - b2**count)) + eps)
        if name in decayed:
            direction = direction + 0.1 * p
        new[name] = p - rates[name] * direction
    return new


def test_steps_against_numpy():
    """Three updates of a hybrid: gradients of norm 5 (clipped), 0.3 (not clipped) and 20 (clipped)."""
    model = abstract_model("interdomain", "softmax")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    adam = dict(b1=0.8, b2=0.7, eps=1e-3)
    optimizer = make_optimizer(dataclasses.replace(RECIPE, **adam), 110, model)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    ssm = {f"groups.block_0.{name}" for name in SSM}
    decayed = {f"groups.block_0.{name}" for name in GROUPS["interdomain"][0] | BLOCK_MATRICES}
    decayed |= {f"groups.block_1.{name}" for name in GROUPS["softmax"][0] | BLOCK_MATRICES} | BACKBONE_MATRICES
    expected = {name: np.asarray(x, np.float64) for name, x in named(params).items()}
    assert ssm | decayed < set(expected)
    mu, nu = ({name: np.zeros_like(x) for name, x in expected.items()} for _ in range(2))
    for count, norm in enumerate((5.0, 0.3, 20.0), start=1):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        scale = norm / math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, scale=scale: jnp.asarray(scale * g, jnp.float32), grads)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rates = {name: count * (1e-4 if name in ssm else 3e-4) for name in expected}
        wide = {name: np.asarray(g, np.float64) for name, g in named(grads).items()}
        before = expected
        expected = adamw_step(expected, wide, mu, nu, count, rates, decayed, **adam)
        for name, x in named(params).items():
            assert_close(x, expected[name], "float32", name=f"{name} after update {count}")
        # The change itself, which is a thousandth of the parameters, to the rounding of those.
        for name, x in named(updates).items():
            change = expected[name] - before[name]
            np.testing.assert_allclose(x, change, rtol=1e-4, atol=1e-7, err_msg=name)


def test_muon():
    """Two updates: of the layers' matrices nearly orthogonal, of everything else those of AdamW."""
    model = abstract_model("interdomain", "softmax")
    rng = np.random.default_rng(0)
    params, *grads = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), full(model, 0.0)) for _ in range(3)
    )
    updates = {}
    for name in ("adamw", "muon"):
        config = OptimConfig(name=name, peak_lr=3e-3, warmup_steps=10, weight_decay=0.0, clip_norm=1e9)
        optimizer = make_optimizer(config, 110, model)
        state = optimizer.init(params)
        for gradient in grads:
            update, state = jax.jit(optimizer.update)(gradient, state, params)
        updates[name] = named(update)
    rules = {rule: inner.inner_state for rule, inner in state[1].inner_states.items()}
    moments = jax.tree.leaves((rules["muon"][0].mu, rules["adam"].mu, rules["adam"].nu))
    costs = describe(dataclasses.replace(quickstart(), model=model.config, optim=config))
    assert costs["bytes"]["optimiser"] == 4 * sum(x.size for x in moments)
    blocks = {"block_0": "interdomain", "block_1": "softmax"}
    layers = {f"groups.{b}.{name}" for b, mixer in blocks.items() for name in GROUPS[mixer][0] | BLOCK_MATRICES}
    first, second = map(named, grads)
    for name, x in updates["adamw"].items():
        if name not in layers:
            assert_close(updates["muon"][name], np.asarray(x), "float32", name=name)
            continue
        # The moment 0.95 m + 0.05 g and Nesterov's step beyond it, each without the bias of its start.
        moment = 0.05 * (0.95 * np.asarray(first[name], np.float64) + second[name])
        moment = 0.95 * moment / (1 - 0.95**3) + 0.05 * second[name] / (1 - 0.95**2)
        for layer, momentum in zip(np.asarray(updates["muon"][name], np.float64), moment, strict=True):
            left, _, right = np.linalg.svd(momentum, full_matrices=False)
            turned = left.T @ layer @ right.T / (-6e-4 * 0.2 * math.sqrt(max(layer.shape)))
            gains = np.diag(turned)
            np.testing.assert_allclose(turned, np.diag(gains), atol=1e-4, err_msg=name)
            assert 0.6 < gains.min() <= gains.max() < 1.3, name


@pytest.mark.parametrize(
    ("scale", "peak", "steps"),
    [("125M", 3e-3, 4768), ("350M", 1.5e-3, 13351), ("760M", 1e-3, 28610), ("1.3B", 1e-3, 49591)],
)
def test_paper_recipe(scale, peak, steps):
    """Section 4 of the paper: 524,288 tokens a step, 375M of warm-up (715 steps), 2.5, 7, 15 and 26 billion in all."""
    config = from_config_dict(get_config(f"{scale},interdomain"))
    assert config.seed == 42
    assert config.optim == OptimConfig(
        peak_lr=peak, warmup_steps=715, final_lr=1e-5, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0,
        ssm_lr_cap=1e-3,
    )  # fmt: skip
    assert config.train.batch_size * config.data.seq_len == 524_288
    assert config.data.seq_len == 4096
    assert config.train.steps == steps
    assert config.compute.dtype == "bfloat16"
    assert config.model.vocab_size == 32_000
    assert (config.model.ssm.num_modes, config.model.ssm.conv_width, config.model.ssm.heads_per_kv) == (64, 4, 1)
    assert (config.model.ssm.delta_min, config.model.ssm.delta_max, config.model.ssm.output_gate) == (1e-3, 0.1, False)

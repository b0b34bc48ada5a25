"""GLA, Mamba-2, Gated DeltaNet and linear attention against their definitions in NumPy, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import oracles
from support.helpers import assert_close

from idattn.choices import PEERS, find_mixer
from idattn.config import ComputeConfig, ModelConfig, SSMConfig
from idattn.costs import count_parameters, forward_flops_per_token, state_size

B, T, D, H, E, R = 2, 11, 12, 2, 6, 20
GATED = (*PEERS, "linear")


def make_mixer(name, **ssm):
    compute = ComputeConfig(dtype="float32", chunk_size=4)
    config = ModelConfig.tiny(name, norm_eps=0.2, ssm=SSMConfig(num_modes=5, **ssm))
    return find_mixer(name)(config, residual_std=0.5, compute=compute, rngs=nnx.Rngs(1))


def inputs(length):
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, length, D)), jnp.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


@pytest.mark.parametrize("output_gate", [True, False])
@pytest.mark.parametrize("name", GATED)
def test_mixers_equal_their_definition(name, output_gate):
    """The whole mixer around the oracle's recurrence, for parameters that are all away from their start."""
    mixer, x = make_mixer(name, output_gate=output_gate), inputs(T)
    rng = np.random.default_rng(5)
    for _, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        variable[...] = variable[...] + 0.3 * rng.normal(size=variable.shape).astype(np.float32)
    state = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    core, z = state.pop("core"), np.asarray(x, np.float64)
    projected = {name: z @ weights["weight"] for name, weights in state.items() if weights["weight"].shape[0] == D}

    def convolve(name, width):
        y = projected[name]
        padded = np.concatenate([np.zeros((B, 3, y.shape[-1])), y], 1)
        taps = core[f"{name}_conv"]["taps"]
        y = core[f"{name}_conv"]["bias"] + sum(taps[i] * padded[:, i : i + T] for i in range(4))
        return silu(y).reshape(B, T, -1, width)

    q, k, v = (convolve(name, E if name == "value" else R) for name in ("query", "key", "value"))
    case = {"initial_state": np.zeros((B, H, E, R))}
    if name == "gla":
        logits = projected["decay_rank"] @ state["decay"]["weight"] + core["decay_bias"]
        q, case["log_decays"] = q / np.sqrt(R), -softplus(-logits).reshape(B, T, H, R) / 16
        o, _ = oracles.gated_forward(case | {"q": q, "k": k, "v": v})
    elif name == "mamba2":
        steps = softplus(projected["step"] + core["step_bias"])[..., None]
        case["log_decays"] = -np.exp(core["a_log"])[:, None] * steps
        q, k = (np.repeat(y, H, axis=2) for y in (q, k))
        o, _ = oracles.gated_forward(case | {"q": q, "k": k, "v": steps * v})
        o = o + core["skip"][:, None] * v
    else:
        q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        case["log_decays"] = np.zeros((B, T, H, 1))
        if name == "gated_deltanet":
            case["log_decays"] = -(np.exp(core["a_log"]) * softplus(projected["decay"] + core["step_bias"]))[..., None]
            case["gains"] = 1 / (1 + np.exp(-projected["gain"]))
        o, _ = oracles.gated_forward(case | {"q": q, "k": k, "v": v})
    gate = silu(projected["gate"]).reshape(o.shape) if output_gate else 1.0
    o = o * gate if name == "mamba2" else o
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 0.2) * core["norm"]["scale"]
    o = o if name == "mamba2" else o * gate
    expected = o.reshape(B, T, D) @ state["output"]["weight"]
    assert_close(mixer(x)[0], expected, "float32", reduction=T * D)


def test_costs_by_hand():
    """At D = 512, H = 8 and M = 16 keys are as wide as heads, and a state has as many numbers as interdomain's."""
    D, H, R = 512, 8, 64
    ssm = SSMConfig(num_modes=16, output_gate=True)
    sizes = dict(vocab_size=1000, model_dim=D, num_layers=2, num_heads=H, mlp_dim=512, ssm=ssm)
    models = {name: ModelConfig(mixers=(name,), **sizes) for name in (*GATED, "interdomain")}
    for name, model in models.items():
        assert state_size(model, name, 100) == D * R
    shared = 2 * D * D + D * D + 4 * D + D + R  # value, gate and output, the values' convolution, the norm
    heads = 2 * (D * D + 4 * D + D)  # queries and keys with their convolutions
    mixers = {
        "gla": shared + heads + 16 * D + 16 * D + D,
        "mamba2": shared + 2 * (D * R + 5 * R) + D * H + 3 * H,
        "gated_deltanet": shared + heads + 2 * D * H + 2 * H,
        "linear": shared + heads,
    }
    for name, count in mixers.items():
        parts = count_parameters(models[name])
        assert parts["mixer"] == 2 * count and parts["norms"] == 2 * 2 * D + D
    flops = {
        "gla": 2 * (5 * D * D + 2 * 16 * D) + 2 * 4 * 3 * D + 5 * D * R,
        "mamba2": 2 * (3 * D * D + 2 * D * R + D * H) + 2 * 4 * (2 * R + D) + 5 * D * R,
        "gated_deltanet": 2 * (5 * D * D + 2 * D * H) + 2 * 4 * 3 * D + 7 * D * R,
        "linear": 2 * 5 * D * D + 2 * 4 * 3 * D + 4 * D * R,
    }
    for name, count in flops.items():
        assert forward_flops_per_token(models[name], 100) == 2 * (count + 6 * D * 512) + 2 * D * 1000


@pytest.mark.parametrize("name", GATED)
def test_options_of_states_are_refused(name):
    for ssm in (SSMConfig(heads_per_kv=2), SSMConfig(core="clock"), SSMConfig(write="delta")):
        with pytest.raises(ValueError, match="must be 1, 'fixed' and 'add'"):
            ModelConfig.tiny(name, ssm=ssm)


@pytest.mark.parametrize("name", [*GATED, "softmax_conv"])
def test_convolutions_are_not_left_out(name):
    with pytest.raises(ValueError, match="conv_width=0 must be at least 1 for .*, which convolves"):
        ModelConfig.tiny(name, ssm=SSMConfig(conv_width=0))

"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464): a decay for each head, and the delta rule."""

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.gated import GatedCore, GatedMixer, Recurrence, step_bias
from idattn.nn.layers import param


class DeltaCore(GatedCore):
    """S_t = alpha_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T with unit keys and queries, b = sigmoid(gain).

    alpha = exp(-A softplus(decay + bias)), as in Mamba-2.
    """

    feature_map = True

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, shared: bool):
        super().__init__(config, compute, rngs, shared)
        H = config.num_heads
        self.step_bias = param(step_bias(rngs, H), "H")
        self.a_log = param(jnp.log(jax.random.uniform(rngs.params(), (H,), minval=1.0, maxval=16.0)), "H")

    def recur(self, heads: dict[str, jax.Array], projected: dict[str, jax.Array]) -> Recurrence:
        steps = jax.nn.softplus(projected["decay"] + self.step_bias[...][None, None])
        log_decays = -(jnp.exp(self.a_log[...])[None, None] * steps)[..., None]
        return Recurrence(heads["query"], heads["key"], heads["value"], log_decays, jax.nn.sigmoid(projected["gain"]))


class GatedDeltaNet(GatedMixer):
    """Gated DeltaNet as a mixer of `LanguageModel`."""

    core_type, corrects = DeltaCore, True

    @classmethod
    def controls(cls, config: ModelConfig) -> dict[str, int]:
        return {"decay": config.num_heads, "gain": config.num_heads}

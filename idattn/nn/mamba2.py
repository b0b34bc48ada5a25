"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a decay for each head, and one query and key for all heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.gated import GatedCore, GatedMixer, Recurrence, step_bias
from idattn.nn.layers import param


class Mamba2Core(GatedCore):
    """h_t = exp(-Delta_t A) h_{t-1} + Delta_t B_t x_t^T,  y_t = C_t^T h_t + D x_t,  Delta = softplus(step + b).

    In the names of attention, C is the query, B the key and x the value. The norm is over heads, as it has to be where
    devices hold some of them each.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, shared: bool):
        super().__init__(config, compute, rngs, shared)
        H = config.num_heads
        self.step_bias = param(step_bias(rngs, H), "H")
        self.a_log = param(jnp.log(jax.random.uniform(rngs.params(), (H,), minval=1.0, maxval=16.0)), "H")
        self.skip = param(jnp.ones(H), "H")

    def recur(self, heads: dict[str, jax.Array], projected: dict[str, jax.Array]) -> Recurrence:
        v = heads["value"]
        steps = jax.nn.softplus(projected["step"] + self.step_bias[...][None, None])[..., None]
        q, k = (jnp.broadcast_to(heads[name], (*v.shape[:3], heads[name].shape[-1])) for name in ("query", "key"))
        log_decays = -jnp.exp(self.a_log[...])[None, None, :, None] * steps
        return Recurrence(q, k, (v * steps).astype(v.dtype), log_decays)

    def finish(self, o: jax.Array, v: jax.Array, gate: jax.Array | None) -> jax.Array:
        o = o + self.skip[...].astype(o.dtype)[None, None, :, None] * v
        return self.norm(o if gate is None else o * gate)


class Mamba2(GatedMixer):
    """Mamba-2 as a mixer of `LanguageModel`, without the expansion of its width: heads are those of the model."""

    core_type, shared = Mamba2Core, True

    @classmethod
    def controls(cls, config: ModelConfig) -> dict[str, int]:
        return {"step": config.num_heads}

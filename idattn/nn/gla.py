"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a decay for every feature of the keys."""

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.gated import GatedCore, GatedMixer, Recurrence, key_width
from idattn.nn.layers import Linear, param

TEMPERATURE = 16.0  # the decays start near 1
RANK = 16  # of the map from tokens to decays


class GLACore(GatedCore):
    """alpha = sigmoid(x W_1 W_2 + b)^(1 / 16); queries are divided by sqrt(R)."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, shared: bool):
        super().__init__(config, compute, rngs, shared)
        self.decay_bias = param(jnp.zeros(config.num_heads * key_width(config)), "H")

    def recur(self, heads: dict[str, jax.Array], projected: dict[str, jax.Array]) -> Recurrence:
        k = heads["key"]
        logits = projected["decay"] + self.decay_bias[...][None, None]
        log_decays = jax.nn.log_sigmoid(logits).reshape(k.shape) / TEMPERATURE
        return Recurrence(heads["query"] * k.shape[-1] ** -0.5, k, heads["value"], log_decays)


class GatedLinearAttention(GatedMixer):
    """GLA as a mixer of `LanguageModel`, with the short convolutions that its public implementations offer."""

    core_type = GLACore

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        super().__init__(config, residual_std=residual_std, compute=compute, rngs=rngs)
        width = config.num_heads * key_width(config)
        self.decay = Linear(RANK, width, (None, "H"), std=config.init_std, rngs=rngs)

    @classmethod
    def controls(cls, config: ModelConfig) -> dict[str, int]:
        return {"decay_rank": RANK}

    def project(self, x: jax.Array) -> dict[str, jax.Array]:
        projected = super().project(x)
        return projected | {"decay": self.decay(projected.pop("decay_rank"))}

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        return super().flops(config, context) + 2 * RANK * config.num_heads * key_width(config)

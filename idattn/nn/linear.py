"""Plain linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): what states do without forgetting or gates."""

import jax
import jax.numpy as jnp

from idattn.config import ModelConfig
from idattn.nn.gated import GatedCore, GatedMixer, Recurrence


class LinearCore(GatedCore):
    """S_t = S_{t-1} + k_t v_t^T with k and q of eq. 10; the norm after it takes the place of a denominator."""

    feature_map = True

    def recur(self, heads: dict[str, jax.Array], projected: dict[str, jax.Array]) -> Recurrence:
        q, k, v = (heads[name] for name in ("query", "key", "value"))
        return Recurrence(q, k, v, jnp.zeros((*k.shape[:3], 1), jnp.promote_types(k.dtype, jnp.float32)))


class LinearAttention(GatedMixer):
    """Linear attention as a mixer of `LanguageModel`."""

    core_type = LinearCore

    @classmethod
    def controls(cls, config: ModelConfig) -> dict[str, int]:
        return {}

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        return super().flops(config, context) - cls.state_size(config, context)  # nothing decays

"""A token mixer outside the package: the mean of its document's tokens so far, decayed."""

import jax
import jax.numpy as jnp

from idattn.nn import Memory, Mixer, param
from idattn.sharding import spec

DECAY = 0.5


class Average(Memory):
    total: jax.Array  # (B, D) float32


class MovingAverage(Mixer):
    """y_t = (a_t) W with a_t = DECAY a_{t-1} + x_t, anew in every document."""

    def __init__(self, config, *, residual_std, compute, rngs):
        D = config.model_dim
        self.dim, self.weight = (
            D,
            param(residual_std * jax.random.normal(rngs.params(), (D, D)), "D", None, group="matrix"),
        )

    def mix(self, x, documents, memory):
        run = jnp.zeros(x.shape[:2], jnp.int32) if documents.run is None else documents.run
        starts = jnp.pad(run[:, 1:] != run[:, :-1], ((0, 0), (1, 0)))

        def advance(total, token):
            x, starts, run = token
            new = DECAY * jnp.where(starts[:, None], 0, total) + x
            return jnp.where(run[:, None] < 0, total, new), new

        first = jnp.zeros((x.shape[0], self.dim)) if memory is None else memory.total
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (x, starts, run))
        total, y = jax.lax.scan(advance, first.astype(jnp.float32), tokens)
        return (jnp.moveaxis(y, 0, 1) @ self.weight[...]).astype(x.dtype), Average(total)

    def init_memory(self, batch_size, max_tokens, dtype, state_dtype=None):
        return Average(jnp.zeros((batch_size, self.dim), state_dtype or jnp.float32))

    def memory_specs(self, *lead):
        return Average(spec(*lead, "B", None))

    @classmethod
    def flops(cls, config, context):
        return 2 * config.model_dim**2

    @classmethod
    def state_size(cls, config, context):
        return config.model_dim

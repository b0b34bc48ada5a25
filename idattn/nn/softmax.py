"""Multi-head softmax attention with rotary positions: the study's baseline, with a cache of keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn.config import ModelConfig
from idattn.nn import carry
from idattn.nn.layers import Linear, rotate_positions
from idattn.ops import softmax_attention
from idattn.ops.segments import PADDING, document_positions, last_token, run_index
from idattn.sharding import is_split, on_shards, spec


class KVCache(NamedTuple):
    """The keys and values of the current document, at the index of their position."""

    k: jax.Array  # (B, max_tokens, H, R)
    v: jax.Array  # (B, max_tokens, H, R)
    position: jax.Array  # (B,) int32, of the next token in its document: the number of keys that count


class SoftmaxAttention(nnx.Module):
    """x (B, T, D) -> (B, T, D): canonical causal attention, no gate, no biases, no normalisation of q and k.

    Args:
      config: widths.
      residual_std: standard deviation of the output projection at the start.
      rngs: the stream `params` is used.
    """

    def __init__(self, config: ModelConfig, *, residual_std: float, rngs: nnx.Rngs):
        D = config.model_dim
        self.config = config
        self.query = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.key = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.value = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.output = Linear(D, D, ("H", "D"), std=residual_std, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: KVCache | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """The mixed tokens (B, T, D), and the cache with them added if one was given.

        Args:
          x: (B, T, D) in the dtype to compute in.
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: the cache of the tokens before; it must have room for this call's tokens.
        """
        projected = self.query(x), self.key(x), self.value(x)
        tokens, heads, cache = spec("B", "T"), spec("B", "T", "H"), spec("B", None, "H")
        cache = None if state is None else KVCache(cache, cache, spec("B"))
        if state is not None and is_split("T"):
            raise NotImplementedError("a cache of keys cannot be split over tokens; use mesh.sequence=1 to generate.")
        core = on_shards(self._attend, ((heads,) * 3, None if segment_ids is None else tokens, cache), (heads, cache))
        o, state = core(projected, segment_ids, state)
        return self.output(o), state

    def _attend(self, projected, segment_ids, state):
        """The heads' outputs (B, T, channels), and the cache, for any heads and, without a cache, tokens of a shard."""
        B, T, _ = projected[0].shape
        axis = "sequence" if is_split("T") else None
        ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
        start = jnp.zeros(B, jnp.int32) if state is None else state.position
        start = carry.positions(segment_ids, T, start, axis)
        positions, end = document_positions(ids, start)
        q, k, v = (y.reshape(B, T, -1, self.config.head_dim) for y in projected)
        q = rotate_positions(q, positions, self.config.rope_base)
        k = rotate_positions(k, positions, self.config.rope_base)
        if state is None:
            o = softmax_attention(q, k, v, segment_ids, axis=axis)
            return checkpoint_name(o.reshape(B, T, -1), "mixer"), None

        runs = run_index(ids)
        mask = (runs[:, :, None] == runs[:, None, :]) & jnp.tri(T, dtype=bool)
        slots = jnp.arange(state.k.shape[1])
        cached = (slots < start[:, None])[:, None] & (runs == 0)[..., None]  # (B, T, max_tokens)
        mask = jnp.concatenate([cached, mask], axis=2)
        keys, values = jnp.concatenate([state.k, k], axis=1), jnp.concatenate([state.v, v], axis=1)
        o = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
        # Tokens of the last document go to the slot of their position; the others to none.
        rows = jnp.arange(B)[:, None]
        last_run = jnp.take_along_axis(runs, jnp.maximum(last_token(ids), 0)[:, None], axis=1)
        slot = jnp.where((runs == last_run) & (ids != PADDING), positions, state.k.shape[1])
        new = [old.at[rows, slot].set(y, mode="drop") for old, y in ((state.k, k), (state.v, v))]
        return o.reshape(B, T, -1), KVCache(*new, end)

    def init_state(self, batch_size: int, max_tokens: int, dtype: jnp.dtype) -> KVCache:
        """The empty cache for `batch_size` rows of at most `max_tokens` tokens, computed in `dtype`."""
        empty = jnp.zeros((batch_size, max_tokens, self.config.num_heads, self.config.head_dim), dtype)
        return KVCache(empty, empty, jnp.zeros(batch_size, jnp.int32))

"""Multi-head softmax attention with rotary positions: the study's baseline, with a cache of keys and values."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn.config import ModelConfig
from idattn.nn import carry
from idattn.nn.layers import Linear, rotate_positions
from idattn.ops import softmax_attention
from idattn.ops.product import product
from idattn.ops.segments import PADDING, document_positions
from idattn.sharding import is_split, on_shards, spec


class KVCache(NamedTuple):
    """The keys and values of all tokens so far, behind one another, of as many layers as are stacked.

    A layer of a stack writes its tokens in place and reads its own part: no step copies a cache.
    """

    k: jax.Array  # (layers, B, H, max_tokens, R)
    v: jax.Array  # (layers, B, H, max_tokens, R)
    used: jax.Array  # (B,) int32, tokens that are there; of a stack (layers, B)
    position: jax.Array  # likewise, of the next token in its document: the last of them that count
    layer: jax.Array | None = None  # () int32, whose turn it is; None for the whole stack, or the only one

    def stack(self, layers: int) -> "KVCache":
        """As many layers, all with what this one has."""
        k, v = (jnp.broadcast_to(x, (layers, *x.shape[1:])) for x in self[:2])
        return KVCache(k, v, *(jnp.broadcast_to(x, (layers, *x.shape)) for x in self[2:4]))

    def pick(self, layer: jax.Array) -> "KVCache":
        """A layer of the stack."""
        return self._replace(used=self.used[layer], position=self.position[layer], layer=layer)

    def put(self, layer: jax.Array, new: "KVCache") -> "KVCache":
        """The stack with a layer that was picked from it and went on."""
        used, position = self.used.at[layer].set(new.used), self.position.at[layer].set(new.position)
        return KVCache(new.k, new.v, used, position)

    def resize(self, max_tokens: int) -> "KVCache":
        """With room for as many tokens, of which not more than that may be there."""
        pad = max_tokens - self.k.shape[3]
        widths = [(0, 0)] * 3 + [(0, max(pad, 0)), (0, 0)]
        k, v = (jnp.pad(x[:, :, :, :max_tokens], widths) for x in self[:2])
        return self._replace(k=k, v=v)


class KVBlock(NamedTuple):
    """A stack of caches that is only read, and the tokens of a block since, which `close` writes into it.

    Rows write at slots of their own, but all at the same index of the block: a token changes few, contiguous numbers.
    """

    cache: KVCache  # of all layers
    k: jax.Array  # (layers, B, size, H, R), without the first axis of a layer whose turn it is
    v: jax.Array
    count: jax.Array  # (layers,) int32, tokens of the block so far; likewise
    layer: jax.Array | None = None  # () int32, whose turn it is; None for the whole stack

    def pick(self, layer: jax.Array) -> "KVBlock":
        """A layer of the stack."""
        return KVBlock(self.cache, self.k[layer], self.v[layer], self.count[layer], layer)

    def put(self, layer: jax.Array, new: "KVBlock") -> "KVBlock":
        """The stack with the token that a layer has added."""

        def write(stack, tokens):
            newest = jax.lax.dynamic_slice_in_dim(tokens, new.count - 1, 1, axis=1)
            return jax.lax.dynamic_update_slice(stack, newest[None], (layer, 0, new.count - 1, 0, 0))

        return KVBlock(self.cache, write(self.k, new.k), write(self.v, new.v), self.count.at[layer].set(new.count))

    def close(self) -> KVCache:
        """The caches with the tokens of the block."""
        cache, size = self.cache, self.k.shape[2]
        rows, t, count = jnp.arange(self.k.shape[1])[:, None], jnp.arange(size), self.count[0]
        slots = jnp.where(t < count, cache.used[0][:, None] + t, cache.k.shape[3])
        keys, values = (
            x.at[:, rows, :, slots].set(jnp.moveaxis(y, 0, 2), mode="drop")
            for x, y in ((cache.k, self.k), (cache.v, self.v))
        )
        return KVCache(keys, values, cache.used + count, cache.position + count)


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
        self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: KVCache | KVBlock | None = None
    ) -> tuple[jax.Array, KVCache | KVBlock | None]:
        """The mixed tokens (B, T, D), and the cache with them added if one was given.

        Args:
          x: (B, T, D) in the dtype to compute in.
          segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
          state: the cache of the tokens before; it must have room for this call's tokens.
        """
        projected = self.query(x), self.key(x), self.value(x)
        tokens, heads = spec("B", "T"), spec("B", "T", "H")
        cache = self._specs(state)
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
        if isinstance(state, KVBlock):
            return self._attend_in_block(projected, state)
        start = jnp.zeros(B, jnp.int32) if state is None else state.position
        start = carry.positions(segment_ids, T, start, axis)
        positions, end = document_positions(ids, start)
        q, k, v = (y.reshape(B, T, -1, self.config.head_dim) for y in projected)
        q = rotate_positions(q, positions, self.config.rope_base)
        k = rotate_positions(k, positions, self.config.rope_base)
        if state is None:
            o = softmax_attention(q, k, v, segment_ids, axis=axis)
            return checkpoint_name(o.reshape(B, T, -1), "mixer"), None

        is_token = ids != PADDING
        layer = 0 if state.layer is None else state.layer
        slots = state.used[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1  # of padding: of the one before
        at = (layer, jnp.arange(B)[:, None], slice(None), jnp.where(is_token, slots, state.k.shape[3]))
        keys, values = (x.at[at].set(y.astype(x.dtype), mode="drop") for x, y in ((state.k, k), (state.v, v)))
        every = jnp.arange(state.k.shape[3])
        mask = (every >= (slots - positions)[..., None]) & (every <= slots[..., None])  # (B, T, max_tokens)
        scores = product("bthr,bhsr->bhts", q, keys[layer], q.dtype) / math.sqrt(q.shape[-1])
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)  # finite: padding may see no token
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        o = product("bhts,bhsr->bthr", weights, values[layer], q.dtype).astype(q.dtype)
        used = state.used + jnp.sum(is_token, axis=1, dtype=jnp.int32)
        return o.reshape(B, T, -1), KVCache(keys, values, used, end, state.layer)

    def _attend_in_block(self, projected, state: KVBlock):
        """As `_attend`, for one token of each row."""
        B = projected[0].shape[0]
        q, k, v = (y.reshape(B, 1, -1, self.config.head_dim) for y in projected)
        cache, layer, t = state.cache, state.layer, state.count
        used, position = cache.used[layer], cache.position[layer]
        q, k = (rotate_positions(y, (position + t)[:, None], self.config.rope_base) for y in (q, k))
        keys, values = (jax.lax.dynamic_update_slice_in_dim(x, y, t, 1) for x, y in ((state.k, k), (state.v, v)))
        slots = jnp.arange(cache.k.shape[3])
        before = (slots >= (used - position)[:, None]) & (slots < used[:, None])
        mask = jnp.concatenate([before, jnp.broadcast_to(jnp.arange(keys.shape[1]) <= t, (B, keys.shape[1]))], axis=1)
        scores = jnp.concatenate(
            [product("bthr,bhsr->bhts", q, cache.k[layer], q.dtype), product("bthr,bshr->bhts", q, keys, q.dtype)],
            axis=-1,
        )
        scores = jnp.where(mask[:, None, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        old, new = jnp.split(weights, [slots.size], axis=-1)
        o = product("bhts,bhsr->bthr", old, cache.v[layer], q.dtype) + product("bhts,bshr->bthr", new, values, q.dtype)
        return o.astype(q.dtype).reshape(B, 1, -1), KVBlock(cache, keys, values, t + 1, layer)

    def init_state(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> KVCache:
        """The empty cache for `batch_size` rows of at most `max_tokens` tokens, in `dtype`; it holds no other state."""
        empty = jnp.zeros((1, batch_size, self.config.num_heads, max_tokens, self.config.head_dim), dtype)
        return KVCache(empty, empty, jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def open_block(self, stack: KVCache, size: int, dtype: jnp.dtype) -> KVBlock:
        """The caches of a stack of layers, as this is one, as of a block of up to `size` tokens in `dtype`."""
        layers, B, H, _, R = stack.k.shape
        empty = jnp.zeros((layers, B, size, H, R), dtype)
        return KVBlock(stack, empty, empty, jnp.zeros(layers, jnp.int32))

    def _specs(self, state):
        """How the state of a call is split."""
        if isinstance(state, KVBlock):
            tokens = spec("B", None, "H")
            return KVBlock(self.state_specs("L"), tokens, tokens, spec(), spec())
        return state and self.state_specs()._replace(layer=None if state.layer is None else spec())

    def state_specs(self, *lead: str) -> KVCache:
        """How a cache is split, its counts behind the axes `lead` of a stack."""
        return KVCache(spec("L", "B", "H"), spec("L", "B", "H"), spec(*lead, "B"), spec(*lead, "B"))

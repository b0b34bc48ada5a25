"""Multi-head softmax attention with rotary positions: the study's baseline, with a cache of keys and values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from idattn.config import ComputeConfig, ModelConfig
from idattn.nn.documents import Documents
from idattn.nn.layers import Linear
from idattn.nn.mixer import Memory, Mixer
from idattn.nn.ssm import check_rope
from idattn.ops import prepare_heads, softmax_attention
from idattn.ops.einsum import einsum_f32
from idattn.ops.prepare import HeadInputs, Preparation
from idattn.ops.segments import PADDING
from idattn.ops.softmax import sharded_softmax_attention
from idattn.sharding import is_split, on_shards, spec


class KVCache(Memory):
    """The keys and values of all tokens so far, one after another, of as many layers as are stacked.

    A layer of a stack writes its tokens in place and reads its part: no step copies a cache.
    """

    k: jax.Array  # (L, B, H, max_tokens, R)
    v: jax.Array  # (L, B, H, max_tokens, R)
    used: jax.Array  # (B,) int32, tokens that are there; of a stack (L, B)
    layer: jax.Array | None = None  # () int32, the layer that was picked; None for the whole stack, or the only one

    def stack(self, layers: int) -> "KVCache":
        """A stack of `layers` layers, all with this cache."""
        k, v = (jnp.broadcast_to(x, (layers, *x.shape[1:])) for x in (self.k, self.v))
        return KVCache(k, v, jnp.broadcast_to(self.used, (layers, *self.used.shape)))

    def pick(self, layer: jax.Array) -> "KVCache":
        """A layer of the stack."""
        return self.replace(used=self.used[layer], layer=layer)

    def put(self, layer: jax.Array, new: "KVCache") -> "KVCache":
        """The stack with a layer that was picked from it and changed."""
        return KVCache(new.k, new.v, self.used.at[layer].set(new.used))

    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.k.shape[3]

    def resize(self, max_tokens: int) -> "KVCache":
        """The cache with room for `max_tokens` tokens, which must not be fewer than it holds."""
        pad = max_tokens - self.k.shape[3]
        widths = [(0, 0)] * 3 + [(0, max(pad, 0)), (0, 0)]
        k, v = (jnp.pad(x[:, :, :, :max_tokens], widths) for x in (self.k, self.v))
        return self.replace(k=k, v=v)


class KVBlock(Memory):
    """A stack of caches, which is only read, and the tokens of a block after it, which `close` writes into the caches.

    The rows' next slots in a cache differ, but all rows write at the same index of a block: few, contiguous numbers.
    """

    cache: KVCache  # of all layers
    k: jax.Array  # (L, B, size, H, R); without the first axis once a layer is picked
    v: jax.Array
    count: jax.Array  # (L,) int32, tokens of the block so far; as above
    layer: jax.Array | None = None  # () int32, the layer that was picked; None for the whole stack

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
        rows, t, count = jnp.arange(self.k.shape[1])[:, None], jnp.arange(size)[None], self.count[0]
        slots = jnp.where(t < count, cache.used[0][:, None] + t, cache.k.shape[3])
        keys, values = (
            x.at[:, rows, :, slots].set(jnp.moveaxis(y, 0, 2), mode="drop")
            for x, y in ((cache.k, self.k), (cache.v, self.v))
        )
        return KVCache(keys, values, cache.used + count)


def _cache_specs(*lead: str) -> KVCache:
    """How a cache is split over the mesh, after the axes `lead` of a stack."""
    return KVCache(spec("L", "B", "H"), spec("L", "B", "H"), spec(*lead, "B"))


def refuse_split_cache(memory: Memory | None) -> None:
    """Raise a NotImplementedError where tokens with a cache would be split over devices."""
    if memory is not None and is_split("T"):
        raise NotImplementedError("a cache of keys cannot be split over tokens; use mesh.sequence=1 to generate.")


class SoftmaxAttention(Mixer):
    """Canonical causal attention: no gate, no biases, no normalisation of q and k; see `Mixer` for the arguments."""

    grows = True

    def __init__(self, config: ModelConfig, *, residual_std: float, compute: ComputeConfig, rngs: nnx.Rngs):
        D = config.model_dim
        self.config, self.backend = config, compute.backend
        self.query = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.key = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.value = Linear(D, D, ("D", "H"), std=config.init_std, rngs=rngs)
        self.output = Linear(D, D, ("H", "D"), std=residual_std, rngs=rngs)

    def mix(self, x: jax.Array, documents: Documents, memory: KVCache | KVBlock | None) -> tuple[jax.Array, Any]:
        """As in `Mixer.mix`; a cache must have room for the tokens."""
        refuse_split_cache(memory)
        heads, specs = spec("B", "T", "H"), self._specs(memory)
        core = on_shards(self._core, ((heads,) * 3, documents.specs(), specs), (heads, specs))
        o, memory = core((self.query(x), self.key(x), self.value(x)), documents, memory)
        return self.output(o), memory

    def _core(self, projected, documents: Documents, memory):
        """What `_attend` returns of the three projections, for any of the heads."""
        return self._attend([HeadInputs(x) for x in projected], documents, memory)

    def _attend(self, inputs: list[HeadInputs], documents: Documents, memory):
        """The outputs (B, T, channels) of any of the heads, and the memory; without a cache also for a shard."""
        B, T, _ = inputs[0].x.shape
        q, k, v = (
            prepare_heads(x._replace(rotary=rotary), Preparation(self.config.head_dim), backend=self.backend).reshape(
                B, T, -1, self.config.head_dim
            )
            for x, rotary in zip(inputs, (documents.rotary, documents.rotary, None), strict=True)
        )
        if memory is None and is_split("T"):
            o = sharded_softmax_attention(q, k, v, documents.positions, "sequence")
        elif memory is None:
            o = softmax_attention(q, k, v, documents.segments)
        elif isinstance(memory, KVBlock):
            o, memory = self._attend_in_block(q, k, v, documents, memory)
        else:
            o, memory = self._attend_in_cache(q, k, v, documents, memory)
        return checkpoint_name(o.reshape(B, T, -1), "mixer"), memory

    def _attend_in_cache(self, q, k, v, documents: Documents, cache: KVCache):
        """The tokens are written into the cache, and attend to what it holds of their documents."""
        B, T = documents.positions.shape
        if cache.capacity() < T:
            raise ValueError(f"{T} tokens do not fit into a cache with room for max_tokens={cache.capacity()}.")
        is_token = jnp.ones((B, T), bool) if documents.run is None else documents.run != PADDING
        layer = 0 if cache.layer is None else cache.layer
        # The slot of each token; padding has the slot of the token before it.
        slots = cache.used[:, None] + jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
        at = (layer, jnp.arange(B)[:, None], slice(None), jnp.where(is_token, slots, cache.capacity()))
        keys, values = (x.at[at].set(y.astype(x.dtype), mode="drop") for x, y in ((cache.k, k), (cache.v, v)))
        every = jnp.arange(cache.capacity())[None, None]
        mask = (every >= (slots - documents.positions)[..., None]) & (every <= slots[..., None])  # (B, T, max_tokens)
        scores = einsum_f32("bthr,bhsr->bhts", q, keys[layer], q.dtype) / math.sqrt(q.shape[-1])
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)  # finite: padding may see no token
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        o = einsum_f32("bhts,bhsr->bthr", weights, values[layer], q.dtype).astype(q.dtype)
        used = cache.used + jnp.sum(is_token, axis=1, dtype=jnp.int32)
        return o, KVCache(keys, values, used, cache.layer)

    def _attend_in_block(self, q, k, v, documents: Documents, block: KVBlock):
        """One token of each row attends to the cache and to the tokens of the block."""
        B = q.shape[0]
        cache, layer, t = block.cache, block.layer, block.count
        used, position = cache.used[layer], documents.positions[:, 0] - t  # before the block
        keys, values = (jax.lax.dynamic_update_slice_in_dim(x, y, t, 1) for x, y in ((block.k, k), (block.v, v)))
        slots = jnp.arange(cache.capacity())[None]
        in_cache = (slots >= (used - position)[:, None]) & (slots < used[:, None])
        in_block = jnp.broadcast_to(jnp.arange(keys.shape[1])[None] <= t, (B, keys.shape[1]))
        mask = jnp.concatenate([in_cache, in_block], axis=1)
        scores = jnp.concatenate(
            [
                einsum_f32("bthr,bhsr->bhts", q, cache.k[layer], q.dtype),
                einsum_f32("bthr,bshr->bhts", q, keys, q.dtype),
            ],
            axis=-1,
        )
        scores = jnp.where(mask[:, None, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        old, new = jnp.split(weights, [cache.capacity()], axis=-1)
        o = einsum_f32("bhts,bhsr->bthr", old, cache.v[layer], q.dtype)
        o += einsum_f32("bhts,bshr->bthr", new, values, q.dtype)
        return o.astype(q.dtype), KVBlock(cache, keys, values, t + 1, layer)

    def init_memory(
        self, batch_size: int, max_tokens: int, dtype: jnp.dtype, state_dtype: jnp.dtype | None = None
    ) -> Any:
        """An empty cache in `dtype`; it holds no state of fixed size."""
        empty = jnp.zeros((1, batch_size, self.config.num_heads, max_tokens, self.config.head_dim), dtype)
        return KVCache(empty, empty, jnp.zeros(batch_size, jnp.int32))

    def memory_specs(self, *lead: str) -> Any:
        return _cache_specs(*lead)

    def _specs(self, memory):
        """How the memory of a call is split."""
        if isinstance(memory, KVBlock):
            tokens = spec("B", None, "H")
            return KVBlock(_cache_specs("L"), tokens, tokens, spec(), spec())
        return memory and _cache_specs().replace(layer=None if memory.layer is None else spec())

    def open_block(self, stack: Any, size: int, dtype: jnp.dtype) -> Any:
        layers, B, H, _, R = stack.k.shape
        empty = jnp.zeros((layers, B, size, H, R), dtype)
        return KVBlock(stack, empty, empty, jnp.zeros(layers, jnp.int32))

    @classmethod
    def flops(cls, config: ModelConfig, context: int) -> int:
        """Projections; scores and weighted values over half the context."""
        return 8 * config.model_dim**2 + 2 * config.model_dim * context

    @classmethod
    def state_size(cls, config: ModelConfig, context: int) -> int:
        return 2 * config.model_dim * context

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raise a ValueError where rotary positions do not fit the heads."""
        check_rope(config, True)

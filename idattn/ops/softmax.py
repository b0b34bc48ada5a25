"""Causal softmax attention, the study's baseline: JAX's splash kernel on TPUs, JAX's own function elsewhere."""

import math

import jax
import jax.numpy as jnp

from idattn.ops.arguments import check_segments
from idattn.ops.segments import Segments
from idattn.shapes import SegmentIds

LANES = 128  # of a TPU's vector registers


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: SegmentIds | Segments | None = None
) -> jax.Array:
    """Causal attention within documents, softmax(q k^T / sqrt(R)) v.

    Args:
      q: (B, T, H, R) queries.
      k: (B, T, H, R) their keys.
      v: (B, T, H, R) their values.
      segment_ids: (B, T) as in `idattn.ops.interdomain_attention`, or None for one document a row; padding attends to
        padding.

    Returns:
      (B, T, H, R) in the dtype of `q`.

    Raises:
      ValueError: the segment ids are no integers, or not one for each token.
    """
    segments = check_segments(segment_ids, *q.shape[:2])
    run = None if segments is None else segments.run
    if q.shape[1] % LANES:
        return _plain(q, k, v, run)
    return jax.lax.platform_dependent(q, k, v, run, tpu=splash, default=_plain)


def sharded_softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, axis: str) -> jax.Array:
    """`softmax_attention` of a shard's queries, where a mesh axis splits the tokens: the shards gather keys and values.

    Args:
      q: (B, T, H, R) queries of the shard's tokens.
      k: (B, T, H, R) their keys.
      v: (B, T, H, R) their values.
      positions: (B, T) of the tokens in their documents, which say how far back a token sees.
      axis: the mesh axis.
    """

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis, axis=1, tiled=True)

    T, k, v = q.shape[1], gather(k), gather(v)
    index = (T * jax.lax.axis_index(axis) + jnp.arange(T))[None, :, None]
    key_index = jnp.arange(k.shape[1])[None, None]
    mask = (key_index <= index) & (key_index >= index - positions[:, :, None])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def splash(q: jax.Array, k: jax.Array, v: jax.Array, run: jax.Array | None = None) -> jax.Array:
    """`softmax_attention` of a whole sequence by JAX's TPU kernel; `run` (B, T) differs between documents."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, H = q.shape[1:3]
    size = math.gcd(T, 512)
    blocks = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), size)
    blocks |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), size)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * H),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks, use_fused_bwd_kernel=True),
    )
    ids = None if run is None else splash_attention_kernel.SegmentIds(run, run)
    q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
    o = jax.vmap(kernel)(q, k, v, ids)
    assert isinstance(o, jax.Array), "residuals come only where they are asked for"
    return o.swapaxes(1, 2)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, run: jax.Array | None) -> jax.Array:
    if run is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    mask = (run[:, :, None] == run[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)[None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

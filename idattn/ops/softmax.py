"""Causal softmax attention, the study's baseline: JAX's splash kernel on TPUs, JAX's own function elsewhere."""

import math

import jax
import jax.numpy as jnp

from idattn.ops.segments import run_index

LANES = 128  # of a TPU's vector registers


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, *, axis: str | None = None
) -> jax.Array:
    """Causal attention within documents, softmax(q k^T / sqrt(R)) v.

    Args:
      q: (B, T, H, R) queries; of a shard of the sequence its own tokens.
      k: (B, T, H, R) their keys.
      v: (B, T, H, R) their values.
      segment_ids: (B, T) as in `idattn.ops.interdomain_attention`, or None for one document a row; padding attends to
        itself.
      axis: the mesh axis that the tokens are split over, whose shards gather all keys and values; or None.

    Returns:
      (B, T, H, R) in the dtype of `q`.
    """
    if axis is not None:
        return _sharded(q, k, v, segment_ids, axis)
    runs = None if segment_ids is None else run_index(segment_ids)
    if q.shape[1] % LANES:
        return _plain(q, k, v, runs)
    return jax.lax.platform_dependent(q, k, v, runs, tpu=splash, default=_plain)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, runs: jax.Array | None = None) -> jax.Array:
    """`softmax_attention` of a whole sequence by JAX's TPU kernel; `runs` (B, T) differ between documents."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, H = q.shape[1:3]
    size = math.gcd(T, 512)
    blocks = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), size)
    blocks |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), size)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * H),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks, use_fused_bwd_kernel=True),
    )
    ids = None if runs is None else splash_attention_kernel.SegmentIds(runs, runs)
    q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(q.shape[-1]), k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


def _plain(q, k, v, runs):
    if runs is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    mask = (runs[:, :, None] == runs[:, None, :]) & jnp.tri(q.shape[1], dtype=bool)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


def _sharded(q, k, v, segment_ids, axis):
    def everywhere(x):
        return jax.lax.all_gather(x, axis, axis=1, tiled=True)

    T, k, v = q.shape[1], everywhere(k), everywhere(v)
    first = T * jax.lax.axis_index(axis)
    mask = (first + jnp.arange(T)[:, None] >= jnp.arange(k.shape[1]))[None]
    if segment_ids is not None:
        runs = run_index(everywhere(segment_ids))
        mask &= jax.lax.dynamic_slice_in_dim(runs, first, T, axis=1)[:, :, None] == runs[:, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

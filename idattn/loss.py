"""Next-token cross-entropy without the logits of a whole batch."""

import jax
import jax.numpy as jnp

from idattn.ops.einsum import einsum_f32
from idattn.sharding import RULES, is_split, on_shards, spec


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of the targets, and how many count.

    Logits exist for `chunk` tokens at a time, in the forward and in the backward pass; softmax is in float32.

    Args:
      hidden: (B, T, D) last hidden vectors; products are computed in their dtype.
      head: (D, V) output matrix.
      targets: (B, T) integers in [0, V).
      mask: (B, T) weights, 0 where a target does not count.
      chunk: tokens whose logits exist at a time, at least 1.

    Returns:
      The sum in nats and the sum of the mask, float32 (float64 under x64) scalars.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    axes = RULES["V"] if is_split("V") else ()
    tokens = spec("B", "T")

    def function(hidden, head, targets, mask):
        # The transpose sums the head's gradient, in float32, to the devices that hold its parts.
        head = jax.lax.all_gather(head, RULES["D"], axis=0, tiled=True) if is_split("D") else head
        return _total(hidden, head, targets, mask, axes=axes, chunk=chunk)

    # One sum a device, of its tokens: adding them up is the only exchange that all devices need.
    total = on_shards(function, (tokens, spec("D", "V"), tokens, tokens), tokens)
    mask = mask.astype(dtype)
    return jnp.sum(total(hidden, head, targets, mask)), jnp.sum(mask)


def _total(hidden, head, targets, mask, *, axes: tuple[str, ...], chunk: int) -> jax.Array:
    """The sum over a device's tokens, (1, 1); its part of the vocabulary is one of those along the mesh axes `axes`."""
    D = hidden.shape[-1]
    count = targets.size
    chunk = min(chunk, count)
    begin = jax.lax.axis_index(axes) * head.shape[1] if axes else 0

    def split(x):
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, ((0, -count % chunk), *[(0, 0)] * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])

    def sum_parts(x):
        return jax.lax.psum(x, axes) if axes else x

    @jax.checkpoint
    def add(total, tokens):
        x, target, weight = tokens
        # Cast inside, so that the head's gradient is summed over chunks in float32.
        logits = einsum_f32("nd,dv->nv", x, head, x.dtype)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        top = jax.lax.pmax(top, axes) if axes else top
        normaliser = top + jnp.log(sum_parts(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)))
        index = target - begin
        is_here = (index >= 0) & (index < head.shape[1])
        target_logit = jnp.take_along_axis(logits, jnp.clip(index, 0, head.shape[1] - 1)[:, None], axis=-1)[:, 0]
        target_logit = sum_parts(jnp.where(is_here, target_logit, 0))
        return total + jnp.sum(weight * (normaliser - target_logit)), None

    tokens = (split(hidden.reshape(*targets.shape, D)), split(targets), split(mask))
    return jax.lax.scan(add, jnp.zeros((), mask.dtype), tokens)[0][None, None]

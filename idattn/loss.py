"""Next-token cross-entropy without the logits of a whole batch."""

from functools import partial

import jax
import jax.numpy as jnp

from idattn.ops.einsum import einsum_f32
from idattn.sharding import RULES, is_split, on_shards, spec


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The summed negative log-likelihood of the targets, and how many count.

    Logits exist for `chunk` tokens at a time, once: the gradients are computed with them, in the forward pass. Softmax
    is in float32.

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
    count = targets.size
    chunk = min(chunk, count)

    def split(x):
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, ((0, -count % chunk), *[(0, 0)] * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])

    hidden = split(hidden.reshape(*targets.shape, -1))
    return jnp.reshape(_sum(hidden, head, split(targets), split(mask), axes), (1, 1))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over chunks of tokens: (chunks, n, D), (D, V), (chunks, n), (chunks, n) -> ()."""

    def add(total, tokens):
        x, target, weight = tokens
        return total + jnp.sum(weight * _losses(x, head, target, axes)[0]), None

    return jax.lax.scan(add, jnp.zeros((), mask.dtype), (hidden, targets, mask))[0]


def _sum_forward(hidden, head, targets, mask, axes):
    """The sum, and its gradients: a chunk's logits are used for both, not computed a second time."""

    def add(carry, tokens):
        (total, d_head), (x, target, weight) = carry, tokens
        loss, logits, normaliser, index = _losses(x, head, target, axes)
        d_logits = weight[:, None] * (
            jnp.exp(logits - normaliser[:, None]) - (index[:, None] == jnp.arange(head.shape[1])[None])
        )
        d_x = einsum_f32("nv,dv->nd", d_logits, head, x.dtype).astype(x.dtype)
        # Summed over chunks in float32.
        d_head += einsum_f32("nd,nv->dv", x, d_logits, x.dtype)
        return (total + jnp.sum(weight * loss), d_head), (d_x, loss)

    start = jnp.zeros((), mask.dtype), jnp.zeros(head.shape, mask.dtype)
    (total, d_head), (d_hidden, losses) = jax.lax.scan(add, start, (hidden, targets, mask))
    return total, (d_hidden, d_head.astype(head.dtype), losses)


def _sum_backward(axes, gradients, g):
    d_hidden, d_head, losses = gradients
    # The transpose of `on_shards` gives every part of the vocabulary its share of g, and sums what they return for
    # arrays of which they hold copies.
    whole = jax.lax.psum(g, axes) if axes else g
    return (d_hidden * whole).astype(d_hidden.dtype), (d_head * whole).astype(d_head.dtype), None, losses * g


_sum.defvjp(_sum_forward, _sum_backward)


def _losses(x, head, target, axes):
    """Of n tokens: their losses, their logits (n, V) here, the logarithms that normalise them, the targets' index."""

    def sum_parts(y):
        return jax.lax.psum(y, axes) if axes else y

    logits = einsum_f32("nd,dv->nv", x, head, x.dtype)
    top = jnp.max(logits, axis=-1)
    top = jax.lax.pmax(top, axes) if axes else top
    normaliser = top + jnp.log(sum_parts(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)))
    index = target - (jax.lax.axis_index(axes) * head.shape[1] if axes else 0)
    is_here = (index >= 0) & (index < head.shape[1])
    target_logit = jnp.take_along_axis(logits, jnp.clip(index, 0, head.shape[1] - 1)[:, None], axis=-1)[:, 0]
    return normaliser - sum_parts(jnp.where(is_here, target_logit, 0)), logits, normaliser, index

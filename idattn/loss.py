"""Next-token cross-entropy without the logits of a whole batch."""

import jax
import jax.numpy as jnp

from idattn.ops.product import product


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
    D = hidden.shape[-1]
    count = targets.size
    chunk = min(chunk, count)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def split(x):
        x = x.reshape(count, *x.shape[2:])
        return jnp.pad(x, ((0, -count % chunk), *[(0, 0)] * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])

    @jax.checkpoint
    def add(total, tokens):
        x, target, weight = tokens
        # Cast inside, so that the head's gradient is summed over chunks in float32.
        logits = product("nd,dv->nv", x, head, x.dtype)
        right = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return total + jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - right)), None

    mask = mask.astype(dtype)
    tokens = (split(hidden.reshape(*targets.shape, D)), split(targets), split(mask))
    return jax.lax.scan(add, jnp.zeros((), dtype), tokens)[0], jnp.sum(mask)

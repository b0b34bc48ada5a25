"""Packed documents: which tokens may see each other, from segment ids.

A token whose id differs from its predecessor's starts a new document; -1 marks padding. Ids may come back, so
everything is decided on *runs* of equal ids, numbered 0, 1, ... along the row; run 0 begins at token 0 and is
the one that an initial state continues.
"""

import jax
import jax.numpy as jnp

PADDING = -1


def run_index(segment_ids: jax.Array) -> jax.Array:
    """The number of the run that each token belongs to, (B, T) int32, from segment ids (B, T)."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def last_token(segment_ids: jax.Array) -> jax.Array:
    """The index of each row's last token that is not padding, (B,) int32; -1 where there is none."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    return jnp.max(jnp.where(segment_ids != PADDING, index, -1), axis=1)


def document_positions(segment_ids: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's position in its document, and the position that the next token would have.

    Args:
      segment_ids: (B, T).
      start: (B,) position of token 0, whose document may have begun earlier.

    Returns:
      Positions (B, T) int32, and (B,) int32: one past the last token that is not padding (`start` where all is).
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    runs = run_index(segment_ids)
    begins = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))
    positions = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1) + jnp.where(runs == 0, start[:, None], 0)
    last = last_token(segment_ids)
    after = jnp.take_along_axis(positions, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] + 1
    return positions, jnp.where(last >= 0, after, start)

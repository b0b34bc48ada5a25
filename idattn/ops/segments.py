"""Packed documents: which tokens may see each other, from segment ids.

A token whose id differs from its predecessor's starts a new document; -1 marks padding. Ids may come back, so
everything is decided on *runs* of equal ids, numbered 0, 1, ... along the row; run 0 begins at token 0 and is
the one that an initial state continues.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PADDING = -1


class Segments(NamedTuple):
    """The documents of the rows of a batch."""

    run: jax.Array  # (B, T) int32, the number of the token's run in its row; PADDING for padding
    last: jax.Array  # (B,) int32, the index of the last token that is not padding; -1 where there is none


def find_segments(segment_ids: jax.Array | np.ndarray) -> Segments:
    """The documents that segment ids (B, T), integers of any kind, describe.

    Raises:
      ValueError: the ids are not integers.
    """
    # NumPy's ids are compared as they are: JAX cuts 64 bits to 32, where different ids may be equal.
    ids = segment_ids if isinstance(segment_ids, jax.Array) else np.asarray(segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids of dtype {ids.dtype} must be integers.")
    is_signed = jnp.issubdtype(ids.dtype, jnp.signedinteger)
    is_token = ids != PADDING if is_signed else jnp.ones(ids.shape, bool)
    run = jnp.cumsum(_changes(ids), axis=1, dtype=jnp.int32)
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    return Segments(jnp.where(is_token, run, PADDING), jnp.max(jnp.where(is_token, index, -1), axis=1))


def document_positions(segments: Segments, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token's position in its document, and the position that the next token would have.

    Args:
      segments: of the tokens.
      start: (B,) position of token 0, whose document may have begun earlier.

    Returns:
      Positions (B, T) int32, and (B,) int32: one past the last token that is not padding (`start` where all is).
    """
    run, last = segments
    index = jnp.arange(run.shape[1], dtype=jnp.int32)[None]
    begin = jax.lax.cummax(jnp.where(_changes(run), index, 0), axis=1)
    positions = index - begin + jnp.where(run == 0, start[:, None], 0)
    after = jnp.take_along_axis(positions, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] + 1
    return positions, jnp.where(last >= 0, after, start)


def _changes(x: jax.Array | np.ndarray) -> jax.Array:
    """Where the numbers (B, T) differ from those before them in the row; not at the first.

    As long as the row, since jax.export does not know that a sum over T - 1 tokens has any.
    """
    before = (jnp if isinstance(x, jax.Array) else np).roll(x, 1, axis=1)
    return (x != before) & (jnp.arange(x.shape[1])[None] > 0)

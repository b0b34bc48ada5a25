"""How the states run through the chunks of a sequence: one after another, or in a parallel scan."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from idattn.ops.chunks import decay_state
from idattn.ops.planes import complex_multiply

Scan = Callable[..., tuple[jax.Array, jax.Array]]  # as `sequential_scan`


def sequential_scan(
    decay: jax.Array, increments: jax.Array, continues: jax.Array | None, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """before_{n+1} = continues_n decay before_n + increment_n with before_0 = first, one chunk after another.

    Args:
      decay: (G, 2, M).
      increments: (N, B, G, W, 2M).
      continues: (N, B, 1, 1, 1) booleans, or None for all true.
      first: (B, G, W, 2M).

    Returns:
      before_0 ... before_{N-1} in the shape of `increments`, and before_N.
    """

    def advance(state, chunk):
        increment, continues = chunk
        decayed = decay_state(decay[None], state)
        return (decayed if continues is None else jnp.where(continues, decayed, 0)) + increment, state

    after, before = jax.lax.scan(advance, first, (increments, continues))
    return before, after


def associative_scan(
    decay: jax.Array, increments: jax.Array, continues: jax.Array | None, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `sequential_scan` returns, in a depth of log N instead of N."""
    decay = jnp.broadcast_to(decay, (*increments.shape[:2], *decay.shape))
    decay = decay if continues is None else jnp.where(continues, decay, 0)

    def combine(early, late):
        return complex_multiply(late[0], early[0]), decay_state(late[0], early[1]) + late[1]

    decay, increments = jax.lax.associative_scan(combine, (decay, increments))
    after = decay_state(decay, first[None]) + increments
    return jnp.concatenate([first[None], after[:-1]]), after[-1]

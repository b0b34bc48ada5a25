"""How the states run through the chunks of a sequence: one after another, in blocks, or in a parallel scan."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from idattn.ops.chunks import decay_state
from idattn.ops.planes import complex_multiply, powers

Scan = Callable[..., tuple[jax.Array, jax.Array]]  # as `sequential_scan`
BLOCK = 6  # chunks that `blocked_scan` sums over


def sequential_scan(
    decay: jax.Array, increments: jax.Array, continues: jax.Array | None, first: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """before_{n+1} = continues_n decay before_n + increment_n with before_0 = first, one chunk after another.

    Args:
      decay: (G, 2, M).
      increments: (G, B, N, W, 2M).
      continues: (B, N) booleans, or None for all true.
      first: (G, B, W, 2M).
      reverse: from the last chunk to the first: before_{n-1} = continues_n decay before_n + increment_n, with
        before_{N-1} = first.

    Returns:
      before_0 ... before_{N-1} in the shape of `increments`, and the one that would be next.
    """

    def advance(state, chunk):
        increment, continues = chunk
        decayed = decay_state(decay[:, None], state)
        decayed = decayed if continues is None else jnp.where(continues[None, :, None, None], decayed, 0)
        return decayed + increment, state

    chunks = jnp.moveaxis(increments, 2, 0), None if continues is None else continues.T
    after, before = jax.lax.scan(advance, first, chunks, reverse=reverse)
    return jnp.moveaxis(before, 0, 2), after


def blocked_scan(
    decay: jax.Array, increments: jax.Array, continues: jax.Array | None, first: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """What `sequential_scan` returns, by few kernels: sums over blocks of chunks, and the same from block to block.

    A sum is written out over the chunks of a block before one, so no kernel waits for another within a block.
    """
    G, B, N, W, M2 = increments.shape
    if not isinstance(N, int):  # a dimension of jax.export
        return sequential_scan(decay, increments, continues, first, reverse=reverse)
    size = min(N, BLOCK)
    blocks = -(-N // size)
    spare = blocks * size - N  # after the last chunk
    pad = (spare, 0) if reverse else (0, spare)
    chunks = jnp.pad(increments, [(0, 0), (0, 0), pad, (0, 0), (0, 0)]).reshape(G, B, blocks, size, W, M2)
    order = range(size - 1, -1, -1) if reverse else range(size)
    chunks = [chunks[:, :, :, i] for i in order]
    flags = None
    if continues is not None:
        padded = jnp.pad(continues, [(0, 0), pad]).reshape(B, blocks, size)
        flags = [padded[..., i] for i in order]
    weights = powers(decay, size)
    starts = first[:, :, None]
    if blocks > 1:
        # Apart from the sums around it, which would be computed again for every value that is read.
        added = jax.lax.optimization_barrier(_decayed_sum(weights, chunks, flags and flags[1:]))
        across = None if continues is None else jnp.all(padded, axis=2)
        starts, _ = blocked_scan(weights[size], added, across, first, reverse=reverse)
        starts = jax.lax.optimization_barrier(starts)
    before = [_decayed_sum(weights, [starts, *chunks[:i]], flags and flags[:i]) for i in range(size)]
    before = jnp.stack(before[::-1] if reverse else before, axis=3).reshape(G, B, blocks * size, W, M2)
    before = before[:, :, pad[0] : pad[0] + N]
    last = 0 if reverse else N - 1
    ends = [x[:, :, last, None] for x in (before, increments)]
    end = _decayed_sum(weights, ends, None if continues is None else [continues[:, last, None]])
    return before, end[:, :, 0]


def _decayed_sum(weights: jax.Array, states: list[jax.Array], continues: list[jax.Array] | None) -> jax.Array:
    """states[-1] + decay states[-2] + decay^2 states[-3] + ..., (G, B, blocks, W, 2M), one kernel.

    Args:
      weights: powers of the decay, (count, G, 2, M).
      continues: for each state but the first, whether those before it count, (B, blocks); None for all true.
    """
    total_re = total_im = jnp.zeros((), states[0].dtype)
    counts = jnp.ones((), bool)
    for i, state in enumerate(reversed(states)):
        re, im = jnp.split(state, 2, axis=-1)
        if i:
            decay_re, decay_im = (weights[i, :, plane][:, None, None, None] for plane in (0, 1))
            re, im = re * decay_re - im * decay_im, re * decay_im + im * decay_re
            if continues is not None:
                counts = counts & continues[len(states) - 1 - i]
                re, im = (jnp.where(counts[None, ..., None, None], x, 0) for x in (re, im))
        total_re, total_im = total_re + re, total_im + im
    return jnp.concatenate([total_re, total_im], axis=-1)


def associative_scan(
    decay: jax.Array, increments: jax.Array, continues: jax.Array | None, first: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """What `sequential_scan` returns, in a depth of log N instead of N."""
    decay = jnp.broadcast_to(decay[:, None, None], (*increments.shape[:3], *decay.shape[1:]))
    decay = decay if continues is None else jnp.where(continues[..., None, None], decay, 0)

    def combine(early, late):
        return complex_multiply(late[0], early[0]), decay_state(late[0], early[1]) + late[1]

    decay, increments = jax.lax.associative_scan(combine, (decay, increments), reverse=reverse, axis=2)
    first = first[:, :, None]
    after = decay_state(decay, first) + increments
    if reverse:
        return jnp.concatenate([after[:, :, 1:], first], axis=2), after[:, :, 0]
    return jnp.concatenate([first, after[:, :, :-1]], axis=2), after[:, :, -1]

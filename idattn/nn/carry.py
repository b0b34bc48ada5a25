"""What reaches a shard of the sequence from the shards before it (ALGORITHM: two passes over fixed-size states).

Everything a token mixer carries along the sequence changes as value -> decay * value + own over a shard's tokens. So
each shard first finds its own pair, an exclusive scan over the mesh axis makes the value that arrives at each shard
of it, in log2(shards) exchanges, and the mixer runs as if that were where its tokens go on from. The axis is None
where the sequence is whole; then nothing is exchanged.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from idattn.ops.segments import PADDING, last_token, run_index


def continues(segment_ids: jax.Array | None, axis: str | None) -> jax.Array | None:
    """Whether what a shard's tokens go on from is the document before its border, (B,); None where all do.

    Shard 0 goes on from the state that the mixer was given. Padding changes nothing, so what comes before passes.
    """
    if segment_ids is None or axis is None:
        return None
    first = segment_ids[:, 0]
    return (_from_previous(segment_ids[:, -1], axis) == first) | (first == PADDING) | (jax.lax.axis_index(axis) == 0)


def arriving(
    decay: jax.Array,
    own: jax.Array,
    first: jax.Array,
    axis: str | None,
    *,
    product: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
) -> jax.Array:
    """The value at the start of each shard, where a shard makes product(decay, value) + own of it.

    Args:
      decay: of the shard, 0 where nothing of the value remains; its kind multiplies itself by `product` too.
      own: what the shard's tokens make of nothing.
      first: the value at the start of shard 0.
    """
    if axis is None:
        return first
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    own = jnp.where(index == 0, own + product(decay, first), own)
    step = 1
    while step < shards:  # where nothing arrives, zeros do: right, as before shard 0 there is nothing
        earlier_decay, earlier = (_from_previous(x, axis, step) for x in (decay, own))
        own, decay = own + product(decay, earlier), product(decay, earlier_decay)
        step *= 2
    return jnp.where(index == 0, first, _from_previous(own, axis))


def positions(segment_ids: jax.Array | None, T: int, first: jax.Array, axis: str | None) -> jax.Array:
    """The position in its document, (B,) int32, that a shard's token 0 would have if it went on with the one before.

    Args:
      segment_ids: (B, T) of the shard, or None.
      T: tokens of a shard.
      first: (B,) position of the sequence's token 0.
    """
    if axis is None:
        return first
    if segment_ids is None:
        return first + T * jax.lax.axis_index(axis)
    runs, last = run_index(segment_ids), last_token(segment_ids)
    run = jnp.take_along_axis(runs, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    begin = jnp.sum(runs < run[:, None], axis=1)  # of the last token's document
    kept = (last < 0) | (run == 0)
    same = continues(segment_ids, axis)
    own = jnp.where(last < 0, 0, last + 1 - begin).astype(jnp.int32)
    here = arriving((kept & same).astype(jnp.int32), own, first, axis)
    return jnp.where(same, here, 0)


def neighbour(tail: jax.Array, first: jax.Array | None, same: jax.Array | None, axis: str) -> jax.Array:
    """The previous shard's tail (B, ...), zero where its document does not go on here; shard 0 has `first`."""
    before = _from_previous(tail, axis)
    if first is not None:
        before = jnp.where(jax.lax.axis_index(axis) == 0, first.astype(before.dtype), before)
    return before if same is None else jnp.where(same.reshape(-1, *[1] * (tail.ndim - 1)), before, 0)


def at_the_end(values: Any, segment_ids: jax.Array | None, axis: str | None) -> Any:
    """Every row's values (B, ...) as they are after its last token, for all shards; `values` are after the shard's."""
    if axis is None:
        return values
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    if segment_ids is None:
        owner = jnp.full((jax.tree.leaves(values)[0].shape[0],), shards - 1)
    else:
        owner = jax.lax.pmax(jnp.where(last_token(segment_ids) >= 0, index, 0), axis)
    return jax.tree.map(
        lambda x: jax.lax.psum(jnp.where((owner == index).reshape(-1, *[1] * (x.ndim - 1)), x, 0), axis), values
    )


def _from_previous(x: jax.Array, axis: str, step: int = 1) -> jax.Array:
    """x of the shard `step` before; zeros where there is none."""
    shards = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, i + step) for i in range(shards - step)])

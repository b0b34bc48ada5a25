"""The documents of a batch, computed once for all layers, and what crosses between the shards of a sequence.

Whatever a token mixer hands along the sequence changes as value -> decay * value + increment over a shard's tokens. So
each shard first computes its decay and its increment. An exclusive scan over the mesh axis then computes the value at
the start of each shard, in log2(shards) exchanges, and the mixer starts from that value. The axis is None where the
sequence is whole; then nothing is exchanged.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.config import ModelConfig
from idattn.ops.prepare import rotary_table
from idattn.ops.segments import PADDING, Segments, document_positions, find_segments
from idattn.sharding import on_shards, sequence_axis, spec


class Documents(NamedTuple):
    """Where the tokens of a batch, or of a shard of it, stand in their documents."""

    positions: jax.Array  # (B, T) int32, of the token in its document
    run: jax.Array | None = None  # (B, T) int32 as in `Segments`; None: every row is one document without padding
    last: jax.Array | None = None  # (B, shards) int32, in each shard as in `Segments`
    continues: jax.Array | None = None  # (B, shards) bool, whether the document before a shard's border goes past it
    rotary: jax.Array | None = None  # (B, T, 2 head_dim) float32, of the positions, see `rotary_table`; None: no pairs

    @property
    def borders(self) -> jax.Array | None:
        """The positions, where rows hold several documents."""
        return None if self.run is None else self.positions

    @property
    def segments(self) -> Segments | None:
        """The documents as `idattn.ops` takes them, inside a shard."""
        if self.run is None or self.last is None:  # both or neither
            return None
        return Segments(self.run, self.last[:, 0])

    def specs(self) -> "Documents":
        """How the arrays are split."""
        return jax.tree.map(lambda x: spec("B", "T"), self)


def find_documents(
    segment_ids: jax.Array | None, start: jax.Array, shape: tuple[int, ...], config: ModelConfig | None
) -> tuple[Documents, jax.Array]:
    """The documents of a batch, and the position (B,) that the next token of each row would have.

    Args:
      segment_ids: (B, T) as in `idattn.ops.interdomain_attention`; None for one document a row.
      start: (B,) int32 position of token 0 of each row, whose document may have begun earlier.
      shape: (B, T) of the batch.
      config: of the model, whose heads may be rotated; None for no table of rotations.
    """
    documents, end = _find(segment_ids, start, shape)
    if config is None or config.head_dim % 2:
        return documents, end
    return documents._replace(rotary=rotary_table(documents.positions, config.head_dim, config.rope_base)), end


def _find(segment_ids: jax.Array | None, start: jax.Array, shape: tuple[int, ...]) -> tuple[Documents, jax.Array]:
    B, T = shape
    axis = sequence_axis()
    if segment_ids is None:
        positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        return Documents(positions), start + T

    tokens, rows = spec("B", "T"), spec("B")
    documents = Documents(tokens, tokens, tokens, None if axis is None else tokens)
    find = on_shards(lambda ids, start: _find_on_shard(ids, start, axis), (tokens, rows), (documents, rows))
    return find(segment_ids, start)


def _find_on_shard(segment_ids: jax.Array, start: jax.Array, axis: str | None) -> tuple[Documents, jax.Array]:
    segments = find_segments(segment_ids)
    run, last = segments
    if axis is None:
        positions, end = document_positions(segments, start)
        return Documents(positions, run, last[:, None]), end
    first = segment_ids[:, 0]
    # Padding changes no state, so the document before it continues.
    continues = (_from_previous(segment_ids[:, -1], axis) == first) | (run[:, 0] == PADDING)
    continues |= jax.lax.axis_index(axis) == 0
    _, length = document_positions(segments, jnp.zeros_like(start))  # of the last token's document in this shard
    passes = (last < 0) | (jnp.take_along_axis(run, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] == 0)
    before = exclusive_scan((passes & continues).astype(jnp.int32), length, start, axis)
    positions, end = document_positions(segments, jnp.where(continues, before, 0))
    documents = Documents(positions, run, last[:, None], continues[:, None])
    return documents, at_last_token(end, documents, axis)


def exclusive_scan(
    decay: jax.Array,
    increment: jax.Array,
    first: jax.Array,
    axis: str | None,
    *,
    apply: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
    compose: Callable[[jax.Array, jax.Array], jax.Array] = operator.mul,
) -> jax.Array:
    """The value at the start of each shard, where every shard changes it to apply(decay, value) + increment.

    Args:
      decay: of the shard's tokens, 0 where they forget the value.
      increment: the value after the shard's tokens where it was 0 before them.
      first: the value at the start of shard 0.
      axis: the mesh axis of the shards.
      apply: (decay, value) -> what remains of the value.
      compose: (later decay, earlier decay) -> the decay over both.
    """
    if axis is None:
        return first
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    increment = jnp.where(index == 0, increment + apply(decay, first), increment)
    step = 1
    while step < shards:  # shards without a predecessor receive zeros, as they should
        earlier_decay, earlier = (_from_previous(x, axis, step) for x in (decay, increment))
        increment, decay = increment + apply(decay, earlier), compose(decay, earlier_decay)
        step *= 2
    return jnp.where(index == 0, first, _from_previous(increment, axis))


def arriving(
    decay: jax.Array, increment: jax.Array, first: jax.Array, documents: Documents, axis: str, **operations: Any
) -> jax.Array:
    """`exclusive_scan` of values (B, ...) that no shard takes over from a document that ends at its border."""
    state = exclusive_scan(where_continued(documents, decay), increment, first, axis, **operations)
    return where_continued(documents, state)


def arriving_rows(
    advance: Callable[[jax.Array, jax.Array], jax.Array],
    values: jax.Array,
    first: jax.Array,
    probe: jax.Array,
    times: Callable[[jax.Array, jax.Array], jax.Array],
    documents: Documents,
    axis: str,
) -> jax.Array:
    """The rows (B, G, E, N) of a state at the start of a shard, whose tokens take every row through one linear map.

    The map is where the tokens take the rows of `probe`. What crosses does not depend on the number of tokens.

    Args:
      advance: (values (B, T, G, rows), start (B, G, rows, N)) -> the rows after the shard's tokens.
      values: (B, T, G, E), which the tokens add.
      first: (B, G, E, N), the rows at the start of shard 0.
      probe: (P, N), which tell the map: the identity, or one row where it is diagonal.
      times: (map (B, G, P, N), rows) -> the rows that it takes them to; of the rows of an earlier map, both maps' one.
      documents: of the tokens.
      axis: the mesh axis that the tokens are split over.
    """
    (B, T, G, E), P = values.shape, probe.shape[0]
    start = jnp.broadcast_to(probe.astype(first.dtype), (B, G, *probe.shape))
    start = jnp.concatenate([jnp.zeros_like(first), start], axis=2)
    end = advance(jnp.concatenate([values, jnp.zeros((B, T, G, P), values.dtype)], axis=3), start)
    return arriving(end[:, :, E:], end[:, :, :E], first, documents, axis, apply=times, compose=times)


def through_matrix(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows (B, G, E, N) times a matrix (B, G, N, N): `times` of `arriving_rows` for maps that mix a row's numbers."""
    return jnp.einsum("bgen,bgnm->bgem", rows, matrix, precision="highest")


def halo(tail: jax.Array, first: jax.Array | None, documents: Documents, axis: str) -> jax.Array:
    """The previous shard's tail (B, ...), zero where its document ends at the border; shard 0 gets `first`."""
    before = _from_previous(tail, axis)
    if first is not None:
        before = jnp.where(jax.lax.axis_index(axis) == 0, first.astype(before.dtype), before)
    return where_continued(documents, before)


def where_continued(documents: Documents, x: jax.Array) -> jax.Array:
    """x (B, ...) of the document before a shard's border, zero where that document ends at the border."""
    if documents.continues is None:
        return x
    return jnp.where(documents.continues.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def at_last_token(values: Any, documents: Documents, axis: str | None) -> Any:
    """Each row's values (B, ...) after its last token, on all shards, from the `values` after each shard's tokens."""
    if axis is None:
        return values
    index, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    if documents.last is None:
        owner = jnp.full((jax.tree.leaves(values)[0].shape[0],), shards - 1)
    else:
        owner = jax.lax.pmax(jnp.where(documents.last[:, 0] >= 0, index, 0), axis)
    return jax.tree.map(
        lambda x: jax.lax.psum(jnp.where((owner == index).reshape(-1, *[1] * (x.ndim - 1)), x, 0), axis), values
    )


def _from_previous(x: jax.Array, axis: str, step: int = 1) -> jax.Array:
    """x of the shard `step` before; zeros where there is none."""
    shards = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, i + step) for i in range(shards - step)])

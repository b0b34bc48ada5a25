"""Arrays in chunks, and which tokens of them see which: what the passes of `idattn.ops.chunkwise` are made of.

Shapes inside: heads before rows and chunks, (G, B, N, ...), as products return them, queries with an axis J = H / G,
modes as 2M flattened planes, states as rows (G, B, N, W, 2M).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.chunks import LagTables, Tables, zero_padding
from idattn.ops.einsum import einsum_f32
from idattn.ops.scans import Scan
from idattn.ops.segments import PADDING

GROUP = 16  # chunks worked on at the same time: enough to fill a processor, few enough to bound the memory


class Masks(NamedTuple):
    """Which tokens see which, chunk by chunk; where every row is one document without padding, only `within`."""

    within: jax.Array  # (1, B, N, 1, K, K) token t sees token s of its chunk; of one document (1, 1, 1, 1, K, K)
    start: jax.Array | None = None  # (1, B, N, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array | None = None  # (1, B, N, 1, K) token s is in the state at the chunk's end
    continues: jax.Array | None = None  # (B, N) the state at the chunk's start is in the one at its end


def split_groups(
    arrays: Sequence[jax.Array], run: jax.Array | None, tables: Tables | LagTables, group: int | None
) -> tuple[tuple[Any, ...], int]:
    """Arrays and runs (B, T, ...) as (groups, B, tokens of a group, ...), 0 at padding; and how many groups."""
    arrays = zero_padding(arrays, run)
    B, T = arrays[0].shape[:2]
    K = tables.lags.shape[1]
    count = 1 if group is None else -(-T // (K * group))
    length = -(-T // (K * count)) * K

    def split(x, fill):
        x = jnp.pad(x, ((0, 0), (0, count * length - T), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(B, count, length, *x.shape[2:]), 1, 0)

    if run is not None:
        run = split(run, PADDING)
        before = jnp.pad(run[:-1, :, -1:], ((1, 0), (0, 0), (0, 0)))
        run = jnp.where(run == PADDING, PADDING, run - before)  # 0 is the run of the state that the group starts from
    return (*(split(x, 0) for x in arrays), run), count


def join_groups(x: jax.Array, like: jax.Array) -> jax.Array:
    """(groups, B, tokens of a group, ...) as (B, T, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]


def split_chunks(x: jax.Array, tables: Tables | LagTables) -> jax.Array:
    """(B, T, G, width) in chunks (G, B, N, K, width)."""
    x = x.reshape(x.shape[0], -1, tables.lags.shape[1], *x.shape[2:])
    return x.transpose(3, 0, 1, 2, 4)


def join_chunks(x: jax.Array) -> jax.Array:
    x = x.transpose(1, 2, 3, 0, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def columns(*arrays: jax.Array, tables: Tables | LagTables) -> jax.Array:
    """Arrays (B, T, G, width) in chunks, side by side, with tokens as columns: (G, B, N, W, K)."""
    return split_chunks(jnp.concatenate(arrays, axis=-1), tables).swapaxes(-1, -2)


def split_queries(x: jax.Array, G: int, tables: Tables) -> jax.Array:
    """(B, T, H, width) in chunks (G, B, N, J, K, width)."""
    x = x.reshape(x.shape[0], -1, tables.lags.shape[1], G, x.shape[2] // G, x.shape[3])
    return x.transpose(3, 0, 1, 4, 2, 5)


def join_queries(x: jax.Array) -> jax.Array:
    G, B, N, J, K, width = x.shape
    return x.transpose(1, 2, 4, 0, 3, 5).reshape(B, N * K, G * J, width)


def find_masks(run: jax.Array | None, tables: Tables | LagTables) -> Masks:
    K = tables.lags.shape[1]
    causal = jnp.tril(jnp.ones((K, K), bool))[None, None]
    if run is None:
        return Masks(causal[None, None])
    run = run.reshape(run.shape[0], -1, K)
    previous = jnp.pad(run[:, :-1, -1], ((0, 0), (1, 0)))  # run of the state at the chunk's start: first run 0
    within = (run[:, :, :, None] == run[:, :, None, :]) & (run >= 0)[..., None] & causal
    start = (run == previous[..., None]) & (run >= 0)
    end = run == run[..., -1:]
    return Masks(within[None, :, :, None], start[None, :, :, None, :, None], end[None, :, :, None], start[..., -1])


def is_last(index: jax.Array, last_chunk: jax.Array, starts: jax.Array) -> jax.Array:
    """Which chunks of group `index` are their row's `last_chunk`, (1, B, N, 1, 1)."""
    N = starts.shape[2]
    return ((index * N + jnp.arange(N))[None] == last_chunk[:, None])[None, :, :, None, None]


def last_of(starts: jax.Array, index: jax.Array, last_chunk: jax.Array) -> jax.Array:
    """The state at the start of each row's `last_chunk`, (B, G, W, 2M), or 0 where that is not in group `index`."""
    return jnp.sum(jnp.where(is_last(index, last_chunk, starts), starts, 0), axis=2).swapaxes(0, 1)


def from_start(x: jax.Array, masks: Masks) -> jax.Array:
    return x if masks.start is None else jnp.where(masks.start, x, 0)


def at_end(z: jax.Array, masks: Masks) -> jax.Array:
    """Of columns (G, B, N, W, K) those that the state at the chunk's end has."""
    return z if masks.end is None else jnp.where(masks.end, z, 0)


def to_lags(pairs: jax.Array) -> jax.Array:
    """y[..., t, K - 1 - l] = x[..., t, t - l] for l <= t, else 0, for lower triangles (..., K, K).

    With rows one longer, what was a column moves left by one from row to row.
    """
    *lead, K, _ = pairs.shape
    flat = jnp.pad(pairs.reshape(*lead, K * K), [(0, 0)] * len(lead) + [(K - 1, 1)])
    return flat.reshape(*lead, K, K + 1)[..., :K]


def to_tokens(lagged: jax.Array) -> jax.Array:
    """The inverse of `to_lags`, and its transpose; above the diagonal there are other numbers."""
    *lead, K, _ = lagged.shape
    flat = jnp.pad(lagged, [(0, 0)] * (len(lead) + 1) + [(0, 1)]).reshape(*lead, K * (K + 1))
    return flat[..., K - 1 : K - 1 + K * K].reshape(*lead, K, K)


def chunk_states(
    z: jax.Array, tables: Tables | LagTables, first: jax.Array, masks: Masks, scan: Scan
) -> tuple[jax.Array, jax.Array]:
    """The states at the chunks' starts, (G, B, N, W, 2M), and after the last, from the columns of the tokens.

    `first` and the last one are (B, G, W, 2M).
    """
    increments = einsum_f32("gbnws,gsm->gbnwm", at_end(z, masks), tables.lags[:, ::-1], z.dtype).astype(first.dtype)
    starts, end = scan(tables.decays[:, -1], increments, masks.continues, first.swapaxes(0, 1))
    return starts, end.swapaxes(0, 1)

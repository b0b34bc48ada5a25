"""Arrays in chunks, and which tokens of them see which: what the passes of `idattn.ops.chunkwise` are made of.

Shapes inside: heads before chunks, (B, G, N, K, ...), queries with an axis J = H / G, modes as 2M flattened planes,
states as rows (..., G, W, 2M). `skew` turns the columns of a matrix from tokens s to lags l = t - s and back: it is its
own inverse on lower triangles, and its own transpose.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.chunks import LagTables, Tables, zero_padding
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, flatten_planes, to_planes
from idattn.ops.scans import Scan
from idattn.ops.segments import PADDING

GROUP = 16  # chunks worked on at the same time: enough to fill a processor, few enough to bound the memory


class Masks(NamedTuple):
    """Which tokens see which, chunk by chunk; absent (None) where every row is one document without padding."""

    within: jax.Array  # (B, 1, N, 1, K, K) token t sees token s of its chunk
    start: jax.Array  # (B, 1, N, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array  # (B, 1, N, K, 1) token s is in the state at the chunk's end
    continues: jax.Array  # (N, B, 1, 1, 1) the state at the chunk's start is in the one at its end


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
    """(B, T, G, width) in chunks (B, G, N, K, width)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tables.lags.shape[1], *x.shape[2:]), 3, 1)


def join_chunks(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def split_queries(x: jax.Array, G: int, tables: Tables) -> jax.Array:
    """(B, T, H, width) in chunks (B, G, N, J, K, width)."""
    x = x.reshape(x.shape[0], -1, tables.lags.shape[1], G, x.shape[2] // G, x.shape[3])
    return x.transpose(0, 3, 1, 4, 2, 5)


def join_queries(x: jax.Array) -> jax.Array:
    B, G, N, J, K, width = x.shape
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * K, G * J, width)


def find_masks(run: jax.Array | None, tables: Tables | LagTables) -> Masks | None:
    if run is None:
        return None
    run = run.reshape(run.shape[0], -1, tables.lags.shape[1])
    previous = jnp.pad(run[:, :-1, -1], ((0, 0), (1, 0)))  # run of the state at the chunk's start: first run 0
    within = (run[:, :, :, None] == run[:, :, None, :]) & (run >= 0)[..., None]
    start = (run == previous[..., None]) & (run >= 0)
    end = run == run[..., -1:]
    return Masks(
        within[:, None, :, None],
        start[:, None, :, None, :, None],
        end[:, None, :, :, None],
        start[..., -1].T[..., None, None, None],
    )


def is_last(index: jax.Array, last_chunk: jax.Array, starts: jax.Array) -> jax.Array:
    """Which chunks of group `index` are their row's `last_chunk`, (N, B, 1, 1, 1)."""
    N = starts.shape[0]
    return (index * N + jnp.arange(N)[:, None] == last_chunk[None])[..., None, None, None]


def mask_within(x: jax.Array, masks: Masks | None) -> jax.Array:
    return x if masks is None else jnp.where(masks.within, x, 0)


def mask_start(x: jax.Array, masks: Masks | None) -> jax.Array:
    return x if masks is None else jnp.where(masks.start, x, 0)


def state_inputs(k: jax.Array, v: jax.Array, masks: Masks | None) -> jax.Array:
    """What the chunk's tokens add to the state, (B, G, N, K, R + E)."""
    z = jnp.concatenate([k, v], axis=-1)
    return z if masks is None else jnp.where(masks.end, z, 0)


def decay_rows(rows: jax.Array, decays: jax.Array) -> jax.Array:
    """Rows of flattened planes (B, G, N, J, K, 2M), each mode times its complex number of decays (G, K, 2, M)."""
    return flatten_planes(complex_multiply(to_planes(rows), decays[None, :, None, None]))


def skew(x: jax.Array) -> jax.Array:
    """y[..., t, l] = x[..., t, t - l] for l <= t, else 0, for square matrices."""
    K = x.shape[-1]
    x = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, K)])
    x = x.reshape(*x.shape[:-2], 2 * K * K)[..., K - 1 : K - 1 + K * (2 * K - 1)]
    return x.reshape(*x.shape[:-1], K, 2 * K - 1)[..., :K]


def chunk_states(
    z: jax.Array, tables: Tables | LagTables, first: jax.Array, masks: Masks | None, scan: Scan
) -> tuple[jax.Array, jax.Array]:
    """The states at the chunks' starts, (N, B, G, W, 2M), and after the last, from what the tokens add."""
    increments = einsum_f32("bgnsw,gsm->nbgwm", z, tables.lags[:, ::-1], z.dtype).astype(first.dtype)
    return scan(tables.decays[:, -1], increments, None if masks is None else masks.continues, first)

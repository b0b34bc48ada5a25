"""The chunked recurrence as matrix products in XLA: fast on every platform, and what the kernels are compared with.

See `idattn.ops.chunks` for the equations. Shapes inside: heads before chunks, (B, G, N, K, ...), queries with an axis
J = H / G, modes as 2M flattened planes, states as rows (..., G, W, 2M). `_skew` turns the columns of a matrix from
tokens s to lags l = t - s and back: it is its own inverse on lower triangles, and its own transpose.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.backend import Backend
from idattn.ops.chunks import (
    LagTables,
    Tables,
    apply_readout,
    final_state,
    lag_tables,
    last_tokens,
    merge_axes,
    pad_to_chunks,
    readout_cotangent,
    zero_padding,
    zero_state,
)
from idattn.ops.discretize import Basis, discretize, linear_readout_row
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, power, to_planes
from idattn.ops.scans import Scan, associative_scan, sequential_scan
from idattn.ops.segments import PADDING, Segments

GROUP = 16  # chunks worked on at the same time: enough to fill a processor, few enough to bound the memory


class _Masks(NamedTuple):
    """Which tokens see which, chunk by chunk; absent (None) where every row is one document without padding."""

    within: jax.Array  # (B, 1, N, 1, K, K) token t sees token s of its chunk
    start: jax.Array  # (B, 1, N, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array  # (B, 1, N, K, 1) token s is in the state at the chunk's end
    continues: jax.Array  # (N, B, 1, 1, 1) the state at the chunk's start is in the one at its end


class _Read(NamedTuple):
    """What the queries of a chunk compute from the chunk and its start state, (B, G, N, J, K, ...)."""

    scores: jax.Array  # S[t, t - l], width K
    response: jax.Array  # X_k^0 q_t, width 2M
    decayed_response: jax.Array  # lambda^{t+1} X_k^0 q_t, width 2M
    w: jax.Array  # with the sign of Re, width 2M
    decayed_w: jax.Array  # w_t lambda^{t+1}, width 2M
    weights: jax.Array  # P[t, s], width K


def forward(
    q, k, v, tables: Tables, initial_state, run, last_chunk, *, scan: Scan = sequential_scan, group: int | None = GROUP
):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`.

    Args:
      scan: how the states run through the chunks of a group.
      group: chunks that are worked on at the same time, the groups one after another.
    """
    G, R = k.shape[2:]
    (*arrays, runs), count = _groups((q, k, v), run, tables, group)

    def body(carry, inputs):
        state, last_start = carry
        index, q, k, v, run = inputs
        masks = _find_masks(run, tables)
        q, k, v = _split_queries(q, G, tables), _split(k, tables), _split(v, tables)
        starts, end = _states(_both(k, v, masks), tables, state, masks, scan)
        X_k, X_v = jnp.split(starts, [R], axis=-2)
        read = _read(q, k, X_k, tables, masks)
        o = einsum_f32("bgnjts,bgnse->bgnjte", read.weights, v, q.dtype)
        o = o + einsum_f32("bgnjtm,nbgem->bgnjte", read.decayed_w, X_v, q.dtype)
        is_last = _is_last(index, last_chunk, starts)
        last_start = last_start + jnp.sum(jnp.where(is_last, starts, 0), axis=0)
        return (end, last_start), _join_queries(o.astype(q.dtype))

    carry = (zero_state(k, v, tables) if initial_state is None else initial_state, zero_state(k, v, tables))
    (_, last_start), o = jax.lax.scan(body, carry, (jnp.arange(count), *arrays, runs))
    return _ungroup(o, q), last_start


def backward(
    q,
    k,
    v,
    tables: Tables,
    initial_state,
    run,
    last_chunk,
    cotangents,
    *,
    scan: Scan = sequential_scan,
    group: int | None = GROUP,
):
    """The cotangents of q, k, v, tables and initial_state; the forward pass is recomputed from these."""
    d_o, d_last = cotangents
    G, R, dtype = *k.shape[2:], q.dtype
    (*arrays, runs), count = _groups((q, k, v, d_o), run, tables, group)

    def advance(state, inputs):
        k, v, run = inputs
        masks = _find_masks(run, tables)
        return _states(_both(_split(k, tables), _split(v, tables), masks), tables, state, masks, scan)[1], state

    def body(carry, inputs):
        d_end, d_tables = carry
        index, state, q, k, v, d_o, run = inputs
        masks = _find_masks(run, tables)
        q, d_o = _split_queries(q, G, tables), _split_queries(d_o, G, tables)
        k, v = _split(k, tables), _split(v, tables)
        z = _both(k, v, masks)
        starts, _ = _states(z, tables, state, masks, scan)
        X_k, X_v = jnp.split(starts, [R], axis=-2)
        read = _read(q, k, X_k, tables, masks)

        # o = P v + decayed_w X_v, P = skew(w lags^T), decayed_w = w conj(decays), since w carries the sign of Re
        d_weights = _skew(_within(einsum_f32("bgnjte,bgnse->bgnjts", d_o, v, dtype), masks))
        d_decayed_w = _from_start(einsum_f32("bgnjte,nbgem->bgnjtm", d_o, X_v, dtype), masks)
        d_w = einsum_f32("bgnjtl,glm->bgnjtm", d_weights, tables.lags, dtype) + _decay(d_decayed_w, tables.decays)
        # w = skew(S) spread + readout decayed_response, decayed_response = response decays
        d_scores = _within(_skew(einsum_f32("bgnjtm,glm->bgnjtl", d_w, tables.spread, dtype)), masks)
        d_decayed_response = _from_start(apply_readout(tables.readout.swapaxes(1, 2), d_w, dtype), masks)
        d_response = _decay(d_decayed_response, conjugate(tables.decays))
        # S = q k^T and response = q X_k^T
        d_q = einsum_f32("bgnjts,bgnsr->bgnjtr", d_scores, k, dtype)
        d_q += einsum_f32("bgnjtm,nbgrm->bgnjtr", d_response, X_k, dtype)

        # The start states, last chunk first.
        d_X_k = einsum_f32("bgnjtm,bgnjtr->nbgrm", d_response, q, dtype)
        d_X_v = einsum_f32("bgnjtm,bgnjte->nbgem", read.decayed_w, d_o, dtype)
        d_starts = jnp.concatenate([d_X_k, d_X_v], axis=-2)
        d_starts += jnp.where(_is_last(index, last_chunk, starts), d_last, 0)
        decay = conjugate(tables.decays[:, -1])
        # The scan's entry n is the cotangent of the state at the end of chunk n, counted from the last.
        continues = None if masks is None else masks.continues[::-1]
        d_X, d_state = scan(decay, d_starts[::-1], continues, d_end)
        d_X = d_X[::-1]

        d_z = einsum_f32("gsm,nbgwm->bgnsw", tables.lags[:, ::-1], d_X, dtype)
        d_z = d_z if masks is None else jnp.where(masks.end, d_z, 0)
        d_k = einsum_f32("bgnjts,bgnjtr->bgnsr", d_scores, q, dtype) + d_z[..., :R]
        d_v = einsum_f32("bgnjts,bgnjte->bgnse", read.weights, d_o, dtype) + d_z[..., R:]

        d_spread = einsum_f32("bgnjtl,bgnjtm->glm", read.scores, d_w, dtype)
        d_lags = einsum_f32("bgnjtl,bgnjtm->glm", d_weights, read.w, dtype)
        d_lags += einsum_f32("bgnsw,nbgwm->gsm", z, d_X, dtype)[:, ::-1]
        response, w, d_decayed_response, d_decayed_w = (
            to_planes(merge_axes(x, 2, 4)) for x in (read.response, read.w, d_decayed_response, d_decayed_w)
        )  # (B, G, N J, K, 2, M)
        d_decays = complex_multiply(conjugate(response), d_decayed_response)
        d_decays += complex_multiply(w, conjugate(d_decayed_w))
        continued = starts if masks is None else jnp.where(masks.continues, starts, 0)
        d_decay = jnp.sum(complex_multiply(conjugate(to_planes(continued)), to_planes(d_X)), axis=(0, 1, 3))
        d_decays = jnp.sum(d_decays, axis=(0, 2)).at[:, -1].add(d_decay)
        d_readout = readout_cotangent(tables.readout, d_w, read.decayed_response, dtype)
        d_tables = jax.tree.map(jnp.add, d_tables, Tables(d_lags, d_decays, d_readout, d_spread))
        d_inputs = _join_queries(d_q), _join(d_k), _join(d_v)
        return (d_state, d_tables), tuple(x.astype(dtype) for x in d_inputs)

    first = zero_state(k, v, tables) if initial_state is None else initial_state
    _, states = jax.lax.scan(advance, first, (*arrays[1:3], runs))
    zeros = jax.tree.map(jnp.zeros_like, (first, tables))
    inputs = (jnp.arange(count), states, *arrays, runs)
    (d_state, d_tables), d_inputs = jax.lax.scan(body, zeros, inputs, reverse=True)
    d_q, d_k, d_v = (_ungroup(d, x).astype(x.dtype) for d, x in zip(d_inputs, (q, k, v), strict=True))
    return d_q, d_k, d_v, d_tables, None if initial_state is None else d_state


def linear(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    chunk_size: int,
    scan: Scan = sequential_scan,
) -> tuple[jax.Array, jax.Array]:
    """The learned linear readout in chunks: one real convolution kernel a head, h(l) = Re(c_out^T C beta lambda^l).

    Shapes as in `idattn.ops.linear_readout`.
    """
    B, T = z.shape[:2]
    tables = lag_tables(basis, chunk_size)
    last = last_tokens(segments, B, T)
    (z,), run = pad_to_chunks((z,), segments, chunk_size)
    (z,) = zero_padding((z,), run)
    masks = _find_masks(run, tables)
    split = _split(z, tables)
    in_end = split if masks is None else jnp.where(masks.end, split, 0)
    starts, _ = _states(in_end, tables, initial_state, masks, scan)
    y = jax.checkpoint(_convolve, prevent_cse=False)(split, starts, tables, linear_readout_row(basis, c_out), masks)
    start = starts[jnp.maximum(last, 0) // chunk_size, jnp.arange(B)]
    return _join(y)[:, :T], final_state((z,), start, tables, initial_state, run, last)


def transfer(
    inputs: tuple[jax.Array, ...], basis: Basis, segments: Segments | None, *, chunk_size: int, group: int = GROUP
) -> tuple[jax.Array, jax.Array]:
    """How tokens change a state, X after them = decay X before + increment; see `idattn.ops.transfer`."""
    B, T, G = inputs[0].shape[:3]
    tables = lag_tables(basis, chunk_size)
    last = last_tokens(segments, B, T)
    inputs, run = pad_to_chunks(inputs, segments, chunk_size)
    (*arrays, runs), count = _groups(inputs, run, tables, group)
    zero = jnp.zeros((B, G, sum(x.shape[3] for x in inputs), tables.lags.shape[-1]), tables.lags.dtype)

    @jax.checkpoint
    def body(carry, chunk_group):
        state, last_start = carry
        index, *arrays, run = chunk_group
        masks = _find_masks(run, tables)
        z = jnp.concatenate([_split(x, tables) for x in arrays], axis=-1)
        z = z if masks is None else jnp.where(masks.end, z, 0)
        starts, end = _states(z, tables, state, masks, sequential_scan)
        is_last = _is_last(index, jnp.maximum(last, 0) // chunk_size, starts)
        return (end, last_start + jnp.sum(jnp.where(is_last, starts, 0), axis=0)), None

    (_, start), _ = jax.lax.scan(body, (zero, zero), (jnp.arange(count), *arrays, runs))
    increment = final_state(inputs, start, tables, zero, run, last)
    decay = power(discretize(basis)[0], last + 1, T)
    if run is not None:
        continues = (last < 0) | (jnp.take_along_axis(run, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] == 0)
        decay = jnp.where(continues[:, None, None, None], decay, 0)
    return decay, increment


def _groups(
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


def _ungroup(x: jax.Array, like: jax.Array) -> jax.Array:
    """(groups, B, tokens of a group, ...) as (B, T, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]


def _split(x: jax.Array, tables: Tables | LagTables) -> jax.Array:
    """(B, T, G, width) in chunks (B, G, N, K, width)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, tables.lags.shape[1], *x.shape[2:]), 3, 1)


def _join(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _split_queries(x: jax.Array, G: int, tables: Tables) -> jax.Array:
    """(B, T, H, width) in chunks (B, G, N, J, K, width)."""
    x = x.reshape(x.shape[0], -1, tables.lags.shape[1], G, x.shape[2] // G, x.shape[3])
    return x.transpose(0, 3, 1, 4, 2, 5)


def _join_queries(x: jax.Array) -> jax.Array:
    B, G, N, J, K, width = x.shape
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * K, G * J, width)


def _find_masks(run: jax.Array | None, tables: Tables | LagTables) -> _Masks | None:
    if run is None:
        return None
    run = run.reshape(run.shape[0], -1, tables.lags.shape[1])
    previous = jnp.pad(run[:, :-1, -1], ((0, 0), (1, 0)))  # run of the state at the chunk's start: first run 0
    within = (run[:, :, :, None] == run[:, :, None, :]) & (run >= 0)[..., None]
    start = (run == previous[..., None]) & (run >= 0)
    end = run == run[..., -1:]
    return _Masks(
        within[:, None, :, None],
        start[:, None, :, None, :, None],
        end[:, None, :, :, None],
        start[..., -1].T[..., None, None, None],
    )


def _is_last(index: jax.Array, last_chunk: jax.Array, starts: jax.Array) -> jax.Array:
    """Which chunks of group `index` are their row's `last_chunk`, (N, B, 1, 1, 1)."""
    N = starts.shape[0]
    return (index * N + jnp.arange(N)[:, None] == last_chunk[None])[..., None, None, None]


def _within(x: jax.Array, masks: _Masks | None) -> jax.Array:
    return x if masks is None else jnp.where(masks.within, x, 0)


def _from_start(x: jax.Array, masks: _Masks | None) -> jax.Array:
    return x if masks is None else jnp.where(masks.start, x, 0)


def _both(k: jax.Array, v: jax.Array, masks: _Masks | None) -> jax.Array:
    """What the chunk's tokens add to the state, (B, G, N, K, R + E)."""
    z = jnp.concatenate([k, v], axis=-1)
    return z if masks is None else jnp.where(masks.end, z, 0)


def _decay(rows: jax.Array, decays: jax.Array) -> jax.Array:
    """Rows of flattened planes (B, G, N, J, K, 2M), each mode times its complex number of decays (G, K, 2, M)."""
    return flatten_planes(complex_multiply(to_planes(rows), decays[None, :, None, None]))


def _skew(x: jax.Array) -> jax.Array:
    """y[..., t, l] = x[..., t, t - l] for l <= t, else 0, for square matrices."""
    K = x.shape[-1]
    x = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, K)])
    x = x.reshape(*x.shape[:-2], 2 * K * K)[..., K - 1 : K - 1 + K * (2 * K - 1)]
    return x.reshape(*x.shape[:-1], K, 2 * K - 1)[..., :K]


def _states(
    z: jax.Array, tables: Tables | LagTables, first: jax.Array, masks: _Masks | None, scan: Scan
) -> tuple[jax.Array, jax.Array]:
    """The states at the chunks' starts, (N, B, G, W, 2M), and after the last, from what the tokens add."""
    increments = einsum_f32("bgnsw,gsm->nbgwm", z, tables.lags[:, ::-1], z.dtype).astype(first.dtype)
    return scan(tables.decays[:, -1], increments, None if masks is None else masks.continues, first)


def _read(q: jax.Array, k: jax.Array, X_k: jax.Array, tables: Tables, masks: _Masks | None) -> _Read:
    dtype = q.dtype
    scores = _skew(_within(einsum_f32("bgnjtr,bgnsr->bgnjts", q, k, dtype), masks))
    response = einsum_f32("bgnjtr,nbgrm->bgnjtm", q, X_k, dtype)
    decayed_response = _from_start(_decay(response, tables.decays), masks)
    w = einsum_f32("bgnjtl,glm->bgnjtm", scores, tables.spread, dtype)
    w = w + apply_readout(tables.readout, decayed_response, dtype)
    weights = _within(_skew(einsum_f32("bgnjtm,glm->bgnjtl", w, tables.lags, dtype)), masks)
    decayed_w = _from_start(_decay(w, conjugate(tables.decays)), masks)
    return _Read(scores, response, decayed_response, w, decayed_w, weights)


def _convolve(z: jax.Array, starts: jax.Array, tables: LagTables, row: jax.Array, masks: _Masks | None) -> jax.Array:
    """y (B, G, N, K, W) from z (B, G, N, K, W), the chunks' start states and c_out^T C, row (G, 2M)."""
    dtype = z.dtype
    K = z.shape[3]
    kernel = jnp.einsum("gm,glm->gl", row, tables.lags, precision="highest")
    toeplitz = _skew(jnp.broadcast_to(kernel[:, None], (kernel.shape[0], K, K)))
    if masks is None:
        y = einsum_f32("gts,bgnsw->bgntw", toeplitz, z, dtype)
    else:
        weights = jnp.where(masks.within[:, :, :, 0], toeplitz[None, :, None], 0)
        y = einsum_f32("bgnts,bgnsw->bgntw", weights, z, dtype)
    # Re(c_out^T C lambda^{t+1} X): the row already carries the sign of the real part.
    rows = flatten_planes(complex_multiply(to_planes(row)[:, None], conjugate(tables.decays)))
    from_start = einsum_f32("gtm,nbgwm->bgntw", rows, starts, dtype)
    return (y + (from_start if masks is None else jnp.where(masks.start[:, :, :, 0], from_start, 0))).astype(dtype)


BACKEND = Backend(name="chunkwise", rule=(forward, backward), linear=linear)
ASSOCIATIVE = Backend(
    name="associative",
    rule=(
        partial(forward, scan=associative_scan, group=None),
        partial(backward, scan=associative_scan, group=None),
    ),
    linear=partial(linear, scan=associative_scan),
)

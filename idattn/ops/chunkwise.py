"""The chunked recurrence as matrix products in XLA: fast on every platform, and what the kernels are compared with.

See `idattn.ops.chunks` for the equations, and `idattn.ops.chunk_arrays` for the shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops import chunk_linear
from idattn.ops.backend import Backend
from idattn.ops.chunk_arrays import (
    GROUP,
    Masks,
    chunk_states,
    decay_rows,
    find_masks,
    is_last,
    join_chunks,
    join_groups,
    join_queries,
    mask_start,
    mask_within,
    skew,
    split_chunks,
    split_groups,
    split_queries,
    state_inputs,
)
from idattn.ops.chunks import Tables, apply_readout, merge_axes, readout_cotangent, zero_state
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, to_planes
from idattn.ops.scans import Scan, associative_scan, sequential_scan


class _Read(NamedTuple):
    """What the queries of a chunk compute from the chunk and its start state, (B, G, N, J, K, ...)."""

    scores: jax.Array  # S[t, t - l], width K
    response: jax.Array  # X_k^0 q_t, width 2M
    decayed_response: jax.Array  # lambda^{t+1} X_k^0 q_t, width 2M
    w: jax.Array  # with the sign of Re, width 2M
    decayed_w: jax.Array  # w_t lambda^{t+1}, width 2M
    weights: jax.Array  # P[t, s], width K


class Chain(NamedTuple):
    """What the queries of chunks compute, as `_Read`, and the cotangents of it, (B, G, N, J, K, ...)."""

    scores: jax.Array
    decayed_response: jax.Array
    w: jax.Array
    decayed_w: jax.Array
    weights: jax.Array
    d_weights: jax.Array  # by lag, as the scores
    d_w: jax.Array
    d_scores: jax.Array  # by token, as the weights
    d_response: jax.Array
    d_q: jax.Array
    d_decays: jax.Array  # what every query adds to them, (B, G, N J, K, 2M)
    descending: bool  # whether the lags of scores and d_weights go from the largest to the smallest


def forward(
    q, k, v, tables: Tables, initial_state, run, last_chunk, *, scan: Scan = sequential_scan, group: int | None = GROUP
):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`.

    Args:
      scan: how the states run through the chunks of a group.
      group: chunks that are worked on at the same time, the groups one after another.
    """
    G, R = k.shape[2:]
    (*arrays, runs), count = split_groups((q, k, v), run, tables, group)

    def body(carry, inputs):
        state, last_start = carry
        index, q, k, v, run = inputs
        masks = find_masks(run, tables)
        q, k, v = split_queries(q, G, tables), split_chunks(k, tables), split_chunks(v, tables)
        starts, end = chunk_states(state_inputs(k, v, masks), tables, state, masks, scan)
        X_k, X_v = jnp.split(starts, [R], axis=-2)
        read = _read(q, k, X_k, tables, masks)
        o = einsum_f32("bgnjts,bgnse->bgnjte", read.weights, v, q.dtype)
        o = o + einsum_f32("bgnjtm,nbgem->bgnjte", read.decayed_w, X_v, q.dtype)
        last_start = last_start + jnp.sum(jnp.where(is_last(index, last_chunk, starts), starts, 0), axis=0)
        return (end, last_start), join_queries(o.astype(q.dtype))

    carry = (zero_state(k, v, tables) if initial_state is None else initial_state, zero_state(k, v, tables))
    (_, last_start), o = jax.lax.scan(body, carry, (jnp.arange(count), *arrays, runs))
    return join_groups(o, q), last_start


def chain_of_products(q, k, v, d_o, starts, tables: Tables, masks: Masks | None, run) -> Chain:
    """Of q and d_o (B, G, N, J, K, ...), k and v (B, G, N, K, ...) and the start states (N, B, G, W, 2M).

    Args:
      run: that `masks` are made of.
    """
    del run
    dtype = q.dtype
    X_k, X_v = jnp.split(starts, [q.shape[-1]], axis=-2)
    read = _read(q, k, X_k, tables, masks)
    # o = P v + decayed_w X_v, P = skew(w lags^T), decayed_w = w conj(decays), since w carries the sign of Re
    d_weights = skew(mask_within(einsum_f32("bgnjte,bgnse->bgnjts", d_o, v, dtype), masks))
    d_decayed_w = mask_start(einsum_f32("bgnjte,nbgem->bgnjtm", d_o, X_v, dtype), masks)
    d_w = einsum_f32("bgnjtl,glm->bgnjtm", d_weights, tables.lags, dtype) + decay_rows(d_decayed_w, tables.decays)
    # w = skew(S) spread + readout decayed_response, decayed_response = response decays
    d_scores = mask_within(skew(einsum_f32("bgnjtm,glm->bgnjtl", d_w, tables.spread, dtype)), masks)
    d_decayed_response = mask_start(apply_readout(tables.readout.swapaxes(1, 2), d_w, dtype), masks)
    d_response = decay_rows(d_decayed_response, conjugate(tables.decays))
    # S = q k^T and response = q X_k^T
    d_q = einsum_f32("bgnjts,bgnsr->bgnjtr", d_scores, k, dtype)
    d_q += einsum_f32("bgnjtm,nbgrm->bgnjtr", d_response, X_k, dtype)
    response, w, d_decayed_response, d_decayed_w = (
        to_planes(merge_axes(x, 2, 4)) for x in (read.response, read.w, d_decayed_response, d_decayed_w)
    )  # (B, G, N J, K, 2, M)
    d_decays = complex_multiply(conjugate(response), d_decayed_response)
    d_decays += complex_multiply(w, conjugate(d_decayed_w))
    return Chain(
        scores=read.scores,
        decayed_response=read.decayed_response,
        w=read.w,
        decayed_w=read.decayed_w,
        weights=read.weights,
        d_weights=d_weights,
        d_w=d_w,
        d_scores=d_scores,
        d_response=d_response,
        d_q=d_q,
        d_decays=flatten_planes(d_decays),
        descending=False,
    )


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
    chain: Callable[..., Chain] = chain_of_products,
):
    """The cotangents of q, k, v, tables and initial_state; the forward pass is recomputed from these.

    Args:
      scan: as in `forward`.
      group: as in `forward`.
      chain: what computes the chain of products of every query, with the arguments of `chain_of_products`.
    """
    d_o, d_last = cotangents
    G, R, dtype = *k.shape[2:], q.dtype
    (*arrays, runs), count = split_groups((q, k, v, d_o), run, tables, group)

    def advance(state, inputs):
        k, v, run = inputs
        masks = find_masks(run, tables)
        z = state_inputs(split_chunks(k, tables), split_chunks(v, tables), masks)
        return chunk_states(z, tables, state, masks, scan)[1], state

    def body(carry, inputs):
        d_end, d_tables = carry
        index, state, q, k, v, d_o, run = inputs
        masks = find_masks(run, tables)
        q, d_o = split_queries(q, G, tables), split_queries(d_o, G, tables)
        k, v = split_chunks(k, tables), split_chunks(v, tables)
        z = state_inputs(k, v, masks)
        starts, _ = chunk_states(z, tables, state, masks, scan)
        c = chain(q, k, v, d_o, starts, tables, masks, run)

        # The start states, last chunk first.
        d_X_k = einsum_f32("bgnjtm,bgnjtr->nbgrm", c.d_response, q, dtype)
        d_X_v = einsum_f32("bgnjtm,bgnjte->nbgem", c.decayed_w, d_o, dtype)
        d_starts = jnp.concatenate([d_X_k, d_X_v], axis=-2)
        d_starts += jnp.where(is_last(index, last_chunk, starts), d_last, 0)
        decay = conjugate(tables.decays[:, -1])
        # The scan's entry n is the cotangent of the state at the end of chunk n, counted from the last.
        continues = None if masks is None else masks.continues[::-1]
        d_X, d_state = scan(decay, d_starts[::-1], continues, d_end)
        d_X = d_X[::-1]

        d_z = einsum_f32("gsm,nbgwm->bgnsw", tables.lags[:, ::-1], d_X, dtype)
        d_z = d_z if masks is None else jnp.where(masks.end, d_z, 0)
        d_k = einsum_f32("bgnjts,bgnjtr->bgnsr", c.d_scores, q, dtype) + d_z[..., :R]
        d_v = einsum_f32("bgnjts,bgnjte->bgnse", c.weights, d_o, dtype) + d_z[..., R:]

        d_spread = einsum_f32("bgnjtl,bgnjtm->glm", c.scores, c.d_w, dtype)
        d_lags = einsum_f32("bgnjtl,bgnjtm->glm", c.d_weights, c.w, dtype)
        if c.descending:
            d_spread, d_lags = d_spread[:, ::-1], d_lags[:, ::-1]
        d_lags += einsum_f32("bgnsw,nbgwm->gsm", z, d_X, dtype)[:, ::-1]
        continued = starts if masks is None else jnp.where(masks.continues, starts, 0)
        d_decay = jnp.sum(complex_multiply(conjugate(to_planes(continued)), to_planes(d_X)), axis=(0, 1, 3))
        d_decays = to_planes(jnp.sum(c.d_decays.astype(first.dtype), axis=(0, 2)))
        d_decays = d_decays.at[:, -1].add(d_decay)
        d_readout = readout_cotangent(tables.readout, c.d_w, c.decayed_response, dtype)
        d_tables = jax.tree.map(jnp.add, d_tables, Tables(d_lags, d_decays, d_readout, d_spread))
        d_inputs = join_queries(c.d_q), join_chunks(d_k), join_chunks(d_v)
        return (d_state, d_tables), tuple(x.astype(dtype) for x in d_inputs)

    first = zero_state(k, v, tables) if initial_state is None else initial_state
    _, states = jax.lax.scan(advance, first, (*arrays[1:3], runs))
    zeros = jax.tree.map(jnp.zeros_like, (first, tables))
    inputs = (jnp.arange(count), states, *arrays, runs)
    (d_state, d_tables), d_inputs = jax.lax.scan(body, zeros, inputs, reverse=True)
    d_q, d_k, d_v = (join_groups(d, x).astype(x.dtype) for d, x in zip(d_inputs, (q, k, v), strict=True))
    return d_q, d_k, d_v, d_tables, None if initial_state is None else d_state


def _read(q: jax.Array, k: jax.Array, X_k: jax.Array, tables: Tables, masks: Masks | None) -> _Read:
    dtype = q.dtype
    scores = skew(mask_within(einsum_f32("bgnjtr,bgnsr->bgnjts", q, k, dtype), masks))
    response = einsum_f32("bgnjtr,nbgrm->bgnjtm", q, X_k, dtype)
    decayed_response = mask_start(decay_rows(response, tables.decays), masks)
    w = einsum_f32("bgnjtl,glm->bgnjtm", scores, tables.spread, dtype)
    w = w + apply_readout(tables.readout, decayed_response, dtype)
    weights = mask_within(skew(einsum_f32("bgnjtm,glm->bgnjtl", w, tables.lags, dtype)), masks)
    decayed_w = mask_start(decay_rows(w, conjugate(tables.decays)), masks)
    return _Read(scores, response, decayed_response, w, decayed_w, weights)


BACKEND = Backend(name="chunkwise", rule=(forward, backward), linear=chunk_linear.linear)
ASSOCIATIVE = Backend(
    name="associative",
    rule=(
        partial(forward, scan=associative_scan, group=None),
        partial(backward, scan=associative_scan, group=None),
    ),
    linear=partial(chunk_linear.linear, scan=associative_scan),
)

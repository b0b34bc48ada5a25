"""The chunked recurrence as matrix products in XLA: fast on every platform, and what the kernels are compared with.

See `idattn.ops.chunks` for the equations, and `idattn.ops.chunk_arrays` for the shapes. Between products, arrays have
the dtype of q.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idattn.ops import chunk_linear
from idattn.ops.backend import Backend
from idattn.ops.chunk_arrays import (
    GROUP,
    Masks,
    at_end,
    chunk_states,
    columns,
    find_masks,
    from_start,
    is_last,
    join_chunks,
    join_groups,
    join_queries,
    last_of,
    split_groups,
    split_queries,
    to_lags,
    to_tokens,
)
from idattn.ops.chunks import Tables, apply_readout, merge_axes, zero_state
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, to_planes
from idattn.ops.scans import Scan, associative_scan, blocked_scan, sequential_scan

GPU_TOKENS = 2**19  # of all rows and heads: on GPUs as many chunks as have so many, if that is more than GROUP


class _Read(NamedTuple):
    """What the queries of a chunk compute from the chunk and its start state, (G, B, N, J, K, K + 2M) in q's dtype.

    weights = by_token(answers), answers = answer(lagged), lagged = by_lag(scores).
    """

    scores: jax.Array  # q_t . k_s by token s, and after them X_k^0 q_t
    lagged: jax.Array  # the same by lag, the largest first, and decayed: lambda^{t+1} X_k^0 q_t
    answers: jax.Array  # P[t, t - l] by lag, and after them w_t with the sign of Re
    weights: jax.Array  # P[t, s] by token s, and after them w_t lambda^{t+1}


class Chain(NamedTuple):
    """What the queries of chunks compute, as `_Read`, and the cotangents of it, in the dtype of q."""

    lagged: jax.Array
    weights: jax.Array
    d_answers: jax.Array
    d_scores: jax.Array
    d_q: jax.Array  # (G, B, N, J, K, R)
    d_decays: jax.Array  # what the queries add to those of the tables, (G, K, 2, M)


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
        q, z = split_queries(q, G, tables), columns(k, v, tables=tables)
        starts, end = chunk_states(z, tables, state, masks, scan)
        memory = _memory(z, starts)
        weights = _read(q, memory[:, :, :, :R], tables, masks).weights
        o = einsum_f32("gbnjta,gbnea->gbnjte", weights, memory[:, :, :, R:], q.dtype).astype(q.dtype)
        return (end, last_start + last_of(starts, index, last_chunk)), join_queries(o)

    carry = (zero_state(k, v, tables) if initial_state is None else initial_state, zero_state(k, v, tables))
    (_, last_start), o = jax.lax.scan(body, carry, (jnp.arange(count), *arrays, runs))
    return join_groups(o, q), last_start


def chain_of_products(q, k, v, d_o, starts, tables: Tables, masks: Masks, run) -> Chain:
    """Of q and d_o (B, tokens, H, ...), k and v (B, tokens, G, ...) and the start states (G, B, N, W, 2M).

    Args:
      run: that `masks` are made of.
    """
    del run
    G, R, dtype, K = *k.shape[2:], q.dtype, tables.lags.shape[1]
    q, d_o = split_queries(q, G, tables), split_queries(d_o, G, tables)
    memory = _memory(columns(k, v, tables=tables), starts)
    read = _read(q, memory[:, :, :, :R], tables, masks)
    # o = weights memory_v^T, weights = by_token(answers)
    d_weights = einsum_f32("gbnjte,gbnea->gbnjta", d_o, memory[:, :, :, R:], dtype).astype(dtype)
    d_answers = _by_lag(d_weights, tables, masks)
    # answers = answer(lagged), lagged = by_lag(scores), scores = q memory_k
    d_lagged = _answer_transposed(d_answers, _answer_constants(tables))
    d_scores = _by_token(d_lagged, tables, masks)
    d_q = einsum_f32("gbnjta,gbnra->gbnjtr", d_scores, memory[:, :, :, :R], dtype).astype(dtype)
    d_decays = _decays_cotangent(read.scores[..., K:], from_start(d_lagged[..., K:], masks), tables)
    d_decays += _decays_cotangent(from_start(d_weights[..., K:], masks), read.answers[..., K:], tables)
    return Chain(read.lagged, read.weights, d_answers, d_scores, d_q, d_decays)


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
    G, R, dtype, K = *k.shape[2:], q.dtype, tables.lags.shape[1]
    (*arrays, runs), count = split_groups((q, k, v, d_o), run, tables, group)

    def advance(state, inputs):
        k, v, run = inputs
        masks = find_masks(run, tables)
        return chunk_states(columns(k, v, tables=tables), tables, state, masks, scan)[1], state

    def body(carry, inputs):
        d_end, d_constants = carry
        index, state, q, k, v, d_o, run = inputs
        masks = find_masks(run, tables)
        z = columns(k, v, tables=tables)
        starts, _ = chunk_states(z, tables, state, masks, scan)
        c = chain(q, k, v, d_o, starts, tables, masks, run)
        q, d_o = split_queries(q, G, tables), split_queries(d_o, G, tables)

        # The start states, last chunk first: entry n is the cotangent of the state at the end of chunk n.
        d_X_k = einsum_f32("gbnjtr,gbnjtm->gbnrm", q, c.d_scores[..., K:], dtype)
        d_X_v = einsum_f32("gbnjte,gbnjtm->gbnem", d_o, c.weights[..., K:], dtype)
        d_starts = jnp.concatenate([d_X_k, d_X_v], axis=-2)
        d_starts += jnp.where(is_last(index, last_chunk, starts), d_last.swapaxes(0, 1)[:, :, None], 0)
        decay = conjugate(tables.decays[:, -1])
        d_X, d_state = scan(decay, d_starts, masks.continues, d_end.swapaxes(0, 1), reverse=True)

        d_z = at_end(einsum_f32("gbnwm,gsm->gbnws", d_X, tables.lags[:, ::-1], dtype).astype(dtype), masks)
        d_k = einsum_f32("gbnjts,gbnjtr->gbnrs", c.d_scores[..., :K], q, dtype).astype(dtype) + d_z[:, :, :, :R]
        d_v = einsum_f32("gbnjts,gbnjte->gbnes", c.weights[..., :K], d_o, dtype).astype(dtype) + d_z[:, :, :, R:]

        d_lags = einsum_f32("gbnws,gbnwm->gsm", at_end(z, masks), d_X, dtype)[:, ::-1]
        d_answering = _answer_cotangent(c.lagged, c.d_answers, constants)
        continued = starts.astype(dtype)
        if masks.continues is not None:
            continued = jnp.where(masks.continues[None, :, :, None, None], continued, 0)
        d_decay = _decays_cotangent(continued[:, :, :, :, None], d_X[:, :, :, :, None], tables)
        d_decays = c.d_decays.at[:, -1].add(d_decay[:, 0])
        d_constants = jax.tree.map(jnp.add, d_constants, (d_lags, d_decays, d_answering))
        d_k, d_v = (join_chunks(x.swapaxes(-1, -2)) for x in (d_k, d_v))
        return (d_state.swapaxes(0, 1), d_constants), (join_queries(c.d_q), d_k, d_v)

    first = zero_state(k, v, tables) if initial_state is None else initial_state
    _, states = jax.lax.scan(advance, first, (*arrays[1:3], runs))
    constants, pullback = jax.vjp(_answer_constants, tables)
    zeros = jax.tree.map(jnp.zeros_like, (first, (tables.lags, tables.decays, constants)))
    inputs = (jnp.arange(count), states, *arrays, runs)
    (d_state, (d_lags, d_decays, d_answering)), d_inputs = jax.lax.scan(body, zeros, inputs, reverse=True)
    (d_tables,) = pullback(d_answering)
    d_tables = d_tables._replace(lags=d_tables.lags + d_lags, decays=d_decays)
    d_q, d_k, d_v = (join_groups(d, x).astype(x.dtype) for d, x in zip(d_inputs, (q, k, v), strict=True))
    return d_q, d_k, d_v, d_tables, None if initial_state is None else d_state


def _memory(z: jax.Array, starts: jax.Array) -> jax.Array:
    """What the queries of a chunk read: its tokens and its start state as columns, (G, B, N, W, K + 2M)."""
    return jnp.concatenate([z, starts.astype(z.dtype)], axis=-1)


def _read(q: jax.Array, memory_k: jax.Array, tables: Tables, masks: Masks) -> _Read:
    dtype = q.dtype
    scores = einsum_f32("gbnjtr,gbnra->gbnjta", q, memory_k, dtype).astype(dtype)
    lagged = _by_lag(scores, tables, masks)
    answers = _answer(lagged, _answer_constants(tables))
    return _Read(scores, lagged, answers, _by_token(answers, tables, masks))


def _answer_constants(tables: Tables) -> jax.Array | Tables:
    """A, (G, K + 2M, K + 2M): what each score by lag and each decayed response adds to `_Read.answers`.

    For a diagonal C the tables as they are, since A has pairs of modes.
    """
    if tables.readout.ndim == 4:
        return tables
    to_w = jnp.concatenate([tables.spread[:, ::-1], tables.readout.swapaxes(1, 2)], axis=1)
    pairs = einsum_f32("gcm,glm->gcl", to_w, tables.lags[:, ::-1], to_w.dtype)
    return jnp.concatenate([pairs, to_w], axis=-1)


def _answer(lagged: jax.Array, constants: jax.Array | Tables) -> jax.Array:
    dtype = lagged.dtype
    if not isinstance(constants, Tables):
        return einsum_f32("gbnjtc,gca->gbnjta", lagged, constants, dtype).astype(dtype)
    K = constants.lags.shape[1]
    rows = merge_axes(lagged, 1, -1)
    w = einsum_f32("gtl,glm->gtm", rows[..., :K], constants.spread[:, ::-1], dtype)
    w = (w + apply_readout(constants.readout, rows[..., K:], dtype)).astype(dtype)
    pairs = einsum_f32("gtm,glm->gtl", w, constants.lags[:, ::-1], dtype).astype(dtype)
    return jnp.concatenate([pairs, w], axis=-1).reshape(lagged.shape)


def _answer_transposed(d_answers: jax.Array, constants: jax.Array | Tables) -> jax.Array:
    """The cotangent of `lagged` in `_answer`."""
    dtype = d_answers.dtype
    if not isinstance(constants, Tables):
        return einsum_f32("gbnjta,gca->gbnjtc", d_answers, constants, dtype).astype(dtype)
    _, pullback = jax.vjp(lambda lagged: _answer(lagged, constants), d_answers)  # linear: at any point
    return pullback(d_answers)[0]


def _answer_cotangent(lagged: jax.Array, d_answers: jax.Array, constants: jax.Array | Tables) -> Any:
    """That of the constants."""
    if not isinstance(constants, Tables):
        return einsum_f32("gbnjtc,gbnjta->gca", lagged, d_answers, lagged.dtype)
    return jax.vjp(lambda constants: _answer(lagged, constants), constants)[1](d_answers)[0]


def _by_lag(x: jax.Array, tables: Tables, masks: Masks) -> jax.Array:
    """Columns of tokens and of modes (..., K, K + 2M) as columns of lags, the largest first, and of decayed modes.

    The barriers here and in `_by_token` make it one kernel on GPUs, whatever else reads its parts.
    """
    K = tables.lags.shape[1]
    x = jax.lax.optimization_barrier(x)
    lagged = to_lags(jnp.where(masks.within, x[..., :K], 0))
    decayed = from_start(_decay(x[..., K:], tables.decays), masks).astype(x.dtype)
    return jax.lax.optimization_barrier(jnp.concatenate([lagged, decayed], axis=-1))


def _by_token(x: jax.Array, tables: Tables, masks: Masks) -> jax.Array:
    """The transpose of `_by_lag`."""
    K = tables.lags.shape[1]
    x = jax.lax.optimization_barrier(x)
    pairs = jnp.where(masks.within, to_tokens(x[..., :K]), 0)
    decayed = from_start(_decay(x[..., K:], conjugate(tables.decays)), masks).astype(x.dtype)
    return jax.lax.optimization_barrier(jnp.concatenate([pairs, decayed], axis=-1))


def _decay(rows: jax.Array, decays: jax.Array) -> jax.Array:
    """Rows of flattened planes (G, B, N, J, K, 2M), each mode times its complex number of decays (G, K, 2, M)."""
    return flatten_planes(complex_multiply(to_planes(rows.astype(decays.dtype)), decays[:, None, None, None]))


def _decays_cotangent(rows: jax.Array, d_decayed: jax.Array, tables: Tables) -> jax.Array:
    """The cotangent of decays in _decay(rows, decays), (G, K, 2, M): conj(rows) d_decayed, summed.

    Rows and cotangent may be exchanged where what is decayed by is conj(decays).
    """
    (re, im), (d_re, d_im) = (
        jnp.split(merge_axes(x, 1, 4).astype(tables.decays.dtype), 2, axis=-1) for x in (rows, d_decayed)
    )  # (G, B N J, K, M)
    return jnp.stack([_total(re * d_re + im * d_im), _total(re * d_im - im * d_re)], axis=-2)


def _total(x: jax.Array) -> jax.Array:
    """The sum over axis 1; for CPUs as a window, since XLA fuses sums into what reads them, and then reads strides."""

    def window(x):
        size = [1, x.shape[1], *[1] * (x.ndim - 2)]
        return jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, size, size, "VALID")[:, 0]

    return jax.lax.platform_dependent(x, cpu=window, default=lambda x: jnp.sum(x, axis=1))


def on_gpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass as GPUs run it: with few, large kernels."""

    def run(q, k, v, tables, *arguments, **options):
        tokens = q.shape[0] * q.shape[2] * tables.lags.shape[1]  # of a chunk; maybe a dimension of jax.export
        group = max(GROUP, GPU_TOKENS // tokens) if isinstance(tokens, int) else GROUP
        return function(q, k, v, tables, *arguments, scan=blocked_scan, group=group, **options)

    return run


def _by_platform(function: Callable[..., Any]) -> Callable[..., Any]:
    gpu = on_gpus(function)
    return lambda *arguments: jax.lax.platform_dependent(*arguments, cuda=gpu, rocm=gpu, default=function)


# What `BACKEND` is on GPUs: for tests.
ON_GPUS = Backend(name="chunkwise on GPUs", rule=(on_gpus(forward), on_gpus(backward)), linear=chunk_linear.linear)
BACKEND = Backend(
    name="chunkwise",
    rule=(_by_platform(forward), _by_platform(backward)),
    linear=chunk_linear.linear,
    cpu_chunk=64,
)
ASSOCIATIVE = Backend(
    name="associative",
    rule=(
        partial(forward, scan=associative_scan, group=None),
        partial(backward, scan=associative_scan, group=None),
    ),
    linear=partial(chunk_linear.linear, scan=associative_scan),
)

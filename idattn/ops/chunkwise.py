"""The recurrence in chunks of K tokens: matrix products in real planes, exact for any decay and any length.

With X^0 the state at a chunk's start and t, s counted inside the chunk from 0,

    S[t,s] = q_t . k_s                                                    (s <= t)
    y_t    = lambda^{t+1} (X_k^0 q_t) + sum_{s<=t} S[t,s] beta lambda^{t-s}
    w_t    = C^T f(C y_t)
    P[t,s] = Re sum_m w_t[m] beta_m lambda_m^{t-s}                        (s <= t)
    o_t    = Re (w_t lambda^{t+1})^T X_v^0 + sum_s P[t,s] v_s
    X^K    = lambda^K X^0 + sum_s beta lambda^{K-1-s} [k_s, v_s]^T

Decays enter only as powers lambda^l with l >= 0, through tables over the lag l = t - s; `_skew` turns the
columns of a matrix from s to l and back. So nothing overflows, however fast a mode forgets. The states at the
chunks' starts are the only thing that crosses chunks.

Shapes inside: heads before chunks, (B, G, N, K, ...), queries with an axis J = H / G, modes as 2M planes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.discretize import Basis, discretize, multiply, output_matrices, powers
from idattn.ops.product import product
from idattn.ops.segments import PADDING, last_token, run_index


class _Tables(NamedTuple):
    """The constants of a chunk, functions of the basis alone."""

    lags: jax.Array  # beta lambda^l, l = 0..K-1, (G, K, 2M)
    rotations: jax.Array  # lambda^{t+1}, t = 0..K-1, (G, K, 2, M)


class _Runs(NamedTuple):
    """Which tokens see which, chunk by chunk; absent (None) where every row is one document without padding."""

    within: jax.Array  # (B, 1, N, 1, K, K) token t sees token s of its chunk
    start: jax.Array  # (B, 1, N, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array  # (B, 1, N, K, 1) token s is in the state at the chunk's end
    keep: jax.Array  # (N, B, 1, 1, 1, 1) the state at the chunk's start is in the one at its end


def interdomain(q, k, v, basis, initial_state, segment_ids, *, readout, chunk_size):
    """Eq. 11 and 13 in chunks; shapes as in `idattn.ops.interdomain_attention`."""
    B, T, H, R = q.shape
    G = k.shape[2]
    tables = _tables(basis, chunk_size)
    q, k, v, runs = _split(q, k, v, segment_ids=segment_ids, chunk_size=chunk_size)
    q = q.reshape(B, G, H // G, *q.shape[2:]).swapaxes(2, 3)  # (B, G, N, J, K, R)
    z = jnp.concatenate([k, v], axis=-1)
    starts = _start_states(z, tables, initial_state, runs)
    to_u, to_w = output_matrices(basis, readout)
    readout_matrix = jnp.matmul(to_w, to_u, precision="highest")
    # Recomputed in the backward pass: a scan over layers keeps q, k, v and the states only. (Without barriers against
    # common subexpressions, which scanned layers do not need, and which cost a single call a quarter of its time.)
    o = jax.checkpoint(partial(_read_chunks, R=R), prevent_cse=False)(q, z, starts, tables, readout_matrix, runs)
    o = o.swapaxes(2, 3).reshape(B, H, -1, v.shape[-1])
    o = jnp.moveaxis(o, 1, 2)[:, :T]
    return o, _final_state(z, starts, tables, initial_state, runs, segment_ids, T)


def linear(z, basis, c_out, initial_state, segment_ids, *, chunk_size):
    """The learned linear readout in chunks: one real convolution kernel a head, h(l) = Re(c_out^T C beta lambda^l)."""
    B, T, H, W = z.shape
    tables = _tables(basis, chunk_size)
    z, runs = _split(z, segment_ids=segment_ids, chunk_size=chunk_size)
    starts = _start_states(z, tables, initial_state, runs)
    y = jax.checkpoint(_convolve_chunks, prevent_cse=False)(z, starts, tables, fold(basis, c_out), runs)
    y = jnp.moveaxis(y.reshape(B, H, -1, W), 1, 2)[:, :T]
    return y, _final_state(z, starts, tables, initial_state, runs, segment_ids, T)


def fold(basis: Basis, c_out: jax.Array) -> jax.Array:
    """c_out^T C as a row of planes that reads Re(c_out^T C X) off flattened planes of X, (G, 2M)."""
    to_u, _ = output_matrices(basis, "transpose")
    M = c_out.shape[1]
    return jnp.einsum("gm,gmn->gn", c_out, to_u[:, :M], precision="highest")


def _tables(basis: Basis, K: int) -> _Tables:
    lam, beta = discretize(basis)
    table = jnp.moveaxis(powers(lam, K), 0, 1)  # (G, K + 1, 2, M)
    lags = multiply(beta[:, None], table[:, :K])
    return _Tables(lags.reshape(*lags.shape[:2], -1), table[:, 1:])


def _split(*arrays: jax.Array, segment_ids, chunk_size: int):
    """Arrays (B, T, G, width) in chunks (B, G, N, K, width), T padded to a multiple of K, and their runs."""
    B, T = arrays[0].shape[:2]
    pad = -T % chunk_size
    runs = None
    if segment_ids is not None:
        is_token = (segment_ids != PADDING)[..., None, None]
        arrays = tuple(jnp.where(is_token, x, 0) for x in arrays)  # whatever padding holds, NaN included
        runs = _find_runs(jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=PADDING), chunk_size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(B, -1, chunk_size, *x.shape[2:]), 3, 1)

    return *map(split, arrays), runs


def _find_runs(segment_ids: jax.Array, K: int) -> _Runs:
    B = segment_ids.shape[0]
    # Padding gets a run of its own sign, so that no token sees it and it sees none.
    run = jnp.where(segment_ids == PADDING, -1, run_index(segment_ids)).reshape(B, -1, K)
    previous = jnp.pad(run[:, :-1, -1], ((0, 0), (1, 0)))  # run of the state at the chunk's start: first run 0
    within = (run[:, :, :, None] == run[:, :, None, :]) & (run >= 0)[..., None]
    start = (run == previous[..., None]) & (run >= 0)
    end = run == run[..., -1:]
    keep = start[..., -1].T
    return _Runs(
        within[:, None, :, None],
        start[:, None, :, None, :, None],
        end[:, None, :, :, None],
        keep[..., None, None, None, None],
    )


def _start_states(z, tables: _Tables, initial_state, runs) -> jax.Array:
    """The states at the chunks' starts, (N, B, G, 2, M, R + E), from z (B, G, N, K, R + E)."""
    if runs is not None:
        z = jnp.where(runs.end, z, 0)
    own = product("bgnsw,gsm->nbgmw", z, tables.lags[:, ::-1], z.dtype)
    own = own.reshape(own.shape[0], *initial_state.shape).astype(initial_state.dtype)
    decay = tables.rotations[:, -1, ..., None]  # lambda^K, (G, 2, M, 1)

    def advance(state, chunk):
        own, keep = chunk
        carried = multiply(decay, state, axis=-3)
        return (carried if keep is None else jnp.where(keep, carried, 0)) + own, state

    return jax.lax.scan(advance, initial_state, (own, None if runs is None else runs.keep))[1]


def _skew(x: jax.Array) -> jax.Array:
    """y[..., t, l] = x[..., t, t - l] for l <= t, else 0, for square matrices: swaps lags and tokens either way."""
    K = x.shape[-1]
    x = jnp.pad(x[..., ::-1], [(0, 0)] * (x.ndim - 1) + [(0, K)])
    x = x.reshape(*x.shape[:-2], 2 * K * K)[..., K - 1 : K - 1 + K * (2 * K - 1)]
    return x.reshape(*x.shape[:-1], K, 2 * K - 1)[..., :K]


def _rotate(rows: jax.Array, rotations: jax.Array) -> jax.Array:
    """Rows of flattened planes (B, G, N, J, K, 2M), each mode turned and damped by lambda^{t+1} (G, K, 2, M)."""
    planes = rows.reshape(*rows.shape[:-1], *rotations.shape[-2:])
    return multiply(planes, rotations[:, None, None]).reshape(rows.shape)


def real_part(rows: jax.Array) -> jax.Array:
    """Rows w of flattened planes such that their product with planes of x is Re(w x): the imaginary half negated."""
    M = rows.shape[-1] // 2
    return jnp.concatenate([rows[..., :M], -rows[..., M:]], axis=-1)


def _read_chunks(q, z, starts, tables: _Tables, readout_matrix, runs, *, R: int) -> jax.Array:
    """o (B, G, N, J, K, E) from q (B, G, N, J, K, R), z (B, G, N, K, R + E) and the chunks' start states."""
    dtype = q.dtype
    k, v = z[..., :R], z[..., R:]
    state = starts.reshape(*starts.shape[:3], -1, starts.shape[-1])  # (N, B, G, 2M, R + E)

    scores = product("bgnjtr,bgnsr->bgnjts", q, k, dtype)
    if runs is not None:
        scores = jnp.where(runs.within, scores, 0)
    y = product("bgnjtl,glm->bgnjtm", _skew(scores), tables.lags, dtype)
    carried = _rotate(product("bgnjtr,nbgmr->bgnjtm", q, state[..., :R], dtype), tables.rotations)
    y = y + (carried if runs is None else jnp.where(runs.start, carried, 0))

    w = real_part(product("bgnjtm,gom->bgnjto", y, readout_matrix, dtype))

    weights = _skew(product("bgnjtm,glm->bgnjtl", w, tables.lags, dtype))
    if runs is not None:
        weights = jnp.where(runs.within, weights, 0)
    o = product("bgnjts,bgnse->bgnjte", weights, v, dtype)
    # Re(w lambda x) with the sign of Re already on w, hence the conjugate rotation.
    turned = _rotate(w, tables.rotations * jnp.asarray([1, -1], w.dtype)[:, None])
    turned = turned if runs is None else jnp.where(runs.start, turned, 0)
    return (o + product("bgnjtm,nbgme->bgnjte", turned, state[..., R:], dtype)).astype(dtype)


def _convolve_chunks(z, starts, tables: _Tables, folded, runs) -> jax.Array:
    """y (B, G, N, K, W) from z (B, G, N, K, W), the chunks' start states and c_out^T C (G, 2M)."""
    dtype = z.dtype
    K = z.shape[3]
    kernel = jnp.einsum("gm,glm->gl", folded, tables.lags, precision="highest")
    toeplitz = _skew(jnp.broadcast_to(kernel[:, None], (kernel.shape[0], K, K)))
    if runs is None:
        y = product("gts,bgnsw->bgntw", toeplitz, z, dtype)
    else:
        y = product("bgnts,bgnsw->bgntw", jnp.where(runs.within[:, :, :, 0], toeplitz[:, None], 0), z, dtype)
    # Re(c_out^T C lambda^{t+1} X): the folded row already carries the sign of the real part.
    rows = multiply(
        folded.reshape(-1, 1, 2, folded.shape[-1] // 2),
        tables.rotations * jnp.asarray([1, -1], folded.dtype)[:, None],
    )
    state = starts.reshape(*starts.shape[:3], -1, starts.shape[-1])
    carried = product("gtm,nbgmw->bgntw", rows.reshape(*rows.shape[:2], -1), state, dtype)
    return (y + (carried if runs is None else jnp.where(runs.start[:, :, :, 0], carried, 0))).astype(dtype)


def _final_state(z, starts, tables: _Tables, initial_state, runs, segment_ids, T: int) -> jax.Array:
    """The state after each row's last token that is not padding, in the shape of `initial_state`."""
    B, K = z.shape[0], z.shape[3]
    last = jnp.full((B,), T - 1) if segment_ids is None else last_token(segment_ids)
    chunk, offset = jnp.maximum(last, 0) // K, jnp.maximum(last, 0) % K
    rows = jnp.arange(B)
    lag = offset[:, None] - jnp.arange(K)  # from each token of the chunk to the last one, (B, K)
    in_state = lag >= 0
    carried = multiply(tables.rotations[:, offset].swapaxes(0, 1)[..., None], starts[chunk, rows], axis=-3)
    if runs is not None:
        in_state &= runs.within[rows, 0, chunk, 0, offset]
        carried = jnp.where(runs.start[rows, 0, chunk, 0, offset][..., None, None, None], carried, 0)
    weights = jnp.where(in_state[..., None], tables.lags[:, jnp.maximum(lag, 0)], 0)  # (G, B, K, 2M)
    own = product("gbsm,bgsw->bgmw", weights, z[rows, :, chunk], z.dtype)
    state = carried + own.reshape(initial_state.shape)
    return jnp.where((last >= 0)[:, None, None, None, None], state, initial_state)

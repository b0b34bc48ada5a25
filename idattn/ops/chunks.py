"""What the chunked backends share: a chunk's tables, which tokens see which, and one derivative for all of them.

With X^0 the state at a chunk's start and t, s counted inside the chunk from 0,

    S[t,s] = q_t . k_s                                                    (s <= t)
    y_t    = lambda^{t+1} (X_k^0 q_t) + sum_{s<=t} S[t,s] beta lambda^{t-s}
    w_t    = C^T f(C y_t)
    P[t,s] = Re sum_m w_t[m] beta_m lambda_m^{t-s}                        (s <= t)
    o_t    = Re (w_t lambda^{t+1})^T X_v^0 + sum_s P[t,s] v_s
    X^K    = lambda^K X^0 + sum_s beta lambda^{K-1-s} [k_s, v_s]^T

Decays enter only as powers lambda^l with l >= 0, through tables over the lag l = t - s, so nothing overflows,
however fast a mode forgets. The states at the chunks' starts are the only thing that crosses chunks.

A backend is a pair of functions, `forward` and `backward`, of whole chunks: the tables are inputs with cotangents of
their own, which JAX carries on to the parameters. Between the two only the inputs are kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.discretize import Basis, discretize, multiply, output_matrices, powers
from idattn.ops.product import product
from idattn.ops.segments import PADDING, last_token, run_index


class Tables(NamedTuple):
    """The constants of a chunk, functions of the basis alone."""

    lags: jax.Array  # beta lambda^l, l = 0..K-1, (G, K, 2M)
    rotations: jax.Array  # lambda^{t+1}, t = 0..K-1, (G, K, 2, M)
    readout: jax.Array  # y -> w with the sign of Re on its imaginary half, (G, 2M, 2M)
    spread: jax.Array  # readout beta lambda^l: what a score adds to the w of l tokens later, (G, K, 2M)


def make_tables(basis: Basis, K: int, readout: str) -> Tables:
    """The tables of chunks of K tokens; readout as in `idattn.ops.interdomain_attention`."""
    to_u, to_w = output_matrices(basis, readout)
    matrix = real_part(jnp.matmul(to_w, to_u, precision="highest"), axis=-2)
    lags, rotations = lag_tables(basis, K)
    return Tables(lags, rotations, matrix, jnp.einsum("gom,glm->glo", matrix, lags, precision="highest"))


def lag_tables(basis: Basis, K: int) -> tuple[jax.Array, jax.Array]:
    """beta lambda^l (G, K, 2M) for l = 0..K-1, and lambda^{t+1} (G, K, 2, M) for t = 0..K-1."""
    lam, beta = discretize(basis)
    table = jnp.moveaxis(powers(lam, K), 0, 1)  # (G, K + 1, 2, M)
    lags = multiply(beta[:, None], table[:, :K])
    return lags.reshape(*lags.shape[:2], -1), table[:, 1:]


def real_part(rows: jax.Array, axis: int = -1) -> jax.Array:
    """Rows w of flattened planes such that their product with planes of x is Re(w x): the imaginary half negated."""
    re, im = jnp.split(rows, 2, axis=axis)
    return jnp.concatenate([re, -im], axis=axis)


def pad_to_chunks(arrays: tuple[jax.Array, ...], segment_ids: jax.Array | None, K: int):
    """Arrays (B, T, ...) with T padded to a multiple of K, and the run of every token, (B, T) int32.

    The run is -1 at padding, whose values become 0 whatever they hold (NaN included); it is None where every row
    is one document without padding.
    """
    pad = -arrays[0].shape[1] % K
    run = None
    if segment_ids is not None:
        is_token = segment_ids != PADDING
        arrays = tuple(jnp.where(is_token[..., None, None], x, 0) for x in arrays)
        run = jnp.where(is_token, run_index(segment_ids), PADDING)
        run = jnp.pad(run, ((0, 0), (0, pad)), constant_values=PADDING)
    return tuple(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in arrays), run


def interdomain(q, k, v, basis, initial_state, segment_ids, *, readout, chunk_size, rule):
    """Eq. 11 and 13 in chunks; shapes as in `idattn.ops.interdomain_attention`.

    Args:
      initial_state: None for zeros, which a backend then need not read.
      rule: the (forward, backward) pair of a backend, see `_attend`.
    """
    B, T = q.shape[:2]
    K = chunk_size
    tables = make_tables(basis, K, readout)
    last = jnp.full((B,), T - 1) if segment_ids is None else last_token(segment_ids)
    (q, k, v), run = pad_to_chunks((q, k, v), segment_ids, K)
    o, start = _attend(rule, q, k, v, tables, initial_state, run, jnp.maximum(last, 0) // K)
    initial_state = zero_state(k, v, tables) if initial_state is None else initial_state
    return o[:, :T], final_state((k, v), start, tables.lags, tables.rotations, initial_state, run, last)


def zero_state(k, v, tables: Tables) -> jax.Array:
    """(B, G, 2, M, R + E) for keys (B, T, G, R) and values (B, T, G, E)."""
    B, _, G, R = k.shape
    return jnp.zeros((B, G, *tables.rotations.shape[2:], R + v.shape[-1]), tables.rotations.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule, q, k, v, tables: Tables, initial_state, run, last_chunk):
    """Outputs (B, T, H, E) and the state at the start of chunk `last_chunk` (B,), T being a multiple of K.

    rule = (forward, backward):
      forward(q, k, v, tables, initial_state, run, last_chunk) returns those two;
      backward(the same, cotangents of those two) returns the cotangents of q, k, v, tables and initial_state.
    """
    return rule[0](q, k, v, tables, initial_state, run, last_chunk)


def _attend_forward(rule, *inputs):
    return rule[0](*inputs), inputs


def _attend_backward(rule, inputs, cotangents):
    return *rule[1](*inputs, cotangents), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def final_state(inputs, start, lags, rotations, initial_state, run, last) -> jax.Array:
    """The state after each row's last token that is not padding, in the shape of `initial_state`.

    Args:
      inputs: arrays (B, T, G, width) whose concatenation is what the state holds.
      start: (B, G, 2, M, W) the state at the start of the chunk that the last token is in.
      run: (B, T) or None.
      last: (B,) index of the last token, -1 where there is none: then the state is the initial one.
    """
    B, K = last.shape[0], lags.shape[1]
    first, offset = jnp.maximum(last, 0) // K * K, jnp.maximum(last, 0) % K
    chunk = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=K))
    z = jnp.concatenate([chunk(x, first) for x in inputs], axis=-1)  # (B, K, G, W)
    lag = offset[:, None] - jnp.arange(K)  # from each token of the chunk to the last one, (B, K)
    in_state = lag >= 0
    carried = multiply(rotations[:, offset].swapaxes(0, 1)[..., None], start, axis=-3)
    if run is not None:
        runs = chunk(run, first)
        own = runs[jnp.arange(B), offset]
        before = jnp.where(first == 0, 0, run[jnp.arange(B), first - 1])
        in_state &= runs == own[:, None]
        carried = jnp.where((own == before)[:, None, None, None, None], carried, 0)
    weights = jnp.where(in_state[..., None], lags[:, jnp.maximum(lag, 0)], 0)  # (G, B, K, 2M)
    own = product("gbsm,bsgw->bgmw", weights, z, z.dtype)
    state = carried + own.reshape(initial_state.shape)
    return jnp.where((last >= 0)[:, None, None, None, None], state, initial_state)

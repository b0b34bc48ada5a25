"""Linear attention with gates: states of real numbers that decay by what the tokens say, and may be corrected."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.arguments import check_heads, check_rank, check_segments, check_serial, check_shape
from idattn.ops.segments import Segments
from idattn.ops.tree import make_tree
from idattn.ops.tree_chunks import (
    Masks,
    find_moves,
    read_tokens,
    rows_at_start,
    scan_corrections,
    scan_groups,
    scan_states,
    scan_tokens,
    split_tokens,
    weights_on_tokens,
)
from idattn.shapes import SegmentIds


class Inputs(NamedTuple):
    """Tokens: (B, T, ...), or a group of chunks of them."""

    q: jax.Array  # (B, T, H, R)
    k: jax.Array  # (B, T, H, R)
    v: jax.Array  # (B, T, H, E)
    log_decays: jax.Array  # (B, T, H, R) or (B, T, H, 1)
    gains: jax.Array | None  # (B, T, H, 1)


def gated_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decays: jax.Array,
    *,
    gains: jax.Array | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    segment_ids: SegmentIds | Segments | None = None,
    initial_state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention, and with gains the gated delta rule.

        S_t = diag(alpha_t) S_{t-1} + k_t u_t^T,   alpha_t = exp(log_decays_t),   o_t = S_t^T q_t
        u_t = v_t, or with gains u_t = b_t (v_t - (diag(alpha_t) S_{t-1})^T k_t)

    A decay for each feature is that of GLA (Yang et al. 2023), one for all features that of Mamba-2 (Dao and Gu 2024),
    and one for all with gains is Gated DeltaNet (Yang et al. 2024), S_t = alpha_t (I - b_t k_t k_t^T) S_{t-1} +
    b_t k_t v_t^T, which is bounded for keys of length 1 and b in [0, 2]. The backward pass keeps only the inputs.

    Args:
      q: (B, T, H, R).
      k: (B, T, H, R).
      v: (B, T, H, E).
      log_decays: (B, T, H, R), or (B, T, H, 1) for a decay that all features share; at most 0.
      gains: (B, T, H), or None.
      backend: "auto" and "chunkwise" are matrix products over chunks, "recurrent" is token by token.
      chunk_size: tokens in a chunk, of which the largest power of two up to 32 is taken; None for 32. Changes speed and
        memory only.
      segment_ids: (B, T) as in `idattn.ops.interdomain_attention`.
      initial_state: (B, H, E, R), S transposed, None for zeros.

    Returns:
      The outputs (B, T, H, E) in the dtype of `q`, and the state (B, H, E, R), float32 or wider.

    Raises:
      ValueError: a shape, dtype or chunk size does not fit, or a name is unknown.
    """
    check_serial(backend, chunk_size)
    _check("B T", q, k, v, log_decays, gains)
    (B, T, H, R), E = q.shape, v.shape[3]
    dtype = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    state = jnp.zeros((B, H, E, R), dtype) if initial_state is None else initial_state.astype(dtype)
    check_shape("the state", state, (B, H, E, R), "B H E R")
    gains = None if gains is None else gains.astype(dtype)[..., None]
    inputs, segments = Inputs(q, k, v, log_decays.astype(dtype), gains), check_segments(segment_ids, B, T)
    if backend == "recurrent":
        return scan_tokens(_step, inputs, state, segments)
    return jax.checkpoint(partial(scan_groups, _group, chunk_size=chunk_size))(inputs, state, segments)


def _check(axes: str, q: jax.Array, k: jax.Array, v: jax.Array, log_decays: jax.Array, gains: jax.Array | None) -> None:
    """The shapes of tokens with the leading axes `axes`."""
    check_heads(axes, q, k, v)
    check_rank(log_decays=(log_decays, f"{axes} H R"))
    *lead, R = q.shape
    check_shape("k", k, q.shape, "that of q")
    check_shape("log_decays", log_decays, (*lead, 1 if log_decays.shape[-1] == 1 else R), "that of q, or 1 for R")
    if gains is not None:
        check_shape("gains", gains, tuple(lead), "a number for each token and head")


def _step(x: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    gains = None if x.gains is None else x.gains[..., 0]
    return gated_step(x.q, x.k, x.v, x.log_decays, state, gains=gains)


def gated_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decays: jax.Array,
    state: jax.Array,
    *,
    gains: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `gated_attention`.

    Args:
      q: (B, H, R).
      k: (B, H, R).
      v: (B, H, E).
      log_decays: (B, H, R) or (B, H, 1).
      state: (B, H, E, R) before the token.
      gains: (B, H), or None.

    Returns:
      The outputs (B, H, E) in the dtype of `q`, and the state after the token, float32 or wider.

    Raises:
      ValueError: a shape or dtype does not fit.
    """
    _check("B", q, k, v, log_decays, gains)
    check_shape("the state", state, (*v.shape, k.shape[-1]), "B H E R")
    dtype = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    q_, k, u = (x.astype(dtype) for x in (q, k, v))
    state = state.astype(dtype) * jnp.exp(log_decays.astype(dtype))[:, :, None]
    if gains is not None:
        u = gains.astype(dtype)[..., None] * (u - jnp.einsum("bher,bhr->bhe", state, k, precision="highest"))
    state = state + u[..., None] * k[:, :, None]
    return jnp.einsum("bher,bhr->bhe", state, q_, precision="highest").astype(q.dtype), state


def _group(inputs: Inputs, masks: Masks | None, state: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) of a group of chunks, and the state after it.

    In a chunk, with the decay D(t,s) = alpha_{s+1} ... alpha_t of each feature, D(t,0) from before the chunk,

        P[t,s] = sum_r x_t[r] D(t,s)[r] k_s[r]                                        x_t: q_t or k_t
        u_t    = b_t (v_t - sum_{s<t} P^k[t,s] u_s - (diag(D(t,0)) S^0)^T k_t)        with corrections, else v_t
        o_t    = sum_{s<=t} P^q[t,s] u_s + (diag(D(t,0)) S^0)^T q_t
    """
    q, k, v, log_decays = (split_tokens(x, K) for x in inputs[:4])
    dtype = inputs.q.dtype
    tree = make_tree(log_decays, None, k.astype(log_decays.dtype), K, None if masks is None else masks.run)
    moves = find_moves(tree, k.shape[0], masks)
    rows = q[:, :, :, None] if inputs.gains is None else jnp.stack([q, k], axis=3)  # (N, B, H, J, K, R)
    rows = rows.astype(log_decays.dtype)
    P, at_start = (
        weights_on_tokens(rows, tree, masks, inputs.gains is not None, dtype),
        rows_at_start(rows, tree, masks),
    )
    if inputs.gains is None:
        u, (states, end) = v, scan_states(v, moves, state)
    else:
        gains = split_tokens(inputs.gains, K)
        u, states, end = scan_corrections(P[:, :, :, 1], at_start[:, :, :, 1], v, gains, moves, state, dtype)
    return read_tokens(P[:, :, :, :1], u, at_start[:, :, :, :1], states, dtype), end

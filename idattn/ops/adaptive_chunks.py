"""Interdomain Attention with a clock and corrective writes in chunks: matrix products, for every platform.

With the decay D(t,s) = lambda_{s+1} ... lambda_t of each mode, D(t,0) from before the chunk, and s, t inside the chunk,

    y_t    = D(t,0) (X_k^0 x_t) + sum_{s<=t} (x_t . k_s) D(t,s) beta_s           x_t: q_t or k_t
    w_t    = C^T f(C y_t)
    p_t    = conj(w^k_t) / |w^k_t|^2 with corrections, else beta_t; also beta_t with damped ones, of other b and w
    P[t,s] = Re sum_m w_t[m] D(t,s)[m] p_s[m]
    u_t    = b_t (v_t - r_t) with corrections, else v_t;    r_t = sum_{s<t} P^k[t,s] u_s + carried^k_t
    o_t    = sum_{s<=t} P^q[t,s] u_s + carried^q_t,         carried_t = Re(w_t D(t,0))^T X_v^0

X_k does not depend on u, so that all but X_v is computed for many chunks at a time,
and (I + diag(b) P^k) u = b (v - carried^k) is solved by the inverse of its unit lower triangular matrix. X_v then runs
through the chunks one by one. Only the inputs are stored for the backward pass, which JAX derives from a forward pass
that is computed anew, group of chunks by group of chunks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.chunks import apply_readout, signed_readout
from idattn.ops.discretize import Basis, discretize, mode_weights
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import flatten_planes, multiply_flattened, real_part_row
from idattn.ops.segments import PADDING, Segments
from idattn.ops.tree import Tree, block_length, blocks, halves, join_right, make_tree
from idattn.ops.tree_chunks import (
    Masks,
    base_mask,
    find_moves,
    level_mask,
    read_tokens,
    rows_at_start,
    scan_corrections,
    scan_groups,
    scan_states,
    split_tokens,
    weights_on_tokens,
)

FLOOR = 1e-12  # under the division by the square of an address


class Inputs(NamedTuple):
    """Tokens: (B, T, ...), or a group of chunks of them."""

    q: jax.Array  # (B, T, H, R)
    k: jax.Array  # (B, T, G, R)
    v: jax.Array  # (B, T, G, E)
    log_steps: jax.Array | None  # (B, T, G, 1)
    gains: jax.Array | None  # (B, T, G, 1)


def attend(
    inputs: Inputs,
    basis: Basis,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    readout: str,
    write: str,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) and the state after each row's last token; see `idattn.ops.adaptive_attention`."""
    return jax.checkpoint(partial(_attend, readout=readout, write=write, chunk_size=chunk_size))(
        inputs, basis, initial_state, segments
    )


def _attend(inputs: Inputs, basis: Basis, initial_state, segments, *, readout: str, write: str, chunk_size: int | None):
    table = signed_readout(basis, readout)
    if write == "damped":
        table = table / own_weights(basis, readout).reshape(-1, *[1] * (table.ndim - 1))

    def advance(inputs: Inputs, masks: Masks | None, state: jax.Array, K: int):
        return _group(inputs, _token_steps(inputs.log_steps, basis, K, masks), table, state, masks, K, write)

    return scan_groups(advance, inputs, initial_state, segments, chunk_size)


def own_weights(basis: Basis, readout: str) -> jax.Array:
    """h = Re(w^T beta) with w = C^T f(C beta), (G,): what a unit key alone reads of its own value."""
    beta = flatten_planes(discretize(basis)[1])
    w = real_part_row(mode_weights(basis, readout, beta[None, :, None]))[0, :, 0]
    return jnp.sum(w * beta, axis=-1)


class Steps(NamedTuple):
    """What steps do to the modes: (G, M) where all are alike, else (B, T, G, M)."""

    log_size: jax.Array  # log |lambda|
    phase: jax.Array  # arg lambda
    beta: jax.Array  # flattened planes


def _steps(log_steps: jax.Array | None, basis: Basis) -> Steps:
    """The steps of tokens with log_steps (B, T, G, 1), or None for those of `idattn.ops.interdomain_attention`."""
    if log_steps is None:
        delta = jnp.exp(basis.log_delta)[:, None]
        beta = flatten_planes(discretize(basis)[1])
        return Steps(-jnp.exp(basis.log_delta[:, None] + basis.a_log), delta * basis.a_imag, beta)
    log_delta = basis.log_delta[None, None, :, None] + log_steps
    x = -jnp.exp(log_delta + basis.a_log[None, None])
    y = jnp.exp(log_delta) * basis.a_imag[None, None]
    # exp(x + iy) - 1 without cancellation. A loop over terms for small steps, as in `discretize`, would take long.
    minus_one = [jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, jnp.exp(x) * jnp.sin(y)]
    a_re = -jnp.exp(basis.a_log)
    size = a_re**2 + basis.a_imag**2
    inverse = jnp.concatenate([a_re / size, -basis.a_imag / size], axis=-1)
    return Steps(x, y, multiply_flattened(jnp.concatenate(minus_one, axis=-1), inverse[None, None]))


def _token_steps(log_steps: jax.Array | None, basis: Basis, K: int, masks: Masks | None) -> Steps:
    """The steps of a group of tokens, (N, B, G, K, M); 1 for N, B and K where all are alike."""
    steps = _steps(log_steps, basis)
    if log_steps is None:
        steps = jax.tree.map(lambda x: x[None, None, :, None], steps)
    else:
        steps = jax.tree.map(lambda x: split_tokens(x, K), steps)
    if masks is None:
        return steps
    is_token = (masks.run != PADDING)[:, :, None, :, None]  # padding leaves the state as it is
    log_size, phase = (jnp.where(is_token, x, 0) for x in (steps.log_size, steps.phase))
    return Steps(log_size, phase, steps.beta)


def _group(
    inputs: Inputs,
    steps: Steps,
    table: jax.Array,
    state: jax.Array,
    masks: Masks | None,
    K: int,
    write: str,
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) of a group of chunks, and the state after it."""
    run = None if masks is None else masks.run
    tree = make_tree(steps.log_size, steps.phase, steps.beta, K, run)
    q, k, v = inputs.q, split_tokens(inputs.k, K), split_tokens(inputs.v, K)
    (B, _, H, R), (N, _, G, *_), dtype = q.shape, k.shape, q.dtype
    q = q.reshape(B, N, K, G, H // G, R).transpose(1, 0, 3, 4, 2, 5)  # (N, B, G, J, K, R)
    rows = q if inputs.gains is None else jnp.concatenate([q, k[:, :, :, None]], axis=3)
    X_k, end_k = scan_states(k, find_moves(tree, N, masks), state[:, :, :R])
    w = _weights_on_modes(rows, k, X_k, tree, table, masks)
    at_start = rows_at_start(w, tree, masks)
    if inputs.gains is None:
        P, u = weights_on_tokens(w, tree, masks, False, dtype), v
        X_v, end_v = scan_states(v, find_moves(tree, N, masks), state[:, :, R:])
    else:
        address, gains = w[:, :, :, -1], split_tokens(inputs.gains, K)  # with the sign of Re, the conjugate
        size = jnp.sum(address**2, axis=-1, keepdims=True)
        if write == "damped":
            gains = gains / (1 + gains * size * jnp.sum(steps.beta**2, axis=-1, keepdims=True))
        else:
            tree = make_tree(steps.log_size, steps.phase, address / (size + FLOOR), K, run)
        P, moves = weights_on_tokens(w, tree, masks, True, dtype), find_moves(tree, N, masks)
        u, X_v, end_v = scan_corrections(P[:, :, :, -1], at_start[:, :, :, -1], v, gains, moves, state[:, :, R:], dtype)
        P, at_start = P[:, :, :, :-1], at_start[:, :, :, :-1]
    o = read_tokens(P, u, at_start, X_v, dtype)
    return o, jnp.concatenate([end_k, end_v], axis=-2)


def _weights_on_modes(rows, k, X_k, tree: Tree, table, masks: Masks | None) -> jax.Array:
    """w (N, B, G, J, K, 2M) with the sign of Re, of rows (N, B, G, J, K, R)."""
    K, dtype = k.shape[3], rows.dtype
    c = block_length(K)
    y = einsum_f32("nbgjtr,nbgrm->nbgjtm", rows, X_k, dtype)
    y = tree.multiply(y, tree.start[:, :, :, None])
    y = y if masks is None else jnp.where(masks.start, y, 0)

    def respond(later, earlier, right, left, mask):  # decays of pairs, rows and keys of the pairs' tokens
        scores = jnp.where(mask, einsum_f32("nbgjptr,nbgpsr->nbgjpts", right, left, dtype), 0)
        y = einsum_f32("nbgjpts,nbgpsm->nbgjptm", scores, earlier, dtype)
        return tree.multiply(y, later[:, :, :, None])

    mask = base_mask(rows.shape[3], c, False, masks)
    y = y + respond(tree.later, tree.earlier, blocks(rows, c, 4), blocks(k, c, 3), mask).reshape(y.shape)
    for level in tree.levels:
        h = level.left.shape[4]
        right, left = halves(rows, h, 4)[1], halves(k, h, 3)[0]
        y = y + join_right(respond(level.right, level.left, right, left, level_mask(h, masks)), 4)
    return jnp.moveaxis(apply_readout(table, jnp.moveaxis(y, 2, 0), dtype), 0, 2)

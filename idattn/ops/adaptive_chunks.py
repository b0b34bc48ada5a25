"""Interdomain Attention with a clock and corrective writes in chunks: matrix products, for every platform.

With the decay D(t,s) = lambda_{s+1} ... lambda_t of each mode, D(t,0) from before the chunk, and s, t inside the chunk,

    y_t    = D(t,0) (X_k^0 x_t) + sum_{s<=t} (x_t . k_s) D(t,s) beta_s           x_t: q_t or k_t
    w_t    = C^T f(C y_t)
    p_t    = conj(w^k_t) / |w^k_t|^2 with corrections, else beta_t
    P[t,s] = Re sum_m w_t[m] D(t,s)[m] p_s[m]
    u_t    = b_t (v_t - r_t) with corrections, else v_t;    r_t = sum_{s<t} P^k[t,s] u_s + carried^k_t
    o_t    = sum_{s<=t} P^q[t,s] u_s + carried^q_t,         carried_t = Re(w_t D(t,0))^T X_v^0

X_k does not depend on u, so that all but X_v is computed for many chunks at a time,
and (I + diag(b) P^k) u = b (v - carried^k) is solved by the inverse of its unit lower triangular matrix. X_v then runs
through the chunks one by one. Only the inputs are stored for the backward pass, which JAX derives from a forward pass
that is computed anew, group of chunks by group of chunks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.chunk_arrays import GROUP
from idattn.ops.chunks import apply_readout, decay_state, pad_to_chunks, signed_readout, zero_padding
from idattn.ops.discretize import Basis, discretize
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, to_planes
from idattn.ops.segments import PADDING, Segments
from idattn.ops.tree import (
    Tree,
    assemble,
    block_length,
    blocks,
    chunk_length,
    halves,
    join_right,
    make_tree,
    solve,
    unit_inverse,
)

LARGEST_CHUNK = 32  # tokens: in longer ones, the products of tokens with tokens take more than the states' do
FLOOR = 1e-12  # under the division by the square of an address


class Inputs(NamedTuple):
    """Tokens: (B, T, ...), or a group of chunks of them."""

    q: jax.Array  # (B, T, H, R)
    k: jax.Array  # (B, T, G, R)
    v: jax.Array  # (B, T, G, E)
    log_steps: jax.Array | None  # (B, T, G, 1)
    gains: jax.Array | None  # (B, T, G, 1)


class Masks(NamedTuple):
    """Which tokens see which; absent (None) where every row is one document without padding."""

    run: jax.Array  # (N, B, K) of the tokens
    latest: jax.Array  # (N, B, K) the run of the last token up to this one that is not padding
    start: jax.Array  # (N, B, 1, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array  # (N, B, 1, K, 1) token s is in the state at the chunk's end
    continues: jax.Array  # (N, B, 1, 1, 1) the state at the chunk's start is in the one at its end


def attend(
    inputs: Inputs,
    basis: Basis,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    readout: str,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) and the state after each row's last token; see `idattn.ops.adaptive_attention`."""
    size = min(LARGEST_CHUNK, LARGEST_CHUNK if chunk_size is None else chunk_size)
    return jax.checkpoint(partial(_attend, readout=readout, chunk_size=size))(inputs, basis, initial_state, segments)


def _attend(inputs: Inputs, basis: Basis, initial_state, segments, *, readout: str, chunk_size: int):
    B, T = inputs.q.shape[:2]
    K = chunk_length(chunk_size, T)
    group = min(GROUP, -(-T // K))
    inputs, run = _pad(inputs, segments, K * group)
    count = inputs.q.shape[1] // (K * group)
    table = signed_readout(basis, readout)

    @partial(jax.checkpoint, prevent_cse=False)
    def advance(carry, tokens):
        state, before = carry
        inputs, run = tokens
        masks = None if run is None else _find_masks(run, before, K)
        o, state = _group(inputs, _token_steps(inputs.log_steps, basis, K, masks), table, state, masks, K)
        return (state, before if masks is None else masks.latest[-1, :, -1]), o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, count, K * group, *x.shape[2:]), 1, 0), (inputs, run))
    (state, _), o = jax.lax.scan(advance, (initial_state, jnp.zeros(B, jnp.int32)), tokens)
    return jnp.moveaxis(o, 0, 1).reshape(B, -1, *o.shape[3:])[:, :T], state


def _pad(inputs: Inputs, segments: Segments | None, size: int) -> tuple[Inputs, jax.Array | None]:
    """The inputs in whole groups of tokens, 0 at padding; and the run of every token."""
    arrays, structure = jax.tree.flatten(inputs)
    B, T = inputs.q.shape[:2]
    if segments is None and T % size:  # then there is padding
        segments = Segments(jnp.zeros((B, T), jnp.int32), jnp.full(B, T - 1, jnp.int32))
    arrays, run = pad_to_chunks(tuple(arrays), segments, size)
    return structure.unflatten(zero_padding(arrays, run)), run


def _find_masks(run: jax.Array, before: jax.Array, K: int) -> Masks:
    """The masks of a group of tokens (B, N K), where the state at its start is of the run `before`, (B,)."""
    # Padding changes no state: what is known of the run before it holds after it. Runs are numbered upwards.
    latest = jax.lax.cummax(jnp.maximum(run, before[:, None]), axis=1)
    run, latest = (jnp.moveaxis(x.reshape(x.shape[0], -1, K), 1, 0) for x in (run, latest))
    previous = jnp.concatenate([before[None], latest[:-1, :, -1]])
    start = (run == previous[..., None]) & (run != PADDING)
    end = (run == latest[..., -1:])[:, :, None, :, None]
    continues = (latest[..., -1] == previous)[:, :, None, None, None]
    return Masks(run, latest, start[:, :, None, None, :, None], end, continues)


class Steps(NamedTuple):
    """What steps do to the modes: (G, M) where all are alike, else (B, T, G, M)."""

    log_size: jax.Array  # log |lambda|
    phase: jax.Array  # arg lambda
    beta: jax.Array  # planes


def _steps(log_steps: jax.Array | None, basis: Basis) -> Steps:
    """The steps of tokens with log_steps (B, T, G, 1), or None for those of `idattn.ops.interdomain_attention`."""
    if log_steps is None:
        delta = jnp.exp(basis.log_delta)[:, None]
        return Steps(-jnp.exp(basis.log_delta[:, None] + basis.a_log), delta * basis.a_imag, discretize(basis)[1])
    log_delta = basis.log_delta[None, None, :, None] + log_steps
    x = -jnp.exp(log_delta + basis.a_log[None, None])
    y = jnp.exp(log_delta) * basis.a_imag[None, None]
    # exp(x + iy) - 1 without cancellation. A loop over terms for small steps, as in `discretize`, would take long.
    minus_one = jnp.stack([jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, jnp.exp(x) * jnp.sin(y)], axis=-2)
    a_re = -jnp.exp(basis.a_log)
    inverse = jnp.stack([a_re, -basis.a_imag], axis=-2) / (a_re**2 + basis.a_imag**2)[:, None]
    return Steps(x, y, complex_multiply(minus_one, inverse[None, None]))


def _token_steps(log_steps: jax.Array | None, basis: Basis, K: int, masks: Masks | None) -> Steps:
    """The steps of a group of tokens, (N, B, G, K, M); 1 for N, B and K where all are alike."""
    steps = _steps(log_steps, basis)
    if log_steps is None:
        steps = jax.tree.map(lambda x: x[None, None, :, None], steps)
    else:
        steps = jax.tree.map(lambda x: _split(x, K), steps)
    if masks is None:
        return steps
    is_token = (masks.run != PADDING)[:, :, None, :, None]  # padding leaves the state as it is
    log_size, phase = (jnp.where(is_token, x, 0) for x in (steps.log_size, steps.phase))
    return Steps(log_size, phase, steps.beta)


def _split(x: jax.Array, K: int) -> jax.Array:
    """(B, T, G, ...) in chunks (N, B, G, K, ...)."""
    x = x.reshape(x.shape[0], -1, K, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _group(
    inputs: Inputs, steps: Steps, table: jax.Array, state: jax.Array, masks: Masks | None, K: int
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) of a group of chunks, and the state after it."""
    tree = make_tree(steps.log_size, steps.phase, steps.beta, K)
    q, k, v = inputs.q, _split(inputs.k, K), _split(inputs.v, K)
    B, T, H, R = q.shape
    G, dtype = k.shape[2], q.dtype
    q = q.reshape(B, -1, K, G, H // G, R).transpose(1, 0, 3, 4, 2, 5)  # (N, B, G, J, K, R)
    rows = q if inputs.gains is None else jnp.concatenate([q, k[:, :, :, None]], axis=3)
    X_k, end_k = _scan_states(k, _moves(tree, rows, masks), state[:, :, :R])
    w = _weights_on_modes(rows, k, X_k, tree, table, masks)
    decayed_w = flatten_planes(complex_multiply(to_planes(w), conjugate(tree.start)[:, :, :, None]))
    decayed_w = decayed_w if masks is None else jnp.where(masks.start, decayed_w, 0)
    if inputs.gains is None:
        P, u = _weights_on_tokens(w, tree, masks, False, dtype), v
        X_v, end_v = _scan_states(v, _moves(tree, rows, masks), state[:, :, R:])
    else:
        address = w[:, :, :, -1]  # with the sign of Re, the conjugate
        address = address / (jnp.sum(address**2, axis=-1, keepdims=True) + FLOOR)
        tree = make_tree(steps.log_size, steps.phase, to_planes(address), K)
        P, gains = _weights_on_tokens(w, tree, masks, True, dtype), _split(inputs.gains, K)
        lower = gains * P[:, :, :, -1]
        rule = (jax.lax.stop_gradient(unit_inverse(lower)), lower, gains, v.astype(state.dtype), decayed_w[:, :, :, -1])
        u, X_v, end_v = _corrected_states(rule, _moves(tree, rows, masks), state[:, :, R:], dtype)
        P, decayed_w = P[:, :, :, :-1], decayed_w[:, :, :, :-1]
    o = einsum_f32("nbgjts,nbgse->nbgjte", P, u, dtype) + einsum_f32("nbgjtm,nbgem->nbgjte", decayed_w, X_v, dtype)
    o = o.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, H, -1).astype(dtype)
    return o, jnp.concatenate([end_k, end_v], axis=-2)


def _weights_on_modes(rows, k, X_k, tree: Tree, table, masks: Masks | None) -> jax.Array:
    """w (N, B, G, J, K, 2M) with the sign of Re, of rows (N, B, G, J, K, R)."""
    K, dtype = k.shape[3], rows.dtype
    c = block_length(K)
    y = einsum_f32("nbgjtr,nbgrm->nbgjtm", rows, X_k, dtype)
    y = flatten_planes(complex_multiply(to_planes(y), tree.start[:, :, :, None]))
    y = y if masks is None else jnp.where(masks.start, y, 0)

    def respond(later, earlier, right, left, mask):  # decays of pairs, rows and keys of the pairs' tokens
        scores = jnp.where(mask, einsum_f32("nbgjptr,nbgpsr->nbgjpts", right, left, dtype), 0)
        y = einsum_f32("nbgjpts,nbgpsm->nbgjptm", scores, flatten_planes(earlier), dtype)
        return flatten_planes(complex_multiply(to_planes(y), later[:, :, :, None]))

    mask = _base_mask(rows.shape[3], c, False, masks)
    y = y + respond(tree.later, tree.earlier, blocks(rows, c, 4), blocks(k, c, 3), mask).reshape(y.shape)
    for level in tree.levels:
        h = level.left.shape[4]
        right, left = halves(rows, h, 4)[1], halves(k, h, 3)[0]
        y = y + join_right(respond(level.right, level.left, right, left, _level_mask(h, masks)), 4)
    return jnp.moveaxis(apply_readout(table, jnp.moveaxis(y, 2, 0), dtype), 0, 2)


def _weights_on_tokens(w: jax.Array, tree: Tree, masks: Masks | None, is_corrected: bool, dtype) -> jax.Array:
    """P (N, B, G, J, K, K) of w (N, B, G, J, K, 2M)."""
    c = tree.later.shape[4]

    def weigh(later, earlier, right, mask):
        right = flatten_planes(complex_multiply(to_planes(right), conjugate(later)[:, :, :, None]))
        return jnp.where(mask, einsum_f32("nbgjptm,nbgpsm->nbgjpts", right, flatten_planes(earlier), dtype), 0)

    base = weigh(tree.later, tree.earlier, blocks(w, c, 4), _base_mask(w.shape[3], c, is_corrected, masks))
    levels = []
    for level in tree.levels:
        h = level.left.shape[4]
        levels.append(weigh(level.right, level.left, halves(w, h, 4)[1], _level_mask(h, masks)))
    return assemble(base, levels)


def _base_mask(J: int, c: int, is_corrected: bool, masks: Masks | None) -> jax.Array:
    """Which pairs (t, s) of a block count for J rows of each token, the last of which is its key: (.., J, P, c, c)."""
    mask = jnp.tril(jnp.ones((c, c), bool))
    mask = jnp.stack([jnp.tril(mask, -1) if is_corrected and j == J - 1 else mask for j in range(J)])
    mask = mask[None, None, None, :, None]
    if masks is None:
        return mask
    run = blocks(masks.run, c, 2)  # (N, B, P, c)
    return mask & _alike(run, run)


def _level_mask(h: int, masks: Masks | None) -> jax.Array:
    if masks is None:
        return jnp.ones((1,) * 7, bool)
    left, right = halves(masks.run, h, 2)
    return _alike(right, left)


def _alike(later: jax.Array, earlier: jax.Array) -> jax.Array:
    """Whether tokens (N, B, P, t) and (N, B, P, s) are of one run: (N, B, 1, 1, P, t, s)."""
    is_alike = (later[..., :, None] == earlier[..., None, :]) & (later != PADDING)[..., None]
    return is_alike[:, :, None, None]


class _Moves(NamedTuple):
    """What chunks do to the states, chunk by chunk."""

    end: jax.Array  # (N, B, G, K, 2M), 1 for B where all rows are alike
    decay: jax.Array  # (N, B, G, 2, M)
    masks: Masks | None

    def scanned(self) -> tuple[Any, ...]:
        return self.end, self.decay, *((None, None) if self.masks is None else (self.masks.end, self.masks.continues))


def _moves(tree: Tree, rows: jax.Array, masks: Masks | None) -> _Moves:
    end, decay = (jnp.broadcast_to(x, (rows.shape[0], *x.shape[1:])) for x in (flatten_planes(tree.end), tree.decay))
    return _Moves(end, decay, masks)


def _move(state: jax.Array, z: jax.Array, move: tuple[Any, ...], dtype: jnp.dtype) -> jax.Array:
    """The state (B, G, width, 2M) after a chunk of tokens z (B, G, K, width)."""
    end, decay, is_in_end, continues = move
    z = z if is_in_end is None else jnp.where(is_in_end, z, 0)
    decayed = decay_state(decay, state)
    decayed = decayed if continues is None else jnp.where(continues, decayed, 0)
    return decayed + einsum_f32("bgsw,bgsm->bgwm", z, end, dtype).astype(state.dtype)


def _scan_states(z: jax.Array, moves: _Moves, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before each chunk of tokens z (N, B, G, K, width), and after the last."""

    def advance(state, chunk):
        z, *move = chunk
        return _move(state, z, tuple(move), z.dtype), state

    end, starts = jax.lax.scan(advance, first, (z, *moves.scanned()))
    return starts, end


def _corrected_states(rule: Any, moves: _Moves, first: jax.Array, dtype: jnp.dtype):
    """u (N, B, G, K, E), and the states of the values before each chunk and after the last."""

    def advance(state, chunk):
        (inverse, lower, gains, v, decayed_w), *move = chunk
        carried = einsum_f32("bgtm,bgem->bgte", decayed_w, state, dtype)
        u = solve(inverse, lower, gains * (v - carried))
        return _move(state, u, tuple(move), dtype), (u, state)

    end, (u, starts) = jax.lax.scan(advance, first, (rule, *moves.scanned()))
    return u, starts, end

"""Sequences in chunks whose decays are a `Tree`: the loop over groups of chunks, masks, corrections, and states.

What `idattn.ops.adaptive_chunks` (complex decays, w on the modes) and `idattn.ops.gated` (real decays, features of
queries) share. The state holds rows of E values, each with M complex coefficients as flattened planes or M real ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.chunk_arrays import GROUP
from idattn.ops.chunks import pad_to_chunks, zero_padding
from idattn.ops.einsum import einsum_f32
from idattn.ops.segments import PADDING, Segments
from idattn.ops.tree import Tree, assemble, blocks, chunk_length, halves, solve, unit_inverse

LARGEST_CHUNK = 32  # tokens: in longer ones, the products of tokens with tokens take more than the states' do


class Masks(NamedTuple):
    """Which tokens see which; absent (None) where every row is one document without padding."""

    run: jax.Array  # (N, B, K) of the tokens
    latest: jax.Array  # (N, B, K) the run of the last token up to this one that is not padding
    start: jax.Array  # (N, B, 1, 1, K, 1) token t sees the state at the chunk's start
    end: jax.Array  # (N, B, 1, K, 1) token s is in the state at the chunk's end
    continues: jax.Array  # (N, B, 1, 1, 1) the state at the chunk's start is in the one at its end


def scan_groups(
    advance_group: Callable[[Any, Masks | None, jax.Array, int], tuple[jax.Array, jax.Array]],
    inputs: Any,
    initial_state: jax.Array,
    segments: Segments | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) and the state after each row's last token, group of chunks after group.

    The backward pass stores the state before each group and computes the rest anew.

    Args:
      advance_group: (inputs of a group, its masks, the state before it, K) -> its outputs, and the state after it.
      inputs: arrays (B, T, ...) of four axes, 0 at padding when the function gets them.
      initial_state: (B, G, ...).
      segments: of the tokens, or None for one document a row.
      chunk_size: tokens in a chunk, of which the largest power of two up to `LARGEST_CHUNK` is taken.
    """
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    K = chunk_length(min(LARGEST_CHUNK, LARGEST_CHUNK if chunk_size is None else chunk_size), T)
    group = min(GROUP, -(-T // K)) if isinstance(T, int) else GROUP
    inputs, run = _pad(inputs, segments, K * group)
    count = jax.tree.leaves(inputs)[0].shape[1] // (K * group)

    @partial(jax.checkpoint, prevent_cse=False)
    def advance(carry, tokens):
        state, before = carry
        inputs, run = tokens
        masks = None if run is None else _find_masks(run, before, K)
        o, state = advance_group(inputs, masks, state, K)
        return (state, before if masks is None else masks.latest[-1, :, -1]), o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, count, K * group, *x.shape[2:]), 1, 0), (inputs, run))
    (state, _), o = jax.lax.scan(advance, (initial_state, jnp.zeros(B, jnp.int32)), tokens)
    return jnp.moveaxis(o, 0, 1).reshape(B, -1, *o.shape[3:])[:, :T], state


def _pad(inputs: Any, segments: Segments | None, size: int) -> tuple[Any, jax.Array | None]:
    """The inputs in whole groups of tokens, 0 at padding; and the run of every token."""
    arrays, structure = jax.tree.flatten(inputs)
    B, T = arrays[0].shape[:2]
    if segments is None and not (isinstance(T, int) and T % size == 0):  # then there is padding, or may be
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


def split_tokens(x: jax.Array, K: int) -> jax.Array:
    """(B, T, G, ...) in chunks (N, B, G, K, ...)."""
    x = x.reshape(x.shape[0], -1, K, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def scan_tokens(
    step: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    inputs: Any,
    state: jax.Array,
    segments: Segments | None,
) -> tuple[jax.Array, jax.Array]:
    """What `scan_groups` returns, token by token.

    Args:
      step: (inputs of a token (B, ...), the state before it) -> its outputs (B, H, E), and the state after it.
      inputs: arrays (B, T, ...) of four axes.
      state: (B, G, ., .) before the first token.
      segments: of the tokens, or None.
    """
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    run = jnp.zeros((B, T), jnp.int32) if segments is None else segments.run
    starts = jnp.pad(run[:, 1:] != run[:, :-1], ((0, 0), (1, 0)))
    is_token = run != PADDING
    # Whatever padding holds, NaN included, must not reach the products: their gradients would be NaN too.
    inputs = jax.tree.map(lambda x: jnp.where(is_token[..., None, None], x, 0), inputs)

    @jax.checkpoint
    def advance(state, token):
        x, starts, is_token = token
        o, after = step(x, jnp.where(starts[:, None, None, None], 0, state))
        state = jnp.where(is_token[:, None, None, None], after, state)
        return state, jnp.where(is_token[:, None, None], o, 0)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, starts, is_token))
    state, o = jax.lax.scan(advance, state, tokens)
    return jnp.moveaxis(o, 0, 1), state


def rows_at_start(rows: jax.Array, tree: Tree, masks: Masks | None) -> jax.Array:
    """What tokens' rows (N, B, G, J, K, ...) read off the state at the start of their chunk."""
    rows = tree.multiply(rows, tree.conjugate(tree.start)[:, :, :, None])
    return rows if masks is None else jnp.where(masks.start, rows, 0)


def weights_on_tokens(w: jax.Array, tree: Tree, masks: Masks | None, is_corrected: bool, dtype) -> jax.Array:
    """P (N, B, G, J, K, K) of rows w (N, B, G, J, K, ...)."""
    c = tree.later.shape[4]

    def weigh(later, earlier, right, mask):
        right = tree.multiply(right, tree.conjugate(later)[:, :, :, None])
        return jnp.where(mask, einsum_f32("nbgjptm,nbgpsm->nbgjpts", right, earlier, dtype), 0)

    base = weigh(tree.later, tree.earlier, blocks(w, c, 4), base_mask(w.shape[3], c, is_corrected, masks))
    levels = []
    for level in tree.levels:
        h = level.left.shape[4]
        levels.append(weigh(level.right, level.left, halves(w, h, 4)[1], level_mask(h, masks)))
    return assemble(base, levels)


def base_mask(J: int, c: int, is_corrected: bool, masks: Masks | None) -> jax.Array:
    """Which pairs (t, s) of a block count for J rows of each token, the last of which is its key: (.., J, P, c, c)."""
    mask = jnp.tril(jnp.ones((c, c), bool))
    mask = jnp.stack([jnp.tril(mask, -1) if is_corrected and j == J - 1 else mask for j in range(J)])
    mask = mask[None, None, None, :, None]
    if masks is None:
        return mask
    run = blocks(masks.run, c, 2)  # (N, B, P, c)
    return mask & _alike(run, run)


def level_mask(h: int, masks: Masks | None) -> jax.Array:
    """Which pairs (t, s) of tokens in different halves of parts of 2h tokens count."""
    if masks is None:
        return jnp.ones((1,) * 7, bool)
    left, right = halves(masks.run, h, 2)
    return _alike(right, left)


def _alike(later: jax.Array, earlier: jax.Array) -> jax.Array:
    """Whether tokens (N, B, P, t) and (N, B, P, s) are of one run: (N, B, 1, 1, P, t, s)."""
    is_alike = (later[..., :, None] == earlier[..., None, :]) & (later != PADDING)[..., None]
    return is_alike[:, :, None, None]


class Moves(NamedTuple):
    """What chunks do to the states, chunk by chunk."""

    end: jax.Array  # (N, B, G, K, 2M), or (.., M) where decays are real; 1 for B where all rows are alike
    decay: jax.Array  # (N, B, G, 2M), or (N, B, G, M)
    masks: Masks | None
    multiply: Callable[[jax.Array, jax.Array], jax.Array]  # of a row of the state and a decay

    def scanned(self) -> tuple[Any, ...]:
        return self.end, self.decay, *((None, None) if self.masks is None else (self.masks.end, self.masks.continues))


def find_moves(tree: Tree, chunks: int, masks: Masks | None) -> Moves:
    """What `chunks` chunks do to the states."""
    end, decay = (jnp.broadcast_to(x, (chunks, *x.shape[1:])) for x in (tree.end, tree.decay))
    return Moves(end, decay, masks, tree.multiply)


def _move(state: jax.Array, z: jax.Array, move: tuple[Any, ...], moves: Moves, dtype: jnp.dtype) -> jax.Array:
    """The state (B, G, width, ...) after a chunk of tokens z (B, G, K, width), of which `move` is that of `moves`."""
    end, decay, is_in_end, continues = move
    z = z if is_in_end is None else jnp.where(is_in_end, z, 0)
    decayed = moves.multiply(state, decay[:, :, None])
    decayed = decayed if continues is None else jnp.where(continues, decayed, 0)
    return decayed + einsum_f32("bgsw,bgsm->bgwm", z, end, dtype).astype(state.dtype)


def scan_states(z: jax.Array, moves: Moves, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before each chunk of tokens z (N, B, G, K, width), and after the last."""

    def advance(state, chunk):
        z, *move = chunk
        return _move(state, z, tuple(move), moves, z.dtype), state

    end, starts = jax.lax.scan(advance, first, (z, *moves.scanned()))
    return starts, end


def scan_corrections(
    P: jax.Array, rows: jax.Array, v: jax.Array, gains: jax.Array, moves: Moves, first: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The corrections u (N, B, G, K, E), the states of the values before each chunk, and after the last.

    Args:
      P: (N, B, G, K, K) what keys read of earlier tokens.
      rows: (N, B, G, K, ...) what they read of the state at the start of the chunk.
      v: (N, B, G, K, E).
      gains: (N, B, G, K, 1).
      moves: of the chunks.
      first: (B, G, E, ...) the state before the first chunk.
      dtype: of the products.
    """
    lower = gains * P
    rule = jax.lax.stop_gradient(unit_inverse(lower)), lower, gains, v.astype(first.dtype), rows

    def advance(state, chunk):
        (inverse, lower, gains, v, rows), *move = chunk
        u = solve(inverse, lower, gains * (v - einsum_f32("bgtm,bgem->bgte", rows, state, dtype)))
        return _move(state, u, tuple(move), moves, dtype), (u, state)

    end, (u, starts) = jax.lax.scan(advance, first, (rule, *moves.scanned()))
    return u, starts, end


def read_tokens(P: jax.Array, u: jax.Array, rows: jax.Array, states: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Outputs (B, T, H, E), of P (N, B, G, J, K, K), and of rows (N, B, G, J, K, ...) and states at chunks' starts."""
    o = einsum_f32("nbgjts,nbgse->nbgjte", P, u, dtype) + einsum_f32("nbgjtm,nbgem->nbgjte", rows, states, dtype)
    N, B, G, J, K, E = o.shape
    return o.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * K, G * J, E).astype(dtype)

"""The bodies of the TPU kernels of `idattn.ops.pallas_tpu`: what one program makes of a block of heads and a chunk.

See `idattn.ops.chunks` for the equations. The grid goes over blocks of heads, rows of the batch and, innermost and in
order, chunks; the state stays in scratch memory from chunk to chunk. A block's heads are independent chains of small
products. Every stage is written for all heads before the next stage, so that the systolic arrays work on the products
of other heads while one of them is under way.

Layouts. Heads lie side by side in the lanes of q, k, v and o, (K, heads * width). A head is read as a window of whole
128-lane tiles in which the lanes of other heads are masked, so that nothing has to be moved. States are transposed,
(heads * width, 2M): rows are features and lanes are modes, the real plane before the imaginary one, each padded with
zero modes to whole tiles. One roll, whose stride is one lane a row, turns the columns of a K x K matrix from tokens s
to lags t - s, and back. A roll goes to the right only. So products that are about to be rolled have k or v reversed (by
a permutation matrix), or read tables from the largest lag to the smallest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
FORWARD_TABLES = ("lags", "spread", "readout")
BACKWARD_TABLES = ("lags", "spread", "late_lags", "late_spread", "readout")


class Block(NamedTuple):
    """The sizes of a program."""

    K: int  # tokens in a chunk
    heads: int  # key-value heads
    J: int  # query heads for each of them
    R: int
    E: int
    M2: int  # 2M, padded
    has_segments: bool
    has_state: bool  # the sequence starts from a given state
    corrects: bool = False  # values by what their keys read, as if these were one more query head

    @property
    def reads(self) -> int:
        """Rows that read the state for a token and key-value head."""
        return self.J + self.corrects

    @property
    def width(self) -> int:
        return self.heads * (self.R + self.E)

    def vmem_bytes(self, itemsize: int) -> int:
        """Roughly the memory of the backward kernel. A block counts twice: the next one is loaded meanwhile."""
        K, M2, W = self.K, self.M2, self.R + self.E
        tables = (4 * K + M2) * M2 * itemsize + 2 * K * M2 * 4
        d_tables = (3 * K + M2) * M2 * 4 + (2 * K + 8) * M2 * 4
        tokens, states = 4 * (self.reads + 1) * K * W * itemsize, W * M2 * (itemsize + 8)
        live = self.reads * 10 * K * max(K, M2) * 4
        return self.heads * (2 * (tables + d_tables + tokens + states) + live)

    @property
    def chains(self) -> list[tuple[int, int]]:
        """What reads the state: (h, j) for the j-th query head of key-value head h, (h, J) for a key that corrects."""
        return [(h, j) for h in range(self.heads) for j in range(self.reads)]

    def rows(self, h: int, width: int, offset: int = 0) -> slice:
        """The rows of head h in an array whose rows are features."""
        return slice(offset + h * width, offset + (h + 1) * width)


class _Masks(NamedTuple):
    """What a chunk's tokens see, for all heads; None where that is everything."""

    tokens: jax.Array | None  # (K, 1) token t is not padding
    flipped: jax.Array  # (K, K) token t sees token s, column K - 1 - s
    flipped_earlier: jax.Array  # likewise, but not itself
    within: jax.Array  # (K, K) token t sees token s
    start: jax.Array | None  # (K, 1) token t sees the state at the start
    end: jax.Array | None  # (1, K) token s is in the state at the end
    continues: jax.Array | None  # (1, 1) the state at the start is in the one at the end


class _Read(NamedTuple):
    """What one query head computes from a chunk, as in `idattn.ops.chunkwise._Read`; lags ascend."""

    scores: jax.Array
    response: jax.Array
    decayed_response: jax.Array
    w: jax.Array
    decayed_w: jax.Array
    weights: jax.Array


def _dot(x, y, contract=(1, 0)):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _window(h: int, width: int, total: int) -> slice:
    """The whole tiles of lanes that hold any of head h."""
    return slice(h * width // LANES * LANES, min(-(-(h + 1) * width // LANES) * LANES, total))


def _head_lanes(x, h: int, width: int):
    """The window of head h in x (K, heads * width), zero in the lanes of other heads."""
    window = _window(h, width, x.shape[1])
    x = x[:, window]
    if x.shape[1] == width:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + window.start
    return jnp.where((lane >= h * width) & (lane < (h + 1) * width), x, jnp.zeros_like(x))


def _assemble(windows, width: int):
    """(K, heads * width) from each head's window, in which only the lanes of that head count."""
    total = len(windows) * width
    tiles = []
    for start in range(0, total, LANES):
        stop, tile = min(start + LANES, total), None
        for h, x in enumerate(windows):
            if h * width < stop and (h + 1) * width > start:
                first = _window(h, width, total).start
                x = x[:, start - first : stop - first]
                lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + start
                tile = x if tile is None else jnp.where(lane >= h * width, x, tile)
        tiles.append(tile)
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


def _roll(x):
    """Row t moved right by t + 1 lanes: see the module's docstring."""
    return pltpu.roll(x, 1, 1, stride=1, stride_axis=0)


def _swap(x):
    """The planes of rows (..., 2M) exchanged."""
    return pltpu.roll(x, x.shape[1] // 2, 1)


def _where(mask, x):
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _find_masks(block: Block, runs_ref, chunk: int = 0) -> _Masks:
    K = block.K
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (K, K), axis) for axis in (0, 1))
    flipped, within, earlier = row + column >= K - 1, column <= row, row + column > K - 1
    if not block.has_segments:
        return _Masks(None, flipped, earlier, within, None, None, None)
    run, reverse, before, last = (runs_ref[0, chunk, i : i + 1] for i in range(4))  # (1, K) each, see `_pack_runs`
    of_row = jnp.broadcast_to(run, (K, K)).T
    return _Masks(
        tokens=of_row[:, :1] >= 0,
        flipped=flipped & (of_row == reverse),
        flipped_earlier=earlier & (of_row == reverse),
        within=within & (of_row == run),
        start=(of_row == before)[:, :1],
        end=run == last,
        continues=(before == last)[:, :1],
    )


def _flip(block: Block, x):
    """The rows of x in reverse, exactly."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (block.K, block.K), axis) for axis in (0, 1))
    return _dot((row + column == block.K - 1).astype(x.dtype), x).astype(x.dtype)


def _views(ref, K: int, names) -> dict:
    """The tables stacked in ref (heads, rows, 2M), as functions of the head: K rows each, of the readout the rest."""
    rows = {name: slice(i * K, (i + 1) * K) for i, name in enumerate(names)}
    if names[-1] == "readout":
        rows["readout"] = slice((len(names) - 1) * K, None)
    return {name: lambda h, rows=rows: ref[h, rows] for name, rows in rows.items()}


def _decay(x, decays_ref, h: int, *, conjugate: bool = False, end: bool = False):
    """x times lambda^{t+1}, or its conjugate, mode by mode, where t is the row; and x with its planes swapped.

    With `end`, t is K - 1 in all rows. The table holds [re, re] for every t and then [-im, im].
    """
    K = decays_ref.shape[1] // 2
    first = K - 1 if end else 0
    swapped = _swap(x)
    same, other = x * decays_ref[h, first:K], swapped * decays_ref[h, K + first :]
    return (same - other if conjugate else same + other), swapped


def _read(block: Block, q, flipped, X, tables, decays_ref, masks: _Masks) -> dict:
    """What every chain computes from its rows q[j] (K, heads * R), k reversed and X, both in the dtype of products."""
    dtype, R = flipped.dtype, block.R
    scores, response, decayed_response, w, decayed_w, weights = ({} for _ in range(6))
    for h, j in block.chains:
        window, lanes = _window(h, R, block.heads * R), _head_lanes(q[j], h, R)
        scores[h, j] = _dot(lanes, flipped[:, window], (1, 1))
        response[h, j] = _dot(lanes, X[window])
    for h, j in block.chains:
        scores[h, j] = _roll(_where(masks.flipped, scores[h, j])).astype(dtype)
        decayed_response[h, j] = _where(masks.start, _decay(response[h, j], decays_ref, h)[0]).astype(dtype)
        w[h, j] = _dot(scores[h, j], tables["spread"](h)) + _dot(decayed_response[h, j], tables["readout"](h), (1, 1))
    for h, j in block.chains:
        weights[h, j] = _dot(w[h, j].astype(dtype), tables["lags"](h), (1, 1))
        decayed_w[h, j] = _where(masks.start, _decay(w[h, j], decays_ref, h, conjugate=True)[0]).astype(dtype)
    for i in block.chains:
        weights[i] = _where(masks.within, _roll(weights[i])).astype(dtype)
    return {i: _Read(scores[i], response[i], decayed_response[i], w[i], decayed_w[i], weights[i]) for i in block.chains}


class _Correction(NamedTuple):
    """What corrects the values of a key-value head; see `idattn.ops.adaptive_attention`, write="damped"."""

    b: jax.Array  # (K, 1)
    damping: jax.Array  # (K, 1) b |beta|^2
    size: jax.Array  # (K, 1) |w|^2
    P: jax.Array  # (K, K) what a key reads of earlier tokens, in the dtype of products

    @property
    def below(self) -> jax.Array:
        return 1 + self.damping * self.size

    @property
    def gain(self) -> jax.Array:
        return self.b / self.below


def _corrections(block: Block, read: dict, gains_ref) -> tuple[list[_Correction], list]:
    """Of every key-value head, and (I + gain P)^-1. The gains are (K, 2 heads), all b before all dampings."""
    numbers, found = gains_ref[0, 0], []
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (block.K, block.K), axis) for axis in (0, 1))
    for h in range(block.heads):
        r = read[h, block.J]
        b, damping = (numbers[:, i : i + 1] for i in (h, block.heads + h))
        size = jnp.sum(r.w * r.w, axis=1, keepdims=True)
        found.append(_Correction(b, damping, size, _where(row > column, r.weights)))
    return found, _unit_inverses([(x.gain * x.P).astype(x.P.dtype) for x in found])


def _unit_inverses(lower: list) -> list:
    """(I + L)^-1 of strictly lower triangular L (K, K), by products in their dtype; see `idattn.ops.tree.unit_inverse`.

    The inverses of the blocks of 2^i tokens on the diagonal give those of 2^(i + 1), for all blocks at once.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, lower[0].shape, axis) for axis in (0, 1))
    highest = row ^ column  # its highest bit tells the size of the blocks that have t and s in different halves
    dtype, inverses = lower[0].dtype, [(row == column).astype(jnp.float32) - _where(highest == 1, x) for x in lower]
    for i in range(1, (len(row) - 1).bit_length()):
        rounded = [x.astype(dtype) for x in inverses]
        corners = [_where(highest >> i == 1, x) for x in lower]
        corners = [_dot(x, y).astype(dtype) for x, y in zip(corners, rounded, strict=True)]
        inverses = [x - _dot(y, z) for x, y, z in zip(inverses, rounded, corners, strict=True)]
    return [x.astype(dtype) for x in inverses]


def _unanswered(block: Block, read: dict, v, X_v, h: int):
    """Head h's values less what the state at the chunk's start answers to their keys: its window, float32."""
    window = _window(h, block.E, block.heads * block.E)
    return v[:, window].astype(jnp.float32) - _dot(read[h, block.J].decayed_w, X_v[window], (1, 1))


def _correct(block: Block, read: dict, v, X_v, gains_ref):
    """The corrections u (K, heads * E) that are written for v: (I + gain P) u = gain (v - what the start answers)."""
    found, inverses = _corrections(block, read, gains_ref)
    right = [(x.gain * _unanswered(block, read, v, X_v, h)).astype(v.dtype) for h, x in enumerate(found)]
    return _assemble([_dot(x, y) for x, y in zip(inverses, right, strict=True)], block.E).astype(v.dtype)


def _correct_backward(block: Block, read: dict, v, u, d_u_T: list, X_v, gains_ref):
    """What the corrections u of a chunk pass back.

    Args:
      d_u_T: (E, K) of each key-value head, all cotangents but those through other corrections.

    Returns:
      The cotangents of v (K, heads * E), which is the negative of what stands for d_o where keys read; of each head's
      |w|^2 (K, 1); and of the gains (K, 2 heads).
    """
    K, E, (found, inverses) = block.K, block.E, _corrections(block, read, gains_ref)
    r = jnp.concatenate([_dot(y.astype(v.dtype), x) for x, y in zip(inverses, d_u_T, strict=True)]).T
    gains, errors = [], []
    for h, x in enumerate(found):
        error = _unanswered(block, read, v, X_v, h)
        errors.append(error - _dot(x.P, u[:, _window(h, E, block.heads * E)]))
        gains.append(jnp.broadcast_to(x.gain, error.shape))
    by_error = r * _assemble(errors, E)
    lane = jax.lax.broadcasted_iota(jnp.int32, (K, 2 * block.heads), 1)
    d_sizes, d_gains = [], jnp.zeros(lane.shape, jnp.float32)
    for h, x in enumerate(found):
        d_gain = jnp.sum(_head_lanes(by_error, h, E), axis=1, keepdims=True)
        d_below = -d_gain * x.gain / x.below
        d_sizes.append(d_below * x.damping)
        d_gains = jnp.where(lane == h, d_gain / x.below, d_gains)
        d_gains = jnp.where(lane == block.heads + h, d_below * x.size, d_gains)
    return r * _assemble(gains, E), d_sizes, d_gains


def _advance(block: Block, k, v, X, lags, decays_ref, masks: _Masks):
    """The state (width, 2M) at the chunk's end from the one at its start: X^K = lambda^K X^0 + z^T lags, float32."""
    ends = []
    for z, width, offset in ((k, block.R, 0), (v, block.E, block.heads * block.R)):
        z = _where(masks.end, z.T)
        for h in range(block.heads):
            decayed = _decay(X[block.rows(h, width, offset)], decays_ref, h, end=True)[0]
            ends.append(_where(masks.continues, decayed) + _dot(z[block.rows(h, width)], lags(h)))
    return jnp.concatenate(ends)


def _split_refs(block: Block, refs, inputs: int):
    """The refs of the runs and of the initial state, or None, and all others: `inputs` inputs, then outputs."""
    refs = list(refs)
    runs = refs.pop(0) if block.has_segments else None
    first = refs.pop(inputs) if block.has_state else None
    return runs, first, refs


def _begin(first_ref, state):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros_like(state) if first_ref is None else first_ref[0, 0]


def forward_kernel(last_ref, *refs, block: Block):
    """The outputs of a chunk, the state at the start of each row's last chunk, and corrections, if there are any."""
    runs_ref, first_ref, refs = _split_refs(block, refs, 5 + block.corrects)
    q_ref, k_ref, v_ref, tables_ref, decays_ref, *refs = refs
    *gains_ref, o_ref, last_start_ref = refs[: 2 + block.corrects]
    *u_ref, state = refs[2 + block.corrects :]
    E, dtype = block.E, q_ref.dtype
    _begin(first_ref, state)

    @pl.when(pl.program_id(2) == last_ref[pl.program_id(1)])
    def _():
        last_start_ref[0, 0] = state[...]

    tables, masks = _views(tables_ref, block.K, FORWARD_TABLES), _find_masks(block, runs_ref)
    q, k, v = (_where(masks.tokens, ref[0]) for ref in (q_ref, k_ref, v_ref))
    X = state[...]
    rounded = X.astype(dtype)
    X_v = rounded[block.heads * block.R :]
    rows = [*(q[j] for j in range(block.J)), k]  # the last of which reads only where it corrects
    read = _read(block, rows, _flip(block, k), rounded, tables, decays_ref, masks)
    if block.corrects:
        v = _correct(block, read, v, X_v, gains_ref[0])
        u_ref[0][0] = v
    o = {}
    for h in range(block.heads):
        window = _window(h, E, block.heads * E)
        for j in range(block.J):
            r = read[h, j]
            o[h, j] = _dot(r.weights, v[:, window]) + _dot(r.decayed_w, X_v[window], (1, 1))
    for j in range(block.J):
        o_ref[0, j] = _assemble([o[h, j] for h in range(block.heads)], E).astype(dtype)
    state[...] = _advance(block, k, v, X, tables["lags"], decays_ref, masks)


def starts_kernel(last_ref, *refs, block: Block):
    """The states at the chunks' starts, which the backward pass reads from the last to the first."""
    del last_ref
    runs_ref, first_ref, refs = _split_refs(block, refs, 4)
    k_ref, v_ref, tables_ref, decays_ref, starts_ref, state = refs
    _begin(first_ref, state)
    lags = _views(tables_ref, block.K, ("lags",))["lags"]
    X = state[...]
    for i in range(starts_ref.shape[1]):
        starts_ref[0, i, 0] = X.astype(starts_ref.dtype)
        tokens, masks = slice(i * block.K, (i + 1) * block.K), _find_masks(block, runs_ref, i)
        k, v = (_where(masks.tokens, ref[0, tokens]) for ref in (k_ref, v_ref))
        X = _advance(block, k, v, X, lags, decays_ref, masks)
    state[...] = X


def backward_kernel(last_ref, *refs, block: Block):
    """The cotangents of a chunk's q, k and v, and those of the tables and the initial state, summed over chunks.

    With corrections, u stands for v, and v, the gains and the cotangents of u from outside are further inputs.
    """
    runs_ref, _, refs = _split_refs(block._replace(has_state=False), refs, 8 + 3 * block.corrects)
    q_ref, k_ref, v_ref, d_o_ref, starts_ref, tables_ref, decays_ref, d_last_ref, *refs = refs
    correction_refs, refs = refs[: 3 * block.corrects], refs[3 * block.corrects :]
    d_q_ref, d_k_ref, d_v_ref, d_tables_ref, d_decays_ref, d_first_ref, *d_gains_ref, d_state = refs
    K, R, E, J, dtype = block.K, block.R, block.E, block.J, q_ref.dtype
    heads, chains = block.heads, block.chains
    b, n = pl.program_id(1), pl.program_id(2)
    chunk = pl.num_programs(2) - 1 - n
    _begin(None, d_state)

    @pl.when((n == 0) & (b == 0))
    def _():
        d_tables_ref[...] = jnp.zeros_like(d_tables_ref)
        d_decays_ref[...] = jnp.zeros_like(d_decays_ref)

    tables, masks = _views(tables_ref, K, BACKWARD_TABLES), _find_masks(block, runs_ref)
    q, k, v, d_o = (_where(masks.tokens, ref[0]) for ref in (q_ref, k_ref, v_ref, d_o_ref))
    q, d_o = ([x[j] for j in range(J)] for x in (q, d_o))
    X, d_X = starts_ref[0, 0, 0], d_state[...]
    X_k, X_v, d_X_rounded = X[: heads * R], X[heads * R :], d_X.astype(dtype)
    v_flipped = _flip(block, v)
    # In transposed arrays a head is a range of rows, so that products with it fill the systolic array.
    k_T, v_T, q_T, d_o_T = k.T, v.T, [x.T for x in q], [x.T for x in d_o]
    read = _read(block, [*q, k], _flip(block, k), X, tables, decays_ref, masks)
    d_weights, d_decayed_w, d_w, d_scores, d_decayed_response, d_response, d_same, d_other = ({} for _ in range(8))

    d_sizes = []
    if block.corrects:  # keys read as queries do, what they read is subtracted, and u is what they are read with
        values_ref, gains_ref, d_u_ref = correction_refs
        d_u_T, from_outside = [], d_u_ref[0].T
        for h in range(heads):
            rows, inputs_rows = block.rows(h, E, heads * R), block.rows(h, E)
            d_u = _where(masks.end, _dot(d_X_rounded[rows], tables["lags"](h), (1, 1)))
            d_u += from_outside[inputs_rows].astype(jnp.float32)
            for j in range(J):
                d_u += _dot(d_o_T[j][inputs_rows], read[h, j].weights)
            d_u_T.append(d_u)
        values = _where(masks.tokens, values_ref[0])
        d_values, d_sizes, d_gains_ref[0][0, 0] = _correct_backward(block, read, values, v, d_u_T, X_v, gains_ref)
        d_v_ref[0] = d_values.astype(dtype)
        d_o.append((-d_values).astype(dtype))
        d_o_T.append(d_o[-1].T)
        q_T.append(k_T)

    # o = P v + decayed_w X_v, P = skew(w lags^T), decayed_w = w conj(decays), since w carries the sign of Re
    for h, j in chains:
        window, lanes = _window(h, E, heads * E), _head_lanes(d_o[j], h, E)
        d_weights[h, j] = _dot(lanes, v_flipped[:, window], (1, 1))
        d_decayed_w[h, j] = _where(masks.start, _dot(lanes, X_v[window]))
    for h, j in chains:
        seen = masks.flipped if j < J else masks.flipped_earlier
        d_weights[h, j] = _roll(_where(seen, d_weights[h, j])).astype(dtype)
        decayed, swapped = _decay(d_decayed_w[h, j], decays_ref, h)
        d_same[h, j], d_other[h, j] = read[h, j].w * d_decayed_w[h, j], read[h, j].w * swapped
        through = _dot(d_weights[h, j], tables["late_lags"](h)) + decayed
        d_w[h, j] = (through if j < J else through + 2 * d_sizes[h] * read[h, j].w).astype(dtype)
    # w = skew(S) spread + readout decayed_response, decayed_response = response decays
    for h, j in chains:
        d_scores[h, j] = _dot(d_w[h, j], tables["late_spread"](h), (1, 1))
        d_decayed_response[h, j] = _where(masks.start, _dot(d_w[h, j], tables["readout"](h)))
    for h, j in chains:
        d_w_T = d_w[h, j].T
        d_tables_ref[h, :, :K] += _dot(read[h, j].w.astype(dtype).T, d_weights[h, j])
        d_tables_ref[h, :, K : 2 * K] += _dot(d_w_T, read[h, j].scores)
        d_tables_ref[h, :, 3 * K :] += _dot(d_w_T, read[h, j].decayed_response)
    for h, j in chains:
        d_scores[h, j] = _where(masks.within, _roll(d_scores[h, j])).astype(dtype)
        decayed, swapped = _decay(d_decayed_response[h, j], decays_ref, h, conjugate=True)
        d_response[h, j] = decayed.astype(dtype)
        # Products of planes, which `backward` adds up to complex ones: x y and x times y with its planes swapped.
        d_decays_ref[h, :K] += d_same[h, j] + read[h, j].response * d_decayed_response[h, j]
        d_decays_ref[h, K : 2 * K] += read[h, j].response * swapped - d_other[h, j]
    # S = q k^T and response = q X_k^T
    d_q_T = {}
    for j in range(block.reads):
        for h in range(heads):
            rows = block.rows(h, R)
            d_q_T[h, j] = _dot(k_T[rows], d_scores[h, j], (1, 1)) + _dot(X_k[rows], d_response[h, j], (1, 1))
        if j < J:
            d_q_ref[0, j] = jnp.concatenate([d_q_T[h, j] for h in range(heads)]).astype(dtype).T
    # X^K = lambda^K X^0 + z^T lags
    weights, decayed_w = {i: r.weights for i, r in read.items()}, {i: r.decayed_w for i, r in read.items()}
    d_k = d_k_ref, k_T, q_T, d_scores, d_response, R, 0
    d_v = d_v_ref, v_T, d_o_T, weights, decayed_w, E, heads * R
    ends, inputs = {}, {}
    for part, (d_z_ref, z_T, from_T, to_z, to_start, width, offset) in enumerate((d_k, d_v)):
        d_z_T = []
        for h in range(heads):
            rows, inputs_rows = block.rows(h, width, offset), block.rows(h, width)
            d_z = _where(masks.end, _dot(d_X_rounded[rows], tables["lags"](h), (1, 1)))
            decayed, swapped = _decay(d_X[rows], decays_ref, h, conjugate=True, end=True)
            d_start = _where(masks.continues, decayed)
            for j in range(block.reads):
                d_z += _dot(from_T[j][inputs_rows], to_z[h, j])
                d_start += _dot(from_T[j][inputs_rows], to_start[h, j])
            if block.corrects and part == 0:  # what keys read, as the last of the queries
                d_z += d_q_T[h, J]
            d_z_T.append(d_z.astype(dtype))
            d_state[rows] = d_start
            continued = _where(masks.continues, X[rows].astype(jnp.float32))
            d_decays_ref[h, 2 * K : 2 * K + 1] += jnp.sum(continued * d_X[rows], axis=0, keepdims=True)
            d_decays_ref[h, 2 * K + 1 : 2 * K + 2] += jnp.sum(continued * swapped, axis=0, keepdims=True)
            ends[h, part], inputs[h, part] = d_X_rounded[rows], _where(masks.end, z_T[inputs_rows])
        if not (block.corrects and part == 1):
            d_z_ref[0] = jnp.concatenate(d_z_T).T
    for h in range(heads):
        end, z_T = (jnp.concatenate([x[h, 0], x[h, 1]]) for x in (ends, inputs))
        d_tables_ref[h, :, 2 * K : 3 * K] += _dot(end, z_T, (0, 0))

    @pl.when(chunk == last_ref[b])
    def _():
        d_state[...] += d_last_ref[0, 0]

    @pl.when(chunk == 0)
    def _():
        d_first_ref[0, 0] = d_state[...]

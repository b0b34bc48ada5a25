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

    @property
    def width(self) -> int:
        return self.heads * (self.R + self.E)

    def vmem_bytes(self, itemsize: int) -> int:
        """Roughly the memory of the backward kernel. A block counts twice: the next one is loaded meanwhile."""
        K, M2, W = self.K, self.M2, self.R + self.E
        tables = (4 * K + M2) * M2 * itemsize + 2 * K * M2 * 4
        d_tables = (3 * K + M2) * M2 * 4 + (2 * K + 8) * M2 * 4
        tokens, states = 4 * (self.J + 1) * K * W * itemsize, W * M2 * (itemsize + 8)
        live = self.J * 10 * K * max(K, M2) * 4
        return self.heads * (2 * (tables + d_tables + tokens + states) + live)

    @property
    def chains(self) -> list[tuple[int, int]]:
        """The query heads (h, j): the j-th of key-value head h."""
        return [(h, j) for h in range(self.heads) for j in range(self.J)]

    def rows(self, h: int, width: int, offset: int = 0) -> slice:
        """The rows of head h in an array whose rows are features."""
        return slice(offset + h * width, offset + (h + 1) * width)


class _Masks(NamedTuple):
    """What a chunk's tokens see, for all heads; None where that is everything."""

    tokens: jax.Array | None  # (K, 1) token t is not padding
    flipped: jax.Array  # (K, K) token t sees token s, column K - 1 - s
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
    flipped, within = row + column >= K - 1, column <= row
    if not block.has_segments:
        return _Masks(None, flipped, within, None, None, None)
    run, reverse, before, last = (runs_ref[0, chunk, i : i + 1] for i in range(4))  # (1, K) each, see `_pack_runs`
    of_row = jnp.broadcast_to(run, (K, K)).T
    return _Masks(
        tokens=of_row[:, :1] >= 0,
        flipped=flipped & (of_row == reverse),
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
    """What every query head computes from q (J, K, heads * R), k reversed and X, both in the dtype of products."""
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
    """The outputs of a chunk, and the state at the start of each row's last chunk."""
    runs_ref, first_ref, refs = _split_refs(block, refs, 5)
    q_ref, k_ref, v_ref, tables_ref, decays_ref, o_ref, last_start_ref, state = refs
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
    o = {}
    for (h, j), r in _read(block, q, _flip(block, k), rounded, tables, decays_ref, masks).items():
        window = _window(h, E, block.heads * E)
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
    """The cotangents of a chunk's q, k and v, and those of the tables and the initial state, summed over chunks."""
    runs_ref, _, refs = _split_refs(block._replace(has_state=False), refs, 8)
    q_ref, k_ref, v_ref, d_o_ref, starts_ref, tables_ref, decays_ref, d_last_ref, *refs = refs
    d_q_ref, d_k_ref, d_v_ref, d_tables_ref, d_decays_ref, d_first_ref, d_state = refs
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
    X, d_X = starts_ref[0, 0, 0], d_state[...]
    X_k, X_v, d_X_rounded = X[: heads * R], X[heads * R :], d_X.astype(dtype)
    v_flipped = _flip(block, v)
    # In transposed arrays a head is a range of rows, so that products with it fill the systolic array.
    k_T, v_T, q_T, d_o_T = k.T, v.T, [q[j].T for j in range(J)], [d_o[j].T for j in range(J)]
    read = _read(block, q, _flip(block, k), X, tables, decays_ref, masks)
    d_weights, d_decayed_w, d_w, d_scores, d_decayed_response, d_response, d_same, d_other = ({} for _ in range(8))

    # o = P v + decayed_w X_v, P = skew(w lags^T), decayed_w = w conj(decays), since w carries the sign of Re
    for h, j in chains:
        window, lanes = _window(h, E, heads * E), _head_lanes(d_o[j], h, E)
        d_weights[h, j] = _dot(lanes, v_flipped[:, window], (1, 1))
        d_decayed_w[h, j] = _where(masks.start, _dot(lanes, X_v[window]))
    for h, j in chains:
        d_weights[h, j] = _roll(_where(masks.flipped, d_weights[h, j])).astype(dtype)
        decayed, swapped = _decay(d_decayed_w[h, j], decays_ref, h)
        d_same[h, j], d_other[h, j] = read[h, j].w * d_decayed_w[h, j], read[h, j].w * swapped
        d_w[h, j] = (_dot(d_weights[h, j], tables["late_lags"](h)) + decayed).astype(dtype)
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
    for j in range(J):
        d_q_T = []
        for h in range(heads):
            rows = block.rows(h, R)
            d_q_T.append(_dot(k_T[rows], d_scores[h, j], (1, 1)) + _dot(X_k[rows], d_response[h, j], (1, 1)))
        d_q_ref[0, j] = jnp.concatenate(d_q_T).astype(dtype).T
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
            for j in range(J):
                d_z += _dot(from_T[j][inputs_rows], to_z[h, j])
                d_start += _dot(from_T[j][inputs_rows], to_start[h, j])
            d_z_T.append(d_z.astype(dtype))
            d_state[rows] = d_start
            continued = _where(masks.continues, X[rows].astype(jnp.float32))
            d_decays_ref[h, 2 * K : 2 * K + 1] += jnp.sum(continued * d_X[rows], axis=0, keepdims=True)
            d_decays_ref[h, 2 * K + 1 : 2 * K + 2] += jnp.sum(continued * swapped, axis=0, keepdims=True)
            ends[h, part], inputs[h, part] = d_X_rounded[rows], _where(masks.end, z_T[inputs_rows])
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

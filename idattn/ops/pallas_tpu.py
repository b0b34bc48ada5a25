"""The chunked op as TPU kernels: one pass over q, k and v in HBM, the state and all between in VMEM.

See `idattn.ops.chunks` for the equations. The grid goes over blocks of heads, rows of the batch and, innermost and in
order, chunks; the state is carried in scratch memory. A block's heads are independent chains of small products, so
every stage is written for all of them before the next one: while one product of a chain is in the systolic arrays,
those of the other heads are too.

Layouts. Heads lie side by side in the lanes of q, k, v and o, (K, heads * width); a head is the lanes that are not
masked within its window of whole 128-lane tiles, so that nothing has to be moved. States are transposed, (heads *
width, 2M): rows are features, lanes are modes, real planes before imaginary ones, padded with zero modes to whole
tiles. Columns of K x K matrices turn from tokens s to lags t - s and back by one roll whose stride is one lane a row,
which goes to the right only: products that are about to be rolled have k or v reversed (by a permutation matrix) or
read tables from the largest lag to the smallest.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

from idattn.ops.chunks import Tables

LANES = 128
MAX_HEADS = 16  # query heads whose chains of products a program interleaves
MERGED = 8  # chunks in a program of the kernel that recomputes the states
VMEM_BYTES = 56 * 2**20  # of 64 MiB (v5p) or 128 MiB (v5e, v6e)
INTERPRET = False  # what `pallas_call` takes as `interpret`; tests on machines without a TPU set it

FORWARD_TABLES = ("lags", "spread", "readout")
BACKWARD_TABLES = ("lags", "spread", "late_lags", "late_spread", "readout")


_requires_tpu = Primitive("requires_tpu")  # 0 when compiled for a TPU, an error when compiled for anything else
_requires_tpu.def_abstract_eval(lambda: jax.core.ShapedArray((), jnp.int32))
_requires_tpu.def_impl(lambda: jax.jit(_requires_tpu.bind)())
mlir.register_lowering(
    _requires_tpu, mlir.lower_fun(lambda: jnp.zeros((), jnp.int32), multiple_results=False), platform="tpu"
)


@partial(mlir.register_lowering, _requires_tpu)
def _refuse(ctx):
    raise NotImplementedError(
        "backend='pallas_tpu' was asked for, and this is compiled for another platform than TPU; "
        "use backend='chunkwise', or 'auto', which takes the kernels on TPUs only."
    )


def requirement(q, k, v, M: int, chunk_size: int, dtype) -> str | None:
    """What the kernels would need for such q, k, v and states of M modes in `dtype`, or None if they have it."""
    R, E = q.shape[-1], v.shape[-1]
    if INTERPRET:
        return None
    if q.dtype not in (jnp.bfloat16, jnp.float32) or dtype != jnp.float32:
        return f"bfloat16 or float32 inputs and float32 parameters, not {q.dtype} and {dtype}"
    if chunk_size % LANES:
        return f"a chunk_size that is a multiple of {LANES}, not {chunk_size}"
    if R % 16 or E % 16:
        return f"head widths that are multiples of 16, not {R=} and {E=}"
    block = _choose_block(q, k, v, M, chunk_size)
    if (size := block.vmem_bytes(q.dtype.itemsize)) > VMEM_BYTES:
        return (
            f"{size >> 20} MiB of VMEM for {block.heads} heads of {R=}, {E=} and {M=}, where {VMEM_BYTES >> 20} MiB are"
        )
    return None


class _Block(NamedTuple):
    """The sizes of a program."""

    K: int  # tokens in a chunk
    heads: int  # key-value heads
    J: int  # query heads for each of them
    R: int
    E: int
    M2: int  # 2M, padded
    has_segments: bool
    has_state: bool  # the sequence goes on from a state

    @property
    def width(self) -> int:
        return self.heads * (self.R + self.E)

    def vmem_bytes(self, itemsize: int) -> int:
        """About what the backward kernel takes: its blocks twice, to load one while the other is worked on."""
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
        """Where head h is among rows that are features."""
        return slice(offset + h * width, offset + (h + 1) * width)


class _Masks(NamedTuple):
    """What a chunk's tokens see, for all heads; None where that is everything."""

    flipped: jax.Array  # (K, K) token t sees token s, column K - 1 - s
    within: jax.Array  # (K, K) token t sees token s
    start: jax.Array | None  # (K, 1) token t sees the state at the start
    end: jax.Array | None  # (1, K) token s is in the state at the end
    keep: jax.Array | None  # (1, 1) the state at the start is in the one at the end


class _Read(NamedTuple):
    """What one query head makes of a chunk: `idattn.ops.chunkwise._Read`, lags ascending."""

    scores: jax.Array
    found: jax.Array
    carried: jax.Array
    w: jax.Array
    turned: jax.Array
    weights: jax.Array


def _dot(x, y, contract=(1, 0)):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _window(h: int, width: int, total: int) -> slice:
    """The whole tiles of lanes that head h has a part in."""
    return slice(h * width // LANES * LANES, min(-(-(h + 1) * width // LANES) * LANES, total))


def _own(x, h: int, width: int):
    """The window of head h in x (K, heads * width), zero in the lanes of other heads."""
    window = _window(h, width, x.shape[1])
    x = x[:, window]
    if x.shape[1] == width:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + window.start
    return jnp.where((lane >= h * width) & (lane < (h + 1) * width), x, jnp.zeros_like(x))


def _assemble(windows, width: int):
    """(K, heads * width) from each head's window, in which only its own lanes count."""
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


def _find_masks(block: _Block, marks_ref, chunk: int = 0) -> _Masks:
    K = block.K
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (K, K), axis) for axis in (0, 1))
    flipped, within = row + column >= K - 1, column <= row
    if not block.has_segments:
        return _Masks(flipped, within, None, None, None)
    run, reverse, before, last = (marks_ref[0, chunk, i : i + 1] for i in range(4))  # (1, K) each, see `_marks`
    of_row = jnp.broadcast_to(run, (K, K)).T
    return _Masks(
        flipped=flipped & (of_row == reverse),
        within=within & (of_row == run),
        start=(of_row == before)[:, :1],
        end=run == last,
        keep=(before == last)[:, :1],
    )


def _flip(block: _Block, x):
    """The rows of x in reverse, exactly."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (block.K, block.K), axis) for axis in (0, 1))
    return _dot((row + column == block.K - 1).astype(x.dtype), x).astype(x.dtype)


def _views(ref, K: int, names) -> dict:
    """The tables in ref (heads, rows, 2M), functions of the head: K rows each, and what remains for the last one."""
    rows = {name: slice(i * K, (i + 1) * K) for i, name in enumerate(names)}
    if names[-1] == "readout":
        rows["readout"] = slice((len(names) - 1) * K, None)
    return {name: lambda h, rows=rows: ref[h, rows] for name, rows in rows.items()}


def _rotate(x, rotations_ref, h: int, *, conjugate: bool = False, end: bool = False):
    """Each mode of x times lambda^{t+1}, or its conjugate, t being the row (`end`: K - 1 in all rows); and swapped x.

    The table holds [re, re] for every t and then [-im, im].
    """
    K = rotations_ref.shape[1] // 2
    first = K - 1 if end else 0
    swapped = _swap(x)
    same, other = x * rotations_ref[h, first:K], swapped * rotations_ref[h, K + first :]
    return (same - other if conjugate else same + other), swapped


def _read(block: _Block, q, flipped, X, tables, rotations_ref, masks: _Masks) -> dict:
    """What every query head makes of a chunk, from q (J, K, heads * R), k flipped and X in the dtype of products."""
    dtype, R = flipped.dtype, block.R
    scores, found, carried, w, turned, weights = ({} for _ in range(6))
    for h, j in block.chains:
        window, own = _window(h, R, block.heads * R), _own(q[j], h, R)
        scores[h, j] = _dot(own, flipped[:, window], (1, 1))
        found[h, j] = _dot(own, X[window])
    for h, j in block.chains:
        scores[h, j] = _roll(_where(masks.flipped, scores[h, j])).astype(dtype)
        carried[h, j] = _where(masks.start, _rotate(found[h, j], rotations_ref, h)[0]).astype(dtype)
        w[h, j] = _dot(scores[h, j], tables["spread"](h)) + _dot(carried[h, j], tables["readout"](h), (1, 1))
    for h, j in block.chains:
        weights[h, j] = _dot(w[h, j].astype(dtype), tables["lags"](h), (1, 1))
        turned[h, j] = _where(masks.start, _rotate(w[h, j], rotations_ref, h, conjugate=True)[0]).astype(dtype)
    for i in block.chains:
        weights[i] = _where(masks.within, _roll(weights[i])).astype(dtype)
    return {i: _Read(scores[i], found[i], carried[i], w[i], turned[i], weights[i]) for i in block.chains}


def _fold(block: _Block, k, v, X, lags, rotations_ref, masks: _Masks):
    """The state (width, 2M) at the chunk's end from the one at its start: X^K = lambda^K X^0 + z^T lags, float32."""
    ends = []
    for z, width, offset in ((k, block.R, 0), (v, block.E, block.heads * block.R)):
        z = _where(masks.end, z.T)
        for h in range(block.heads):
            decayed = _rotate(X[block.rows(h, width, offset)], rotations_ref, h, end=True)[0]
            ends.append(_where(masks.keep, decayed) + _dot(z[block.rows(h, width)], lags(h)))
    return jnp.concatenate(ends)


def _split_refs(block: _Block, refs, inputs: int):
    """The refs of marks and of the initial state, if there are any, and the others: `inputs` of them, then outputs."""
    refs = list(refs)
    marks = refs.pop(0) if block.has_segments else None
    first = refs.pop(inputs) if block.has_state else None
    return marks, first, refs


def _begin(first_ref, state):
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = jnp.zeros_like(state) if first_ref is None else first_ref[0, 0]


def _forward_kernel(last_ref, *refs, block: _Block):
    marks_ref, first_ref, refs = _split_refs(block, refs, 5)
    q_ref, k_ref, v_ref, tables_ref, rotations_ref, o_ref, last_start_ref, state = refs
    E, dtype = block.E, q_ref.dtype
    _begin(first_ref, state)

    @pl.when(pl.program_id(2) == last_ref[pl.program_id(1)])
    def _():
        last_start_ref[0, 0] = state[...]

    tables, masks = _views(tables_ref, block.K, FORWARD_TABLES), _find_masks(block, marks_ref)
    k, v, X = k_ref[0], v_ref[0], state[...]
    rounded = X.astype(dtype)
    X_v = rounded[block.heads * block.R :]
    o = {}
    for (h, j), r in _read(block, q_ref[0], _flip(block, k), rounded, tables, rotations_ref, masks).items():
        window = _window(h, E, block.heads * E)
        o[h, j] = _dot(r.weights, v[:, window]) + _dot(r.turned, X_v[window], (1, 1))
    for j in range(block.J):
        o_ref[0, j] = _assemble([o[h, j] for h in range(block.heads)], E).astype(dtype)
    state[...] = _fold(block, k, v, X, tables["lags"], rotations_ref, masks)


def _starts_kernel(last_ref, *refs, block: _Block):
    """The states at the chunks' starts, which the backward pass reads from the last to the first."""
    del last_ref
    marks_ref, first_ref, refs = _split_refs(block, refs, 4)
    k_ref, v_ref, tables_ref, rotations_ref, starts_ref, state = refs
    _begin(first_ref, state)
    lags = _views(tables_ref, block.K, ("lags",))["lags"]
    X = state[...]
    for i in range(starts_ref.shape[1]):
        starts_ref[0, i, 0] = X.astype(starts_ref.dtype)
        tokens = slice(i * block.K, (i + 1) * block.K)
        X = _fold(block, k_ref[0, tokens], v_ref[0, tokens], X, lags, rotations_ref, _find_masks(block, marks_ref, i))
    state[...] = X


def _backward_kernel(last_ref, *refs, block: _Block):
    marks_ref, _, refs = _split_refs(block._replace(has_state=False), refs, 8)
    q_ref, k_ref, v_ref, d_o_ref, starts_ref, tables_ref, rotations_ref, d_last_ref, *refs = refs
    d_q_ref, d_k_ref, d_v_ref, d_tables_ref, d_rotations_ref, d_first_ref, d_state = refs
    K, R, E, J, dtype = block.K, block.R, block.E, block.J, q_ref.dtype
    heads, chains = block.heads, block.chains
    b, n = pl.program_id(1), pl.program_id(2)
    chunk = pl.num_programs(2) - 1 - n
    _begin(None, d_state)

    @pl.when((n == 0) & (b == 0))
    def _():
        d_tables_ref[...] = jnp.zeros_like(d_tables_ref)
        d_rotations_ref[...] = jnp.zeros_like(d_rotations_ref)

    tables, masks = _views(tables_ref, K, BACKWARD_TABLES), _find_masks(block, marks_ref)
    k, v, X, d_X = k_ref[0], v_ref[0], starts_ref[0, 0, 0], d_state[...]
    X_k, X_v, d_X_rounded = X[: heads * R], X[heads * R :], d_X.astype(dtype)
    v_flipped = _flip(block, v)
    # Transposed, a head is rows of its own, and products with it fill the systolic array.
    k_T, v_T, q_T, d_o_T = k.T, v.T, [q_ref[0, j].T for j in range(J)], [d_o_ref[0, j].T for j in range(J)]
    read = _read(block, q_ref[0], _flip(block, k), X, tables, rotations_ref, masks)
    d_weights, d_turned, d_w, d_scores, d_carried, d_found, d_same, d_other = ({} for _ in range(8))

    # o = P v + turned X_v, with P = skew(w lags^T) and turned = w conj(rotations), since w carries the sign of Re
    for h, j in chains:
        window, own = _window(h, E, heads * E), _own(d_o_ref[0, j], h, E)
        d_weights[h, j] = _dot(own, v_flipped[:, window], (1, 1))
        d_turned[h, j] = _where(masks.start, _dot(own, X_v[window]))
    for h, j in chains:
        d_weights[h, j] = _roll(_where(masks.flipped, d_weights[h, j])).astype(dtype)
        rotated, swapped = _rotate(d_turned[h, j], rotations_ref, h)
        d_same[h, j], d_other[h, j] = read[h, j].w * d_turned[h, j], read[h, j].w * swapped
        d_w[h, j] = (_dot(d_weights[h, j], tables["late_lags"](h)) + rotated).astype(dtype)
    # w = skew(S) spread + readout carried, with carried = found rotations
    for h, j in chains:
        d_scores[h, j] = _dot(d_w[h, j], tables["late_spread"](h), (1, 1))
        d_carried[h, j] = _where(masks.start, _dot(d_w[h, j], tables["readout"](h)))
    for h, j in chains:
        d_w_T = d_w[h, j].T
        d_tables_ref[h, :, :K] += _dot(read[h, j].w.astype(dtype).T, d_weights[h, j])
        d_tables_ref[h, :, K : 2 * K] += _dot(d_w_T, read[h, j].scores)
        d_tables_ref[h, :, 3 * K :] += _dot(d_w_T, read[h, j].carried)
    for h, j in chains:
        d_scores[h, j] = _where(masks.within, _roll(d_scores[h, j])).astype(dtype)
        rotated, swapped = _rotate(d_carried[h, j], rotations_ref, h, conjugate=True)
        d_found[h, j] = rotated.astype(dtype)
        # Products of planes, which `backward` adds up to complex ones: x y and x times y with its planes swapped.
        d_rotations_ref[h, :K] += d_same[h, j] + read[h, j].found * d_carried[h, j]
        d_rotations_ref[h, K : 2 * K] += read[h, j].found * swapped - d_other[h, j]
    # S = q k^T and found = q X_k^T
    for j in range(J):
        d_q_T = []
        for h in range(heads):
            rows = block.rows(h, R)
            d_q_T.append(_dot(k_T[rows], d_scores[h, j], (1, 1)) + _dot(X_k[rows], d_found[h, j], (1, 1)))
        d_q_ref[0, j] = jnp.concatenate(d_q_T).astype(dtype).T
    # X^K = lambda^K X^0 + z^T lags
    weights, turned = {i: r.weights for i, r in read.items()}, {i: r.turned for i, r in read.items()}
    d_k = d_k_ref, k_T, q_T, d_scores, d_found, R, 0
    d_v = d_v_ref, v_T, d_o_T, weights, turned, E, heads * R
    ends, inputs = {}, {}
    for part, (d_z_ref, z_T, from_T, to_z, to_start, width, offset) in enumerate((d_k, d_v)):
        d_z_T = []
        for h in range(heads):
            rows, own = block.rows(h, width, offset), block.rows(h, width)
            d_z = _where(masks.end, _dot(d_X_rounded[rows], tables["lags"](h), (1, 1)))
            decayed, swapped = _rotate(d_X[rows], rotations_ref, h, conjugate=True, end=True)
            d_start = _where(masks.keep, decayed)
            for j in range(J):
                d_z += _dot(from_T[j][own], to_z[h, j])
                d_start += _dot(from_T[j][own], to_start[h, j])
            d_z_T.append(d_z.astype(dtype))
            d_state[rows] = d_start
            kept = _where(masks.keep, X[rows].astype(jnp.float32))
            d_rotations_ref[h, 2 * K : 2 * K + 1] += jnp.sum(kept * d_X[rows], axis=0, keepdims=True)
            d_rotations_ref[h, 2 * K + 1 : 2 * K + 2] += jnp.sum(kept * swapped, axis=0, keepdims=True)
            ends[h, part], inputs[h, part] = d_X_rounded[rows], _where(masks.end, z_T[own])
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


def forward(q, k, v, tables: Tables, initial_state, run, last_chunk):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`."""
    block = _choose_block(
        q,
        k,
        v,
        tables.rotations.shape[-1],
        tables.lags.shape[1],
        has_segments=run is not None,
        has_state=initial_state is not None,
    )
    specs = _Specs(block, k.shape[2] // block.heads, q.shape[1] // block.K)
    arrays = [*_by_lanes(block, q, k, v), *_pack_tables(block, tables, q.dtype, FORWARD_TABLES)]
    in_specs = [specs.query(block.R), specs.key(block.R), specs.key(block.E), *map(specs.table, arrays[3:])]
    state = jax.ShapeDtypeStruct(_state_shape(block, k), jnp.float32)
    o = jax.ShapeDtypeStruct((*arrays[0].shape[:3], k.shape[2] * block.E), q.dtype)
    out_specs = [specs.query(block.E), specs.state()]
    o, last_start = _call(
        _forward_kernel, specs, run, initial_state, last_chunk, arrays, in_specs, [o, state], out_specs
    )
    return _heads_again(block, o, q), _unpack_state(block, last_start, tables)


def backward(q, k, v, tables: Tables, initial_state, run, last_chunk, cotangents):
    """The cotangents of q, k, v, tables and initial_state, from the same and the recomputed states."""
    d_o, d_last = cotangents
    block = _choose_block(
        q,
        k,
        v,
        tables.rotations.shape[-1],
        tables.lags.shape[1],
        has_segments=run is not None,
        has_state=initial_state is not None,
    )
    K, R, E, M2 = block.K, block.R, block.E, block.M2
    chunks, (B, G) = q.shape[1] // K, k.shape[::2]
    state = jax.ShapeDtypeStruct(_state_shape(block, k), jnp.float32)
    q_, k_, v_ = _by_lanes(block, q, k, v)

    # Little work a chunk, so several chunks in a program; the last may reach behind the end, for nothing.
    specs = _Specs(block, G // block.heads, -(-chunks // MERGED), merged=min(MERGED, chunks))
    arrays = [k_, v_, *_pack_tables(block, tables, q.dtype, ("lags",))]
    in_specs = [specs.key(R), specs.key(E), *map(specs.table, arrays[2:])]
    starts = jax.ShapeDtypeStruct((B, chunks, *state.shape[1:]), q.dtype)
    (starts,) = _call(
        _starts_kernel, specs, run, initial_state, last_chunk, arrays, in_specs, [starts], [specs.start()]
    )

    specs = _Specs(block, G // block.heads, chunks, reverse=True)
    d_o = _by_lanes(block, d_o.astype(q.dtype), k, v)[0]
    arrays = [q_, k_, v_, d_o, starts, *_pack_tables(block, tables, q.dtype, BACKWARD_TABLES)]
    arrays.append(_pack_state(block, d_last))
    inputs = [specs.query(R), specs.key(R), specs.key(E)]
    in_specs = [*inputs, specs.query(E), specs.start(), *map(specs.table, arrays[5:7]), specs.state()]
    d_tables = jax.ShapeDtypeStruct((G, M2, 3 * K + M2), jnp.float32)  # transposed; lags twice, spread, readout
    d_rotations = jax.ShapeDtypeStruct((G, 2 * K + 8, M2), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_, k_, v_)] + [d_tables, d_rotations, state]
    out_specs = [*inputs, specs.table(d_tables), specs.table(d_rotations), specs.state()]
    d_q, d_k, d_v, d_tables, d_rotations, d_first = _call(
        _backward_kernel, specs, run, None, last_chunk, arrays, in_specs, shapes, out_specs
    )
    return (
        _heads_again(block, d_q, q),
        d_k.reshape(k.shape).astype(k.dtype),
        d_v.reshape(v.shape).astype(v.dtype),
        _unpack_tables(block, d_tables, d_rotations, tables),
        None if initial_state is None else _unpack_state(block, d_first, tables),
    )


class _Specs(NamedTuple):
    """The blocks that a program sees; the grid is (blocks of heads, rows, chunks)."""

    block: _Block
    groups: int
    chunks: int
    reverse: bool = False  # the chunks from the last to the first
    merged: int = 1  # chunks in a program

    def _chunk(self, n):
        return self.chunks - 1 - n if self.reverse else n

    def marks(self):
        return pl.BlockSpec((1, self.merged, 4, self.block.K), lambda g, b, n, *_: (b, self._chunk(n), 0, 0))

    def query(self, width):
        shape = (1, self.block.J, self.merged * self.block.K, self.block.heads * width)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, 0, self._chunk(n), g))

    def key(self, width):
        shape = (1, self.merged * self.block.K, self.block.heads * width)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, self._chunk(n), g))

    def table(self, x):
        return pl.BlockSpec((self.block.heads, *x.shape[1:]), lambda g, b, n, *_: (g, 0, 0))

    def state(self):
        return pl.BlockSpec((1, 1, self.block.width, self.block.M2), lambda g, b, n, *_: (b, g, 0, 0))

    def start(self):
        shape = (1, self.merged, 1, self.block.width, self.block.M2)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, self._chunk(n), g, 0, 0))


def _call(kernel, specs: _Specs, run, initial_state, last_chunk, arrays, in_specs, out_shape, out_specs):
    """Run a kernel over (blocks of heads, rows, chunks), with marks before and the state behind its inputs."""
    block = specs.block._replace(has_state=initial_state is not None)
    if run is not None:
        arrays, in_specs = [_marks(run, block.K), *arrays], [specs.marks(), *in_specs]
    if initial_state is not None:
        arrays, in_specs = [*arrays, _pack_state(block, initial_state)], [*in_specs, specs.state()]
    return pl.pallas_call(
        partial(kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.groups, last_chunk.shape[0], specs.chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((block.width, block.M2), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=INTERPRET,
        name="interdomain" + kernel.__name__.removesuffix("_kernel"),
    )(last_chunk.astype(jnp.int32) + (0 if INTERPRET else _requires_tpu.bind()), *arrays)


def _choose_block(q, k, v, M: int, K: int, *, has_segments: bool = False, has_state: bool = False) -> _Block:
    """The block with the most heads, of those that fill whole tiles of lanes or are all, within the limits.

    Not all heads if it can be half of them: the two cores of a v5p work on different blocks.
    """
    H, R = q.shape[2:]
    G, E = k.shape[2], v.shape[3]
    M2 = -(-2 * M // LANES) * LANES
    whole = [d for d in range(1, G + 1) if G % d == 0 and (d == G or (d * R % LANES == 0 and d * E % LANES == 0))]
    blocks = [_Block(K, heads, H // G, R, E, M2, has_segments, has_state) for heads in whole]
    fit = [x for x in blocks if x.heads * x.J <= MAX_HEADS and x.vmem_bytes(q.dtype.itemsize) <= VMEM_BYTES]
    halves = [x for x in fit if x.heads < G]
    return (halves or fit or blocks[:1])[-1]


def _pad_modes(block: _Block, x, axis: int = -1):
    """Flattened planes 2M on `axis`, each padded with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, (block.M2 - x.shape[axis]) // 2)
    return jnp.concatenate([jnp.pad(half, pad) for half in jnp.split(x, 2, axis=axis)], axis=axis)


def _cut_modes(x, M: int, axis: int = -1):
    """The opposite of `_pad_modes`."""
    halves = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([jax.lax.slice_in_dim(half, 0, M, axis=axis) for half in halves], axis=axis)


def _pack_tables(block: _Block, tables: Tables, dtype, names):
    """The tables of products, stacked by rows in `dtype`, and the rotations as `_rotate` reads them, float32.

    Lags go from the largest to the smallest in "lags" and "late_spread", and the other way in "spread" and "late_lags".
    """
    rows = {
        "lags": tables.lags[:, ::-1],
        "spread": tables.spread,
        "late_lags": tables.lags,
        "late_spread": tables.spread[:, ::-1],
        "readout": _pad_modes(block, tables.readout, axis=1),
    }
    stacked = jnp.concatenate([_pad_modes(block, rows[name]) for name in names], axis=1).astype(dtype)
    re, im = jnp.moveaxis(tables.rotations, 2, 0)
    rotations = jnp.concatenate([jnp.concatenate([re, re], axis=-1), jnp.concatenate([-im, im], axis=-1)], axis=1)
    return stacked, _pad_modes(block, rotations)


def _unpack_tables(block: _Block, d_tables, d_rotations, tables: Tables) -> Tables:
    """The tables' cotangents from what the backward kernel adds up."""
    K, M = block.K, tables.rotations.shape[-1]
    late_lags, spread, lags, readout = jnp.split(_cut_modes(d_tables, M, axis=1), [K, 2 * K, 3 * K], axis=2)
    same, other, at_end = jnp.split(d_rotations, [K, 2 * K], axis=1)
    same, other = same.at[:, -1].add(at_end[:, 0]), other.at[:, -1].add(at_end[:, 1])
    (re_re, im_im), (re_im, im_re) = (jnp.split(_cut_modes(x, M), 2, axis=-1) for x in (same, other))
    return Tables(
        lags=(late_lags + lags[..., ::-1]).swapaxes(1, 2),
        rotations=jnp.stack([re_re + im_im, re_im - im_re], axis=2),
        readout=_cut_modes(readout, M),
        spread=spread.swapaxes(1, 2),
    )


def _marks(run, K: int):
    """(B, N, 4, K): runs of the tokens, the same reversed, that of the state at the start, that of the last token."""
    run = run.reshape(run.shape[0], -1, K)
    before = jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    before = jnp.where(before < 0, -2, before)  # a token that is padding sees no state
    last = jnp.where(run[..., -1:] < 0, -3, run[..., -1:])  # and a state that ends in padding is seen by none
    return jnp.stack([run, run[..., ::-1], *(jnp.broadcast_to(x, run.shape) for x in (before, last))], axis=2)


def _by_lanes(block: _Block, q, k, v):
    """q as (B, J, T, G * R), k and v as (B, T, G * width), in the dtype of q."""
    B, T = q.shape[:2]
    k, v = (x.reshape(B, T, -1).astype(q.dtype) for x in (k, v))
    q = q.reshape(B, T, -1, block.J, q.shape[3]).transpose(0, 3, 1, 2, 4)
    return q.reshape(B, block.J, T, -1), k, v


def _heads_again(block: _Block, x, q):
    """(B, J, T, G * width) as (B, T, H, width)."""
    B, T, H = q.shape[:3]
    return x.reshape(B, block.J, T, H // block.J, -1).transpose(0, 2, 3, 1, 4).reshape(B, T, H, -1)


def _state_shape(block: _Block, k):
    return (k.shape[0], k.shape[2] // block.heads, block.width, block.M2)


def _pack_state(block: _Block, state):
    """States (B, G, 2, M, W) as (B, blocks of heads, width, 2M): the features of all k, then those of all v."""
    B, G, _, M, W = state.shape
    state = _pad_modes(block, jnp.moveaxis(state.reshape(B, G // block.heads, block.heads, 2 * M, W), 3, 4))
    parts = jnp.split(state, [block.R], axis=3)
    return jnp.concatenate([x.reshape(*x.shape[:2], -1, block.M2) for x in parts], axis=2)


def _unpack_state(block: _Block, x, tables: Tables):
    B, blocks = x.shape[:2]
    parts = jnp.split(x, [block.heads * block.R], axis=2)
    parts = [part.reshape(B, blocks, block.heads, -1, block.M2) for part in parts]
    state = _cut_modes(jnp.concatenate(parts, axis=3), tables.rotations.shape[-1])
    return jnp.moveaxis(state.reshape(B, blocks * block.heads, block.R + block.E, 2, -1), 2, 4)

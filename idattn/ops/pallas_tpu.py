"""The chunked op on TPUs: one pass over q, k and v in HBM, the state and all intermediate results in VMEM.

This module packs arrays into the layouts of `idattn.ops.tpu_kernels`, chooses the sizes of a program and calls the
kernels: one forward; backward one that recomputes the chunks' start states, and one for the cotangents.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from idattn.ops import prepare_tpu
from idattn.ops.backend import Backend
from idattn.ops.chunks import Tables
from idattn.ops.platforms import requires
from idattn.ops.tpu_kernels import (
    BACKWARD_TABLES,
    FORWARD_TABLES,
    LANES,
    Block,
    backward_kernel,
    forward_kernel,
    starts_kernel,
)

MAX_HEADS = 16  # query heads whose chains of products a program interleaves
MERGED = 8  # chunks in a program of the kernel that recomputes the states
VMEM_BYTES = 56 * 2**20  # of 64 MiB (v5p) or 128 MiB (v5e, v6e)


def requirement(q, k, v, M: int, chunk_size: int, dtype, corrects: bool = False) -> str | None:
    """What the kernels would need for such q, k, v and states of M modes in `dtype`, or None if they have it."""
    R, E = q.shape[-1], v.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float32) or dtype != jnp.float32:
        return f"bfloat16 or float32 inputs and float32 parameters, not {q.dtype} and {dtype}"
    if chunk_size % LANES:
        return f"a chunk_size that is a multiple of {LANES}, not {chunk_size}"
    if R % 16 or E % 16:
        return f"head widths that are multiples of 16, not {R=} and {E=}"
    block = _choose_block(q, k, v, M, chunk_size, corrects=corrects)
    if (size := block.vmem_bytes(q.dtype.itemsize)) > VMEM_BYTES:
        return (
            f"{size >> 20} MiB of VMEM for {block.heads} heads of {R=}, {E=} and {M=}, where {VMEM_BYTES >> 20} MiB are"
        )
    return None


def forward(q, k, v, tables: Tables, initial_state, run, last_chunk, *, gains=None, interpret=False):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`.

    With gains (B, T, G, 2), b and b |beta|^2 of the write "damped", also the corrections u (B, T, G, E), in q's dtype.
    """
    block = _block_for(q, k, v, tables, initial_state, run, gains)
    specs = _Specs(block, k.shape[2] // block.heads, q.shape[1] // block.K)
    arrays = [*_by_lanes(block, q, k, v), *_pack_tables(block, tables, q.dtype, FORWARD_TABLES)]
    in_specs = [specs.query(block.R), specs.key(block.R), specs.key(block.E), *map(specs.table, arrays[3:])]
    state = jax.ShapeDtypeStruct(_state_shape(block, k), jnp.float32)
    o = jax.ShapeDtypeStruct((*arrays[0].shape[:3], k.shape[2] * block.E), q.dtype)
    shapes, out_specs = [o, state], [specs.query(block.E), specs.state()]
    if gains is not None:
        arrays, in_specs = [*arrays, _pack_gains(block, gains)], [*in_specs, specs.gains()]
        shapes.append(jax.ShapeDtypeStruct(arrays[2].shape, q.dtype))
        out_specs.append(specs.key(block.E))
    call = partial(_call, interpret=interpret)
    o, last_start, *u = call(forward_kernel, specs, run, initial_state, last_chunk, arrays, in_specs, shapes, out_specs)
    return _split_heads(block, o, q), _unpack_state(block, last_start, tables), *(x.reshape(v.shape) for x in u)


def backward(
    q, k, v, tables: Tables, initial_state, run, last_chunk, cotangents, *, gains=None, u=None, interpret=False
):
    """The cotangents of q, k, v, tables and initial_state, from the same and the recomputed states.

    With gains, u is what `forward` returned, and the last cotangent that is returned is that of the gains.
    """
    d_o, d_last, *d_u = cotangents
    block = _block_for(q, k, v, tables, initial_state, run, gains)
    K, R, E, M2 = block.K, block.R, block.E, block.M2
    chunks, (B, G) = q.shape[1] // K, k.shape[::2]
    state = jax.ShapeDtypeStruct(_state_shape(block, k), jnp.float32)
    q_, k_, v_ = _by_lanes(block, q, k, v if u is None else u)

    # A chunk has little work here, so a program takes several. The last one may compute chunks past the end in vain.
    merged = min(MERGED, chunks) if isinstance(chunks, int) else 1
    specs = _Specs(block, G // block.heads, -(-chunks // merged), merged=merged)
    arrays = [k_, v_, *_pack_tables(block, tables, q.dtype, ("lags",))]
    in_specs = [specs.key(R), specs.key(E), *map(specs.table, arrays[2:])]
    starts = jax.ShapeDtypeStruct((B, chunks, *state.shape[1:]), q.dtype)
    call = partial(_call, interpret=interpret)
    (starts,) = call(starts_kernel, specs, run, initial_state, last_chunk, arrays, in_specs, [starts], [specs.start()])

    specs = _Specs(block, G // block.heads, chunks, reverse=True)
    d_o = _by_lanes(block, d_o.astype(q.dtype), k, v)[0]
    arrays = [q_, k_, v_, d_o, starts, *_pack_tables(block, tables, q.dtype, BACKWARD_TABLES)]
    arrays.append(_pack_state(block, d_last))
    inputs = [specs.query(R), specs.key(R), specs.key(E)]
    in_specs = [*inputs, specs.query(E), specs.start(), *map(specs.table, arrays[5:7]), specs.state()]
    d_tables = jax.ShapeDtypeStruct((G, M2, 3 * K + M2), jnp.float32)  # transposed; lags twice, spread, readout
    d_decays = jax.ShapeDtypeStruct((G, 2 * K + 8, M2), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_, k_, v_)] + [d_tables, d_decays, state]
    out_specs = [*inputs, specs.table(d_tables), specs.table(d_decays), specs.state()]
    if gains is not None:
        values, d_u = (x.reshape(v_.shape).astype(q.dtype) for x in (v, *d_u))
        arrays += [values, packed := _pack_gains(block, gains), d_u]
        in_specs += [specs.key(E), specs.gains(), specs.key(E)]
        shapes.append(jax.ShapeDtypeStruct(packed.shape, jnp.float32))
        out_specs.append(specs.gains())
    d_q, d_k, d_v, d_tables, d_decays, d_first, *d_gains = call(
        backward_kernel, specs, run, None, last_chunk, arrays, in_specs, shapes, out_specs
    )
    return (
        _split_heads(block, d_q, q),
        d_k.reshape(k.shape).astype(k.dtype),
        d_v.reshape(v.shape).astype(v.dtype),
        _unpack_tables(block, d_tables, d_decays, tables),
        None if initial_state is None else _unpack_state(block, d_first, tables),
        *(_unpack_gains(block, x) for x in d_gains),
    )


class _Specs(NamedTuple):
    """The blocks that a program sees; the grid is (blocks of heads, rows, chunks)."""

    block: Block
    groups: int
    chunks: int
    reverse: bool = False  # the chunks from the last to the first
    merged: int = 1  # chunks in a program

    def _chunk(self, n):
        return self.chunks - 1 - n if self.reverse else n

    def runs(self):
        return pl.BlockSpec((1, self.merged, 4, self.block.K), lambda g, b, n, *_: (b, self._chunk(n), 0, 0))

    def query(self, width):
        shape = (1, self.block.J, self.merged * self.block.K, self.block.heads * width)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, 0, self._chunk(n), g))

    def key(self, width):
        shape = (1, self.merged * self.block.K, self.block.heads * width)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, self._chunk(n), g))

    def gains(self):
        shape = (1, 1, self.block.K, 2 * self.block.heads)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, g, self._chunk(n), 0))

    def table(self, x):
        return pl.BlockSpec((self.block.heads, *x.shape[1:]), lambda g, b, n, *_: (g, 0, 0))

    def state(self):
        return pl.BlockSpec((1, 1, self.block.width, self.block.M2), lambda g, b, n, *_: (b, g, 0, 0))

    def start(self):
        shape = (1, self.merged, 1, self.block.width, self.block.M2)
        return pl.BlockSpec(shape, lambda g, b, n, *_: (b, self._chunk(n), g, 0, 0))


def _call(kernel, specs: _Specs, run, initial_state, last_chunk, arrays, in_specs, out_shape, out_specs, *, interpret):
    """Run a kernel over (blocks of heads, rows, chunks), with the runs before and the state after its inputs."""
    block = specs.block._replace(has_state=initial_state is not None)
    if run is not None:
        arrays, in_specs = [_pack_runs(run, block.K), *arrays], [specs.runs(), *in_specs]
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
        interpret=interpret,
        name="interdomain_" + kernel.__name__.removesuffix("_kernel"),
    )(last_chunk.astype(jnp.int32) + (0 if interpret else requires("tpu", "pallas_tpu")), *arrays)


def _block_for(q, k, v, tables: Tables, initial_state, run, gains) -> Block:
    options = dict(has_segments=run is not None, has_state=initial_state is not None, corrects=gains is not None)
    return _choose_block(q, k, v, tables.decays.shape[-1], tables.lags.shape[1], **options)


def _choose_block(
    q, k, v, M: int, K: int, *, has_segments: bool = False, has_state: bool = False, corrects: bool = False
) -> Block:
    """The block with the most heads within the limits, where heads fill whole tiles of lanes or are all there are.

    Half of the heads are preferred to all of them, since the two cores of a v5p work on different blocks.
    """
    H, R = q.shape[2:]
    G, E = k.shape[2], v.shape[3]
    M2 = -(-2 * M // LANES) * LANES
    whole = [d for d in range(1, G + 1) if G % d == 0 and (d == G or (d * R % LANES == 0 and d * E % LANES == 0))]
    blocks = [Block(K, heads, H // G, R, E, M2, has_segments, has_state, corrects) for heads in whole]
    fit = [x for x in blocks if x.heads * x.reads <= MAX_HEADS and x.vmem_bytes(q.dtype.itemsize) <= VMEM_BYTES]
    halves = [x for x in fit if x.heads < G]
    return (halves or fit or blocks[:1])[-1]


def _pad_modes(block: Block, x, axis: int = -1):
    """Flattened planes 2M on `axis`, each padded with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, (block.M2 - x.shape[axis]) // 2)
    return jnp.concatenate([jnp.pad(half, pad) for half in jnp.split(x, 2, axis=axis)], axis=axis)


def _cut_modes(x, M: int, axis: int = -1):
    """The opposite of `_pad_modes`."""
    halves = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([jax.lax.slice_in_dim(half, 0, M, axis=axis) for half in halves], axis=axis)


def _pack_tables(block: Block, tables: Tables, dtype, names):
    """The tables that enter products, stacked by rows in `dtype`, and the decays as the kernels read them, float32.

    Lags go from the largest to the smallest in "lags" and "late_spread", and the other way in "spread" and "late_lags".
    """
    rows = {
        "lags": tables.lags[:, ::-1],
        "spread": tables.spread,
        "late_lags": tables.lags,
        "late_spread": tables.spread[:, ::-1],
        "readout": _pad_modes(block, _dense(tables.readout), axis=1),
    }
    stacked = jnp.concatenate([_pad_modes(block, rows[name]) for name in names], axis=1).astype(dtype)
    re, im = jnp.moveaxis(tables.decays, 2, 0)
    decays = jnp.concatenate([jnp.concatenate([re, re], axis=-1), jnp.concatenate([-im, im], axis=-1)], axis=1)
    return stacked, _pad_modes(block, decays)


def _dense(readout):
    """`Tables.readout` as matrices (G, 2M, 2M), which a systolic array multiplies by as fast as by a diagonal."""
    if readout.ndim == 3:
        return readout
    G, _, _, M = readout.shape
    blocks = readout[..., None] * jnp.eye(M, dtype=readout.dtype)[None, None, None]
    return blocks.transpose(0, 1, 3, 2, 4).reshape(G, 2 * M, 2 * M)


def _unpack_tables(block: Block, d_tables, d_decays, tables: Tables) -> Tables:
    """The tables' cotangents from what the backward kernel adds up."""
    K, M = block.K, tables.decays.shape[-1]
    late_lags, spread, lags, readout = jnp.split(_cut_modes(d_tables, M, axis=1), [K, 2 * K, 3 * K], axis=2)
    same, other, at_end = jnp.split(d_decays, [K, 2 * K], axis=1)
    same, other = same.at[:, -1].add(at_end[:, 0]), other.at[:, -1].add(at_end[:, 1])
    (re_re, im_im), (re_im, im_re) = (jnp.split(_cut_modes(x, M), 2, axis=-1) for x in (same, other))
    readout = _cut_modes(readout, M)
    if tables.readout.ndim == 4:  # of a diagonal C: what lies off the modes is constant
        readout = jnp.diagonal(readout.reshape(-1, 2, M, 2, M), axis1=2, axis2=4)
    return Tables(
        lags=(late_lags + lags[..., ::-1]).swapaxes(1, 2),
        decays=jnp.stack([re_re + im_im, re_im - im_re], axis=2),
        readout=readout,
        spread=spread.swapaxes(1, 2),
    )


def _pack_runs(run, K: int):
    """(B, N, 4, K): runs of the tokens, the same reversed, that of the state at the start, that of the last token."""
    run = run.reshape(run.shape[0], -1, K)
    before = jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    before = jnp.where(before < 0, -2, before)  # a token that is padding sees no state
    last = jnp.where(run[..., -1:] < 0, -3, run[..., -1:])  # and a state that ends in padding is seen by none
    return jnp.stack([run, run[..., ::-1], *(jnp.broadcast_to(x, run.shape) for x in (before, last))], axis=2)


def _pack_gains(block: Block, gains):
    """(B, T, G, 2) as (B, blocks of heads, T, 2 heads): all first numbers before all second ones."""
    B, T, G, _ = gains.shape
    return (
        gains.reshape(B, T, G // block.heads, block.heads, 2)
        .transpose(0, 2, 1, 4, 3)
        .reshape(B, -1, T, 2 * block.heads)
    )


def _unpack_gains(block: Block, x):
    """The opposite of `_pack_gains`."""
    B, _, T, _ = x.shape
    return x.reshape(B, -1, T, 2, block.heads).transpose(0, 2, 1, 4, 3).reshape(B, T, -1, 2)


def _by_lanes(block: Block, q, k, v):
    """q as (B, J, T, G * R), k and v as (B, T, G * width), in the dtype of q."""
    B, T = q.shape[:2]
    k, v = (x.reshape(B, T, -1).astype(q.dtype) for x in (k, v))
    q = q.reshape(B, T, -1, block.J, q.shape[3]).transpose(0, 3, 1, 2, 4)
    return q.reshape(B, block.J, T, -1), k, v


def _split_heads(block: Block, x, q):
    """(B, J, T, G * width) as (B, T, H, width)."""
    B, T, H = q.shape[:3]
    return x.reshape(B, block.J, T, H // block.J, -1).transpose(0, 2, 3, 1, 4).reshape(B, T, H, -1)


def _state_shape(block: Block, k):
    return (k.shape[0], k.shape[2] // block.heads, block.width, block.M2)


def _pack_state(block: Block, state):
    """States (B, G, W, 2M) as (B, blocks of heads, width, 2M): the features of all k, then those of all v."""
    B, G, W, planes = state.shape
    state = _pad_modes(block, state.reshape(B, G // block.heads, block.heads, W, planes))
    parts = jnp.split(state, [block.R], axis=3)
    return jnp.concatenate([x.reshape(*x.shape[:2], -1, block.M2) for x in parts], axis=2)


def _unpack_state(block: Block, x, tables: Tables):
    """The opposite of `_pack_state`."""
    B, blocks = x.shape[:2]
    parts = jnp.split(x, [block.heads * block.R], axis=2)
    parts = [part.reshape(B, blocks, block.heads, -1, block.M2) for part in parts]
    state = _cut_modes(jnp.concatenate(parts, axis=3), tables.decays.shape[-1])
    return state.reshape(B, blocks * block.heads, block.R + block.E, -1)


BACKEND = Backend(
    name="pallas_tpu",
    rule=(forward, backward),
    platforms=("tpu",),
    requirement=requirement,
    clips_chunks=False,
    prepare=prepare_tpu.RULE,
)


def interpreted(interpret) -> Backend:
    """The kernels as they are interpreted on any platform: for tests, since it is slow; no shape is refused.

    Args:
      interpret: as `jax.experimental.pallas.pallas_call` takes it.
    """
    rule = (partial(forward, interpret=interpret), partial(backward, interpret=interpret))
    return Backend(name="pallas_tpu", rule=rule, clips_chunks=False, prepare=prepare_tpu.interpreted(interpret))

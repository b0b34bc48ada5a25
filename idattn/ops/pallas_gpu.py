"""The chunked op on GPUs: XLA runs the states through the chunks, kernels of Mosaic GPU do what reads them.

This module packs arrays for the kernels of `idattn.ops.gpu_kernels` and calls them: one forward, one backward.
"""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device

from idattn.ops import chunkwise
from idattn.ops.backend import Backend
from idattn.ops.chunk_arrays import (
    GROUP,
    chunk_states,
    find_masks,
    is_last,
    split_chunks,
    split_groups,
    state_inputs,
)
from idattn.ops.chunks import Tables, zero_padding, zero_state
from idattn.ops.planes import to_planes
from idattn.ops.platforms import requires
from idattn.ops.scans import sequential_scan
from idattn.ops.segments import PADDING

if TYPE_CHECKING:
    from idattn.ops.gpu_kernels import Block

TILE = 64  # tokens in a tile; modes are padded to a multiple of it
SMEM_BYTES = 227 * 1024  # of a program, on Hopper


def requirement(q, k, v, M: int, chunk_size: int, dtype) -> str | None:
    """What the kernels would need for such q, k, v and states of M modes in `dtype`, or None if they have it."""
    R, E = q.shape[-1], v.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or dtype != jnp.float32:
        return f"bfloat16 or float16 inputs and float32 parameters, not {q.dtype} and {dtype}"
    if chunk_size % TILE or chunk_size > 256:
        return f"a chunk_size of 64, 128, 192 or 256, not {chunk_size}"
    if R % 16 or E % 16:
        return f"head widths that are multiples of 16, not {R=} and {E=}"
    M = -(-M // TILE) * TILE
    if max(R, E, M) > 256:
        return f"widths and modes of at most 256, not {R=}, {E=} and {M=}"
    if (size := _smem_bytes(chunk_size, R, E, M)) > SMEM_BYTES:
        return (
            f"{size >> 10} KiB of shared memory for {chunk_size=}, {R=}, {E=} and {M=}, where {SMEM_BYTES >> 10} KiB "
            "are: a smaller chunk_size needs less"
        )
    capability = _capability()
    if capability not in (None, "9.0"):
        return f"an NVIDIA GPU of compute capability 9.0 (H100, H200), not {capability}"
    return None


def _smem_bytes(K: int, R: int, E: int, M: int) -> int:
    """Of the backward kernel, whose tiles are the larger ones."""
    operands = K * (R + E) + 2 * M * (R + E) + 4 * K * M + 4 * M * M
    tiles = TILE * (R + E + K + M) + TILE * (K + 9) + K
    return 2 * (operands + tiles) + 4096  # 4 KiB for barriers and what Mosaic itself takes


def _capability() -> str | None:
    """The compute capability of the GPU that Mosaic compiles for; None where JAX knows none: it takes Hopper then."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or get_default_device()
    return getattr(device, "compute_capability", None)


def forward(q, k, v, tables: Tables, initial_state, run, last_chunk, *, interpret=False):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`."""
    from idattn.ops.gpu_kernels import forward_kernel  # loads Mosaic GPU, which not every platform has

    q, k, v = zero_padding((q, k.astype(q.dtype), v.astype(q.dtype)), run)
    starts, last_start = _start_states(k, v, tables, initial_state, run, last_chunk)
    block = _choose_block(q, k, v, tables, run, interpret)
    B, T, H = q.shape[:3]
    tokens = (x.reshape(-1, block.K, *x.shape[2:]) for x in (k, v))
    arrays = [*tokens, *_pack_states(block, starts), *_pack_tables(block, tables, q.dtype)]
    arrays.append(q.reshape(-1, block.tiles, block.rows, *q.shape[2:]))
    o = jax.ShapeDtypeStruct((B * T // block.K, block.tiles, block.rows, H, block.E), q.dtype)
    scratch = [(1, block.rows, block.R), (1, block.rows, block.E)]
    o = _call(forward_kernel, block, B, H, run, tables, arrays, o, scratch, (7, 1), interpret)
    return o.reshape(B, T, H, block.E), last_start


def chain(q, k, v, d_o, starts, tables: Tables, masks, run, *, interpret=False) -> chunkwise.Chain:
    """The chain of products of every query, as `idattn.ops.chunkwise.chain_of_products`, in the dtype of q."""
    from idattn.ops.gpu_kernels import Kept, chain_kernel

    del masks
    B, G, N, J, K, R = q.shape
    dtype = q.dtype
    block = _choose_block(q, k, v, tables, run, interpret, J)
    keys = (x.astype(dtype).reshape(B * G * N, K, -1) for x in (k, v))
    queries = (x.astype(dtype).reshape(-1, block.tiles, block.rows, x.shape[-1]) for x in (q, d_o))
    arrays = [*keys, *_pack_states(block, starts.astype(dtype)), *_pack_tables(block, tables, dtype), *queries]
    rows = (B * G * N * J, block.tiles, block.rows)
    shapes = [jax.ShapeDtypeStruct((*rows, *width), dtype) for width in Kept.widths(block)]
    scratch = [(1, block.rows, R), (1, block.rows, block.E), (1, block.rows, K), (1, block.rows, block.M)]
    kept = Kept(*_call(chain_kernel, block, B, G * J, run, tables, arrays, shapes, scratch, (7, 2), interpret))
    M = tables.decays.shape[-1]
    kept = [x.reshape(B, G, N, J, K, *x.shape[3:]) for x in kept]
    kept = Kept(*(x if x.ndim == 6 else x[..., :M].reshape(*x.shape[:5], 2 * M) for x in kept))
    d_decays = kept.d_decays_of_w.astype(jnp.float32) + kept.d_decays_of_response.astype(jnp.float32)
    return chunkwise.Chain(
        **{name: x for name, x in kept._asdict().items() if not name.startswith("d_decays")},
        d_decays=d_decays.reshape(B, G, N * J, K, 2 * M),
        descending=True,
    )


def backward(*arguments, interpret=False):
    """The cotangents of q, k, v, tables and initial_state; see `idattn.ops.chunks`."""
    return chunkwise.backward(*arguments, chain=partial(chain, interpret=interpret))


def _start_states(k, v, tables: Tables, initial_state, run, last_chunk):
    """The states at the starts of all chunks, (N, B, G, W, 2M) in the dtype of k, and exactly that of `last_chunk`."""
    (*arrays, runs), count = split_groups((k, v), run, tables, GROUP)

    def body(carry, inputs):
        state, last_start = carry
        index, k, v, run = inputs
        masks = find_masks(run, tables)
        z = state_inputs(split_chunks(k, tables), split_chunks(v, tables), masks)
        starts, end = chunk_states(z, tables, state, masks, sequential_scan)
        last_start = last_start + jnp.sum(jnp.where(is_last(index, last_chunk, starts), starts, 0), axis=0)
        return (end, last_start), starts.astype(k.dtype)

    zeros = zero_state(k, v, tables)
    carry = (zeros if initial_state is None else initial_state, zeros)
    (_, last_start), starts = jax.lax.scan(body, carry, (jnp.arange(count), *arrays, runs))
    return starts.reshape(-1, *starts.shape[2:])[: k.shape[1] // tables.lags.shape[1]], last_start


def _choose_block(q, k, v, tables: Tables, run, interpret, J: int | None = None) -> "Block":
    from idattn.ops.gpu_kernels import Block

    M = tables.decays.shape[-1]
    return Block(
        K=tables.lags.shape[1],
        J=q.shape[2] // k.shape[2] if J is None else J,
        R=q.shape[-1],
        E=v.shape[-1],
        M=M if interpret else -(-M // TILE) * TILE,
        has_segments=run is not None,
    )


def _call(kernel, block: "Block", B: int, H: int, run, tables: Tables, arrays, outputs, matrices, arrivals, interpret):
    """Run a kernel over (rows, chunks, query heads).

    Args:
      outputs: the shapes of its results.
      matrices: what it has in SMEM besides its operands: how many, rows and columns.
      arrivals: how many copies each of its barriers waits for.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from idattn.ops.gpu_kernels import Hopper, Interpreted, Operands

    machine, dtype = Interpreted() if interpret else Hopper(), arrays[0].dtype
    decays = jnp.pad(jnp.moveaxis(tables.decays, 2, 1), [(0, 0)] * 3 + [(0, block.M - tables.decays.shape[-1])])
    decays = decays.reshape(*decays.shape[:2], -1, block.rows, block.M)
    reach = jnp.zeros((1, 1, block.rows), jnp.int32) if run is None else _reach(block, run)
    reach += 0 if interpret else requires("cuda", "pallas_gpu")
    N = arrays[2].shape[0] * block.J // (B * H)
    return plgpu.kernel(
        partial(kernel, block=block, machine=machine),
        out_type=outputs,
        grid=(B, N, H),
        grid_names=("b", "n", "h"),
        scratch_types=[
            *(machine.matrices(n, r, c, dtype) for n, r, c in (*Operands.shapes(block), *matrices)),
            plgpu.SMEM((block.skew_elements,), dtype),
            *(plgpu.Barrier(num_arrivals=n) for n in arrivals),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="interdomain_" + kernel.__name__.removesuffix("_kernel"),
    )(reach, decays, *arrays)


def _planes(block: "Block", x):
    """Rows of flattened planes (X, W, 2M) as (X, 2W, M), all real parts first, padded with zero modes."""
    x = jnp.moveaxis(to_planes(x), 2, 1)
    return jnp.pad(x, [(0, 0)] * 3 + [(0, block.M - x.shape[-1])]).reshape(len(x), -1, block.M)


def _pack_states(block: "Block", starts):
    """States (N, B, G, W, 2M) as those of keys (N B G, 2R, M) and of values (N B G, 2E, M)."""
    parts = jnp.split(starts.reshape(-1, *starts.shape[3:]), [block.R], axis=1)
    return [_planes(block, x) for x in parts]


def _pack_tables(block: "Block", tables: Tables, dtype):
    """Lags and spread (G, 2K, M), the largest lag first, and readout (G, 4M, M), w from y; in `dtype`."""
    lags, spread = (_planes(block, x[:, ::-1]) for x in (tables.lags, tables.spread))
    M = tables.decays.shape[-1]
    if tables.readout.ndim == 4:  # of a diagonal C
        readout = tables.readout[..., None] * jnp.eye(M, dtype=tables.readout.dtype)[None, None, None]
    else:
        readout = tables.readout.reshape(-1, 2, M, 2, M).swapaxes(2, 3)
    readout = jnp.pad(readout, [(0, 0)] * 3 + [(0, block.M - M)] * 2).reshape(-1, 4 * block.M, block.M)
    return [x.astype(dtype) for x in (lags, spread, readout)]


def _reach(block: "Block", run):
    """Over how many lags a token sees its document, (B N, tiles, rows) int32.

    A token that sees the state at the chunk's start reaches past it, K lags more than its place in the chunk.
    """
    run = run.reshape(run.shape[0], -1, block.K)
    before = jnp.pad(run[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    token = jnp.arange(block.K, dtype=jnp.int32)[None, None]
    begins = jnp.concatenate([jnp.ones_like(run[..., :1], bool), run[..., 1:] != run[..., :-1]], axis=-1)
    first = jax.lax.cummax(jnp.where(begins, token, 0), axis=2)
    reach = token - first + jnp.where((run == before) & (run != PADDING), block.K, 0)
    return reach.reshape(-1, block.tiles, block.rows)


# No platform: "auto" does not take it before a card has run it.
BACKEND = Backend(name="pallas_gpu", rule=(forward, backward), requirement=requirement, clips_chunks=False)


def interpreted(interpret) -> Backend:
    """The kernels as they are interpreted on any platform: for tests, since it is slow; no shape is refused.

    Args:
      interpret: as `jax.experimental.pallas.mosaic_gpu.kernel` takes it.
    """
    rule = (partial(forward, interpret=interpret), partial(backward, interpret=interpret))
    return Backend(name="pallas_gpu", rule=rule, clips_chunks=False)

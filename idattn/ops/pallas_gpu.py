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
from idattn.ops.chunk_arrays import chunk_states, columns, find_masks, last_of, split_groups
from idattn.ops.chunks import Tables, zero_padding, zero_state
from idattn.ops.planes import to_planes
from idattn.ops.platforms import requires
from idattn.ops.segments import PADDING

if TYPE_CHECKING:
    from idattn.ops.gpu_kernels import Block

TILE = 64  # tokens in a tile; modes are padded to a multiple of it
# Shared memory of a program by compute capability, of A100 and H100. That of others does not hold a chunk.
SMEM_BYTES = {"8.0": 163 * 1024, "9.0": 227 * 1024}


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
    capability = _capability()
    if capability not in SMEM_BYTES:
        return f"an NVIDIA GPU of compute capability 9.0 (H100, H200) or 8.0 (A100), not {capability}"
    if capability == "8.0" and jax.__version_info__ < (0, 12):
        return f"jax 0.12 for compute capability 8.0 (A100), not {jax.__version__}"
    if (size := _smem_bytes(chunk_size, R, E, M, capability)) > SMEM_BYTES[capability]:
        return (
            f"{size >> 10} KiB of shared memory for {chunk_size=}, {R=}, {E=} and {M=}, where "
            f"{SMEM_BYTES[capability] >> 10} KiB are: a smaller chunk_size needs less"
        )
    return None


def _smem_bytes(K: int, R: int, E: int, M: int, capability: str) -> int:
    """Of the backward kernel, whose tiles are the larger ones."""
    operands = K * (R + E) + 2 * M * (R + E) + 4 * K * M + 4 * M * M
    tiles = TILE * (R + E + K + M) + TILE * (K + 9) + K
    if capability == "8.0":  # with a buffer for left operands
        return 2 * (operands + tiles + TILE * max(R, E, K, M)) + 1024  # 1 KiB for what Mosaic itself takes
    return 2 * (operands + tiles) + 4096  # 4 KiB for that, barriers and the alignment of swizzled matrices


def _capability() -> str:
    """The compute capability of the GPU that Mosaic compiles for: Hopper's where JAX knows none."""
    device, default = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), get_default_device()
    if device is None or device.device_kind == getattr(default, "device_kind", None):
        device = default  # which knows, as the abstract one does not
    return getattr(device, "compute_capability", "9.0")


def forward(q, k, v, tables: Tables, initial_state, run, last_chunk, *, interpret=False):
    """Outputs and the state at the start of `last_chunk`; see `idattn.ops.chunks`."""
    from idattn.ops.gpu_kernels import forward_kernel  # loads Mosaic GPU, which not every platform has

    q, k, v = zero_padding((q, k.astype(q.dtype), v.astype(q.dtype)), run)
    states = chunkwise.on_gpus(_start_states)
    starts, last_start = states(q, k, v, tables, initial_state, run, last_chunk)
    block = _choose_block(q, k, v, tables, run, interpret)
    B, T, H = q.shape[:3]
    arrays = _pack(block, q, k, v, starts, tables)
    o = jax.ShapeDtypeStruct((B * T // block.K, block.tiles, block.rows, H, block.E), q.dtype)
    scratch = [(1, block.rows, block.R), (1, block.rows, block.E)]
    o = _call(forward_kernel, block, B, H, run, tables, arrays, o, scratch, (7, 1), interpret)
    return o.reshape(B, T, H, block.E), last_start


def chain(q, k, v, d_o, starts, tables: Tables, masks, run, *, interpret=False) -> chunkwise.Chain:
    """The chain of products of every query, as `idattn.ops.chunkwise.chain_of_products`."""
    from idattn.ops.gpu_kernels import Kept, chain_kernel

    del masks
    (B, _, H, R), (G, _, N) = q.shape, starts.shape[:3]
    block = _choose_block(q, k, v, tables, run, interpret)
    arrays = [*_pack(block, q, k, v, starts, tables), _tiles(block, d_o.astype(q.dtype))]
    rows = (G * B * N * block.J, block.tiles, block.rows)
    shapes = [jax.ShapeDtypeStruct((*rows, width), q.dtype) for width in Kept.widths(block)]
    scratch = [(1, block.rows, R), (1, block.rows, block.E), (1, block.rows, block.K), (1, block.rows, block.M)]
    kept = Kept(*_call(chain_kernel, block, B, H, run, tables, arrays, shapes, scratch, (7, 2), interpret))
    M = tables.decays.shape[-1]

    def unpack(name: str, x: jax.Array) -> jax.Array:
        x = x.reshape(G, B, N, block.J, block.K, -1)
        if M == block.M or name == "d_q":
            return x
        pairs, re, im = jnp.split(x, [x.shape[-1] - 2 * block.M, x.shape[-1] - block.M], axis=-1)
        return jnp.concatenate([pairs, re[..., :M], im[..., :M]], axis=-1)

    *arrays, d_decays_of_w, d_decays_of_response = (unpack(*item) for item in kept._asdict().items())
    d_decays = d_decays_of_w.astype(jnp.float32) + d_decays_of_response.astype(jnp.float32)
    return chunkwise.Chain(*arrays, d_decays=to_planes(jnp.sum(d_decays, axis=(1, 2, 3))))


def backward(*arguments, interpret=False):
    """The cotangents of q, k, v, tables and initial_state; see `idattn.ops.chunks`."""
    return chunkwise.on_gpus(chunkwise.backward)(*arguments, chain=partial(chain, interpret=interpret))


def _start_states(q, k, v, tables: Tables, initial_state, run, last_chunk, *, scan, group):
    """The states at the starts of all chunks, (G, B, N, W, 2M) in the dtype of q, and exactly that of `last_chunk`."""
    (*arrays, runs), count = split_groups((k, v), run, tables, group)

    def body(carry, inputs):
        state, last_start = carry
        index, k, v, run = inputs
        masks = find_masks(run, tables)
        starts, end = chunk_states(columns(k, v, tables=tables), tables, state, masks, scan)
        return (end, last_start + last_of(starts, index, last_chunk)), starts.astype(q.dtype)

    zeros = zero_state(k, v, tables)
    carry = (zeros if initial_state is None else initial_state, zeros)
    (_, last_start), starts = jax.lax.scan(body, carry, (jnp.arange(count), *arrays, runs))
    starts = jnp.moveaxis(starts, 0, 2)  # (G, B, groups, chunks of a group, W, 2M)
    return starts.reshape(*starts.shape[:2], -1, *starts.shape[4:])[
        :, :, : k.shape[1] // tables.lags.shape[1]
    ], last_start


def _choose_block(q, k, v, tables: Tables, run, interpret) -> "Block":
    from idattn.ops.gpu_kernels import Block

    M = tables.decays.shape[-1]
    return Block(
        K=tables.lags.shape[1],
        J=q.shape[2] // k.shape[2],
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

    from idattn.ops.gpu_kernels import Operands
    from idattn.ops.gpu_machines import Ampere, Hopper, Interpreted

    machine = Interpreted() if interpret else {"8.0": Ampere, "9.0": Hopper}[_capability()]()
    dtype = arrays[0].dtype
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


def _pack(block: "Block", q, k, v, starts, tables: Tables) -> list[jax.Array]:
    """What both kernels read, in the dtype of q: keys, values, states, tables and queries.

    Keys and values are (B N, K, G, width), states of keys and of values (G B N, 2R, M) and (G B N, 2E, M), lags and
    spread (G, 2K, M), the largest lag first, readout (G, 4M, M), w from y, and queries as `_tiles` has them.
    """
    dtype = q.dtype
    tokens = (x.astype(dtype).reshape(-1, block.K, *x.shape[2:]) for x in (k, v))
    states = jnp.split(starts.astype(dtype).reshape(-1, *starts.shape[3:]), [block.R], axis=1)
    M = tables.decays.shape[-1]
    if tables.readout.ndim == 4:  # of a diagonal C
        readout = tables.readout[..., None] * jnp.eye(M, dtype=tables.readout.dtype)[None, None, None]
    else:
        readout = tables.readout.reshape(-1, 2, M, 2, M).swapaxes(2, 3)
    readout = jnp.pad(readout, [(0, 0)] * 3 + [(0, block.M - M)] * 2).reshape(-1, 4 * block.M, block.M)
    planes = (_planes(block, x) for x in (*states, tables.lags[:, ::-1], tables.spread[:, ::-1]))
    return [*tokens, *(x.astype(dtype) for x in (*planes, readout)), _tiles(block, q)]


def _tiles(block: "Block", x: jax.Array) -> jax.Array:
    """Queries (B, T, H, width) as (B N, tiles, rows, H, width)."""
    return x.reshape(-1, block.tiles, block.rows, *x.shape[2:])


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
BACKEND = Backend(
    name="pallas_gpu", rule=(forward, backward), requirement=requirement, default_chunk=64, clips_chunks=False
)


def interpreted(interpret) -> Backend:
    """The kernels as they are interpreted on any platform: for tests, since it is slow; no shape is refused.

    Args:
      interpret: as `jax.experimental.pallas.mosaic_gpu.kernel` takes it.
    """
    rule = (partial(forward, interpret=interpret), partial(backward, interpret=interpret))
    return Backend(name="pallas_gpu", rule=rule, clips_chunks=False)

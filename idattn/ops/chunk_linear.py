"""What is linear in its inputs, in chunks: the learned linear readout, and how tokens change a state."""

import jax
import jax.numpy as jnp

from idattn.ops.chunk_arrays import (
    GROUP,
    Masks,
    chunk_states,
    columns,
    find_masks,
    from_start,
    join_chunks,
    last_of,
    split_chunks,
    split_groups,
    to_tokens,
)
from idattn.ops.chunks import LagTables, final_state, lag_tables, last_tokens, pad_to_chunks, zero_padding
from idattn.ops.discretize import Basis, discretize, linear_readout_row
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, power, to_planes
from idattn.ops.scans import Scan, sequential_scan
from idattn.ops.segments import Segments


def linear(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    chunk_size: int,
    scan: Scan = sequential_scan,
) -> tuple[jax.Array, jax.Array]:
    """The learned linear readout in chunks: one real convolution kernel a head, h(l) = Re(c_out^T C beta lambda^l).

    Shapes as in `idattn.ops.linear_readout`.
    """
    B, T = z.shape[:2]
    tables = lag_tables(basis, chunk_size)
    last = last_tokens(segments, B, T)
    (z,), run = pad_to_chunks((z,), segments, chunk_size)
    (z,) = zero_padding((z,), run)
    masks = find_masks(run, tables)
    starts, _ = chunk_states(columns(z, tables=tables), tables, initial_state, masks, scan)
    row = linear_readout_row(basis, c_out)
    y = jax.checkpoint(_convolve, prevent_cse=False)(split_chunks(z, tables), starts, tables, row, masks)
    start = starts[:, jnp.arange(B), jnp.maximum(last, 0) // chunk_size].swapaxes(0, 1)
    return join_chunks(y)[:, :T], final_state((z,), start, tables, initial_state, run, last)


def transfer(
    inputs: tuple[jax.Array, ...], basis: Basis, segments: Segments | None, *, chunk_size: int, group: int = GROUP
) -> tuple[jax.Array, jax.Array]:
    """How tokens change a state, X after them = decay X before + increment; see `idattn.ops.transfer`."""
    B, T, G = inputs[0].shape[:3]
    tables = lag_tables(basis, chunk_size)
    last = last_tokens(segments, B, T)
    inputs, run = pad_to_chunks(inputs, segments, chunk_size)
    (*arrays, runs), count = split_groups(inputs, run, tables, group)
    zero = jnp.zeros((B, G, sum(x.shape[3] for x in inputs), tables.lags.shape[-1]), tables.lags.dtype)

    @jax.checkpoint
    def body(carry, chunk_group):
        state, last_start = carry
        index, *arrays, run = chunk_group
        masks = find_masks(run, tables)
        starts, end = chunk_states(columns(*arrays, tables=tables), tables, state, masks, sequential_scan)
        return (end, last_start + last_of(starts, index, jnp.maximum(last, 0) // chunk_size)), None

    (_, start), _ = jax.lax.scan(body, (zero, zero), (jnp.arange(count), *arrays, runs))
    increment = final_state(inputs, start, tables, zero, run, last)
    decay = power(discretize(basis)[0], last + 1, T)
    if run is not None:
        continues = (last < 0) | (jnp.take_along_axis(run, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] == 0)
        decay = jnp.where(continues[:, None, None, None], decay, 0)
    return decay, increment


def _convolve(z: jax.Array, starts: jax.Array, tables: LagTables, row: jax.Array, masks: Masks) -> jax.Array:
    """y (G, B, N, K, W) from z (G, B, N, K, W), the chunks' start states and c_out^T C, row (G, 2M)."""
    dtype = z.dtype
    K = z.shape[3]
    kernel = jnp.einsum("gm,glm->gl", row, tables.lags[:, ::-1], precision="highest")
    toeplitz = to_tokens(jnp.broadcast_to(kernel[:, None], (kernel.shape[0], K, K)))
    if masks.start is None:
        y = einsum_f32("gts,gbnsw->gbntw", jnp.where(masks.within[0, 0, 0], toeplitz, 0), z, dtype)
    else:
        weights = jnp.where(masks.within[:, :, :, 0], toeplitz[:, None, None], 0)
        y = einsum_f32("gbnts,gbnsw->gbntw", weights, z, dtype)
    # Re(c_out^T C lambda^{t+1} X): the row already carries the sign of the real part.
    rows = flatten_planes(complex_multiply(to_planes(row)[:, None], conjugate(tables.decays)))
    y_start = from_start(einsum_f32("gtm,gbnwm->gbntw", rows, starts, dtype)[:, :, :, None], masks)[:, :, :, 0]
    return (y + y_start).astype(dtype)

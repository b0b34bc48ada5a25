"""What is linear in its inputs, in chunks: the learned linear readout, and how tokens change a state."""

import jax
import jax.numpy as jnp

from idattn.ops.chunk_arrays import (
    GROUP,
    Masks,
    chunk_states,
    find_masks,
    is_last,
    join_chunks,
    skew,
    split_chunks,
    split_groups,
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
    split = split_chunks(z, tables)
    in_end = split if masks is None else jnp.where(masks.end, split, 0)
    starts, _ = chunk_states(in_end, tables, initial_state, masks, scan)
    y = jax.checkpoint(_convolve, prevent_cse=False)(split, starts, tables, linear_readout_row(basis, c_out), masks)
    start = starts[jnp.maximum(last, 0) // chunk_size, jnp.arange(B)]
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
        z = jnp.concatenate([split_chunks(x, tables) for x in arrays], axis=-1)
        z = z if masks is None else jnp.where(masks.end, z, 0)
        starts, end = chunk_states(z, tables, state, masks, sequential_scan)
        in_last = is_last(index, jnp.maximum(last, 0) // chunk_size, starts)
        return (end, last_start + jnp.sum(jnp.where(in_last, starts, 0), axis=0)), None

    (_, start), _ = jax.lax.scan(body, (zero, zero), (jnp.arange(count), *arrays, runs))
    increment = final_state(inputs, start, tables, zero, run, last)
    decay = power(discretize(basis)[0], last + 1, T)
    if run is not None:
        continues = (last < 0) | (jnp.take_along_axis(run, jnp.maximum(last, 0)[:, None], axis=1)[:, 0] == 0)
        decay = jnp.where(continues[:, None, None, None], decay, 0)
    return decay, increment


def _convolve(z: jax.Array, starts: jax.Array, tables: LagTables, row: jax.Array, masks: Masks | None) -> jax.Array:
    """y (B, G, N, K, W) from z (B, G, N, K, W), the chunks' start states and c_out^T C, row (G, 2M)."""
    dtype = z.dtype
    K = z.shape[3]
    kernel = jnp.einsum("gm,glm->gl", row, tables.lags, precision="highest")
    toeplitz = skew(jnp.broadcast_to(kernel[:, None], (kernel.shape[0], K, K)))
    if masks is None:
        y = einsum_f32("gts,bgnsw->bgntw", toeplitz, z, dtype)
    else:
        weights = jnp.where(masks.within[:, :, :, 0], toeplitz[None, :, None], 0)
        y = einsum_f32("bgnts,bgnsw->bgntw", weights, z, dtype)
    # Re(c_out^T C lambda^{t+1} X): the row already carries the sign of the real part.
    rows = flatten_planes(complex_multiply(to_planes(row)[:, None], conjugate(tables.decays)))
    from_start = einsum_f32("gtm,nbgwm->bgntw", rows, starts, dtype)
    return (y + (from_start if masks is None else jnp.where(masks.start[:, :, :, 0], from_start, 0))).astype(dtype)

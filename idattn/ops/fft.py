"""The recurrence as causal convolutions by FFT: one kernel a head where a linear readout contracts the modes.

An FFT's rounding errors are relative to the largest value of a row and reach every token, earlier ones too: causal to
tolerance only. Nothing can be reset, since a convolution treats all tokens alike. FFTs know float32 and float64 only:
bfloat16 inputs are computed with in float32, and the outputs are rounded.
"""

import jax
import jax.numpy as jnp

from idattn.ops.backend import Backend
from idattn.ops.chunks import decay_state, lag_tables
from idattn.ops.discretize import Basis, linear_readout_row, mode_weights
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, real_part_row, to_planes
from idattn.ops.segments import Segments


def interdomain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: Basis,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    readout: str,
) -> tuple[jax.Array, jax.Array]:
    """Eq. 11 and 13 with all states X_1 ... X_T formed at once; shapes as in `idattn.ops.interdomain_attention`.

        X_t = lambda^{t+1} X^0 + sum_{s<=t} beta lambda^{t-s} [k_s, v_s]^T
        w_t = C^T f(C X_k q_t),   o_t = Re(w_t^T X_v)   with X_t = [X_k, X_v]

    The queries read every state, so none can be contracted away: the states take B T G 2M (R + E) numbers of memory.
    This is a checked reference for small T.
    """
    _refuse(segments)
    B, T, H, R = q.shape
    G = k.shape[2]
    lags, decays = lag_tables(basis, T)
    z = jnp.concatenate([k, v], axis=-1).astype(initial_state.dtype)
    increments = _convolve(lags.transpose(1, 0, 2)[None, :, :, None], z[..., None])  # (B, T, G, W, 2M)
    states = increments + decay_state(decays.swapaxes(0, 1)[None], initial_state[:, None])
    X_k, X_v = jnp.split(states, [R], axis=-2)
    queries = q.reshape(B, T, G, H // G, R).astype(z.dtype)
    y = jnp.einsum("btgjr,btgrm->btgjm", queries, X_k, precision="highest")
    w = mode_weights(basis, readout, y.reshape(B * T, *y.shape[2:])).reshape(y.shape)
    o = jnp.einsum("btgjm,btgem->btgje", real_part_row(w), X_v, precision="highest")
    return o.reshape(B, T, H, -1).astype(q.dtype), states[:, -1]


def linear(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The learned linear readout: one kernel h(l) = Re(c_out^T C beta lambda^l) a head, in O(T log T) work.

        y_t = Re(c_out^T C lambda^{t+1} X^0) + sum_{s<=t} h(t-s) z_s

    Shapes as in `idattn.ops.linear_readout`.
    """
    _refuse(segments)
    lags, decays = lag_tables(basis, z.shape[1])
    wide = z.astype(initial_state.dtype)
    row = linear_readout_row(basis, c_out)
    kernel = jnp.einsum("gm,gtm->tg", row, lags, precision="highest")
    # Re(c_out^T C lambda^{t+1} X^0): the row carries the sign of Re already, hence the conjugate.
    rows = flatten_planes(complex_multiply(to_planes(row)[:, None], conjugate(decays)))
    y = _convolve(kernel[None, ..., None], wide)
    y += jnp.einsum("gtm,bgwm->btgw", rows, initial_state, precision="highest")
    increment = jnp.einsum("btgw,gtm->bgwm", wide, lags[:, ::-1], precision="highest")
    return y.astype(z.dtype), increment + decay_state(decays[None, :, -1], initial_state)


def _refuse(segments: Segments | None) -> None:
    if segments is not None:
        raise NotImplementedError(
            "backend='fft' was given segment_ids, and a convolution can neither reset a state nor leave out padding; "
            "use backend='chunkwise'."
        )


def _convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """y_t = sum_{s<=t} kernel_{t-s} x_s along axis 1, of real arrays that broadcast."""
    T = x.shape[1]
    size = 1 << (2 * T - 1).bit_length()  # room for no wrap-around
    product = jnp.fft.rfft(kernel, size, axis=1) * jnp.fft.rfft(x, size, axis=1)
    return jnp.fft.irfft(product, size, axis=1)[:, :T]


BACKEND = Backend(name="fft", interdomain=interdomain, linear=linear)

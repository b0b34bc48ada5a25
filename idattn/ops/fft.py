"""The recurrence as causal convolutions by FFT: one kernel a head where a linear readout contracts the modes.

An FFT's rounding errors are relative to the largest value of a row and reach every token, earlier ones too: causal to
tolerance only. Nothing can be reset, since a convolution treats all tokens alike. FFTs know float32 and float64 only:
bfloat16 inputs are computed with in float32, and the outputs are rounded.
"""

import jax
import jax.numpy as jnp

from idattn.ops.chunks import lag_tables, real_part
from idattn.ops.chunkwise import fold
from idattn.ops.discretize import multiply, output_matrices


def interdomain(q, k, v, basis, initial_state, segment_ids, *, readout):
    """Eq. 11 and 13 with all states X_1 ... X_T formed at once; shapes as in `idattn.ops.interdomain_attention`.

        X_t = lambda^{t+1} X^0 + sum_{s<=t} beta lambda^{t-s} [k_s, v_s]^T
        w_t = C^T f(C X_k q_t),   o_t = Re(w_t^T X_v)   with X_t = [X_k, X_v]

    The queries read every state, so none can be contracted away: B T G 2M (R + E) numbers of memory. A checked
    reference for small T.
    """
    _refuse(segment_ids)
    B, T, H, R = q.shape
    G = k.shape[2]
    lags, decays = lag_tables(basis, T)
    z = jnp.concatenate([k, v], axis=-1).astype(initial_state.dtype)
    own = _convolve(lags.transpose(1, 0, 2)[None, ..., None], z[:, :, :, None])  # (B, T, G, 2M, W)
    carried = multiply(decays.swapaxes(0, 1)[..., None], initial_state[:, None], axis=-3)  # (B, T, G, 2, M, W)
    states = own.reshape(carried.shape) + carried
    X_k, X_v = jnp.split(states.reshape(own.shape), [R], axis=-1)
    to_u, to_w = output_matrices(basis, readout)
    queries = q.reshape(B, T, G, H // G, R).astype(z.dtype)
    y = jnp.einsum("btgjr,btgmr->btgjm", queries, X_k, precision="highest")
    w = jnp.einsum("gom,gmn,btgjn->btgjo", to_w, to_u, y, precision="highest", optimize=[(0, 1), (0, 1)])
    o = jnp.einsum("btgjm,btgme->btgje", real_part(w), X_v, precision="highest")
    return o.reshape(B, T, H, -1).astype(q.dtype), states[:, -1]


def linear(z, basis, c_out, initial_state, segment_ids):
    """The learned linear readout: one kernel h(l) = Re(c_out^T C beta lambda^l) a head, in O(T log T) work.

        y_t = Re(c_out^T C lambda^{t+1} X^0) + sum_{s<=t} h(t-s) z_s

    Shapes as in `idattn.ops.linear_readout`.
    """
    _refuse(segment_ids)
    B, T, G, W = z.shape
    lags, decays = lag_tables(basis, T)
    wide = z.astype(initial_state.dtype)
    row = fold(basis, c_out)
    kernel = jnp.einsum("gm,gtm->tg", row, lags, precision="highest")
    # Re(c_out^T C lambda^{t+1} X^0): the folded row carries the sign of Re already, hence the conjugate.
    rows = multiply(row.reshape(G, 1, 2, -1), decays * jnp.asarray([1, -1], decays.dtype)[:, None]).reshape(G, T, -1)
    y = _convolve(kernel[None, ..., None], wide)
    y += jnp.einsum("gtm,bgmw->btgw", rows, initial_state.reshape(B, G, -1, W), precision="highest")
    own = jnp.einsum("btgw,gtm->bgmw", wide, lags[:, ::-1], precision="highest").reshape(initial_state.shape)
    return y.astype(z.dtype), own + multiply(decays[:, -1, ..., None], initial_state, axis=-3)


def _refuse(segment_ids) -> None:
    if segment_ids is not None:
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

"""The paper's recurrence, written down literally: the reference that every other backend is judged by.

It takes one token at a time, in complex numbers, and forms U and Gamma with the full C: slow on purpose. The backward
pass stores the state at every sqrt(T)-th token and recomputes the others, as the paper's sequential kernel does.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from idattn.ops.backend import Backend
from idattn.ops.discretize import Basis, discretize
from idattn.ops.segments import PADDING, Segments

_einsum = partial(jnp.einsum, precision="highest")  # on TPUs and GPUs float32 products have fewer bits by default


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
    """Eq. 11 and 13 token by token; shapes as in `idattn.ops.interdomain_attention`."""
    B, T, H, R = q.shape
    G, E = k.shape[2], v.shape[-1]
    dtype = initial_state.dtype
    c = _complex_c(basis)

    def read(state, q_t):  # state (B, G, M, R + E), q_t (B, H, R)
        coefficients = _einsum("gmn,bgnw->bgmw", c, state)
        u, gamma = coefficients[..., :R], coefficients[..., R:]
        xi_u = _einsum("bgjr,bgmr->bgjm", q_t.reshape(B, G, H // G, R), u)
        if readout == "real":
            return _einsum("bgjm,bgme->bgje", xi_u.real, gamma.real).reshape(B, H, E)
        xi_u = xi_u.conj() if readout == "hermitian" else xi_u
        return _einsum("bgjm,bgme->bgje", xi_u, gamma).real.reshape(B, H, E)

    z = jnp.concatenate([k, v], axis=-1).astype(dtype)
    o, state = _scan(read, z, basis, initial_state, segments, q.astype(dtype))
    return o.astype(q.dtype), state


def linear(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    initial_state: jax.Array,
    segments: Segments | None,
    *,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The learned linear readout Re(c_out^T C X_t) token by token; shapes as in `idattn.ops.linear_readout`."""
    c = _complex_c(basis)

    def read(state, _):
        return _einsum("gm,gmn,bgnw->bgw", c_out, c, state).real

    y, state = _scan(read, z.astype(initial_state.dtype), basis, initial_state, segments, None)
    return y.astype(z.dtype), state


def _complex_c(basis: Basis) -> jax.Array:
    M = basis.a_log.shape[1]
    if basis.c is None:
        return jnp.broadcast_to(jnp.eye(M, dtype=basis.a_log.dtype), (*basis.a_log.shape, M))
    c = jax.lax.complex(*basis.c) if isinstance(basis.c, tuple) else basis.c
    return c if c.ndim == 3 else c[..., None] * jnp.eye(M, dtype=c.dtype)[None]


def _scan(
    read: Callable[..., jax.Array],
    z: jax.Array,
    basis: Basis,
    initial_state: jax.Array,
    segments: Segments | None,
    queries: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """X_t = Lambda X_{t-1} + B z_t^T over t, and what `read` makes of every X_t."""
    B, T = z.shape[:2]
    lam, beta = (jax.lax.complex(planes[:, 0], planes[:, 1])[:, :, None] for planes in discretize(basis))
    run = jnp.zeros((B, T), jnp.int32) if segments is None else segments.run
    starts = jnp.pad(run[:, 1:] != run[:, :-1], ((0, 0), (1, 0)))
    is_token = run != PADDING
    # Whatever padding holds, NaN included, must not reach the products: their gradients would be NaN too.
    z, queries = jax.tree.map(lambda x: jnp.where(is_token[..., None, None], x, 0), (z, queries))

    def advance(state, inputs):
        z_t, q_t, starts_t, is_token_t = inputs
        before = jnp.where(starts_t[:, None, None, None], 0, state)
        after = lam[None] * before + beta[None] * z_t[:, :, None, :]
        state = jnp.where(is_token_t[:, None, None, None], after, state)
        return state, jnp.where(is_token_t[:, None, None], read(state, q_t), 0)

    segment = math.isqrt(T - 1) + 1
    pad = -T % segment  # with what padding is: no token, no start

    def in_segments(x):  # (B, T, ...) -> (segments, tokens of a segment, B, ...)
        x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))), 1, 0)
        return x.reshape(-1, segment, *x.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)
    def advance_segment(state, inputs):
        return jax.lax.scan(advance, state, inputs)

    re, im = jnp.split(initial_state.swapaxes(-1, -2), 2, axis=-2)  # (B, G, M, W) each
    state = jax.lax.complex(re, im)
    state, outputs = jax.lax.scan(advance_segment, state, jax.tree.map(in_segments, (z, queries, starts, is_token)))
    outputs = jnp.moveaxis(outputs.reshape(-1, *outputs.shape[2:])[:T], 0, 1)
    return outputs, jnp.concatenate([state.real, state.imag], axis=-2).swapaxes(-1, -2)


BACKEND = Backend(name="recurrent", interdomain=interdomain, linear=linear)

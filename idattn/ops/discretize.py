"""The discretised basis of a state: decays, input weights, their powers, and the readout, in real planes.

Continuous parameters become the coefficients of the recurrence X_t = Lambda X_{t-1} + B z_t^T (eq. 11):

    a = -exp(a_log) + i a_imag,   Delta = exp(log_delta)
    lambda = exp(Delta a),        beta = (lambda - 1) / a        (zero-order hold of a one-valued input)

and C becomes the map from the response of the keys' state to a query, y = X_k q, to the query's weights on the modes
of the values, w = C^T f(C y), where f is the identity ("transpose", eq. 13), the conjugate ("hermitian") or
the real part ("real"), so that o = Re(w^T X_v) without ever forming U = C X_k or Gamma = C X_v.

Everything here is a function of the parameters alone: small, computed once a call, in float32 or float64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idattn.ops.planes import complex_matrix, complex_multiply, conjugate, flatten_planes, to_planes


class Basis(NamedTuple):
    """Parameters of the states' basis functions, one set for each of G key-value heads with M modes.

    Attributes:
      log_delta: (G,) logarithm of the step size Delta; |log_delta| <= 30.
      a_log: (G, M) logarithm of the modes' decay rates; |a_log| <= 30.
      a_imag: (G, M) the modes' frequencies in radians per unit of time; |a_imag| <= 1e6.
      c: the readout C: complex (G, M, M) full, (G, M) diagonal, None for the identity; or a pair of real planes
        (real, imaginary), each of one of the two shapes.
    """

    log_delta: jax.Array
    a_log: jax.Array
    a_imag: jax.Array
    c: jax.Array | tuple[jax.Array, jax.Array] | None


def s4d_inv_frequencies(num_modes: int, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """The frequencies of S4D-Inv, a_imag(n) = (M / pi) (M / (2n + 1) - 1), (M,), in radians per unit of time.

    Args:
      num_modes: M.
      dtype: np.float32 or np.float64, in which they are computed.
    """
    n = np.arange(num_modes, dtype=dtype)
    return num_modes / math.pi * (num_modes / (2 * n + 1) - 1)


def frequencies(kind: str, num_modes: int, delta: jax.Array) -> jax.Array:
    """The frequencies a_imag (G, M) that modes start from, in radians per unit of time; n = 0 ... M - 1.

    Args:
      kind: "s4d_inv"; "s4d_lin", pi n; or "uniform", Delta a_imag(n) = 2 pi n / M, so that equally fast decaying modes
        sum to a Dirichlet kernel of the lag l, sum_n lambda_n^l = 0 unless M divides l.
      num_modes: M.
      delta: (G,) step sizes.
    """
    n = jnp.arange(num_modes, dtype=jnp.float32)
    if kind == "uniform":
        return 2 * math.pi * n[None] / (num_modes * delta[:, None])
    return jnp.tile(s4d_inv_frequencies(num_modes) if kind == "s4d_inv" else math.pi * n, (delta.shape[0], 1))


def discretize(basis: Basis) -> tuple[jax.Array, jax.Array]:
    """The decays lambda and input weights beta, planes (G, 2, M) each; accurate also where lambda - 1 cancels."""
    delta = jnp.exp(basis.log_delta)[:, None]
    x = -jnp.exp(basis.log_delta[:, None] + basis.a_log)  # Delta a = x + i y
    y = delta * basis.a_imag
    decay = jnp.exp(x)
    lam = jnp.stack([decay * jnp.cos(y), decay * jnp.sin(y)], axis=-2)
    return lam, delta[..., None] * _phi1(jnp.stack([x, y], axis=-2))


def _phi1(z: jax.Array) -> jax.Array:
    """phi1(z) = (exp(z) - 1) / z for planes (..., 2, M) with Re z <= 0: a series for small |z|, else the quotient.

    Neither branch cancels where it is used, in its derivative no more than in its value.
    """
    one = jnp.zeros_like(z).at[..., 0, :].set(1)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(z), axis=-2, keepdims=True))  # keeps |z|^2 from overflowing
    small = scale < 0.25
    terms = 14 if z.dtype == jnp.float64 else 8  # the next one is below the rounding of 1

    near = jnp.where(small, z, 0)
    # Horner's scheme of sum_n z^n / (n + 1)!, with planes apart: one kernel, where a loop would start some a term.
    (near_re, near_im), (re, im) = (jnp.unstack(x, axis=-2) for x in (near, one))
    for n in range(terms, 1, -1):
        re, im = 1 + (near_re * re - near_im * im) / n, (near_re * im + near_im * re) / n
    series = jnp.stack([re, im], axis=-2)

    far = jnp.where(small, one, z)
    x, y = far[..., 0, :], far[..., 1, :]
    minus_one_re = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2  # exp(x + iy) - 1 without cancellation
    minus_one = jnp.stack([minus_one_re, jnp.exp(x) * jnp.sin(y)], axis=-2)
    unit = far / jnp.where(small, 1, scale)
    quotient = complex_multiply(minus_one, conjugate(unit)) / jnp.sum(unit**2, axis=-2, keepdims=True)
    return jnp.where(small, series, quotient / jnp.where(small, 1, scale))


_PLANE_FACTORS = {"transpose": (1, 1), "hermitian": (1, -1), "real": (1, 0)}  # f scales the two planes


def c_planes(basis: Basis) -> tuple[jax.Array, jax.Array]:
    """The real and the imaginary part of C: (G, M, M) each where it is full, (G, M) where it is diagonal."""
    if basis.c is None:
        return jnp.ones_like(basis.a_log), jnp.zeros_like(basis.a_log)
    return basis.c if isinstance(basis.c, tuple) else (basis.c.real, basis.c.imag)


def mode_weights(basis: Basis, readout: str, y: jax.Array) -> jax.Array:
    """w = C^T f(C y), the weights on the modes of the values, in O(M^2) a query; O(M) where C is diagonal.

    Args:
      basis: its `c` in any of the forms that Basis allows.
      readout: "transpose", "hermitian" or "real".
      y: (B, G, J, 2M) flattened planes, the response X_k q to each query.

    Returns:
      w (B, G, J, 2M).
    """
    c_re, c_im = c_planes(basis)
    re, im = _PLANE_FACTORS[readout]
    if c_re.ndim == 2:
        c = jnp.stack([c_re, c_im], axis=-2)[None, :, None]
        factors = jnp.asarray([re, im], y.dtype).reshape(1, 1, 1, 2, 1)
        return flatten_planes(complex_multiply(c, factors * complex_multiply(c, to_planes(y))))
    t_re, t_im = c_re.swapaxes(-1, -2), c_im.swapaxes(-1, -2)
    to_u = complex_matrix(c_re, c_im)
    to_w = jnp.block([[t_re * re, -t_im * im], [t_im * re, t_re * im]])
    equation, order = "gom,gmn,bgjn->bgjo", [(1, 2), (0, 1)]
    return jnp.einsum(equation, to_w, to_u, y, precision="highest", optimize=order)


def readout_table(basis: Basis, readout: str) -> jax.Array:
    """The map from y to w = C^T f(C y) as an array: (G, 2M, 2M) on flattened planes; (G, 2, 2, M) where C is diagonal.

    `apply_readout` applies either.
    """
    c_re, c_im = c_planes(basis)
    G, M = basis.a_log.shape
    if c_re.ndim == 3:
        eye = jnp.broadcast_to(jnp.eye(2 * M, dtype=c_re.dtype)[None, None], (1, G, 2 * M, 2 * M))
        return mode_weights(basis, readout, eye)[0].swapaxes(-1, -2)
    units = jnp.broadcast_to(jnp.eye(2, dtype=c_re.dtype)[None, None, :, :, None], (1, G, 2, 2, M))  # 1 and i
    return to_planes(mode_weights(basis, readout, flatten_planes(units))[0]).swapaxes(1, 2)


def linear_readout_row(basis: Basis, c_out: jax.Array) -> jax.Array:
    """c_out^T C as a row (G, 2M) that reads Re(c_out^T C X) off flattened planes of X, from c_out (G, M)."""
    c_re, c_im = c_planes(basis)
    if c_re.ndim == 2:
        return jnp.concatenate([c_out * c_re, -c_out * c_im], axis=-1)
    rows = (jnp.einsum("gm,gmn->gn", c_out, c, precision="highest") for c in (c_re, -c_im))
    return jnp.concatenate(list(rows), axis=-1)

"""The paper's ideal layer (eq. 3-9): kernel features of the keys and the values, projected online on polynomials.

Two approximations of kernel regression, sum_s K(q, k_s) v_s / sum_s K(q, k_s), each with its own size:

* R random features stand for the kernel, K(q, k) ~ xi(q)^T xi(k) (eq. 3-5);
* M scaled Legendre polynomials over [0, t] stand for the past (HiPPO-LegS, eq. 6): after t tokens, token s having
  lasted from s - 1 to s, row n of U, Gamma and eta is (1/t) int_0^t f(s) g_n(s/t) ds of the keys' features, of the
  values and of f = 1, with the orthonormal g_n(x) = sqrt(2n + 1) P_n(2x - 1).

The zero-order hold of LegS, t dc/dt = -A c + B f, is c_t = E c_{t-1} + A^-1 (I - E) B f_t. Since A e_0 = B, that is

    c_t = c_{t-1} + (E - I) (c_{t-1} - e_0 f_t),   E = exp(-A ln(t / (t-1))),   c_1 = e_0 f_1,   and eta = e_0:

no matrix is inverted, and the denominator of eq. 8 is xi(q)^T u_0, free of error for any M.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idattn.choices import FEATURES, check_choice
from idattn.ops.arguments import check_heads, check_segments, check_shape
from idattn.ops.segments import PADDING, Segments, document_positions
from idattn.shapes import SegmentIds


class IdealState(NamedTuple):
    """The state of the ideal layer after a token."""

    coefficients: jax.Array  # (B, H, M, R + E): U, then Gamma
    position: jax.Array  # (B,) int32, tokens of the document so far


def draw_frequencies(seed: int, kind: str, num_features: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal frequencies for `random_features`, (*shape, n) float64: the same numbers for a seed everywhere.

    Args:
      seed: of NumPy's default generator.
      kind: "positive", "fourier" or "softmax".
      num_features: R, even for "fourier", which makes two features of a frequency.
      shape: (width,) of the vectors whose features are wanted, or (H, width) for H sets of frequencies.

    Raises:
      ValueError: `kind` is unknown, or `num_features` is odd for "fourier" or below 1.
    """
    check_choice("kind", kind, FEATURES)
    pairs = kind == "fourier"
    if num_features < 1 or (pairs and num_features % 2):
        raise ValueError(f"{num_features=} of {kind=} must be at least 1{', and even: a cosine and a sine' * pairs}.")
    return np.random.default_rng(seed).standard_normal((*shape, num_features // 2 if pairs else num_features))


def random_features(x: jax.Array, frequencies: jax.Array | np.ndarray, kind: str) -> jax.Array:
    """xi(x), for which E[xi(q)^T xi(k)] is a kernel, over standard normal frequencies w.

    Args:
      x: (..., width).
      frequencies: (width, n), or with leading axes that x has too.
      kind: for the kernel exp(-|q - k|^2 / 2) "fourier", [cos(w^T x), sin(w^T x)] / sqrt(n) (Bochner), whose products
        with few features or far from all keys may be negative; or "positive", exp(w^T x - |x|^2) / sqrt(n), whose
        products cannot. For softmax's kernel exp(q^T k) "softmax", exp(w^T x - |x|^2 / 2) / sqrt(n), positive too.

    Returns:
      (..., R) with R = 2n for "fourier" and n for the others.

    Raises:
      ValueError: `kind` is unknown.
    """
    check_choice("kind", kind, FEATURES)
    scale = 1 / math.sqrt(frequencies.shape[-1])
    angle = jnp.einsum("...d,...dn->...n", x, frequencies, precision="highest")
    if kind == "fourier":
        return scale * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return scale * jnp.exp(angle - (square / 2 if kind == "softmax" else square))


def legs_change(position: jax.Array, num_modes: int, dtype: jnp.dtype) -> jax.Array:
    """E - I with E = exp(-A ln(t / (t - 1))), (..., M, M), for the token that `position` = t - 1 tokens precede.

    E turns a signal's coefficients over [0, t - 1] into those over [0, t] of the signal that continues with zero. Its
    entries are therefore (1 - 1/t) int_0^1 g_n((1 - 1/t) x) g_k(x) dx. Gauss's rule of M nodes integrates them exactly,
    with numbers of the size of the result; the eigenvectors of A are powers of x, conditioned like 6^M. The recursion
    of the polynomials computes the differences P_n(x') - P_n(x). Entries that are near zero for large t therefore have
    no rounding error of the size of I, which would add up over the tokens.

    Args:
      position: (...) integers from 0, for which the result is -I.
      num_modes: M.
      dtype: float32 or float64.
    """
    nodes, _ = np.polynomial.legendre.leggauss(num_modes)
    degrees = np.arange(num_modes)
    at_nodes = np.polynomial.legendre.legvander(nodes, num_modes - 1)  # (nodes, M)
    weights = 1 / (at_nodes**2 @ (2 * degrees + 1))  # Christoffel's formula: 100 times as accurate as leggauss
    step = 1 / (position.astype(dtype) + 1)
    lead = [1] * position.ndim

    def constant(x, *shape):
        return jnp.asarray(x, dtype).reshape(*lead, *shape)

    shift = -step[..., None] * constant(nodes + 1, -1)  # x' - x
    moved = constant(nodes, -1) + shift

    def higher(differences, degree):  # Bonnet's recursion
        before, this = differences
        n, polynomial = degree
        following = ((2 * n + 1) * (moved * this + shift * polynomial) - n * before) / (n + 1)
        return (this, following), this

    zero = jnp.zeros_like(shift)
    polynomials = jnp.asarray(at_nodes.T, dtype).reshape(num_modes, *lead, -1)
    _, differences = jax.lax.scan(higher, (zero, zero), (jnp.asarray(degrees, dtype), polynomials))
    norms = np.sqrt(2 * degrees + 1)
    onto = jnp.asarray(weights[:, None] * at_nodes * norms, dtype)
    product = jnp.einsum("n...i,ik->...nk", differences, onto, precision="highest") * constant(norms, -1, 1)
    step, eye = step[..., None, None], constant(np.eye(num_modes), num_modes, num_modes)
    return jnp.where(position[..., None, None] == 0, -eye, (1 - step) * jnp.tril(product) - step * eye)


def ideal_step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: IdealState, *, floor: float = 1e-6
) -> tuple[jax.Array, IdealState]:
    """One token of `ideal_attention`.

    Args:
      q: (B, H, R) features of the queries.
      k: (B, H, R) features of the keys.
      v: (B, H, E) values.
      state: before the token.
      floor: as in `ideal_attention`.

    Returns:
      The outputs (B, H, E) in the dtype of `v`, and the state after the token.

    Raises:
      ValueError: shapes do not fit.
    """
    coefficients, position = state
    _check("B", q, k, v, coefficients, coefficients.shape[2])
    dtype, R, M = coefficients.dtype, q.shape[-1], coefficients.shape[2]
    f = jnp.concatenate([k, v], axis=-1).astype(dtype)
    starts = position[:, None, None, None] == 0  # there E = 0, but adding -I would leave rounding errors
    coefficients = jnp.where(starts, 0, coefficients)
    change = legs_change(position, M, dtype)
    coefficients += jnp.einsum("bnm,bhmw->bhnw", change, coefficients.at[:, :, 0].add(-f), precision="highest")
    u, gamma = coefficients[..., :R], coefficients[..., R:]
    xi_u = jnp.einsum("bhr,bhmr->bhm", q.astype(dtype), u, precision="highest")
    numerator = jnp.einsum("bhm,bhme->bhe", xi_u, gamma, precision="highest")
    denominator = xi_u[:, :, :1]  # sum_m xi_u eta_m with eta = e_0
    unsafe = denominator <= floor
    o = jnp.where(unsafe, gamma[:, :, 0], numerator / jnp.where(unsafe, 1, denominator))
    return o.astype(v.dtype), IdealState(coefficients, position + 1)


def ideal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    num_modes: int,
    *,
    segment_ids: SegmentIds | Segments | None = None,
    initial_state: IdealState | None = None,
    floor: float = 1e-6,
) -> tuple[jax.Array, IdealState]:
    """The ideal layer of features and values (eq. 8), token by token: o_t reads tokens 1..t.

        o = sum_m (xi(q)^T u_m) gamma_m / sum_m (xi(q)^T u_m) eta_m

    The denominator estimates the mean of K(q, k_s), which is positive. Where the estimate is at most `floor`, no key is
    near the query or the features are too few. The output there is the mean of the values, gamma_0, which an
    infinitely wide kernel would give, and no gradient passes through the denominator. So no output exceeds
    |numerator| / floor. With features that are at least 0, this happens only where the kernel itself is that small.

    A token costs M^2 (R + E) operations a head and M^3 a row, and the backward pass stores the coefficients of every
    token. So this is a reference for small models, not a layer to scale.

    Args:
      q: (B, T, H, R) features of the queries, `random_features`.
      k: (B, T, H, R) features of the keys.
      v: (B, T, H, E) values.
      num_modes: M, at least 1.
      segment_ids: (B, T) integers. A change from one token to the next starts a new document; -1 marks padding, whose
        output is 0 and which leaves the state as it is.
      initial_state: as returned by an earlier call, to resume from there; None to start anew.
      floor: greater than 0; see above.

    Returns:
      The outputs (B, T, H, E) in the dtype of `v`, and the state after each row's last token that is not padding;
      it is float32, or float64 if an input is.

    Raises:
      ValueError: shapes do not fit, or a number is out of its range.
    """
    if num_modes < 1 or not floor > 0:
        raise ValueError(f"{num_modes=} must be at least 1, and {floor=} greater than 0.")
    dtype = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    _check("B T", q, k, v, None if initial_state is None else initial_state.coefficients, num_modes)
    (B, T, H, R), E = q.shape, v.shape[3]
    if initial_state is None:
        initial_state = IdealState(jnp.zeros((B, H, num_modes, R + E), dtype), jnp.zeros(B, jnp.int32))
    segments = check_segments(jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids, B, T)
    assert segments is not None, "there are ids"
    positions, end = document_positions(segments, initial_state.position)
    is_token = segments.run != PADDING
    # Whatever padding holds, NaN included, must not reach the products: their gradients would be NaN too.
    q, k, v = (jnp.where(is_token[..., None, None], x, 0) for x in (q, k, v))

    def advance(coefficients, inputs):
        q, k, v, position, is_token = inputs
        o, after = ideal_step(q, k, v, IdealState(coefficients, position), floor=floor)
        is_token = is_token[:, None, None]
        return jnp.where(is_token[..., None], after.coefficients, coefficients), jnp.where(is_token, o, 0)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, positions, is_token))
    coefficients, o = jax.lax.scan(advance, initial_state.coefficients.astype(dtype), inputs)
    return jnp.moveaxis(o, 0, 1), IdealState(coefficients, end)


def _check(axes: str, q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array | None, num_modes: int) -> None:
    """The shapes of tokens with the leading axes `axes`, and of coefficients (B, H, M, R + E)."""
    check_heads(axes, q, k, v)
    check_shape("k", k, q.shape, "that of q")
    if state is not None:
        shape = (q.shape[0], q.shape[-2], num_modes, q.shape[-1] + v.shape[-1])
        check_shape("the state", state, shape, "B H M R+E")

"""Complex numbers as real planes, for hot paths and for hardware that has none.

Two forms of M complex numbers: *planes* (..., 2, M), the real parts and then the imaginary parts, for elementwise
arithmetic; and *flattened planes* (..., 2M), the same memory, for matrix products.
"""

import math

import jax
import jax.numpy as jnp


def to_planes(x: jax.Array) -> jax.Array:
    """Flattened planes (..., 2M) as planes (..., 2, M)."""
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)


def flatten_planes(x: jax.Array) -> jax.Array:
    """Planes (..., 2, M) as flattened planes (..., 2M)."""
    return x.reshape(*x.shape[:-2], 2 * x.shape[-1])


def complex_multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of planes (..., 2, M); the leading axes broadcast, and both have as many."""
    x_re, x_im, y_re, y_im = (jax.lax.index_in_dim(z, i, -2, keepdims=False) for z in (x, y) for i in (0, 1))
    return jnp.stack([x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re], axis=-2)


def multiply_flattened(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of flattened planes (..., 2M), which broadcast; on TPUs it fills registers, as planes do not."""
    (a, b), (c, d) = (jnp.split(z, 2, axis=-1) for z in (x, y))
    return jnp.concatenate([a * c - b * d, a * d + b * c], axis=-1)


def conjugate(x: jax.Array) -> jax.Array:
    """The complex conjugate of planes (..., 2, M)."""
    return x * jnp.asarray([1, -1], x.dtype).reshape(*[1] * (x.ndim - 2), 2, 1)


def real_part_row(x: jax.Array) -> jax.Array:
    """The row y of flattened planes (..., 2M) whose real product with flattened z is Re(sum_m x_m z_m): conj(x)."""
    re, im = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([re, -im], axis=-1)


def complex_matrix(re: jax.Array, im: jax.Array) -> jax.Array:
    """The real matrix (..., 2M, 2N) that multiplies flattened planes as the complex one (..., M, N) does."""
    return jnp.block([[re, -im], [im, re]])


def powers(x: jax.Array, count: int) -> jax.Array:
    """x^0 ... x^count, (count + 1, *x.shape), of planes x (..., 2, M), by repeated squaring: no large phase appears."""
    table = jnp.zeros_like(x).at[..., 0, :].set(1)[None]
    square = x
    for _ in range(math.ceil(math.log2(count + 1))):
        table = jnp.concatenate([table, complex_multiply(table, square[None])])
        square = complex_multiply(square, square)
    return table[: count + 1]


def power(x: jax.Array, count: jax.Array, largest: int) -> jax.Array:
    """x^count, (B, *x.shape), of planes x (..., 2, M) for counts (B,) from 0 to `largest`, by repeated squaring."""
    one = jnp.zeros_like(x).at[..., 0, :].set(1)
    result, square = jnp.broadcast_to(one[None], (count.shape[0], *x.shape)), x
    for bit in range(largest.bit_length()):
        is_set = (count >> bit & 1).reshape(-1, *[1] * x.ndim) == 1
        result = jnp.where(is_set, complex_multiply(result, square[None]), result)
        square = complex_multiply(square, square)
    return result

"""Matrix products of rounded operands, accumulated in float32 or better, on every platform."""

import jax
import jax.numpy as jnp


def einsum_f32(equation: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """An einsum of two operands rounded to `dtype`; the result is float32 (float64 for float64)."""
    x, y = x.astype(dtype), y.astype(dtype)
    if jnp.dtype(dtype).itemsize > 2:
        return jnp.einsum(equation, x, y, precision="highest")

    def native(x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def widened(x, y):  # XLA has no CPU code for some layouts of bfloat16 x bfloat16 = float32
        return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=native)

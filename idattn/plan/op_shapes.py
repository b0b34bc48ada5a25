"""The shapes that the op is measured at: the paper's four scales, and one for a machine without an accelerator."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idattn.ops import Basis
from idattn.ops.discretize import s4d_inv_frequencies


class OpShape(NamedTuple):
    """Heads and widths of one layer."""

    H: int
    G: int
    R: int
    E: int
    M: int


SHAPES = {
    "125M": OpShape(12, 12, 64, 64, 64),
    "350M": OpShape(16, 16, 64, 64, 64),
    "760M": OpShape(16, 16, 96, 96, 64),
    "1.3B": OpShape(32, 32, 64, 64, 64),
    "cpu": OpShape(4, 4, 64, 64, 64),
}


def abstract_inputs(shape: OpShape, B: int, T: int, dtype):
    """q, k, v, basis and a cotangent of the outputs as shapes."""
    H, G, R, E, M = shape
    q, k, v, g = (jax.ShapeDtypeStruct((B, T, *s), dtype) for s in ((H, R), (G, R), (G, E), (H, E)))
    parameters: list[Any] = [jax.ShapeDtypeStruct((G, *(M,) * n), jnp.float32) for n in range(3)]  # for arrays
    vector, matrix, cube = parameters
    return q, k, v, Basis(vector, matrix, matrix, (cube, cube)), g


def random_inputs(shape: OpShape, B: int, T: int, dtype, seed: int = 0):
    """The same with the values that a layer has at the start of training, roughly."""
    rng = np.random.default_rng(seed)
    q, k, v, basis, g = jax.tree.map(lambda x: rng.normal(size=x.shape), abstract_inputs(shape, B, T, dtype))
    G, M = shape.G, shape.M
    c_re, c_im = (jnp.asarray(plane / math.sqrt(32 * M), jnp.float32) for plane in basis.c)
    basis = Basis(
        jnp.asarray(rng.uniform(math.log(1e-3), math.log(1e-1), G), jnp.float32),
        jnp.full((G, M), math.log(0.5), jnp.float32),
        jnp.tile(s4d_inv_frequencies(M), (G, 1)),
        (c_re, c_im),
    )
    q, k, v, g = (jnp.asarray(x, dtype) for x in (q / math.sqrt(shape.R), k, v, g))
    return q, k, v, basis, g

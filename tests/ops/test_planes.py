"""Complex numbers as real planes, against numpy's complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.helpers import assert_close

from idattn.ops import planes

M = 5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draw(rng, *shape):
    """Complex numbers of size up to about 1, and their planes."""
    x = rng.normal(size=(2, *shape)) / 2
    return x[0] + 1j * x[1], jnp.asarray(np.stack(list(x), axis=-2), jnp.float32)


def as_complex(x):
    x = np.asarray(x, np.float64)
    return x[..., 0, :] + 1j * x[..., 1, :]


def test_flattened_planes_are_the_same_memory(rng):
    _, x = draw(rng, 3, M)
    flat = planes.flatten_planes(x)
    assert flat.shape == (3, 2 * M)
    np.testing.assert_array_equal(flat, np.asarray(x).reshape(3, -1))
    np.testing.assert_array_equal(planes.to_planes(flat), x)


def test_products_and_conjugates(rng):
    (x, x_planes), (y, y_planes) = draw(rng, 3, 1, M), draw(rng, 1, 4, M)
    assert_close(as_complex(planes.complex_multiply(x_planes, y_planes)), x * y, "float32", reduction=2)
    np.testing.assert_array_equal(as_complex(planes.conjugate(x_planes)), as_complex(x_planes).conj())


def test_the_row_that_reads_a_real_part(rng):
    (x, x_planes), (y, y_planes) = draw(rng, M), draw(rng, M)
    row = planes.real_part_row(planes.flatten_planes(x_planes))
    assert_close(row @ planes.flatten_planes(y_planes), (x * y).sum().real, "float32", reduction=2 * M)


def test_a_matrix_of_planes_multiplies_as_the_complex_one(rng):
    matrix, matrix_planes = draw(rng, 4, M)
    x, x_planes = draw(rng, M)
    real = planes.complex_matrix(matrix_planes[..., 0, :], matrix_planes[..., 1, :])
    product = planes.to_planes(real @ planes.flatten_planes(x_planes))
    assert_close(as_complex(product), matrix @ x, "float32", reduction=2 * M)


@pytest.mark.parametrize("count", [0, 1, 6, 8])
def test_powers(rng, count):
    x, x_planes = draw(rng, 2, M)
    table = planes.powers(x_planes, count)
    assert table.shape == (count + 1, 2, 2, M)
    for n in range(count + 1):
        assert_close(as_complex(table[n]), x**n, "float32", reduction=max(n, 1), name=f"power {n}")
    counts = jnp.asarray([0, count // 2, count])
    assert_close(
        as_complex(planes.power(x_planes, counts, count)),
        np.stack([x ** int(n) for n in counts]),
        "float32",
        reduction=max(count, 1),
    )


def test_powers_of_a_fast_phase_lose_no_digits():
    """Repeated squaring of lambda, where exp of one large phase would lose digits to the phase's rounding."""
    lam = np.exp(1j * 3.0)
    x = jnp.asarray([[lam.real], [lam.imag]], jnp.float32)
    exact = as_complex(x)[0] ** 4096
    power = as_complex(jax.jit(planes.power, static_argnums=2)(x, jnp.asarray([4096]), 4096))
    assert_close(power[0], [exact], "float32", reduction=4096)

"""Runs of equal ids against a loop, for ids of every type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idattn.ops import find_segments
from idattn.ops.arguments import check_segments

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_runs_of_integers_of_any_kind(dtype):
    """From JAX and from NumPy; the largest number is an id, also where -1 has its last bits."""
    most = np.iinfo(dtype).max
    values = np.array([0, 1, most, -1 if dtype.startswith("int") else most - 1], dtype)
    ids = np.random.default_rng(0).choice(values, (20, 9))
    ids[0] = values[3]
    run, last = np.zeros((20, 9), int), np.full(20, -1)
    for b, t in np.ndindex(ids.shape):
        run[b, t] = t and run[b, t - 1] + (ids[b, t] != ids[b, t - 1])
        last[b] = last[b] if ids[b, t] == -1 else t
    expected = np.where(ids == -1, -1, run)
    with jax.enable_x64(True):
        from_jax = find_segments(jnp.asarray(ids))
    for segments in (find_segments(ids), from_jax, check_segments(ids, 20, 9)):
        assert (segments.run.dtype, segments.last.dtype) == (jnp.int32, jnp.int32)
        np.testing.assert_array_equal(segments.run, expected)
        np.testing.assert_array_equal(segments.last, last)


@pytest.mark.parametrize("dtype", ["bool", "float32", "complex64"])
def test_other_types_are_refused(dtype):
    for find in (find_segments, lambda ids: check_segments(ids, 2, 3), jax.jit(find_segments)):
        for zeros in (np.zeros, jnp.zeros):
            with pytest.raises(ValueError, match=f"segment_ids of dtype {dtype} must be integers"):
                find(zeros((2, 3), dtype))

"""The GPU kernels without a GPU: refused by name and never taken by itself. tests/plan compiles them.

test_contract.py judges their numbers, interpreted, next to those of the other backends.
"""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from idattn.ops import interdomain_attention, pallas_gpu
from idattn.plan.op_shapes import OpShape, abstract_inputs, random_inputs

op = functools.partial(interdomain_attention, backend="pallas_gpu")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_are_refused(platform):
    *inputs, _ = abstract_inputs(OpShape(2, 2, 16, 16, 4), 1, 140, jnp.bfloat16)
    traced = jax.jit(lambda *inputs: pallas_gpu.requires("cuda", "pallas_gpu") + len(inputs)).trace(*inputs)
    with pytest.raises(NotImplementedError, match="'pallas_gpu'.*another platform than NVIDIA GPU.*'chunkwise'"):
        traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_named_backend_does_not_fall_back(compiled):
    *inputs, _ = random_inputs(OpShape(2, 2, 16, 16, 4), 1, 140, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'pallas_gpu'.*'chunkwise'"):
        (jax.jit(op) if compiled else op)(*inputs)


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk_size", "words"),
    [
        (OpShape(2, 2, 16, 16, 4), "bfloat16", 96, "64, 128, 192 or 256, not 96"),
        (OpShape(2, 2, 16, 16, 4), "float32", 128, "bfloat16 or float16.*float32"),
        (OpShape(2, 2, 40, 16, 4), "bfloat16", 128, "multiples of 16.*R=40"),
        (OpShape(1, 1, 64, 512, 64), "bfloat16", 64, "at most 256.*E=512"),
        (OpShape(1, 1, 64, 64, 64), "bfloat16", 256, "KiB of shared memory.*chunk_size=256.*smaller chunk_size"),
    ],
)
def test_what_the_kernels_need_is_said(shape, dtype, chunk_size, words):
    *inputs, _ = abstract_inputs(shape, 1, 256, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=f"'pallas_gpu' needs .*{words}.*'chunkwise'"):
        jax.eval_shape(functools.partial(op, chunk_size=chunk_size), *inputs)


@pytest.mark.parametrize("capability", ["7.5", "8.9", "10.0"])
def test_other_gpus_are_refused(monkeypatch, capability):
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(pallas_gpu, "get_default_device", lambda: gpu)
    *inputs, _ = abstract_inputs(OpShape(2, 2, 64, 64, 64), 1, 256, jnp.bfloat16)
    with pytest.raises(ValueError, match=f"compute capability 9.0 .*8.0 .*not {capability}.*'chunkwise'"):
        jax.eval_shape(op, *inputs)


def test_ampere(monkeypatch):
    """Which has less shared memory, and is compiled for from jax 0.12 on."""
    gpu = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(pallas_gpu, "get_default_device", lambda: gpu)
    *inputs, _ = abstract_inputs(OpShape(2, 2, 64, 64, 64), 1, 256, jnp.bfloat16)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    with pytest.raises(ValueError, match=r"needs jax 0.12 for compute capability 8.0 \(A100\), not .*'chunkwise'"):
        jax.eval_shape(op, *inputs)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    with pytest.raises(ValueError, match="KiB of shared memory for chunk_size=128.*163 KiB.*smaller chunk_size"):
        jax.eval_shape(functools.partial(op, chunk_size=128), *inputs)
    assert pallas_gpu.requirement(*inputs[:3], 64, 64, jnp.dtype("float32")) is None


def test_auto_does_not_take_the_kernels():
    *inputs, _ = abstract_inputs(OpShape(2, 2, 64, 64, 64), 1, 256, jnp.bfloat16)
    text = jax.jit(interdomain_attention).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text

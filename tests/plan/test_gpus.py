"""Programs compiled for GPUs that are not there, by their compiler."""

import jax
import jax.numpy as jnp
import pytest

from idattn.chips import CHIPS
from idattn.ops import interdomain_attention
from idattn.plan.compiler import compile_for
from idattn.plan.gpus import GPUS, gpu_devices, gpu_of
from idattn.plan.op_shapes import SHAPES, abstract_inputs


def test_names():
    assert [gpu_of(name) for name in ("h100:8", "a100", "t4:1", "v5e:2x2")] == ["H100", "A100", "T4", None]
    for wrong in ("h100:0", "h100:2x2", "2xh100:8", "v5e:2x2"):
        with pytest.raises(ValueError, match="must be as h100:8"):
            gpu_devices(wrong)


def test_every_gpu_has_its_peaks():
    assert all(min(CHIPS[name][1:4]) > 0 for name in GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_devices(gpu_compile, name):
    devices = gpu_devices(f"{name.lower()}:4")
    assert {x.device_kind for x in devices} == {CHIPS[name].kinds[0]} and len(devices) == 4


@pytest.mark.parametrize("name", GPUS)
def test_the_op_compiles(gpu_compile, name):
    """Forward, on every card; of T4 in float16, as it has no bfloat16."""
    dtype = jnp.float16 if name == "T4" else jnp.bfloat16
    *inputs, _ = abstract_inputs(SHAPES["cpu"], 1, 300, dtype)
    compiled = compile_for(name.lower(), interdomain_attention, *inputs)
    (o,) = jax.tree.leaves(compiled.out_info)
    assert (o.shape, o.dtype) == ((1, 300, 4, 64), dtype)
    assert compiled.memory_analysis().temp_size_in_bytes > 0

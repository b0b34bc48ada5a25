"""Figures of a kernel that can be counted by hand."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from idattn.chips import CHIPS
from idattn.ops.softmax import splash
from idattn.plan.hlo import kernel_call, parse
from idattn.plan.schedules import find_kernels


def blocked_product(x, y):
    """x (32, 64) times y (64, 48), rows in blocks of 8, columns of 16, y's block staying for all rows."""

    def kernel(x_ref, y_ref, z_ref):
        z_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    return pl.pallas_call(
        kernel,
        grid=(3, 4),
        in_specs=[pl.BlockSpec((8, 64), lambda j, i: (i, 0)), pl.BlockSpec((64, 16), lambda j, i: (0, j))],
        out_specs=pl.BlockSpec((8, 16), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 48), jnp.float32),
        name="blocked_product",
    )(x, y)


@pytest.mark.parametrize(("chip", "cycles"), [("v5e", 8 / 4), ("v6e", 8 / 4)])
def test_traffic_and_products_of_a_kernel(chip, cycles):
    x, y = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    (kernel,) = find_kernels(jax.make_jaxpr(jax.jit(blocked_product))(x, y).jaxpr)
    assert (kernel.name, kernel.steps) == ("blocked_product", 12)
    assert kernel.hbm_bytes == 3 * 32 * 64 * 2 + 64 * 48 * 2 + 32 * 48 * 4  # x again for every block of columns
    assert kernel.mxu_cycles(CHIPS[chip]) == 12 * cycles
    assert kernel.operands == ("bf16[32,64]", "bf16[64,48]")
    json.dumps([kernel.steps, kernel.hbm_bytes])  # which an integer of numpy's would refuse


def test_masked_blocks_of_splash_attention_do_not_count():
    """Four by four blocks, of which ten are on the diagonal or below it, in both passes."""
    q = jax.ShapeDtypeStruct((3, 2048, 2, 128), jnp.bfloat16)
    traced = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(splash(q, q, q).astype(jnp.float32))))(q)
    kernels = find_kernels(traced.jaxpr)
    assert len(kernels) == 2 and all(x.name.startswith("splash_mha") for x in kernels)
    for kernel in kernels:
        assert (kernel.steps, kernel.working_steps) == (3 * 2 * 16, 3 * 2 * 10)
    (other,) = find_kernels(jax.make_jaxpr(blocked_product)(jnp.ones((32, 64)), jnp.ones((64, 48))).jaxpr)
    assert other.working_steps == other.steps


def test_a_call_in_hlo_is_that_of_its_kernel():
    """The names and shapes by which a schedule is found: those of the equation, without what XLA adds."""
    line = (
        "  %blocked_product.7 = f32[32,48]{1,0:T(8,128)} custom-call(%x, %y), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[32,64]{1,0}, bf16[64,48]{1,0}}, '
        "frontend_attributes={kernel_metadata={}}"
    )
    x, y = jax.ShapeDtypeStruct((32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 48), jnp.bfloat16)
    (kernel,) = find_kernels(jax.make_jaxpr(blocked_product)(x, y).jaxpr)
    (call,) = parse(f"ENTRY %main () -> f32[] {{\n{line}\n}}")["ENTRY"].values()
    assert kernel_call(call) == (kernel.name, kernel.operands)
    newer = call._replace(name="blocked_product.7.refs_1_.refs_2_")
    assert kernel_call(newer) == (kernel.name, kernel.operands)
    assert kernel_call(call._replace(line=line.replace("tpu_custom_call", "AllocateBuffer"))) is None

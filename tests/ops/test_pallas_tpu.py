"""The TPU kernels without a TPU: compiled by its compiler, chosen by platform, refused by name.

test_contract.py judges their numbers, interpreted, next to those of the other backends.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idattn.ops import adaptive_attention, interdomain_attention, prepare_heads
from idattn.ops.prepare import HeadInputs, Preparation
from idattn.plan.compiler import compile_for
from idattn.plan.op_shapes import SHAPES, OpShape, abstract_inputs, random_inputs

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# A program for few heads is short, and heads of 96 channels cross tiles, as those of 760M do.
FEW_HEADS = {"few heads": OpShape(4, 4, 96, 96, 64)}
QUICK = [("v5e:2x2", "125M", "bfloat16"), ("v6e:2x2", "few heads", "float32")]
ALL = [(t, s, d) for t in TOPOLOGIES for s in ("125M", "760M", "1.3B") for d in ("bfloat16", "float32")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK]
ODD = {
    "heads share a state": OpShape(16, 4, 64, 64, 64),
    "widths that are no tiles": OpShape(3, 3, 96, 32, 70),
    "many modes": OpShape(4, 4, 128, 64, 256),
    "more heads than fit": OpShape(16, 16, 128, 128, 128),
}


def op(q, k, v, basis, g, segment_ids, *, backend="pallas_tpu"):
    """Outputs, final state and all cotangents."""

    def forward(q, k, v, basis, state):
        options = dict(segment_ids=segment_ids, initial_state=state, return_state=True)
        return interdomain_attention(q, k, v, basis, backend=backend, **options)

    B, _, G, R = k.shape
    state = jnp.zeros((B, G, R + v.shape[3], 2 * basis.a_log.shape[1]))
    (o, state), pullback = jax.vjp(forward, q, k, v, basis, state)
    return o, state, pullback((g, state))


def damped(q, k, v, basis, g, segment_ids, gains, state, core="fixed"):
    """Outputs, final state and all cotangents of damped corrections."""

    def forward(q, k, v, basis, gains, state):
        return adaptive_attention(
            q, k, v, basis, gains=gains, log_steps=None if core == "fixed" else gains, readout="hermitian",
            write="damped", segment_ids=segment_ids, initial_state=state,
        )  # fmt: skip

    outputs, pullback = jax.vjp(forward, q, k, v, basis, gains, state)
    return outputs, pullback((g, outputs[1]))


def damped_inputs(shape, B, T, dtype):
    state = jax.ShapeDtypeStruct((B, shape.G, shape.R + shape.E, 2 * shape.M), jnp.float32)
    ids, gains = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B, T, shape.G), jnp.float32)
    return *abstract_inputs(shape, B, T, jnp.dtype(dtype)), ids, gains, state


def compile_op(topology, shape, dtype, T=300, segments=True):
    inputs = abstract_inputs(shape, 2, T, jnp.dtype(dtype))
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32) if segments else None
    return compile_for(topology, op, *inputs, ids).as_text()


def compile_preparation(topology, shape, dtype, B=2, T=300):
    """Keys as the layer prepares them, with all that may be done, and their cotangents."""
    C, R = shape.G * shape.R, shape.R
    array = jax.ShapeDtypeStruct
    inputs = HeadInputs(
        x=array((B, T, C), jnp.dtype(dtype)),
        taps=array((4, C), jnp.float32),
        conv_bias=array((C,), jnp.float32),
        tail=array((B, 3, C), jnp.dtype(dtype)),
        scale=array((R,), jnp.float32),
        bias=array((C,), jnp.float32),
        rotary=array((B, T, 2 * R), jnp.float32),
        positions=array((B, T), jnp.int32),
    )

    def gradients(inputs, d_y):
        def forward(arrays):
            arrays = arrays._replace(rotary=inputs.rotary, positions=inputs.positions)
            return prepare_heads(arrays, Preparation(R, activate=True, eps=1e-6))

        return jax.vjp(forward, inputs._replace(rotary=None, positions=None))[1](d_y)

    return compile_for(topology, gradients, inputs, inputs.x).as_text()


@pytest.mark.parametrize(("topology", "shape", "dtype"), [*QUICK, *SLOW])
def test_the_kernels_compile(libtpu, topology, shape, dtype):
    sizes = (SHAPES | FEW_HEADS)[shape]
    text = compile_op(topology, sizes, dtype) + compile_preparation(topology, sizes, dtype)
    for kernel in ("interdomain_forward", "interdomain_starts", "interdomain_backward", "prepare_backward"):
        assert kernel in text
    corrected = compile_for(topology, damped, *damped_inputs(sizes, 2, 300, dtype)).as_text()
    assert corrected.count('custom_call_target="tpu_custom_call"') == 3, "no other kernel, and no loop over chunks"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_compile(libtpu, shape, dtype):
    assert "interdomain_backward" in compile_op("v5e:2x2", ODD[shape], dtype, segments=False)
    corrected = compile_for("v5e:2x2", damped, *damped_inputs(ODD[shape], 2, 300, dtype)).as_text()
    assert "interdomain_backward" in corrected


def test_auto_takes_the_kernels_where_compiled_for_a_tpu():
    inputs = abstract_inputs(SHAPES["cpu"], 1, 256, jnp.bfloat16)
    traced = jax.jit(functools.partial(op, backend="auto")).trace(*inputs, None)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    chunkwise = jax.jit(functools.partial(op, backend="chunkwise")).trace(*inputs, None)
    assert "tpu_custom_call" not in chunkwise.lower(lowering_platforms=("tpu",)).as_text()


def test_auto_takes_the_kernels_for_damped_corrections_without_a_clock():
    inputs = damped_inputs(SHAPES["cpu"], 1, 256, jnp.bfloat16)
    counts = {
        core: str(jax.make_jaxpr(functools.partial(damped, core=core))(*inputs)).count("pallas_call")
        for core in ("fixed", "clock")
    }
    assert counts == {"fixed": 3, "clock": 0}


@pytest.mark.parametrize("function", [functools.partial(op, backend="auto"), damped], ids=["paper", "damped"])
def test_length_may_be_symbolic(function):
    """Derivatives included."""
    (T,) = jax.export.symbolic_shape("t")
    inputs = damped_inputs(SHAPES["cpu"], 1, T, jnp.bfloat16)
    inputs = inputs if function is damped else inputs[:-2]
    assert jax.export.export(jax.jit(function))(*inputs).out_avals[0].shape[1] == T


def test_auto_is_chunkwise_elsewhere():
    inputs = random_inputs(OpShape(2, 2, 16, 16, 4), 1, 140, jnp.float32)
    outputs = [jax.jit(functools.partial(op, backend=backend))(*inputs, None) for backend in ("auto", "chunkwise")]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


@pytest.mark.parametrize("compiled", [True, False])
def test_named_kernels_do_not_fall_back(compiled):
    inputs = random_inputs(OpShape(2, 2, 16, 16, 4), 1, 140, jnp.float32)
    with pytest.raises(NotImplementedError, match="'pallas_tpu'.*'chunkwise'"):
        (jax.jit(op) if compiled else op)(*inputs, None)


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk_size", "words"),
    [
        (OpShape(2, 2, 16, 16, 4), "float32", 64, "multiple of 128, not 64"),
        (OpShape(2, 2, 16, 16, 4), "float16", 128, "bfloat16 or float32.*float16"),
        (OpShape(2, 2, 40, 16, 4), "float32", 128, "multiples of 16.*R=40"),
        (OpShape(1, 1, 128, 128, 4096), "float32", 128, "VMEM.*M=4096"),
    ],
)
def test_what_the_kernels_need_is_said(shape, dtype, chunk_size, words):
    q, k, v, basis, _ = abstract_inputs(shape, 1, 256, jnp.dtype(dtype))

    def run(backend):
        f = functools.partial(interdomain_attention, backend=backend, chunk_size=chunk_size)
        return jax.eval_shape(f, q, k, v, basis)

    with pytest.raises(ValueError, match=f"'pallas_tpu' needs .*{words}.*'chunkwise'"):
        run("pallas_tpu")
    assert run("auto").shape == (1, 256, shape.H, shape.E)

"""The kernels of `pallas_gpu` compiled for GPUs that are not there, and what registers they spill.

Each case is compiled by a process of its own, as a process compiles Mosaic's kernels for the first GPU that it meets.
"""

import ast
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from idattn.ops import interdomain_attention
from idattn.plan.compiler import compile_for
from idattn.plan.gpus import load_gpu_compiler
from idattn.plan.op_shapes import OpShape, abstract_inputs

# Bytes that forward and backward may spill, a few more than docs/kernels.md records.
CASES = [
    ("h100", OpShape(4, 4, 64, 64, 64), 64, True, 64, 256),
    ("h100", OpShape(4, 4, 64, 64, 64), 128, True, 512, 2048),
    ("h100", OpShape(4, 2, 64, 64, 64), 128, False, 512, 2048),
    ("h100", OpShape(2, 2, 96, 96, 64), 64, False, 512, 2048),
    ("h100", OpShape(2, 2, 32, 48, 20), 64, True, 512, 2048),
]
if jax.__version_info__ >= (0, 12):
    CASES.append(("a100", OpShape(4, 4, 64, 64, 64), 64, True, 128, 256))
ARCHITECTURES = {"h100": "sm_90a", "a100": "sm_80"}


def compile_op(topology, shape, chunk_size, segments):
    """The op and its gradients; prints how many of its calls are Mosaic's."""

    def op(q, k, v, basis, g, ids, state):
        options = dict(segment_ids=ids, initial_state=state, return_state=True)

        def forward(*inputs):
            return interdomain_attention(*inputs, backend="pallas_gpu", chunk_size=chunk_size, **options)

        (o, state), pullback = jax.vjp(forward, q, k, v, basis)
        return o, state, pullback((g, state))

    ids = jax.ShapeDtypeStruct((2, 300), jnp.int32) if segments else None
    inputs = abstract_inputs(shape, 2, 300, jnp.bfloat16)
    state = jax.ShapeDtypeStruct((2, shape.G, shape.R + shape.E, 2 * shape.M), jnp.float32) if segments else None
    text = compile_for(topology, op, *inputs, ids, state).as_text()
    print("calls", text.count("mosaic_gpu"))


@pytest.mark.parametrize(("topology", "shape", "chunk_size", "segments", "forward_spills", "backward_spills"), CASES)
def test_the_kernels_compile(gpu_compile, topology, shape, chunk_size, segments, forward_spills, backward_spills):
    command = [sys.executable, __file__, repr((topology, tuple(shape), chunk_size, segments))]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1"})
    said = process.stdout + process.stderr
    assert process.returncode == 0, said
    calls = re.search(r"calls (\d+)", process.stdout)
    assert calls and int(calls[1]) >= 2
    pattern = r"function 'interdomain_(\w+?)_mosaic\w+' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = {x[1]: x.groups()[1:] for x in re.finditer(pattern, said, re.DOTALL)}
    print(topology, shape, chunk_size, kernels)
    assert kernels.keys() == {"forward", "chain"}
    assert {architecture for architecture, *_ in kernels.values()} == {ARCHITECTURES[topology]}
    assert int(kernels["forward"][1]) <= forward_spills
    assert int(kernels["chain"][1]) <= backward_spills


if __name__ == "__main__":
    load_gpu_compiler()
    topology, shape, *options = ast.literal_eval(sys.argv[1])
    compile_op(topology, OpShape(*shape), *options)

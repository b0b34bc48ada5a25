"""What a TPU would do with the op, from the compiler of a machine without one: memory, traffic, bundles, MXU bound.

python -m launch.tpu_schedule --shape=1.3B --topology=v5e:2x2 --direction=forward --segments

One line a Pallas kernel, per head and 128 tokens:

  bundles   VLIW bundles of a grid step as libtpu schedules it, "empty" ones (stalls) included, about its cycles: all
            code of the step, also what runs in some steps only. DMA waits are not in it, hence the next column.
  HBM       bytes that the grid moves, a block counting whenever its index changes from one step to the next, tables,
            states and all; the ratio is to q, k, v in and o out (backward: these, their cotangents and that of o).
  MXU       cycles of the step's matrix products if every array were always busy, rows entering one a cycle and an
            array half filled counting as whole.

With --program also the temporary memory of the compiled program, and the FLOPs of what XLA computes outside of the
kernels.
"""

import glob
import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.extend.core import jaxpr_as_fun

from idattn.ops import interdomain_attention
from launch.op_shapes import SHAPES, abstract_inputs
from launch.tpu_compiler import DUMP, compile_for, load_compiler

FLAGS = flags.FLAGS
# Arrays a core and their width, as the published peaks have it (v6e: 918 TFLOP/s are four of 256 at 1.75 GHz).
MXUS = {"v5e": (4, 128), "v5p": (4, 128), "v6e": (4, 256)}


def define_flags() -> None:
    flags.DEFINE_multi_enum("shape", ["1.3B"], list(SHAPES), "Named shapes; may be given several times.")
    flags.DEFINE_multi_string("topology", ["v5e:2x2"], "TPU topologies, as v5e:2x2, v5p:2x2x1, v6e:2x2.")
    flags.DEFINE_multi_enum("direction", ["forward", "backward"], ["forward", "backward"], "Of the op.")
    flags.DEFINE_string("backend", "pallas_tpu", "Backend of the op.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of q, k and v.")
    flags.DEFINE_integer("seq_len", 4096, "T, tokens.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "B, sequences.", lower_bound=1)
    flags.DEFINE_bool("segments", True, "Whether documents are packed.")
    flags.DEFINE_bool("program", False, "Compile the whole program too, for memory and FLOPs; takes minutes.")
    flags.DEFINE_string("json", None, "File to write the figures to.")


class Kernel(NamedTuple):
    """A Pallas kernel and what it costs in all of its grid."""

    call: Any  # the equation that calls it
    name: str
    steps: int  # of the grid
    hbm_bytes: int
    mxu_cycles: float


def find_kernels(function, *arguments, chip: str) -> list[Kernel]:
    """The Pallas kernels that `function` calls."""
    return [
        Kernel(
            call=eqn,
            name=eqn.params["name"],
            steps=math.prod(eqn.params["grid_mapping"].grid),
            hbm_bytes=_traffic(eqn.params["grid_mapping"]),
            mxu_cycles=math.prod(eqn.params["grid_mapping"].grid) * _mxu_cycles(eqn.params["jaxpr"], chip),
        )
        for eqn in _equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if eqn.primitive.name == "pallas_call"
    ]


def count_bundles(kernel: Kernel, topology: str) -> tuple[int, int]:
    """The bundles of a grid step, and how many of them are empty, from compiling the kernel alone."""
    arguments = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in kernel.call.invars]

    def alone(*arguments):
        return kernel.call.primitive.bind(*arguments, **kernel.call.params)

    alone.__name__ = kernel.name  # which XLA names the kernel after, or the kernel's own name
    compile_for(topology, alone, *arguments)
    files = glob.glob(f"{DUMP}/*{kernel.name}*schedule-analysis_packed-bundles-post-ra.txt")
    if len(files) != 1:
        raise RuntimeError(f"expected one schedule of {kernel.name} in {DUMP}, found {files}")
    with open(files[0]) as file:
        total, empty = (int(x) for x in re.findall(r"(?:total|empty) scheduled bundles:\s+(\d+)", file.read())[:2])
    return total, empty


def _equations(jaxpr):
    """All equations, also those of nested programs but for the bodies of kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _traffic(grid_mapping) -> int:
    """Bytes moved between HBM and VMEM by a walk over the grid, last axis fastest."""
    indices = [x.ravel() for x in np.indices(grid_mapping.grid)]
    total = 0
    for mapping in grid_mapping.block_mappings:
        index_map = mapping.index_map_jaxpr
        rest = [0] * (len(index_map.jaxpr.invars) - len(indices))  # prefetched scalars, which no index map here reads
        evaluate = jax.vmap(lambda *i, index_map=index_map, rest=rest: jaxpr_as_fun(index_map)(*i, *rest))
        blocks = np.stack([np.broadcast_to(x, indices[0].shape) for x in evaluate(*indices)])
        moves = 1 + int(np.count_nonzero(np.any(blocks[:, 1:] != blocks[:, :-1], axis=0)))
        size = math.prod(getattr(width, "block_size", width) for width in mapping.block_shape)
        total += moves * size * mapping.array_aval.dtype.itemsize
    return total


def _mxu_cycles(jaxpr, chip: str) -> float:
    """Cycles of one grid step's products; float32 ones in full precision are six of bfloat16."""
    count, width = MXUS[chip]
    cycles = 0
    for eqn in _equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            x, y = (v.aval for v in eqn.invars)
            depth = math.prod(x.shape[axis] for axis in contract)
            passes = 6 if x.dtype == jnp.float32 else 1
            rows, columns = x.size // depth, y.size // depth
            cycles += passes * rows * math.ceil(depth / width) * math.ceil(columns / width)
    return cycles / count


def op(direction: str):
    """(q, k, v, basis, cotangent, segment ids) -> outputs, or cotangents of all inputs."""

    def forward(q, k, v, basis, segment_ids):
        return interdomain_attention(q, k, v, basis, backend=FLAGS.backend, segment_ids=segment_ids)

    def backward(q, k, v, basis, g, segment_ids):
        return jax.vjp(lambda *x: forward(*x, segment_ids), q, k, v, basis)[1](g)

    return backward if direction == "backward" else lambda q, k, v, basis, g, ids: forward(q, k, v, basis, ids)


def report(name: str, topology: str, direction: str) -> dict[str, Any]:
    """Figures of the op at a named shape, per head and 128 tokens where not said otherwise."""
    shape, B, T = SHAPES[name], FLAGS.batch_size, FLAGS.seq_len
    inputs = abstract_inputs(shape, B, T, jnp.dtype(FLAGS.dtype))
    arguments = (*inputs, jax.ShapeDtypeStruct((B, T), jnp.int32) if FLAGS.segments else None)
    # The forward kernel is in a backward pass too, but nothing reads its results there.
    kernels = find_kernels(op(direction), *arguments, chip=topology.split(":")[0])
    kernels = [x for x in kernels if ("forward" in x.name) == (direction == "forward")]
    units = B * shape.H * T / 128
    rows = []
    for x in kernels:
        total, empty = (n * x.steps / units for n in count_bundles(x, topology))
        rows.append(dict(name=x.name, bundles=total, empty=empty, mxu=x.mxu_cycles / units, hbm_bytes=x.hbm_bytes))
    q, k, v, _, g = (x if isinstance(x, tuple) else x.size * x.dtype.itemsize for x in inputs)
    least = q + k + v + g if direction == "forward" else 2 * (q + k + v) + g
    figures = {key: sum(row[key] for row in rows) for key in ("bundles", "empty", "mxu")}
    figures["hbm_ratio"] = sum(row["hbm_bytes"] for row in rows) / least
    if FLAGS.program:
        compiled = compile_for(topology, op(direction), *arguments)
        memory = compiled.memory_analysis()
        figures |= dict(temp_bytes=memory.temp_size_in_bytes, argument_bytes=memory.argument_size_in_bytes)
        figures |= dict(output_bytes=memory.output_size_in_bytes, xla_flops=compiled.cost_analysis().get("flops"))
    return dict(shape=name, topology=topology, direction=direction, kernels=rows, **figures)


def main(_):
    load_compiler(dump=True)
    print(f"jax {jax.__version__}, {FLAGS.backend}, {FLAGS.dtype}, B = {FLAGS.batch_size}, T = {FLAGS.seq_len}", end="")
    print(", with segments" if FLAGS.segments else "")
    print(f"{'':<26}{'kernel':<22}{'bundles':>9}{'empty':>7}{'MXU':>6}{'HBM ratio':>11}{'memory':>12}{'XLA':>12}")
    rows = []
    for name in FLAGS.shape:
        for topology in FLAGS.topology:
            for direction in FLAGS.direction:
                row = report(name, topology, direction)
                rows.append(row)
                for x in row["kernels"] if len(row["kernels"]) > 1 else []:
                    print(f"{'':<26}{x['name']:<22}{x['bundles']:>9.0f}{x['empty']:>7.0f}{x['mxu']:>6.0f}")
                line = f"{f'{name} {topology} {direction}':<26}{'all':<22}{row['bundles']:>9.0f}{row['empty']:>7.0f}"
                line += f"{row['mxu']:>6.0f}{row['hbm_ratio']:>11.2f}"
                if FLAGS.program:
                    line += f"{row['temp_bytes'] / 1e6:>9.1f} MB{row['xla_flops'] / 1e9:>6.1f} GFLOP"
                print(line, flush=True)
    if FLAGS.json:
        with open(FLAGS.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    define_flags()
    app.run(main)

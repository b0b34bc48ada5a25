"""Show how a TPU would run the op's kernels, from the compiler alone: memory, traffic, bundles, products.

idattn schedule --shape=1.3B --topology=v5e:2x2 --direction=forward --segments

The table has a line for each Pallas kernel, with figures per head and 128 tokens:

  bundles   VLIW bundles of a grid step as libtpu schedules it, "empty" ones (stalls) included: about its cycles. All
            code of the step counts, also what only some steps run. Waits for DMA do not; for them see the next column.
  HBM       bytes that the grid moves, a block counting whenever its index changes from one step to the next, tables,
            states and all; the ratio is to q, k, v in and o out (backward: these, their cotangents and that of o).
  MXU       cycles of the step's matrix products if every array were always busy, rows entering one a cycle and an
            array half filled counting as whole.

--program adds the temporary memory of the compiled program, and the FLOPs of what XLA computes outside of the kernels.
"""

import json
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from idattn.chips import chip_of
from idattn.files import resolve_path, write_atomic
from idattn.ops import interdomain_attention
from idattn.plan.compiler import compile_for, load_compiler
from idattn.plan.op_shapes import SHAPES, abstract_inputs
from idattn.plan.schedules import count_bundles, find_kernels

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_multi_enum("shape", ["1.3B"], list(SHAPES), "Named shapes; may be given several times.")
    flags.DEFINE_multi_string("topology", ["v5e:2x2"], "TPU topologies, as v5e:2x2, v5p:2x2x1, v6e:2x2.")
    flags.DEFINE_multi_enum("direction", ["forward", "backward"], ["forward", "backward"], "Passes of the op.")
    flags.DEFINE_string("backend", "pallas_tpu", "Backend of the op.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of q, k and v.")
    flags.DEFINE_integer("seq_len", 4096, "T, tokens.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1, "B, sequences.", lower_bound=1)
    flags.DEFINE_bool("segments", True, "Whether documents are packed.")
    flags.DEFINE_bool("program", False, "Compile the whole program too, for memory and FLOPs; takes minutes.")
    flags.DEFINE_string("json", None, "File to write the figures to.")


def op(direction: str):
    """(q, k, v, basis, cotangent, segment ids) -> outputs, or cotangents of all inputs."""

    def forward(q, k, v, basis, segment_ids):
        return interdomain_attention(q, k, v, basis, backend=FLAGS.backend, segment_ids=segment_ids)

    def backward(q, k, v, basis, g, segment_ids):
        return jax.vjp(lambda *x: forward(*x, segment_ids=segment_ids), q, k, v, basis)[1](g)

    return backward if direction == "backward" else lambda q, k, v, basis, g, ids: forward(q, k, v, basis, ids)


def report(name: str, topology: str, direction: str, dump: str) -> dict[str, Any]:
    """Figures of the op at a named shape, per head and 128 tokens where not said otherwise."""
    shape, B, T, chip = SHAPES[name], FLAGS.batch_size, FLAGS.seq_len, chip_of(topology)
    inputs = abstract_inputs(shape, B, T, jnp.dtype(FLAGS.dtype))
    arguments = (*inputs, jax.ShapeDtypeStruct((B, T), jnp.int32) if FLAGS.segments else None)
    # The forward kernel is in a backward pass too, but nothing reads its results there.
    kernels = find_kernels(jax.make_jaxpr(op(direction))(*arguments).jaxpr)
    kernels = [x for x in kernels if ("forward" in x.name) == (direction == "forward")]
    units = B * shape.H * T / 128
    rows = []
    for x in kernels:
        total, empty = (n * x.steps / units for n in count_bundles(x, topology, dump))
        mxu = x.mxu_cycles(chip) / units
        rows.append(dict(name=x.name, bundles=total, empty=empty, mxu=mxu, hbm_bytes=x.hbm_bytes))
    q, k, v, g = (x.size * x.dtype.itemsize for x in (*inputs[:3], inputs[4]))
    least = q + k + v + g if direction == "forward" else 2 * (q + k + v) + g
    figures = {key: sum(row[key] for row in rows) for key in ("bundles", "empty", "mxu")}
    figures["hbm_ratio"] = sum(row["hbm_bytes"] for row in rows) / least
    if FLAGS.program:
        compiled = compile_for(topology, op(direction), *arguments)
        memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
        assert memory is not None and costs is not None, "the TPU's compiler has both"
        figures |= dict(temp_bytes=memory.temp_size_in_bytes, argument_bytes=memory.argument_size_in_bytes)
        figures |= dict(output_bytes=memory.output_size_in_bytes, xla_flops=costs.get("flops"))
    return dict(shape=name, topology=topology, direction=direction, kernels=rows, **figures)


def main(_):
    file = resolve_path(FLAGS.json) if FLAGS.json else None
    with tempfile.TemporaryDirectory() as dump:
        load_compiler(dump_to=dump)
        rows = show(dump)
    if file is not None:
        write_atomic(file, json.dumps(rows, indent=1))


def show(dump: str) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    print(f"jax {jax.__version__}, {FLAGS.backend}, {FLAGS.dtype}, B = {FLAGS.batch_size}, T = {FLAGS.seq_len}", end="")
    print(", with segments" if FLAGS.segments else "")
    print(f"{'':<26}{'kernel':<22}{'bundles':>9}{'empty':>7}{'MXU':>6}{'HBM ratio':>11}{'memory':>12}{'XLA':>12}")
    rows = []
    for name in FLAGS.shape:
        for topology in FLAGS.topology:
            for direction in FLAGS.direction:
                row = report(name, topology, direction, dump)
                rows.append(row)
                for x in row["kernels"] if len(row["kernels"]) > 1 else []:
                    print(f"{'':<26}{x['name']:<22}{x['bundles']:>9.0f}{x['empty']:>7.0f}{x['mxu']:>6.0f}")
                line = f"{f'{name} {topology} {direction}':<26}{'all':<22}{row['bundles']:>9.0f}{row['empty']:>7.0f}"
                line += f"{row['mxu']:>6.0f}{row['hbm_ratio']:>11.2f}"
                if FLAGS.program:
                    line += f"{row['temp_bytes'] / 1e6:>9.1f} MB{row['xla_flops'] / 1e9:>6.1f} GFLOP"
                print(line, flush=True)
    return rows

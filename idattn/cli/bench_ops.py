"""Time the op's backends next to softmax attention, forward and with gradients, once their results are right.

idattn bench-ops --shape=cpu --seq_len=4096
idattn bench-ops --shape=1.3B --seq_len=512 --seq_len=65536 --backend=chunkwise --backend=fft
idattn bench-ops --shape=1.3B --dtype=bfloat16 --topology=v5e:2x2 --backend=pallas_tpu

Each backend is first compared with the literal recurrence: outputs and all gradients, at 512 tokens at most. A time is
the best of several runs. A ratio says how many times as fast as softmax attention, written out, a backend is in this
run. Memory is what the compiled forward and backward pass takes besides its arguments and results. With --topology
everything is compiled for a TPU that need not be there, and the table has the memory only. What runs out of memory is
left out; --json is written after every row.
"""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from idattn.files import resolve_path, write_atomic
from idattn.ops import BACKENDS, interdomain_attention
from idattn.ops.softmax import splash
from idattn.plan.compiler import compile_for, is_out_of_memory, load_compiler
from idattn.plan.op_shapes import SHAPES, abstract_inputs, random_inputs

FLAGS = flags.FLAGS
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # root-mean-square error of a gradient relative to the reference
WRITTEN_OUT, FLASH = "softmax, written out", "softmax, fused"


def define_flags() -> None:
    flags.DEFINE_multi_enum("shape", ["cpu"], list(SHAPES), "Named shapes; may be given several times.")
    flags.DEFINE_multi_integer("seq_len", [4096], "T, tokens; may be given several times.", lower_bound=16)
    flags.DEFINE_multi_enum("backend", ["chunkwise"], ["auto", *BACKENDS], "Backends; may be given several times.")
    flags.DEFINE_multi_integer("chunk_size", [0], "K, may be given several times; 0: by platform.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 1, "B, sequences.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(TOLERANCE), "Dtype of q, k and v.")
    flags.DEFINE_integer("repeats", 5, "Runs, of which the best counts.", lower_bound=1)
    flags.DEFINE_float("max_gib", 8, "Softmax whose scores take more is left out.", lower_bound=0)
    flags.DEFINE_string("topology", None, "Compile for this TPU, as v5e:2x2, and only report memory.")
    flags.DEFINE_string("json", None, "File to write the table to.")


def written_out(q, k, v):
    """Causal softmax attention with its T x T matrix."""
    T, R = q.shape[1], q.shape[-1]
    scores = jnp.einsum("bthr,bshr->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(R)
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def fused(q, k, v, platform: str):
    """Causal softmax attention by the platform's best kernel; on CPU XLA's, which is written out too."""
    if platform == "tpu":
        return splash(q, k, v)
    implementation = "cudnn" if platform == "gpu" and q.dtype == jnp.bfloat16 else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def with_gradients(function):
    """(cotangent, arguments) -> the outputs and the gradients of all arguments of `function`."""

    def run(cotangent, *arguments):
        o, pull = jax.vjp(function, *arguments)
        return o, pull(cotangent.astype(o.dtype))

    return run


def backend(name: str, chunk_size: int):
    return lambda q, k, v, basis: interdomain_attention(q, k, v, basis, backend=name, chunk_size=chunk_size or None)


def worst_error(name: str, chunk_size: int, shape, dtype: str) -> float:
    """The largest root-mean-square error of outputs and gradients relative to the literal recurrence."""
    *inputs, basis, g = random_inputs(shape, 1, min(min(FLAGS.seq_len), 512), dtype)
    actual = jax.jit(with_gradients(backend(name, chunk_size)))(g, *inputs, basis)
    wide = [x.astype(jnp.float32) for x in (g, *inputs)]
    expected = jax.jit(with_gradients(backend("recurrent", 0)))(*wide, basis)

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def best_time(compiled, *arguments) -> float:
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None, "CPUs, GPUs and TPUs report it"
    return memory.temp_size_in_bytes


def measure(function, g, arguments) -> dict[str, float]:
    """Seconds of the forward pass and of both, and bytes of temporary memory of both."""
    if FLAGS.topology:
        compiled = compile_for(FLAGS.topology, with_gradients(function), g, *arguments)
        return dict(temp_bytes=temporary_bytes(compiled))
    forward = jax.jit(function).lower(*arguments).compile()
    both = jax.jit(with_gradients(function)).lower(g, *arguments).compile()
    seconds = best_time(forward, *arguments), best_time(both, g, *arguments)
    return dict(forward=seconds[0], both=seconds[1], temp_bytes=temporary_bytes(both))


def candidates(shape, platform: str):
    """Name -> (function, whether it takes the basis), and a sentence on each backend whose results are wrong."""
    functions = {WRITTEN_OUT: (written_out, False), FLASH: (lambda *x: fused(*x, platform=platform), False)}
    wrong = []
    for name in FLAGS.backend:
        for chunk_size in FLAGS.chunk_size if name not in ("recurrent", "fft") else [0]:
            label = f"{name}, K = {chunk_size}" if chunk_size else name
            error = 0.0 if FLAGS.topology else worst_error(name, chunk_size, shape, FLAGS.dtype)
            if error <= TOLERANCE[FLAGS.dtype]:
                functions[label] = (backend(name, chunk_size), True)
            else:
                wrong.append(f"{label}: relative error {error:.2e} exceeds {TOLERANCE[FLAGS.dtype]:.0e}; not timed")
    return functions, wrong


def main(_):
    file = resolve_path(FLAGS.json) if FLAGS.json else None
    if FLAGS.topology:
        load_compiler()
    device = FLAGS.topology or jax.local_devices()[0].device_kind
    platform = "tpu" if FLAGS.topology else jax.default_backend()
    print(f"jax {jax.__version__} on {device}, {FLAGS.dtype}, B = {FLAGS.batch_size}; ratios to {WRITTEN_OUT}")
    print(f"{'':<14}{'':<24}{'forward, ms':>12}{'ratio':>7}{'both, ms':>11}{'ratio':>7}{'memory, MB':>12}")
    rows, wrong = [], []
    for name in FLAGS.shape:
        functions, failures = candidates(SHAPES[name], platform)
        wrong += [f"{name}: {x}" for x in failures]
        for T in FLAGS.seq_len:
            make = abstract_inputs if FLAGS.topology else random_inputs
            q, k, v, basis, g = make(SHAPES[name], FLAGS.batch_size, T, FLAGS.dtype)
            first = None
            for label, (function, takes_basis) in tqdm(
                functions.items(), desc=f"{name}, T = {T}", leave=False, disable=None
            ):
                scores = FLAGS.batch_size * SHAPES[name].H * T * T * 4 / 2**30
                written = label == WRITTEN_OUT or (label == FLASH and platform == "cpu")
                if written and scores > FLAGS.max_gib:
                    continue
                try:
                    row = measure(function, g, (q, k, v, basis) if takes_basis else (q, k, v))
                except jax.errors.JaxRuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    tqdm.write(f"{name + f' {T}':<14}{label:<24}out of memory")
                    continue
                rows.append(dict(shape=name, seq_len=T, backend=label, device=device, **row))
                first = row if label == WRITTEN_OUT else first
                line = f"{name + f' {T}':<14}{label:<24}"
                for key, width in (("forward", 12), ("both", 11)):
                    line += f"{row[key] * 1e3:>{width}.1f}" if key in row else f"{'-':>{width}}"
                    line += f"{first[key] / row[key]:>7.2f}" if key in row and first else f"{'-':>7}"
                tqdm.write(line + f"{row['temp_bytes'] / 1e6:>12.1f}")
                if file is not None:
                    write_atomic(file, json.dumps(rows, indent=1))
    if wrong:
        raise SystemExit("\n".join(wrong))

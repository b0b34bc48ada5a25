"""Time the op beside softmax attention, forward and with gradients, in one run; nothing is timed that is wrong.

python -m launch.bench_ops --seq_len=4096 --num_heads=4 --head_dim=64 --num_modes=64

Each chunk size is first compared with the literal recurrence: outputs and all gradients, at a tenth of the length.
Times are the best of several runs; ratios say how many times faster than softmax attention written out in this run.
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from idattn.ops import Basis, interdomain_attention

SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "T, tokens.", lower_bound=16)
BATCH = flags.DEFINE_integer("batch_size", 1, "B, sequences.", lower_bound=1)
HEADS = flags.DEFINE_integer("num_heads", 4, "H.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "R = E.", lower_bound=1)
MODES = flags.DEFINE_integer("num_modes", 64, "M.", lower_bound=1)
CHUNKS = flags.DEFINE_multi_integer("chunk_size", [128], "K, may be given several times.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of q, k and v.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Runs, of which the best counts.", lower_bound=1)
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # root-mean-square error of a gradient relative to the reference


def written_out(q, k, v):
    """Causal softmax attention with its T x T matrix."""
    T, R = q.shape[1], q.shape[-1]
    scores = jnp.einsum("bthr,bshr->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(R)
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def make_inputs(seq_len: int, dtype: str):
    """q, k, v, basis as a layer has them at the start of training, and a cotangent."""
    rng = np.random.default_rng(0)
    B, H, R, M = BATCH.value, HEADS.value, HEAD_DIM.value, MODES.value
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(B, seq_len, H, R)), dtype) for _ in range(4))
    n = np.arange(M)
    basis = Basis(
        jnp.asarray(rng.uniform(math.log(1e-3), math.log(1e-1), H), jnp.float32),
        jnp.full((H, M), math.log(0.5), jnp.float32),
        jnp.asarray(np.broadcast_to(M / math.pi * (M / (2 * n + 1) - 1), (H, M)), jnp.float32),
        tuple(jnp.asarray(rng.normal(size=(H, M, M)) / math.sqrt(32 * M), jnp.float32) for _ in range(2)),
    )
    return (q / math.sqrt(R), k, v), basis, cotangent


def with_gradients(function, cotangent):
    """The outputs and the gradients of all arguments of `function`, compiled."""

    def run(*arguments):
        o, pull = jax.vjp(function, *arguments)
        return o, pull(cotangent.astype(o.dtype))

    return jax.jit(run)


def backend(name: str, chunk_size: int):
    return lambda q, k, v, basis: interdomain_attention(q, k, v, basis, backend=name, chunk_size=chunk_size)


def worst_error(chunk_size: int) -> float:
    """The largest root-mean-square error of outputs and gradients relative to the literal recurrence."""
    inputs, basis, cotangent = make_inputs(max(SEQ_LEN.value // 10, 16), DTYPE.value)
    actual = with_gradients(backend("chunkwise", chunk_size), cotangent)(*inputs, basis)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = with_gradients(backend("recurrent", chunk_size), cotangent.astype(jnp.float32))(*wide, basis)

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def best_time(function, *arguments) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def main(_):
    inputs, basis, cotangent = make_inputs(SEQ_LEN.value, DTYPE.value)
    rows = {
        "softmax, written out": (written_out, inputs),
        "jax.nn.dot_product_attention": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), inputs),
    }
    wrong = []
    for chunk_size in CHUNKS.value:
        name, error = f"chunkwise, K = {chunk_size}", worst_error(chunk_size)
        if error > TOLERANCE[DTYPE.value]:
            wrong.append(f"{name}: relative error {error:.2e} exceeds {TOLERANCE[DTYPE.value]:.0e}; not timed")
        else:
            rows[name] = (backend("chunkwise", chunk_size), (*inputs, basis))
    device = jax.local_devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, {DTYPE.value}, B T H R = {inputs[0].shape}, M = {MODES.value}")
    print(f"{'':<30}{'forward, ms':>14}{'+ gradients':>14}{'ratio':>8}{'ratio':>8}")
    first = None
    for name, (function, arguments) in rows.items():
        times = [best_time(f, *arguments) for f in (jax.jit(function), with_gradients(function, cotangent))]
        first = first or times
        ratios = "".join(f"{a / b:>8.2f}" for a, b in zip(first, times, strict=True))
        print(f"{name:<30}{times[0] * 1e3:>14.1f}{times[1] * 1e3:>14.1f}{ratios}", flush=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    app.run(main)

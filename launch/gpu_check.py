"""Check the op on this machine's GPU, and time what is right: the op, training steps, decoding. At most nine minutes.

python -m launch.gpu_check --out=runs/gpu_check

The numbers come first: each backend for GPUs is compared with the float64 recurrence, as `idattn verify` does it. Only
a backend that holds in every case that it takes is timed:

  op        outputs and all gradients of 1.3B's heads, next to cuDNN's attention, 16,384 tokens or one longer row
  training  steps of 125M and 350M on four rows of 4,096 tokens
  decoding  tokens of 1.3B, once decoding agrees with one pass; next to the bytes that must move at a copy's speed

What the time does not suffice for is left out by name, and so is what needs a package that is not there: the op needs
jax, absl-py, etils, jaxtyping and tqdm, the rest all that idattn needs. OUT/gpu_check.json is written after every
item, with device, driver and versions, and OUT/gpu_check.md is the table that is printed. The exit status is 1 if
anything was wrong, failed, or not checked. Without a GPU the program refuses; --tiny runs it all but the kernels at a
size for tests.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from idattn.chips import compute_dtype, device_peak_flops
from idattn.cli import verify
from idattn.cli.bench_ops import fused, with_gradients
from idattn.files import resolve_path, write_atomic
from idattn.ops import BACKENDS, Backend, interdomain_attention
from idattn.ops.backend import DEFAULT_CHUNK_SIZE
from idattn.plan.compiler import is_out_of_memory
from idattn.plan.op_shapes import SHAPES, OpShape, random_inputs

FLAGS = flags.FLAGS
ROWS = 4  # of a training step
Rows = list[dict[str, Any]]


class Item(NamedTuple):
    """Something to check or to time."""

    section: str  # of the report
    name: str
    seconds: float  # that it takes at most, as far as one knows
    run: Callable[[], Rows]


class Sizes(NamedTuple):
    """What is checked and timed."""

    shape: OpShape
    tokens: int  # of all rows of the op, but for a longer one
    lengths: tuple[int, ...]
    training: tuple[str, ...]  # scales of `configs.paper`
    decoding: tuple[tuple[int, int], ...]  # rows, and tokens before
    repeats: int = 5


REAL = Sizes(
    SHAPES["1.3B"], 16384, (4096, 1024, 65536, 16384, 2048, 8192, 32768), ("125M", "350M"), ((1, 512), (8, 512))
)
TINY = Sizes(OpShape(1, 1, 16, 16, 4), 16, (16,), ("125M",), ((2, 8),), repeats=1)


def define_flags() -> None:
    flags.DEFINE_string("out", "runs/gpu_check", "Folder of the report; it is made where there is none.")
    flags.DEFINE_float("seconds", 520, "What the program may take.", lower_bound=0)
    flags.DEFINE_bool("tiny", False, "Run everything at a tiny size on a CPU; the times mean nothing.")


def candidates(tiny: bool) -> list[Backend]:
    """The backends to check: XLA's, and the kernels, which only a GPU runs."""
    return [BACKENDS[name] for name in ("chunkwise", "pallas_gpu")[: 1 if tiny else 2]]


def cases(tiny: bool) -> dict[str, Callable[[], verify.Case]]:
    if not tiny:
        return verify.cases("gpu")
    small = partial(verify.op_case, TINY.shape, 1, 40, documents=True)
    return {"documents-float32": partial(small, "float32"), "documents-bfloat16": partial(small, "bfloat16")}


def check(backends: list[Backend], name: str, make: Callable[[], verify.Case], say: Callable[[str], Any]) -> Rows:
    """The rows of `idattn verify` of a case, with `needs` where a backend does not take it."""
    x, rows, able = make().x, [], []
    for backend in backends:
        needs = None
        if "q" in x:
            sizes = x["q"], x["k"], x["v"], x["a_log"].shape[1], DEFAULT_CHUNK_SIZE, x["a_log"].dtype
            needs = backend.requirement(*sizes)
        if needs:
            rows.append(dict(case=name, backend=backend.name, needs=needs))
            say(f"{name:<20}{backend.name:<12}not taken: it needs {needs}")
        else:
            able.append(backend)
    return rows + verify.check_all(able, {name: make}, say)


def right(backends: list[Backend], checks: Rows, names: Iterable[str]) -> list[Backend]:
    """The backends that held in every case that they take, once all cases were tried, at least one of the op."""
    if {row["case"] for row in checks} != {*names}:
        return []
    rows = {x.name: [row for row in checks if row["backend"] == x.name and "needs" not in row] for x in backends}
    return [
        x for x in backends if all(r["held"] for r in rows[x.name]) and any("o" in r["arrays"] for r in rows[x.name])
    ]


def time_op(sizes: Sizes, T: int, backends: list[Backend], dtype: str, platform: str) -> Rows:
    """Milliseconds of outputs and all gradients."""
    B = max(1, sizes.tokens // T)
    *qkv, basis, g = random_inputs(sizes.shape, B, T, dtype)
    cudnn = platform == "gpu" and dtype == "bfloat16"
    attention = with_gradients(partial(fused, platform=platform))
    rows = [
        dict(what="cuDNN's attention" if cudnn else "JAX's attention") | measure(attention, (g, *qkv), sizes.repeats)
    ]
    for backend in backends:
        op = with_gradients(partial(interdomain_attention, backend=backend))
        rows.append(dict(what=backend.name) | measure(op, (g, *qkv, basis), sizes.repeats))
    for row in rows:
        row |= dict(T=T, rows=B, dtype=dtype)
        if {"median"} <= row.keys() & rows[0].keys():
            row["ratio"] = rows[0]["median"] / row["median"]  # times as fast as attention
    return rows


def measure(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> dict[str, Any]:
    """What `idattn verify` measures; nothing where the memory does not suffice."""
    try:
        return verify.measure(function, arguments, repeats)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": True}


def time_training(scale: str, backend: Backend, dtype: str, tiny: bool) -> Rows:
    """Milliseconds of a step, once its loss is that of a model that knows nothing."""
    from idattn.config import MeshConfig, from_config_dict
    from idattn.config_files import load_config
    from idattn.costs import training_flops_per_token
    from idattn.data.batch import ARRAYS
    from idattn.sharding import make_mesh
    from idattn.train.step import Trainer

    config = from_config_dict(load_config(f"paper:{scale},interdomain"))
    if tiny:
        model = dataclasses.replace(config.model, vocab_size=64, model_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
        config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, seq_len=8))
    name = "chunkwise" if tiny else backend.name  # a config names a backend, and none that is interpreted
    config = dataclasses.replace(
        config,
        compute=dataclasses.replace(config.compute, dtype=dtype, backend=name),
        train=dataclasses.replace(config.train, batch_size=ROWS),
    )
    device, V, T = jax.local_devices()[0], config.model.vocab_size, config.data.seq_len
    trainer = Trainer(config, make_mesh(MeshConfig(), [device]))
    tokens = np.random.default_rng(0).integers(0, V, (ROWS, T + 1))
    arrays = dict(
        inputs=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=tokens[:, 1:] * 0, loss_mask=tokens[:, 1:] * 0 + 1
    )
    batch = {name: jnp.asarray(arrays[name], spec.dtype) for name, spec in ARRAYS.items()}
    state, metrics = trainer.step(trainer.init(), batch)
    loss = float(metrics["loss"])
    if int(metrics["not_finite"]) or abs(loss - math.log(V)) > 1:
        raise ValueError(
            f"the loss of the first step is {loss:.3f}, where log({V}) = {math.log(V):.3f} is to be expected"
        )
    seconds = []
    for _ in range(REAL.repeats):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(trainer.step(state, batch))
        seconds.append(time.perf_counter() - start)
    row = dict(what=f"{scale}, {name}", rows=ROWS, T=T, dtype=dtype, median=1e3 * float(np.median(seconds)), loss=loss)
    flops = training_flops_per_token(config.model, T) * ROWS * T
    if peak := device_peak_flops(device.device_kind):
        row["mfu"] = flops / peak / float(np.median(seconds))
    return [row | dict(tokens_per_second=ROWS * T / float(np.median(seconds)))]


def time_decoding(cells: Iterable[tuple[int, int]], dtype: str, tiny: bool) -> Rows:
    """Milliseconds of a token, once decoding agrees with one pass over the sequence."""
    from flax import nnx

    from idattn.cli import bench_decode
    from idattn.config import ComputeConfig, ModelConfig
    from idattn.costs import decode_bytes
    from idattn.inference import Decoder
    from idattn.nn import LanguageModel

    if tiny:
        config = ModelConfig(vocab_size=64, model_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    else:
        config = bench_decode.model_config("1.3B", "interdomain")
    model = nnx.jit(lambda: LanguageModel(config, ComputeConfig(dtype=dtype), rngs=nnx.Rngs(0)))()
    decoder = Decoder(model, chunk_size=512, block_size=8 if tiny else 64)
    error, tolerance = bench_decode.error_of(model, decoder), bench_decode.TOLERANCE[dtype]
    if not error <= tolerance:
        raise ValueError(f"decoding errs by {error:.1e} of one pass, tolerance {tolerance:.0e}")
    bandwidth, rows = bench_decode.copy_bandwidth(), []
    for B, prefix in cells:
        seconds = bench_decode.step_seconds(decoder, B, prefix, warmup=1, repeats=REAL.repeats)
        least = decode_bytes(config, B, prefix, dtype=dtype, state_dtype="float32") / bandwidth
        row = dict(what=f"{B} rows after {prefix}", dtype=dtype, median=1e3 * seconds, ratio=least / seconds)
        rows.append(row | dict(copy_gb_per_second=bandwidth / 1e9))
    return rows


def verdict_on_auto(report: dict[str, Any], able: list[Backend]) -> str:
    """What "auto" could do on this card, by the rule that a backend must be right and faster in a committed report."""
    if "pallas_gpu" not in [x.name for x in able]:
        return "auto keeps chunkwise: pallas_gpu did not hold here, or was not checked"
    times = {(row["T"], row["what"]): row.get("median", math.inf) for row in report["op"]}
    lengths = [T for T, what in times if what == "pallas_gpu" and (T, "chunkwise") in times]
    if not lengths:
        return "auto keeps chunkwise: the two were not timed next to one another"
    if slower := [T for T in lengths if not times[T, "pallas_gpu"] < times[T, "chunkwise"]]:
        return f"auto keeps chunkwise: pallas_gpu is not faster at T = {slower}"
    return (
        'auto could take pallas_gpu on such a card: commit this report, and add "cuda" to the platforms of its record'
    )


def driver() -> str:
    """The card and its driver, as nvidia-smi names them."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def words(section: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    place = f"T = {row['T']}, {row['rows']} rows, " if section == "op" else ""
    if "median" not in row:
        return f"{section:<10}{place}{row['what']:<32}out of memory"
    line = f"{section:<10}{place}{row['what']:<24}{row['median']:>12.3f} ms"
    if "ratio" in row:
        line += f"{row['ratio']:>8.2f} {'x attention' if section == 'op' else 'of a copy of the bytes that must move'}"
    if "tokens_per_second" in row:
        line += f"{row['tokens_per_second']:>12,.0f} tokens/s" + (f", MFU {row['mfu']:.0%}" if "mfu" in row else "")
    return line


class Run:
    """The report of a run, and the clock that it is kept by."""

    def __init__(self, out, seconds: float):
        self.out, self.deadline, self.lines = out, time.monotonic() + seconds, []
        self.report: dict[str, Any] = dict(checks=[], op=[], training=[], decoding=[], left_out=[], failed=[])
        self._pending: list[Item] = []
        self._watch = threading.Timer(seconds, self._expire)  # for an item that takes longer than one knows
        self._watch.daemon = True
        self._watch.start()

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)

    def take(self, items: list[Item]) -> None:
        """Run, in this order, the items that there is time for."""
        self._pending = [*items]
        for item in items:
            left = self.deadline - time.monotonic()
            if left < item.seconds:
                self._leave_out(item, f"it may need {item.seconds:.0f} s, {max(left, 0):.0f} s are left")
            else:
                self._run(item)
            self._pending.remove(item)
            self.write()

    def _run(self, item: Item) -> None:
        try:
            rows = item.run()
        except ImportError as error:
            self._leave_out(item, f"{error}; install it")
        except Exception as error:  # what a compiler or device says of one item is for the report, next to the others
            line = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.report["failed"].append(dict(name=item.name, why=line, traceback=traceback.format_exc()))
            self.say(f"FAILED: {item.name} ({line})")
        else:
            self.report[item.section] += rows
            if item.section != "checks":  # which have been said
                for row in rows:
                    self.say(words(item.section, row))

    def _leave_out(self, item: Item, why: str) -> None:
        self.report["left_out"].append(dict(name=item.name, why=why))
        self.say(f"left out: {item.name} ({why})")

    def write(self) -> None:
        write_atomic(self.out / "gpu_check.json", json.dumps(self.report, indent=1))
        write_atomic(self.out / "gpu_check.md", "\n".join(["```text", *self.lines, "```", ""]))

    def close(self) -> None:
        self._watch.cancel()
        self.write()

    def _expire(self) -> None:
        for item in self._pending:
            self._leave_out(item, "the time is over")
        self.write()
        os._exit(1)


def main(_):
    device, tiny = jax.local_devices()[0], FLAGS.tiny
    if device.platform != "gpu" and not tiny:
        raise SystemExit(f"launch.gpu_check needs a GPU, JAX finds {device.platform}; --tiny runs its flow on a CPU")
    sizes, dtype = (TINY if tiny else REAL), "bfloat16" if tiny else compute_dtype(device)
    run = Run(resolve_path(FLAGS.out), FLAGS.seconds)
    facts = verify.facts_of_machine() | dict(driver=driver())
    run.report |= facts
    for name, value in facts.items():
        run.say(f"{name:<20}{value}")
    table, backends = cases(tiny), candidates(tiny)
    run.take(
        [
            Item("checks", f"case {name}", 0 if tiny else 40, partial(check, backends, name, make, run.say))
            for name, make in table.items()
        ]
    )
    checks = run.report["checks"]
    if able := right(backends, checks, table):
        run.take(timed_items(sizes, able, dtype, device.platform, tiny, run.report["op"]))
    run.say(run.report.setdefault("auto", verdict_on_auto(run.report, able)))
    run.close()
    wrong = [f"{row['case']} with {row['backend']}" for row in checks if not row.get("held", True)]
    wrong += [row["name"] for row in run.report["failed"]]
    if wrong or not able:
        raise SystemExit(f"FAILED: {', '.join(wrong) or 'not all cases were tried'}; what did not hold is not timed")


def timed_items(sizes: Sizes, able: list[Backend], dtype: str, platform: str, tiny: bool, op_rows: Rows) -> list[Item]:
    """What is timed, the most telling first: what comes last is left out first."""

    def fastest() -> Backend:
        return min(able, key=lambda x: sum(r.get("median", math.inf) for r in op_rows if r["what"] == x.name))

    guesses = dict.fromkeys(("op", "training", "decoding"), 0.0) if tiny else dict(op=60, training=120, decoding=90)
    op = [
        Item("op", f"op at T = {T}", guesses["op"], partial(time_op, sizes, T, able, dtype, platform))
        for T in sizes.lengths
    ]
    steps = [
        Item(
            "training",
            f"training step of {scale}",
            guesses["training"],
            lambda scale=scale: time_training(scale, fastest(), dtype, tiny),
        )
        for scale in sizes.training
    ]
    decoding = Item("decoding", "decoding", guesses["decoding"], lambda: time_decoding(sizes.decoding, dtype, tiny))
    return [*op[:3], steps[0], decoding, *steps[1:], *op[3:]]


if __name__ == "__main__":
    define_flags()
    FLAGS.set_default("verbosity", logging.WARNING)  # else JAX logs which platforms it did not find
    app.run(main)

"""Check the op's numbers on this machine's accelerator, time it, and write a report to send in an issue.

idattn verify
idattn verify --case=documents-bfloat16 --case=heads-bfloat16 --out=runs/verify

Every backend that trains on this platform is compared with `idattn.reference`, the recurrence token by token in float64
NumPy: outputs, final states and all gradients, and the preparation of heads. An array's error is the largest difference
relative to the largest expected value, head by head where it has heads. The tolerance is 1e-6 in float32 and 4e-3 in
bfloat16, times 4 for gradients, times the root of the number of terms (in bfloat16, whose sums are float32, of
roundings). What holds in all cases is timed, and on TPUs compared with the estimates of the TPU's compiler.

OUT/report.json has versions, device, every error with its tolerance, and times; OUT/report.md is what was printed. The
exit status is 1 if anything failed.
"""

import importlib.metadata
import json
import math
import platform as machine
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from idattn import reference
from idattn.chips import CHIPS
from idattn.choices import check_choice
from idattn.files import resolve_path, write_atomic
from idattn.ops import BACKENDS, Backend, Basis, interdomain_attention, prepare_heads
from idattn.ops.prepare import HeadInputs, Preparation, rotary_table
from idattn.plan.op_shapes import SHAPES, OpShape, random_inputs
from idattn.plan.schedules import predict

FLAGS = flags.FLAGS
PACKAGES = ("idattn", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy")
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
ROUNDINGS = 8  # of a value to bfloat16, on its way through a pass of the op
HEAD_AXIS = {"o": 2, "q": 2, "k": 2, "v": 2, "state": 1, "initial_state": 1}
HEAD_AXIS |= {name: 0 for name in ("log_delta", "a_log", "a_imag", "c_re", "c_im")}
WIDTH, BASE, EPS = 64, 1e4, 0.1  # of prepared heads
Arrays = dict[str, jax.Array]


def define_flags() -> None:
    flags.DEFINE_multi_string("case", [], "What to check, by name; may be given several times. All if not given.")
    flags.DEFINE_integer("repeats", 10, "Measurements, of which median and quartiles are shown.", lower_bound=1)
    flags.DEFINE_string("out", "runs/verify", "Folder of the report; it is made where there is none.")


class Case(NamedTuple):
    """What is computed, and what judges it."""

    function: Callable[..., Arrays]  # (x, fixed, backend) -> results by name
    judge: Callable[..., reference.Arrays]  # (x and fixed, d) -> results, and the cotangents of x as d_NAME
    x: Arrays  # what is differentiated
    fixed: Arrays  # integers
    d: Arrays  # cotangents of the results
    tolerance: float  # of results
    heads: slice = slice(None)  # those that are compared


def attend(x: Arrays, fixed: Arrays, backend: str | Backend, return_state: bool = True) -> Arrays:
    basis = Basis(x["log_delta"], x["a_log"], x["a_imag"], (x["c_re"], x["c_im"]))
    options: dict[str, Any] = dict(segment_ids=fixed.get("segment_ids"), initial_state=x.get("initial_state"))
    with jax.named_scope("op"):  # else XLA puts names of transformations into those of the kernels
        o, state = interdomain_attention(x["q"], x["k"], x["v"], basis, backend=backend, return_state=True, **options)
    return {"o": o, "state": state} if return_state else {"o": o}


def prepare(x: Arrays, fixed: Arrays, backend: str | Backend) -> Arrays:
    positions = fixed["positions"]
    inputs = HeadInputs(**x, rotary=rotary_table(positions, WIDTH, BASE), positions=positions)
    return {"y": prepare_heads(inputs, Preparation(WIDTH, activate=True, eps=EPS), backend=backend)}


def with_cotangents(x: Arrays, fixed: Arrays, d: Arrays, function: Callable[..., Arrays]) -> Arrays:
    y, pull = jax.vjp(lambda x: function(x, fixed), x)
    return y | {f"d_{name}": cotangent for name, cotangent in pull(d)[0].items()}


def op_case(shape: OpShape, B: int, T: int, dtype: str, *, documents: bool, resumed: bool = False, **options) -> Case:
    """The op as a layer starts; with documents also padding; resumed from a state also decays of up to 50 a token."""
    rng = np.random.default_rng(0)
    q, k, v, basis, g = random_inputs(shape, B, T, dtype)
    x = {"q": q, "k": k, "v": v} | basis._asdict()
    x["c_re"], x["c_im"] = x.pop("c")
    d_state, state = jnp.asarray(rng.normal(size=(2, B, shape.G, shape.R + shape.E, 2 * shape.M)), jnp.float32)
    fixed = {}
    if resumed:
        x["initial_state"] = 0.1 * state
        x["a_log"] = jnp.asarray(rng.uniform(math.log(0.1), math.log(500), basis.a_log.shape), jnp.float32)
    if documents:
        ids = np.cumsum(rng.random((B, T)) < 8 / T, axis=1)
        ids[0, -(T // 9) :] = ids[-1, T // 3 : T // 3 + 20] = reference.PADDING
        fixed["segment_ids"] = jnp.asarray(ids, jnp.int32)
    tolerance = TOLERANCE[dtype] * math.sqrt(ROUNDINGS if dtype == "bfloat16" else T * shape.M)
    return Case(attend, reference.attention, x, fixed, {"o": g, "state": d_state}, tolerance, **options)


def heads_case(dtype: str) -> Case:
    """Keys of two documents a row, the first of which began five tokens earlier."""
    rng, B, T, C, W = np.random.default_rng(0), 2, 150, 256, 4
    sizes = dict(taps=(W, C), conv_bias=(C,), scale=(WIDTH,), bias=(C,))
    x = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
    arrays = jnp.asarray(rng.normal(size=(B, W - 1 + 2 * T, C)), dtype)
    x["tail"], x["x"], d_y = jnp.split(arrays, [W - 1, W - 1 + T], axis=1)
    t, border = np.arange(T), np.array([[17], [127]])
    fixed = {"positions": jnp.asarray(np.where(t < border, t + 5, t - border), jnp.int32)}
    tolerance = TOLERANCE[dtype] * math.sqrt(1 if dtype == "bfloat16" else B * T)  # only the result is rounded
    judge = partial(reference.heads, width=WIDTH, base=BASE, eps=EPS)
    return Case(prepare, judge, x, fixed, {"y": d_y}, tolerance)


def cases(platform: str) -> dict[str, Callable[[], Case]]:
    """What is checked on a platform of jax, by name. Of 32 heads every eighth is compared."""
    documents = partial(op_case, OpShape(4, 2, 32, 16, 24), 2, 301, documents=True, resumed=True)
    table: dict[str, Callable[[], Case]] = {
        "one-token": partial(op_case, OpShape(2, 2, 16, 32, 8), 3, 1, "float32", documents=False, resumed=True),
        "documents-float32": partial(documents, "float32"),
        "documents-bfloat16": partial(documents, "bfloat16"),
        "heads-float32": partial(heads_case, "float32"),
        "heads-bfloat16": partial(heads_case, "bfloat16"),
    }
    if platform == "cpu":
        return table | {"real-size": partial(op_case, SHAPES["cpu"], 1, 1024, "float32", documents=False)}
    real = partial(op_case, SHAPES["1.3B"], 1, 4096, heads=slice(None, None, 8))
    table["real-size-float32"] = partial(real, "float32", documents=False)
    return table | {"real-size": partial(real, "bfloat16", documents=True)}


def offered(platform: str) -> list[str]:
    """The backends that "auto" takes on a platform of jax, then the one that serves every platform."""
    names = {"cuda", "rocm"} if platform == "gpu" else {platform}
    return [*(name for name, x in BACKENDS.items() if names & {*x.platforms}), "chunkwise"]


def compared(case: Case, arrays: Arrays) -> reference.Arrays:
    """The heads that are compared, floating point as float64."""
    result = {}
    for name, x in arrays.items():
        axis = HEAD_AXIS.get(name.removeprefix("d_"))
        x = np.asarray(x) if jnp.issubdtype(x.dtype, jnp.integer) else np.asarray(x).astype(np.float64)
        result[name] = x if axis is None else x[(*[slice(None)] * axis, case.heads)]
    return result


def judge(case: Case, actual: Arrays, expected: reference.Arrays) -> dict[str, dict[str, Any]]:
    """Of every array the error, None where something is not finite, the tolerance, and whether it held."""
    rows = {}
    for name, x in compared(case, actual).items():
        y, axis = expected[name], HEAD_AXIS.get(name.removeprefix("d_"))
        others = tuple(i for i in range(y.ndim) if i != axis) or None  # a vector over heads counts as a whole
        largest = np.max(np.abs(y), axis=others)
        error = float(np.max(np.max(np.abs(x - y), axis=others) / np.where(largest == 0, 1, largest)))
        finite, tolerance = bool(jnp.isfinite(actual[name]).all()), case.tolerance * (4 if name.startswith("d_") else 1)
        rows[name] = dict(error=error if finite else None, tolerance=tolerance, held=finite and error <= tolerance)
    return rows


def check(case: Case, backend: str | Backend, expected: reference.Arrays) -> dict[str, Any]:
    """Whether a backend holds in a case, and in words its worst array, or the error with which it ended."""
    try:
        run = jax.jit(partial(with_cotangents, function=partial(case.function, backend=backend)))
        arrays = judge(case, run(case.x, case.fixed, case.d), expected)
    except Exception as error:  # what a compiler or a device says of one case is for the report, next to the others
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        return dict(held=False, words=words, traceback=traceback.format_exc())
    held = all(row["held"] for row in arrays.values())
    name, row = max(arrays.items(), key=lambda x: (x[1]["error"] is None, (x[1]["error"] or 0) / x[1]["tolerance"]))
    error = "is not finite" if row["error"] is None else f"errs by {row['error']:.1e}"
    return dict(held=held, words=f"{name} {error}, tolerance {row['tolerance']:.1e}", arrays=arrays)


def check_all(
    backends: Sequence[str | Backend], table: Mapping[str, Callable[[], Case]], say: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """A row, JSON-ready, for every backend in every case; each is said as it is known."""
    rows = []
    with tqdm(total=len(table) * len(backends), unit="check", leave=False, disable=None) as bar:
        for case_name, make in table.items():
            case = make()
            expected = case.judge(compared(case, case.x | case.fixed), compared(case, case.d))
            for backend in backends:
                name = backend if isinstance(backend, str) else backend.name
                rows.append(dict(case=case_name, backend=name) | check(case, backend, expected))
                verdict = "held" if rows[-1]["held"] else "FAILED"
                say(f"{case_name:<20}{name:<12}{verdict:<8}{rows[-1]['words']}")
                bar.update()
    return rows


def measure(function: Callable[..., Any], arguments: Sequence[Arrays], repeats: int) -> dict[str, float]:
    """Milliseconds of a call: the median and the quartiles."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arguments) for _ in range(calls)])
        return (time.perf_counter() - start) / calls

    seconds(1)  # loads the program
    calls = min(max(round(0.05 / seconds(1)), 1), 20)  # short ones wait together, so that to start one takes no time
    quartiles = np.percentile([1e3 * seconds(calls) for _ in range(repeats)], [50, 25, 75])
    return dict(zip(("median", "lower", "upper"), quartiles.tolist(), strict=True))


def predicted(function: Callable[..., Any], arguments: Sequence[Arrays], kind: str) -> dict[str, Any]:
    """Milliseconds of a call on a kind of device, and those of its kernels; or why there is no prediction."""
    names = [name for name, chip in CHIPS.items() if chip.cores and kind in chip.kinds]
    if not names:
        return {"no_prediction": f"idattn plans nothing for {kind}"}
    try:
        both = predict(function, arguments, "v5p:2x2x1" if names == ["v5p"] else f"{names[0]}:2x2")
    except Exception as error:  # the times are worth as much without
        return {"no_prediction": f"{type(error).__name__}: {error}".partition("\n")[0]}
    return {"predicted": 1e3 * both[0], "predicted_kernels": 1e3 * both[1]}


def time_all(backends: Sequence[str], case: Case, repeats: int, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """A row, JSON-ready, for both passes of every backend; each is said as it is known."""
    kind, rows, q = jax.local_devices()[0].device_kind, [], case.x["q"]
    say(f"times, q of {q.shape} {q.dtype}, {case.x['a_log'].shape[1]} modes:")
    for backend in backends:
        forward = partial(attend, backend=backend, return_state=False)
        arguments = case.x, case.fixed, {"o": case.d["o"]}
        both = partial(with_cotangents, function=forward)
        for name, function, n in (("forward", forward, 2), ("and gradients", both, 3)):
            row = dict(passes=name, backend=backend) | measure(function, arguments[:n], repeats)
            row |= predicted(function, arguments[:n], kind)
            words = "{median:.3f} ms (quartiles {lower:.3f} and {upper:.3f}), ".format(**row)
            if "predicted" in row:
                words += "predicted {predicted:.3f} ms, {predicted_kernels:.3f} of them in kernels".format(**row)
            else:
                words += f"no prediction: {row['no_prediction']}"
            say(f"{name:<20}{backend:<12}{words}")
            rows.append(row)
    return rows


def facts_of_machine() -> dict[str, Any]:
    """Date, device and versions."""
    device = jax.local_devices()[0]
    facts = dict(date=datetime.now(UTC).isoformat(timespec="seconds"), machine=machine.platform())
    facts |= dict(device=f"{jax.device_count()} x {device.device_kind}", platform=device.platform)
    facts["runtime"] = " ".join(device.client.platform_version.split())
    return facts | {x.name: x.version for x in importlib.metadata.distributions() if x.name in PACKAGES}


def main(_):
    out, device = resolve_path(FLAGS.out), jax.local_devices()[0]
    table, lines = cases(device.platform), []
    for name in FLAGS.case:
        check_choice("case", name, table)

    def say(line: str) -> None:
        lines.append(line)
        tqdm.write(line)

    def write() -> None:
        write_atomic(out / "report.json", json.dumps(report, indent=1))
        write_atomic(out / "report.md", "\n".join(["```text", *lines, verdict, "```", ""]))

    report = facts_of_machine()
    for name, value in report.items():
        say(f"{name:<20}{value}")
    backends, table = offered(device.platform), {name: table[name] for name in FLAGS.case or table}
    report["checks"] = check_all(backends, table, say)
    failed = [row for row in report["checks"] if not row["held"]]
    names = ", ".join(f"{row['case']} with {row['backend']}" for row in failed)
    verdict = f"FAILED: {names}" if failed else f"All {len(report['checks'])} checks held"
    verdict += f"; the report is {out / 'report.md'}"
    report["times"] = []
    write()  # before what may take long
    if right := [name for name in backends if name not in [row["backend"] for row in failed] and "real-size" in table]:
        report["times"] = time_all(right, table["real-size"](), FLAGS.repeats, say)
        write()
    if failed:
        raise SystemExit(verdict)
    print(verdict)

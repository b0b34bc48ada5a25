"""Time decoding after prefixes of many lengths, softmax next to fixed-size states, once its results are right.

idattn bench-decode --scale=cpu --prefix=128 --prefix=1024 --batch_size=1 --batch_size=4 --out=runs/decode
idattn bench-decode --scale=1.3B --dtype=bfloat16 --prefix=512 --prefix=16384 --prefix=131072
idattn bench-decode --scale=1.3B --dtype=bfloat16 --topology=v5e:2x2 --batch_size=1 --batch_size=64

The protocol is that of the paper's appendix C: random weights, a prefix that is read in chunks, and 64 tokens that one
compiled program writes. A time is the median of the timed runs, which warm-up runs precede. First of all, decoding is
compared with one pass over the whole sequence.

Next to every time stands the bound of this machine: the bytes that must move (weights, states read and written, keys
and values) divided by the bandwidth of a large copy, measured in the same run. What fits in a cache may beat the bound.
Memory is what the compiled programs take besides the weights: the context, and the temporaries of reading the prefix in
chunks and, with --whole, at once. OUT/decode.json, .md and .png are written again after every row.

With several prefixes a second table sums up as the paper's tables 11 to 14 do: the range of times up to the longest
prefix that fits, the ratio of the medians, and the memory of a prompt with the weights.

With --topology nothing runs. The programs are compiled for a TPU that need not be there, and the table has the bytes
that a token moves to and from HBM, with its share of the bytes that the end of a block moves.
"""

import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from tqdm import tqdm

from idattn.choices import MIXERS, find_mixer
from idattn.config import ComputeConfig, ModelConfig, from_config_dict
from idattn.config_files import load_config, load_module
from idattn.costs import decode_bytes
from idattn.files import resolve_path, write_atomic, write_figure
from idattn.inference import Decoder
from idattn.nn import LanguageModel
from idattn.plan.compiler import is_out_of_memory, load_compiler, tpu_devices
from idattn.plan.traffic import decode_traffic

FLAGS = flags.FLAGS
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # root-mean-square error of logits relative to the whole pass


def define_flags() -> None:
    flags.DEFINE_multi_enum(
        "scale", ["cpu"], ["cpu", *load_module("paper").SCALES], "Sizes of the model; may be given several times."
    )
    flags.DEFINE_multi_enum("mixer", ["softmax", "interdomain"], list(MIXERS), "Mixers; ratios are to the first.")
    flags.DEFINE_multi_integer("prefix", [512, 2048], "Tokens of a prefix; may be given several times.", lower_bound=1)
    flags.DEFINE_multi_integer("batch_size", [1], "Rows; may be given several times.", lower_bound=1)
    flags.DEFINE_integer("steps", 64, "Tokens that are written.", lower_bound=1)
    flags.DEFINE_integer("warmup", 5, "Runs before those that are timed.", lower_bound=0)
    flags.DEFINE_integer("repeats", 20, "Timed runs, of which the median counts.", lower_bound=1)
    flags.DEFINE_integer("chunk_size", 2048, "Tokens of the prefix that are read at a time.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", list(TOLERANCE), "Dtype of weights and activations.")
    flags.DEFINE_enum("state_dtype", "float32", ["float32", "bfloat16"], "Dtype of stored states.")
    flags.DEFINE_bool("whole", False, "Also compile reading the prefix all at once, for its memory.")
    flags.DEFINE_float("max_gib", 8, "Rows whose context takes more are left out.", lower_bound=0)
    flags.DEFINE_string("topology", None, "Compile for this TPU, as v5e:2x2, and count bytes.")
    flags.DEFINE_string("out", None, "Folder to write to.")


def model_config(scale: str, mixer: str) -> ModelConfig:
    if scale == "cpu":
        return ModelConfig(vocab_size=512, model_dim=256, num_layers=4, num_heads=4, mlp_dim=768, mixers=(mixer,))
    return from_config_dict(load_config(f"paper:{scale},{mixer}")).model


def make_decoder(model: LanguageModel, chunk_size: int) -> Decoder:
    return Decoder(model, chunk_size=chunk_size, block_size=FLAGS.steps, state_dtype=FLAGS.state_dtype)


def make_model(config: ModelConfig, *, abstract: bool) -> LanguageModel:
    def make():
        return LanguageModel(config, ComputeConfig(dtype=FLAGS.dtype), rngs=nnx.Rngs(0))

    return nnx.eval_shape(make) if abstract else nnx.jit(make)()


def error_of(model: LanguageModel, decoder: Decoder) -> float:
    """The relative root-mean-square error of the log-probabilities after a prefix and written tokens."""
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (2, 40))
    written, context, _ = decoder.decode(decoder.prefill(tokens), decoder.sampling(2))
    last = np.random.default_rng(1).integers(0, decoder.config.vocab_size, (2, 24))
    actual, _, _ = decoder.score(last, context=context)
    whole = np.concatenate([tokens, written, last], axis=1)
    logits = nnx.jit(lambda model, x: model(x)[0])(model, jnp.asarray(whole))[:, -25:-1]
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits, axis=-1)), last[..., None], axis=-1)[..., 0]
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean((expected - expected.mean()) ** 2)))


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes, the best of several."""
    x, best = jnp.zeros(2**26), float("inf")
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(10):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def step_seconds(decoder: Decoder, batch_size: int, prefix: int, *, warmup: int, repeats: int) -> float:
    """The median over the timed runs, of a block each, of the seconds of one step."""
    tokens = np.random.default_rng(2).integers(0, decoder.config.vocab_size, (batch_size, prefix))
    context = decoder.prefill(tokens, context=decoder.start(batch_size, prefix + decoder.block_size))
    sampling, times = decoder.sampling(batch_size), []
    for _ in range(warmup + repeats):
        fresh = jax.block_until_ready(decoder.fork(context, range(batch_size)))
        start = time.perf_counter()
        decoder.decode(fresh, sampling)  # returns tokens to the host, so the program is done
        times.append(time.perf_counter() - start)
    return float(np.median(times[warmup:])) / decoder.block_size


@functools.cache
def prefill_bytes(decoder: Decoder, batch_size: int, max_tokens: int) -> int:
    return decoder.lower(batch_size, max_tokens)["prefill"].compile().memory_analysis().temp_size_in_bytes


def context_bytes(decoder: Decoder, batch_size: int, max_tokens: int) -> int:
    context = jax.eval_shape(lambda: decoder.start(batch_size, max_tokens))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(context))


def measure(row: dict[str, Any], model: LanguageModel, decoder: Decoder, bandwidth: float) -> None:
    """Fill in a row of the table; one whose context exceeds --max_gib gets no times."""
    mixer, batch_size, prefix = row["mixer"], row["batch_size"], row["prefix"]
    room = prefix + FLAGS.steps
    least = row["least_bytes"] = decode_bytes(
        decoder.config, batch_size, prefix + FLAGS.steps // 2, dtype=FLAGS.dtype, state_dtype=FLAGS.state_dtype
    )
    row["context_bytes"] = context_bytes(decoder, batch_size, room)
    if row["context_bytes"] > FLAGS.max_gib * 2**30:
        return
    if FLAGS.topology:
        programs = decoder.lower(batch_size, room, device=tpu_devices(FLAGS.topology)[0])
        decode = programs["decode"].compile()
        row["token_bytes"], row["block_share_bytes"] = decode_traffic(decode.as_text(), FLAGS.steps)
        row["decode_bytes"] = decode.memory_analysis().temp_size_in_bytes
        row["prefill_bytes"] = programs["prefill"].compile().memory_analysis().temp_size_in_bytes
        return
    row["seconds"] = step_seconds(decoder, batch_size, prefix, warmup=FLAGS.warmup, repeats=FLAGS.repeats)
    row["bound_seconds"] = least / bandwidth
    row["weight_bytes"] = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    room = room if find_mixer(mixer).grows else 0  # only caches depend on it
    row["prefill_bytes"] = prefill_bytes(decoder, batch_size, room)
    if FLAGS.whole:
        whole = make_decoder(model, prefix)
        row["whole_bytes"] = prefill_bytes(whole, batch_size, room)


def write_tables(rows: list[dict[str, Any]], title: str) -> str:
    """The table of all rows and, where there are several prefixes and times, the summary."""
    has_summary = len(FLAGS.prefix) > 1 and not FLAGS.topology
    return write_table(rows, title) + ("\n\n" + write_summary(rows, FLAGS.mixer[0]) if has_summary else "")


def write_table(rows: list[dict[str, Any]], title: str) -> str:
    """The rows as a markdown table, with ratios to the first mixer."""
    columns = {
        "seconds": ("ms a step", 1e3), "bound_seconds": ("bound, ms", 1e3), "token_bytes": ("MB a token", 1e-6),
        "block_share_bytes": ("+ of a block, MB", 1e-6), "least_bytes": ("at least, MB", 1e-6),
        "context_bytes": ("context, MB", 1e-6), "prefill_bytes": ("prefill, MB", 1e-6),
        "whole_bytes": ("whole, MB", 1e-6), "decode_bytes": ("decode, MB", 1e-6),
    }  # fmt: skip
    shown = [name for name in columns if any(name in row for row in rows)]
    speed = "seconds" if "seconds" in shown else "token_bytes"
    ratio = f"{FLAGS.mixer[0]} / this"
    lines = [
        title,
        "",
        "| " + " | ".join(["scale, rows, prefix", "mixer", *(columns[c][0] for c in shown), ratio]) + " |",
    ]
    lines.append("| --- | --- |" + " ---: |" * (len(shown) + 1))
    first = {_place(row): row for row in rows if row["mixer"] == FLAGS.mixer[0]}
    for row in rows:
        cells = [f"{row[c] * columns[c][1]:,.2f}" if c in row else "" for c in shown]
        other = first.get(_place(row), {})
        cells.append(f"{other[speed] / row[speed]:.2f}" if speed in other and speed in row else "")
        lines.append("| " + " | ".join([", ".join(map(str, _place(row))), row["mixer"], *cells]) + " |")
    return "\n".join(lines)


def write_summary(rows: list[dict[str, Any]], first: str) -> str:
    """Times over the prefixes that fit, as in the paper's tables 11 to 14, with ratios to the mixer `first`."""
    lines = [
        "| scale, rows | mixer | ms a step | up to a prefix of | prompt with weights, GB | "
        + f"{first} / this, medians |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        fits = groups.setdefault((row["scale"], row["batch_size"], row["mixer"]), [])
        if "seconds" in row:
            fits.append(row)
    for (scale, batch_size, mixer), fits in groups.items():
        if not fits:
            lines.append(f"| {scale}, {batch_size} | {mixer} | | none fits | | |")
            continue
        times = {row["prefix"]: 1e3 * row["seconds"] for row in fits}
        others = {row["prefix"]: 1e3 * row["seconds"] for row in groups.get((scale, batch_size, first), [])}
        common = sorted(times.keys() & others.keys())
        ratio = (
            f"{np.median([others[n] for n in common]) / np.median([times[n] for n in common]):.2f}" if common else ""
        )
        memory = max(row["weight_bytes"] + row["context_bytes"] + row["prefill_bytes"] for row in fits)
        spread = f"{min(times.values()):,.2f}-{max(times.values()):,.2f}"
        lines.append(f"| {scale}, {batch_size} | {mixer} | {spread} | {max(times):,} | {memory / 1e9:,.2f} | {ratio} |")
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["scale"], row["batch_size"], row["prefix"]


def plot(rows: list[dict[str, Any]], file: epath.Path) -> None:
    """Draw the time of a step against the prefix, in a panel for each scale; bounds are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scales = list(dict.fromkeys(row["scale"] for row in rows))
    figure, axes = pyplot.subplots(1, len(scales), figsize=(5 * len(scales), 4), squeeze=False)
    for scale, panel in zip(scales, axes[0], strict=True):
        lines = list(dict.fromkeys((row["mixer"], row["batch_size"]) for row in rows if row["scale"] == scale))
        for i, (mixer, batch_size) in enumerate(lines):
            mine = [r for r in rows if (r["scale"], r["mixer"], r["batch_size"]) == (scale, mixer, batch_size)]
            for key, style in (("seconds", "o-"), ("bound_seconds", "--")):
                label = f"{mixer}, {batch_size} rows" if key == "seconds" else None
                panel.plot([r["prefix"] for r in mine], [r[key] * 1e3 for r in mine], style, color=f"C{i}", label=label)
        panel.set(title=scale, xlabel="tokens before", ylabel="ms a step (dashed: bound)", xscale="log", yscale="log")
        panel.legend(fontsize="small")
    figure.tight_layout()
    write_figure(file, figure, dpi=120)
    pyplot.close(figure)


def main(_):
    folder = resolve_path(FLAGS.out) if FLAGS.out else None
    if FLAGS.topology:
        load_compiler()
    bandwidth = 0.0 if FLAGS.topology else copy_bandwidth()
    where = FLAGS.topology or f"{jax.local_devices()[0].device_kind}, a copy moves {bandwidth / 1e9:.1f} GB/s"
    title = f"jax {jax.__version__} on {where}; {FLAGS.dtype}, states {FLAGS.state_dtype}, {FLAGS.steps} steps"
    rows, wrong = [], []
    for scale in FLAGS.scale:
        for mixer in FLAGS.mixer:
            config = model_config(scale, mixer)
            model = make_model(config, abstract=bool(FLAGS.topology))
            decoder = make_decoder(model, FLAGS.chunk_size)
            error = 0.0 if FLAGS.topology else error_of(model, decoder)
            if not error <= TOLERANCE["bfloat16" if FLAGS.state_dtype == "bfloat16" else FLAGS.dtype]:
                wrong.append(f"{scale}, {mixer}: relative error {error:.1e} of decoding; not timed")
                continue
            places = [(batch_size, prefix) for batch_size in FLAGS.batch_size for prefix in FLAGS.prefix]
            for batch_size, prefix in tqdm(places, desc=f"{scale}, {mixer}", leave=False, disable=None):
                rows.append(dict(scale=scale, mixer=mixer, batch_size=batch_size, prefix=prefix))
                try:
                    measure(rows[-1], model, decoder, bandwidth)
                except jax.errors.JaxRuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    tqdm.write(f"{scale}, {mixer}, {batch_size} rows after {prefix}: out of memory")
                if folder is not None:
                    write_atomic(folder / "decode.json", json.dumps({"title": title, "rows": rows}, indent=1))
                    write_atomic(folder / "decode.md", write_tables(rows, title) + "\n")
                    if timed := [row for row in rows if "seconds" in row]:
                        plot(timed, folder / "decode.png")
    if rows:
        print(write_tables(rows, title))
    if wrong:
        raise SystemExit("\n".join(wrong))

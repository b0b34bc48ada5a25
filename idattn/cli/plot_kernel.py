"""Draw w(i, j), the weight with which a key i tokens ago passes its score on to the value j tokens ago.

idattn plot-kernel --out=docs/kernel.png
idattn plot-kernel --checkpoint=runs/quickstart --out=docs/learned_kernel.png --json=runs/quickstart/blur.json

Plain linear attention is w(i, j) = [i = j]. Without a checkpoint, the figure has the basis of one head as it starts
(S4D-Inv), with M = 64 and three step sizes; C is the identity and the readout hermitian. With a checkpoint, it has
every head of the trained model next to what the run started from: w(i, j), or h(i) of linear readouts; the width of the
values that a key reaches, and its strength, against its distance (`idattn.evals.blur.Resolution`); half-life and
frequency of every mode.
"""

import io
import json
import math
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from idattn.evals.blur import LayerBlur, blur_kernel, draw_weights, plot_layers, read_layers, resolution
from idattn.files import resolve_path, write_atomic
from idattn.nn import InterdomainAttention
from idattn.train.checkpoint import load_params

FLAGS = flags.FLAGS
DELTAS, M = (0.1, 0.03, 0.01), 64


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a run, a checkpoint or exported weights, or hf:OWNER/NAME.")
    flags.DEFINE_string("out", None, "PNG file to write.", required=True)
    flags.DEFINE_string("json", None, "File to write the numbers of --checkpoint to.")
    flags.DEFINE_integer("length", 128, "Tokens of the context.", lower_bound=1)


def plot_start(length: int) -> Figure:
    """The heads that the module's docstring describes."""
    figure = Figure(figsize=(10, 3.4), dpi=80, layout="constrained")
    axes = figure.subplots(1, len(DELTAS), sharey=True)
    for cell, delta in zip(axes, DELTAS, strict=True):
        options: dict[str, Any] = dict(c="identity", readout="hermitian", delta_min=delta, delta_max=delta)
        layer = InterdomainAttention(M, 1, num_modes=M, rngs=nnx.Rngs(0), **options)
        (weights,) = np.asarray(blur_kernel(layer.core.basis(), length, "hermitian"))
        image = draw_weights(cell, weights)
        cell.set(title=f"$\\Delta$ = {delta}", xlabel="j, tokens since the value")
    axes[0].set_ylabel("i, tokens since the key")
    figure.colorbar(image, label="w(i, j), largest = 1")
    return figure


def numbers(layer: LayerBlur) -> dict:
    """A layer in JSON: lists over its heads."""
    arrays = {"half_life": layer.half_life, "frequency": layer.frequency}
    arrays |= resolution(layer.weights)._asdict() if layer.weights.ndim == 3 else {"response": layer.weights}
    lists = {
        name: [[float(f"{x:.5g}") if math.isfinite(x) else None for x in head] for head in values]
        for name, values in arrays.items()
    }
    return {"layer": layer.layer, "mixer": layer.mixer} | lists


def save(figure: Figure, path: epath.Path) -> None:
    """Write a figure with a palette: a quarter of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    data = io.BytesIO()
    image.quantize(256).save(data, format="png", optimize=True)
    write_atomic(path, data.getvalue())


def main(_):
    logging.set_verbosity(logging.WARNING)
    out, file = resolve_path(FLAGS.out), resolve_path(FLAGS.json) if FLAGS.json else None
    if FLAGS.checkpoint is None:
        if file is not None:
            raise ValueError("--json needs a --checkpoint.")
        save(plot_start(FLAGS.length), out)
        return
    config, params, step = load_params(FLAGS.checkpoint)
    layers, start = (read_layers(config, values, FLAGS.length) for values in (params, None))
    save(plot_layers(layers, start), out)
    print(f"{FLAGS.checkpoint}, step {step}; {FLAGS.length} tokens, medians of heads, at the start -> now\n")
    print("layer  mixer              half-lives, tokens   width at i = 0    strength at the middle")
    for old, new in zip(start, layers, strict=True):
        row = f"{new.layer:>5}  {new.mixer:<18} {new.half_life.min():>8,.1f} to {new.half_life.max():>7,.1f}"
        if new.weights.ndim == 3:
            pair = [resolution(layer.weights) for layer in (old, new)]
            row += "   {:>6.1f} -> {:>5.1f}".format(*(np.median(x.width[:, 0]) for x in pair))
            row += "   {:>12.2f} -> {:.2f}".format(*(np.median(x.strength[:, FLAGS.length // 2]) for x in pair))
        print(row)
    if file is not None:
        stages = {"step": step, "start": [*map(numbers, start)], "trained": [*map(numbers, layers)]}
        write_atomic(file, json.dumps(stages))

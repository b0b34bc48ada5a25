"""What the states of a model remember: each head's w(i, j), its resolution, and the eigenvalues that make it.

Written out, a mixer that queries read is linear attention whose scores reach the values of other tokens too,

    o_t = sum_{s,s' <= t} (q_t . k_s) w(t - s, t - s') v_{s'}
    w(i, j) = Re sum_{m,n} (beta_m lambda_m^i) G_mn (beta_n lambda_n^j)

with G = C^T C (readout "transpose"; "hermitian" conjugates the first factor; "real": the mean of the two), where plain
linear attention has w(i, j) = [i = j]. A linear readout has a response h(i) = Re sum_m c_out_m (C beta lambda^i)_m
instead, which no query changes. All of it is a function of the parameters alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from idattn.config import Config
from idattn.nn import LanguageModel, SSMMixer
from idattn.ops import Basis
from idattn.ops.chunks import lag_tables, make_tables
from idattn.ops.discretize import discretize, linear_readout_row


class LayerBlur(NamedTuple):
    """What the G states of a layer remember over a context of T tokens."""

    layer: int  # from 0
    mixer: str  # name of `idattn.choices.MIXERS`
    weights: np.ndarray  # w(i, j), (G, T, T); of a linear readout h(i), (G, T)
    half_life: np.ndarray  # (G, M), as of `timescales`
    frequency: np.ndarray  # (G, M)


class Resolution(NamedTuple):
    """What a head resolves at each distance i of a key, (..., T) each over a context of T tokens.

    With p_i(j) = w(i, j)^2 / sum_j w(i, j)^2 over the values of the context, `centre` is the mean of j under p_i and
    `width` its standard deviation, in tokens; NaN where the key passes nothing on. `strength` is the root of the sum,
    relative to that of the strongest distance. Plain linear attention has centre i, width 0 and strength 1; a key
    whose score goes to all values alike has centre T / 2 and width T / sqrt(12).
    """

    centre: np.ndarray
    width: np.ndarray
    strength: np.ndarray


@partial(jax.jit, static_argnames=("length", "readout"))
def blur_kernel(basis: Basis, length: int, readout: str = "transpose") -> jax.Array:
    """w(i, j), with which a key i tokens ago passes its score on to the value j tokens ago, (G, length, length).

    Args:
      basis: of G states, in float32 or float64.
      length: tokens, at least 1.
      readout: as in `idattn.ops.interdomain_attention`.
    """
    tables = make_tables(basis, length, readout)
    return jnp.einsum("gim,gjm->gij", tables.spread, tables.lags, precision="highest")


@partial(jax.jit, static_argnames="length")
def impulse_response(basis: Basis, c_out: jax.Array, length: int) -> jax.Array:
    """h(i), with which an input i tokens ago is in the output of a linear readout c_out (G, M); (G, length)."""
    lags, _ = lag_tables(basis, length)
    return jnp.einsum("gm,glm->gl", linear_readout_row(basis, c_out), lags, precision="highest")


def resolution(weights: np.ndarray) -> Resolution:
    """Where the score of a key goes, how sharply and how strongly, for w(i, j) (..., T, T) of any heads."""
    power = np.square(np.asarray(weights, np.float64))
    total = power.sum(-1)
    with np.errstate(invalid="ignore"):
        share = power / total[..., None]
        strength = np.sqrt(total / total.max(-1, keepdims=True))
    j = np.arange(power.shape[-1])
    centre = share @ j
    width = np.sqrt((share * (j - centre[..., None]) ** 2).sum(-1))
    return Resolution(centre, width, strength)


@jax.jit
def timescales(basis: Basis) -> tuple[jax.Array, jax.Array]:
    """Every mode's half-life in tokens, and its frequency in cycles per token, in [0, 1/2]; (G, M) each.

    lambda = 2^(-1 / half-life) exp(2 pi i frequency), up to the sign of the frequency; one above 1/2
    is aliased to a lower one, as in any sampled signal.
    """
    (re, im), _ = (jnp.moveaxis(x, -2, 0) for x in discretize(basis))
    half_life = jnp.log(2.0) * jnp.exp(-basis.log_delta[:, None] - basis.a_log)
    return half_life, jnp.abs(jnp.arctan2(im, re)) / (2 * jnp.pi)


def read_layers(config: Config, params: Any | None, length: int) -> list[LayerBlur]:
    """What every layer with states remembers; layers without an SSM are left out.

    Args:
      config: of the run.
      params: its parameters as nested dicts, as of `idattn.train.checkpoint.load_params`; None for those that a run
        of this config starts from.
      length: T, tokens of the context.

    Raises:
      ValueError: no layer has an SSM, or `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"{length=} must be at least 1 token.")
    if params is None:
        model = nnx.jit(lambda: LanguageModel(config.model, config.compute, rngs=nnx.Rngs(config.seed)))()
    else:
        model = nnx.merge(nnx.graphdef(LanguageModel.abstract(config.model, config.compute)), params)
    layers = []
    for layer in range(config.model.num_layers):
        repeat, place = divmod(layer, len(config.model.mixers))
        name, mixer = config.model.mixers[place], model.groups.blocks[place].mixer
        if not isinstance(mixer, SSMMixer):
            continue
        core = mixer.core
        graphdef, stacked = nnx.split(core.basis)
        basis = nnx.merge(graphdef, jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked))()
        if core.readout.by_query:
            weights = blur_kernel(basis, length, config.model.ssm.readout)
        else:
            weights = impulse_response(basis, core.c_out[repeat], length)
        layers.append(LayerBlur(layer, name, *map(np.asarray, (weights, *timescales(basis)))))
    if not layers:
        raise ValueError(f"mixers={config.model.mixers} have no SSM among them, such as interdomain or s4d.")
    return layers


def draw_weights(axes: Axes, weights: np.ndarray) -> AxesImage:
    """Draw w(i, j) (T, T) of a head, its largest absolute value as 1."""
    scale = np.abs(weights).max() or 1.0
    levels = colormaps["RdBu_r"].resampled(41)  # few colours make small files
    return axes.imshow(weights / scale, cmap=levels, vmin=-1, vmax=1, origin="lower", interpolation_stage="data")


def plot_layers(layers: Sequence[LayerBlur], start: Sequence[LayerBlur]) -> Figure:
    """Every head at the start and now, a row for each layer; width and strength against distance; the modes.

    Args:
      layers: as of `read_layers`.
      start: the same for the parameters that the run started from.
    """
    rows, columns = len(layers), max(len(layer.weights) for layer in layers)
    inches = max(0.8, 4.8 / max(rows, columns))  # of a head
    sides = (inches * columns + 0.5, inches * columns + 0.5, 5.5)
    figure = Figure(figsize=(sum(sides), max(inches * rows + 0.8, 6)), dpi=80, layout="constrained")
    *grids, right = figure.subfigures(1, 3, squeeze=False, width_ratios=sides)[0]
    for grid, name, stage in zip(grids, ("at the start", "trained"), (start, layers), strict=True):
        grid.suptitle(f"w(i, j) {name}, largest = 1")
        T = layers[0].weights.shape[-1]
        grid.supxlabel(f"j, value 0 to {T} tokens ago")
        grid.supylabel(f"i, key 0 to {T} tokens ago")
        axes = grid.subplots(rows, columns, squeeze=False)
        for row, layer in zip(axes, stage, strict=True):
            row[0].set_ylabel(f"layer {layer.layer}")
            for cell, weights in zip(row, layer.weights, strict=True):
                cell.set(xticks=[], yticks=[])
                if weights.ndim == 2:
                    draw_weights(cell, weights)
                else:
                    cell.plot(weights, linewidth=1)
    is_queried = any(layer.weights.ndim == 3 for layer in layers)
    *curves, modes = np.ravel(right.subplots(3 if is_queried else 1, 1))
    for number, (old, new) in enumerate(zip(start, layers, strict=True)):
        untrained = dict(color="lightgray", label=None if number else "at the start", zorder=1)
        trained: dict[str, Any] = dict(color=colormaps["viridis"](0.9 * number / max(rows - 1, 1)), zorder=2)
        trained["label"] = f"layer {new.layer}" if number in (0, rows - 1) else None
        for blur, style in ((old, untrained), (new, trained)):
            modes.scatter(blur.half_life, blur.frequency, s=4, **style)
            if blur.weights.ndim == 3:
                _, width, strength = resolution(blur.weights)
                for axes, values in zip(curves, (width, strength), strict=True):
                    axes.plot(np.nanmedian(values, axis=0), **style)
    for axes, name in zip(curves, ("width, tokens", "strength"), strict=False):
        axes.set(xlabel="i, tokens since the key", ylabel=f"{name}\n(median of heads)", ylim=(0, None))
        axes.grid(alpha=0.3)
    modes.set(xlabel="half-life of a mode, tokens", ylabel="cycles per token", xscale="log", yscale="log")
    right.legend(*modes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure

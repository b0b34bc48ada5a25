"""The layer read as a Gaussian process: how uncertain the value of each query is, given what the state has stored.

The prior of a head is a linear map from features to values: for each channel of values, f(x) = x^T W with
W ~ N(0, I / size), where `size` is the mean of |k_s|^2 so far, so that f of a typical key has variance 1. A value is
f(k_s) and white noise of variance `noise`. Observed are the 2M real numbers that the state has of the channel,
X_v = Phi v with Phi_ms = beta_m lambda_m^(t - s), real and imaginary parts. With X_k = Phi k, what the state has of the
keys, the covariances are

    Kuu = X_k X_k^T / size,  k_uq = X_k q / size,  k_qq = q^T q / size,  Cov[X_v] = Kuu + noise Phi Phi^T

and Phi Phi^T follows from the basis and t alone. The posterior mean is k_qu Cov[X_v]^-1 X_v, of which the layer's
output is a form with a learned matrix for the inverse: C^H C under readout "hermitian", and under "transpose" one that
is no covariance's inverse. The variance is a share

    1 - k_qu Cov[X_v]^-1 k_uq / k_qq = q^T (I + X_k^T (Phi Phi^T)^-1 X_k / (noise size))^-1 q / q^T q

of the prior's, in (0, 1], the same for all channels and every invertible C: 1 where the state has nothing of the
query's direction. It depends on keys and queries, not on values. With `noise` = 1, the value of a typical key is as
much noise as it is a function of the key.

Where modes resemble each other, Phi Phi^T is singular in floating point, and no layer could read their difference.
So `ROUNDING` times its trace is added to its diagonal: noise of what is stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from scipy.stats import rankdata

from idattn.config import Config
from idattn.evals.scores import progress
from idattn.files import write_figure
from idattn.nn import LanguageModel
from idattn.nn.documents import find_documents
from idattn.nn.ssm import SSMCore
from idattn.ops import Basis
from idattn.ops.chunks import decay_state, lag_tables
from idattn.ops.discretize import discretize

ROUNDING = 1e-5
RESAMPLES, MIN_ROWS, BINS = 1000, 10, 10
CONTROLS = ("position", "frequency", "target frequency")
CONTROL_SETS = {"position and frequencies": CONTROLS, "these and entropy": (*CONTROLS, "entropy")}


@jax.jit
def posterior_variance(q: jax.Array, k: jax.Array, basis: Basis, noise: float | jax.Array = 1.0) -> jax.Array:
    """The posterior variance of every query's value relative to its prior variance, (B, T, H) in (0, 1].

    Args:
      q: (B, T, H, R) queries, none of them 0; token t's reads the state after token t.
      k: (B, T, G, R) keys, from an empty state; G divides H.
      basis: of the G states, in float32 or float64, in which all is computed.
      noise: variance of a value's noise relative to that of the function of a typical key, above 0.
    """
    B, T, H, R = q.shape
    G = k.shape[2]
    lags, _ = lag_tables(basis, T)  # (G, T, 2M)
    lam, _ = discretize(basis)
    q, k = q.reshape(B, T, G, H // G, R).astype(lags.dtype), k.astype(lags.dtype)
    size = jnp.cumsum(jnp.sum(k**2, -1), 1) / jnp.arange(1, T + 1, dtype=k.dtype)[None, :, None]
    eye, wide_eye = jnp.eye(R, dtype=k.dtype), jnp.eye(lags.shape[-1], dtype=k.dtype)

    def advance(carry, inputs):
        state, gram = carry  # X_k^T (B, G, R, 2M), and Phi Phi^T (G, 2M, 2M)
        q_t, k_t, size_t, lag = inputs
        state = decay_state(lam[None], state) + k_t[..., None] * lags[None, :, :1]
        gram = gram + lag[:, :, None] * lag[:, None]
        root = jnp.linalg.cholesky(gram + ROUNDING * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] * wide_eye[None])
        columns = state.transpose(1, 3, 0, 2).reshape(G, -1, B * R)
        white = jax.lax.linalg.triangular_solve(root, columns, left_side=True, lower=True).reshape(G, -1, B, R)
        known = jnp.einsum("gmbr,gmbs->bgrs", white, white, precision="highest") / (noise * size_t)[..., None, None]
        known = jnp.linalg.cholesky(eye[None, None] + known)
        left = jax.lax.linalg.triangular_solve(known, q_t.swapaxes(-1, -2), left_side=True, lower=True)
        return (state, gram), jnp.sum(left**2, -2) / jnp.sum(q_t**2, -1)

    empty = jnp.zeros((B, G, R, lags.shape[-1]), k.dtype), jnp.zeros((G, *wide_eye.shape), k.dtype)
    inputs = (*(jnp.moveaxis(x, 1, 0) for x in (q, k, size)), jnp.moveaxis(lags, 1, 0))
    _, variance = jax.lax.scan(advance, empty, inputs)
    return jnp.moveaxis(variance, 0, 1).reshape(B, T, H)


def read_rows(model: LanguageModel, tokens: jax.Array, noise: float) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Of rows (B, T), each from an empty state, (B, T - 1) float32 each: loss, entropy, and the layers' log variances.

    They are the loss of token t + 1 and the entropy of the model's distribution of it, in nats, and for every layer
    that `is_readable` the mean over heads of the log of `posterior_variance` at token t.
    """
    x = model.embed(tokens)
    documents, _ = find_documents(None, jnp.zeros(tokens.shape[0], jnp.int32), tokens.shape, model.config)
    graphdef, stacked = nnx.split(model.groups)
    variances = []
    for repeat in range(model.repeats):
        group = nnx.merge(graphdef, jax.tree.map(lambda p, repeat=repeat: p[repeat], stacked))
        for block in group.blocks:
            if is_readable(block.mixer):
                normed, mixer = block.mixer_norm(x), block.mixer
                projected = {name: getattr(mixer, name)(normed) for name in ("key", "value", "query")}
                q, k, _, _ = mixer.core.heads(projected, documents)
                variances.append(jnp.log(posterior_variance(q, k, mixer.core.basis(), noise)).mean(-1)[:, :-1])
            x, _ = block(x, documents, None)

    def score(row):  # the logits of a row at a time
        hidden, targets = row
        log_probs = jax.nn.log_softmax(model.head(hidden[None])[0].astype(jnp.float32))
        nats = -jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0]
        return nats, -jnp.sum(jnp.exp(log_probs) * log_probs, -1)

    loss, entropy = jax.lax.map(score, (model.final_norm(x)[:, :-1], tokens[:, 1:]))
    return loss, entropy, variances


def is_readable(mixer: Any) -> bool:
    """Whether a mixer has queries that read a state whose steps no token sets and whose writes only add."""
    core = getattr(mixer, "core", None)
    return type(core) is SSMCore and core.readout.by_query


def measure(config: Config, params: Any, rows: np.ndarray, batch_size: int, noise: float) -> dict[str, np.ndarray]:
    """The loss of every token but the first of rows, and what could predict it, (N, T - 1) each.

    Args:
      config: of the run.
      params: its parameters as nested dicts.
      rows: (N, T) integer tokens, each row from an empty state.
      batch_size: rows that are read together.
      noise: as in `posterior_variance`.

    Returns:
      `loss`, "layer N" and `entropy` as of `read_rows`; `all`, the mean over layers; `position` of token t in its row;
      `frequency`, how often that token is in all rows, and `target frequency`, how often token t + 1 is.

    Raises:
      ValueError: no layer has a posterior variance, or there are fewer than `MIN_ROWS` rows.
    """
    abstract = LanguageModel.abstract(config.model, config.compute)
    pattern = [is_readable(block.mixer) for block in abstract.groups.blocks]
    if not any(pattern):
        raise ValueError(
            f"mixers={config.model.mixers} with core={config.model.ssm.core!r} and write={config.model.ssm.write!r} "
            "have no posterior variance, which needs queries that read a state of fixed steps: interdomain's, with "
            "core='fixed' and write='add'."
        )
    if len(rows) < MIN_ROWS:
        raise ValueError(f"{len(rows)} rows of {rows.shape[1]} tokens must be at least {MIN_ROWS}, for a bootstrap.")
    graphdef = nnx.graphdef(abstract)
    read = jax.jit(lambda params, tokens: read_rows(nnx.merge(graphdef, params), tokens, noise))
    parts = []
    for first in progress(range(0, len(rows), batch_size), "posterior"):
        batch = np.take(rows, range(first, first + batch_size), axis=0, mode="clip")  # the last row fills a batch
        parts.append(jax.device_get(read(params, batch)))
    loss, entropy, layers = jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *parts)
    numbers = np.flatnonzero(pattern * abstract.repeats)
    counts = np.bincount(rows.ravel())
    return {
        "loss": loss,
        **{f"layer {number}": x for number, x in zip(numbers, layers, strict=True)},
        "all": np.mean(layers, axis=0),
        "position": np.broadcast_to(np.arange(rows.shape[1] - 1), loss.shape),
        "frequency": counts[rows[:, :-1]],
        "target frequency": counts[rows[:, 1:]],
        "entropy": entropy,
    }


def correlate(values: Mapping[str, np.ndarray], seed: int) -> dict[str, tuple[float, float, list[float]]]:
    """Spearman's correlation of everything with the loss, and the partial ones of variances, by bootstrap over rows.

    A partial correlation is that of ranks, given the ranks of a set of `CONTROL_SETS`. Ranks are those in the whole
    text; resamples of rows keep them.

    Args:
      values: (N, n) each, as of `measure`; N rows are resampled.
      seed: of the resamples.

    Returns:
      For each "NAME" and "NAME given SET" the correlation, its standard error and its 95 % interval.
    """
    names = list(values)
    ranks = np.stack([rankdata(x).reshape(x.shape) for x in values.values()])
    ranks = (ranks - ranks.mean((1, 2), keepdims=True)) / ranks.std((1, 2), keepdims=True)
    columns = np.concatenate([ranks, np.ones_like(ranks[:1])])  # with the ones, products have the means too
    products = np.einsum("prt,qrt->rpq", columns, columns)
    sums = np.einsum("xr,rpq->xpq", resample(len(products), seed), products)
    means = sums[:, :-1, -1] / sums[:, -1:, -1]
    covariance = sums[:, :-1, :-1] / sums[:, -1:, -1:] - means[:, :, None] * means[:, None]

    def partial(name: str, controls: Sequence[str]) -> tuple[float, float, list[float]]:
        index = [names.index(x) for x in (name, "loss", *controls)]
        inverse = np.linalg.inv(covariance[:, index][:, :, index])
        rho = -inverse[:, 0, 1] / np.sqrt(inverse[:, 0, 0] * inverse[:, 1, 1])
        return float(rho[0]), float(rho[1:].std()), np.quantile(rho[1:], (0.025, 0.975)).tolist()

    variances = [name for name in names if name == "all" or name.startswith("layer")]
    results = {name: partial(name, ()) for name in names if name != "loss"}
    for label, controls in CONTROL_SETS.items():
        results |= {f"{name} given {label}": partial(name, controls) for name in variances}
    return results


def calibration(variance: np.ndarray, loss: np.ndarray, seed: int) -> dict[str, list]:
    """The loss in `BINS` bins of as many tokens each, by variance; both (N, n), the variance as its log.

    Returns:
      `variance`, the geometric mean of a bin; `loss`, the mean in nats; `low` and `high`, its 95 % interval by
      bootstrap over rows.
    """
    order = np.argsort(np.argsort(variance, axis=None, kind="stable"), kind="stable").reshape(variance.shape)
    bins = order * BINS // order.size
    sums = np.stack([[(bins == i).sum(1), np.where(bins == i, loss, 0).sum(1)] for i in range(BINS)])  # (BINS, 2, N)
    count, nats = np.einsum("xr,ijr->jxi", resample(len(loss), seed), sums)
    means = nats / np.maximum(count, 1)
    low, high = np.quantile(means[1:], (0.025, 0.975), axis=0)
    centres = [float(np.exp(variance[bins == i].mean())) for i in range(BINS)]
    return {"variance": centres, "loss": means[0].tolist(), "low": low.tolist(), "high": high.tolist()}


def resample(num_rows: int, seed: int) -> np.ndarray:
    """How often each of N rows is taken, (1 + RESAMPLES, N): once each, and then as in bootstrap resamples."""
    drawn = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), RESAMPLES)
    return np.concatenate([np.ones((1, num_rows)), drawn])


def plot_posterior(correlations: Mapping[str, Any], curves: Mapping[str, Any], path: epath.Path) -> None:
    """The loss by decile of variance, and every correlation with its 95 % interval; a PNG."""
    figure = Figure(figsize=(11, 4.5), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        is_mean = name == "all"
        left.plot(curve["variance"], curve["loss"], marker="o", markersize=4, label=name, alpha=1 if is_mean else 0.5)
        if is_mean:
            left.fill_between(curve["variance"], curve["low"], curve["high"], alpha=0.2)
    left.set(xlabel="posterior variance / prior variance, decile", ylabel="nats per token")
    left.legend(fontsize=8)
    for place, (rho, _, (low, high)) in enumerate(correlations.values()):
        right.plot((low, high), (place, place), color="gray")
        right.plot(rho, place, "|", color="black")
    right.set_yticks(range(len(correlations)), labels=list(correlations), fontsize=7)
    right.invert_yaxis()
    right.axvline(0, color="gray", linewidth=0.8)
    right.set(xlabel="rank correlation with the loss")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_figure(path, figure)

"""The parts that the mixers and the decoder share: projections, norms, convolutions, rotary positions, the basis.

Parameters are float32 and name their dimensions (`dims`) for `idattn.sharding`; everything computes in the dtype of its
input. `SSMParam` marks the parameters of the
optimiser's SSM group (norm scales and biases of eq. 12, Delta, A, C, c_out), `MatrixParam` those with weight decay.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import SSMConfig
from idattn.ops import Basis
from idattn.ops.segments import last_token, run_index
from idattn.sharding import constrain, gathered


class SSMParam(nnx.Param):
    """A parameter with the SSM group's learning rate and without weight decay."""


class MatrixParam(nnx.Param):
    """A matrix of weights or embeddings: the parameters that weight decay applies to."""


class Linear(nnx.Module):
    """x W without bias, W (num_in, num_out) starting normal with standard deviation `std`; `dims` name its two axes."""

    def __init__(self, num_in: int, num_out: int, dims: tuple[str, str], *, std: float, rngs: nnx.Rngs):
        self.weight = MatrixParam(std * jax.random.normal(rngs.params(), (num_in, num_out)), dims=dims)
        self.dims = dims

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, num_in) -> (B, T, num_out)."""
        weight = gathered(self.weight[...].astype(x.dtype), self.dims)  # in the smaller dtype
        return constrain(x @ weight, "B", "T", None if self.dims[1] == "D" else self.dims[1])


def rms_normalise(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 and rounded to the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, of the residual stream (..., D)."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(dim), dims=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x, self.scale[...], self.eps)


class HeadNorm(nnx.Module):
    """RMSNorm(x) + b of eq. 12 on heads (B, T, G, width): one scale for all heads, a bias for each."""

    def __init__(self, num_heads: int, width: int, *, eps: float, bias_init: float):
        self.scale = SSMParam(jnp.ones(width), dims=("R",))
        self.bias = SSMParam(jnp.full((num_heads, width), bias_init), dims=("G", "R"))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x, self.scale[...], self.eps) + self.bias[...].astype(x.dtype)


def feature_map(x: jax.Array) -> jax.Array:
    """xi(x) = SiLU(x) / ||SiLU(x)|| over the last axis (eq. 10); 1e-6 under the root keeps its gradient finite at 0."""
    activated = jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    inverse = jax.lax.rsqrt(jnp.sum(activated**2, axis=-1, keepdims=True) + 1e-6)
    return (activated * inverse).astype(x.dtype)


def rotate_positions(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary positions on all channels of x (B, T, H, width), pairs (i, i + width / 2), at positions (B, T)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # (B, T, 1, half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class ShortConv(nnx.Module):
    """A causal depthwise convolution over (B, T, channels) with bias, which never looks across a document's border.

    The taps start uniform within 1 / sqrt(width) (by fan-in), the bias at zero; `dim` names the channels.
    """

    def __init__(self, channels: int, width: int, dim: str, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(width)
        taps = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.taps = nnx.Param(taps, dims=(None, dim))
        self.bias = nnx.Param(jnp.zeros(channels), dims=(dim,))
        self.width = width

    def __call__(self, x: jax.Array, tail: jax.Array | None, segment_ids: jax.Array | None):
        """The convolved x (B, T, channels), and the tail from which the next tokens go on.

        Args:
          x: (B, T, channels) inputs.
          tail: (B, width - 1, channels) inputs of the tokens before, of token 0's document; None for zeros.
          segment_ids: (B, T), as in `idattn.ops.interdomain_attention`, or None for one document.
        """
        T, before = x.shape[1], self.width - 1
        padded, runs = self._with_tail(x, tail, segment_ids)
        taps = self.taps[...].astype(x.dtype)
        y = self.bias[...].astype(x.dtype)
        for i in range(self.width):  # a constant few shifted sums, which XLA fuses into one pass
            shifted = padded[:, i : i + T]
            if runs is not None:
                shifted = jnp.where((runs[:, i : i + T] == runs[:, before:])[..., None], shifted, 0)
            y = y + shifted * taps[i]
        return y, self.next_tail(x, tail, segment_ids)

    def next_tail(self, x: jax.Array, tail: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array:
        """The tail after x; arguments as above."""
        before = self.width - 1
        padded, runs = self._with_tail(x, tail, segment_ids)
        if segment_ids is None:
            return padded[:, x.shape[1] :]
        # The inputs up to the last token that is not padding, without those of other documents.
        index = (last_token(segment_ids) + 1)[:, None] + jnp.arange(before)
        rows = jnp.arange(padded.shape[0])[:, None]
        same = runs[rows, index] == runs[rows, index[:, -1:]] if before else jnp.ones(index.shape, bool)
        return jnp.where(same[..., None], padded[rows, index], 0)

    def _with_tail(self, x, tail, segment_ids):
        """The tail and x behind one another, and the runs of both."""
        B, _, channels = x.shape
        before = self.width - 1
        tail = jnp.zeros((B, before, channels), x.dtype) if tail is None else tail.astype(x.dtype)
        runs = None if segment_ids is None else jnp.pad(run_index(segment_ids), ((0, 0), (before, 0)))
        return jnp.concatenate([tail, x], axis=1), runs


class StateBasis(nnx.Module):
    """The parameters of one layer's states: Delta, A and C of G heads, initialised as S4D-Inv.

    exp(a_log) = 1/2, a_imag(n) = (M / pi) (M / (2n + 1) - 1), Delta log-uniform. C is complex normal with total
    variance c_init_scale / M an entry (diagonal: c_init_scale), or sqrt(c_init_scale) times the identity.
    """

    def __init__(self, num_heads: int, config: SSMConfig, *, rngs: nnx.Rngs):
        G, M = num_heads, config.num_modes
        low, high = math.log(config.delta_min), math.log(config.delta_max)
        self.log_delta = SSMParam(jax.random.uniform(rngs.params(), (G,), minval=low, maxval=high), dims=("G",))
        self.a_log = SSMParam(jnp.full((G, M), math.log(0.5)), dims=("G", "M"))
        n = jnp.arange(M, dtype=jnp.float32)
        self.a_imag = SSMParam(jnp.broadcast_to(M / math.pi * (M / (2 * n + 1) - 1), (G, M)), dims=("G", "M"))
        if config.c == "identity":
            self.c = None
            return
        shape, fan_in = ((G, M, M), M) if config.c == "full" else ((G, M), 1)
        if config.c_init == "normal":
            planes = math.sqrt(config.c_init_scale / (2 * fan_in)) * jax.random.normal(rngs.params(), (2, *shape))
        else:
            eye = jnp.eye(M) if config.c == "full" else jnp.ones(M)
            planes = jnp.zeros((2, *shape)).at[0].set(math.sqrt(config.c_init_scale) * eye)
        self.c = SSMParam(planes, dims=(None, "G", *"MM"[: len(shape) - 1]))

    def __call__(self) -> Basis:
        """The parameters as `idattn.ops` takes them."""
        c = None if self.c is None else (self.c[0], self.c[1])
        return Basis(self.log_delta[...], self.a_log[...], self.a_imag[...], c)

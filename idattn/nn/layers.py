"""The parts that the mixers and the decoder share: projections, norms, convolutions, the basis.

Parameters are float32, name their dimensions (`dims`) for `idattn.sharding` and their `group` for the optimiser;
everything computes in the dtype of its input.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from idattn.config import ModelConfig, SSMConfig
from idattn.nn.documents import Documents, halo
from idattn.ops import Basis, Segments
from idattn.ops.discretize import frequencies
from idattn.ops.platforms import apart
from idattn.ops.prepare import HeadInputs, rms_normalise, with_tail
from idattn.sharding import product


def param(value: jax.Array, *dims: str | None, group: str = "other") -> nnx.Param:
    """A parameter.

    Args:
      value: at the start.
      dims: a name, or None, for each axis.
      group: "matrix" for weights and embeddings, which weight decay applies to; "ssm" for norm scales and biases of
        eq. 12, Delta, A, C and c_out, with a separate learning rate and no weight decay; or "other".
    """
    # A weakly typed array, as of jnp.full(shape, 0.5), would compile a training step a second time.
    return nnx.Param(value.astype(value.dtype), dims=dims, group=group)


class Linear(nnx.Module):
    """x W without bias, W (num_in, num_out) starting normal with standard deviation `std`; `dims` name its two axes."""

    def __init__(self, num_in: int, num_out: int, dims: tuple[str | None, str | None], *, std: float, rngs: nnx.Rngs):
        self.weight = param(std * jax.random.normal(rngs.params(), (num_in, num_out)), *dims, group="matrix")
        self.dims = dims

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, num_in) -> (B, T, num_out)."""
        return product(x, self.weight[...].astype(x.dtype), self.dims)  # cast first, so that fewer bytes are gathered


@jax.custom_jvp
def silu_gate(gate: jax.Array, x: jax.Array) -> jax.Array:
    """SiLU(gate) x, of arrays of one shape.

    A backward pass multiplies by two arrays that the forward pass made, rather than to make them of four.
    """
    return jax.nn.silu(gate) * x


@silu_gate.defjvp
def _silu_gate_jvp(primals, tangents):
    (gate, x), (d_gate, d_x) = primals, tangents

    def coefficients(gate, x):
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        return silu, x * (sigmoid + silu * (1 - sigmoid))

    silu, slope = apart(coefficients)(gate, x)
    return silu * x, d_gate * slope + d_x * silu


class Control(nnx.Module):
    """x W + b, a number for each of G states, starting at 0."""

    def __init__(self, num_in: int, num_states: int):
        self.weight = param(jnp.zeros((num_in, num_states)), "D", "G", group="matrix")
        self.bias = param(jnp.zeros(num_states), "G")

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, num_in) -> (B, T, G)."""
        return product(x, self.weight[...].astype(x.dtype), ("D", "G")) + self.bias[...].astype(x.dtype)[None, None]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, of the residual stream (..., D), in `dtype` or that of x."""

    def __init__(self, dim: int, *, eps: float, dtype: str | None = None):
        self.scale = param(jnp.ones(dim), None)
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x, self.scale[...], self.eps).astype(self.dtype or x.dtype)


class HeadNorm(nnx.Module):
    """The parameters of eq. 12, RMSNorm(x) + b of heads: one scale for all heads, a bias for each."""

    def __init__(self, num_heads: int, width: int, *, eps: float, bias_init: float):
        self.scale = param(jnp.ones(width), "R", group="ssm")
        self.bias = param(jnp.full((num_heads, width), bias_init), "G", "R", group="ssm")
        self.eps = eps


class ShortConv(nnx.Module):
    """The parameters of a causal depthwise convolution over (B, T, channels), and its inputs that are still needed.

    The taps start uniform within 1 / sqrt(width) (by fan-in), the bias at zero; `dim` names the channels, if anything.
    """

    def __init__(self, channels: int, width: int, dim: str | None, *, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(width)
        taps = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.taps = param(taps, None, dim)
        self.bias = param(jnp.zeros(channels), dim)
        self.width = width

    def inputs(
        self, x: jax.Array, tail: jax.Array | None, documents: Documents, axis: str | None = None
    ) -> tuple[HeadInputs, jax.Array]:
        """The convolution of x as `idattn.ops.prepare_heads` takes it, and the tail that the tokens after x need.

        Args:
          x, tail: as in `next_tail`.
          documents: of the tokens.
          axis: the mesh axis that the tokens are split over, or None; then `tail` is that of the whole sequence.
        """
        if axis is not None:
            if x.shape[1] < self.width - 1:
                raise ValueError(
                    f"a shard of {x.shape[1]} tokens must have at least conv_width - 1 = {self.width - 1}, as far as a "
                    "convolution looks back; use longer rows, or fewer devices for mesh.sequence."
                )
            tail = halo(self.next_tail(x, None, documents.segments), tail, documents, axis)
        inputs = HeadInputs(x, taps=self.taps[...], conv_bias=self.bias[...], tail=tail, positions=documents.borders)
        return inputs, self.next_tail(x, tail, documents.segments)

    def next_tail(self, x: jax.Array, tail: jax.Array | None, segments: Segments | None) -> jax.Array:
        """The tail that the tokens after x need.

        Args:
          x: (B, T, channels) inputs.
          tail: (B, width - 1, channels) inputs of the tokens before, of token 0's document; None for zeros.
          segments: the documents of the tokens, or None for one document a row.
        """
        before = self.width - 1
        if segments is None or before == 0:
            return with_tail(x, tail, self.width)[:, x.shape[1] :]
        # The inputs up to the last token that is not padding, without those of other documents. They are looked up in
        # x and in the tail: to put one behind the other would copy all of x.
        index = (segments.last + 1)[:, None] + jnp.arange(-before, 0)[None]
        rows, in_x = jnp.arange(x.shape[0])[:, None], index >= 0
        inputs = x[rows, jnp.maximum(index, 0)]
        if tail is not None:
            inputs = jnp.where(in_x[..., None], inputs, tail[rows, jnp.minimum(index, -1) + before].astype(x.dtype))
        run = jnp.where(in_x, segments.run[rows, jnp.maximum(index, 0)], 0)
        last_run = jnp.where(segments.last < 0, 0, segments.run[rows[:, 0], jnp.maximum(segments.last, 0)])
        is_input = (run == last_run[:, None]) & (in_x if tail is None else True)
        return jnp.where(is_input[..., None], inputs, 0)


CONVOLVED = ("query", "key", "value")  # the projections of mixers that always have convolutions


def check_convolved(config: ModelConfig, mixer: str) -> None:
    """Raise a ValueError where a mixer that always has convolutions is to have none."""
    if config.ssm.conv_width < 1:
        raise ValueError(f"conv_width={config.ssm.conv_width} must be at least 1 for {mixer}, which convolves.")


class StateBasis(nnx.Module):
    """The parameters of one layer's states: Delta, A and C of G heads.

    exp(a_log) = 1/2, a_imag by `idattn.ops.discretize.frequencies`, Delta log-uniform. C is complex normal with
    total variance c_init_scale / M for each entry (diagonal: c_init_scale), or sqrt(c_init_scale) times the identity.
    """

    def __init__(self, num_heads: int, config: SSMConfig, *, rngs: nnx.Rngs):
        G, M = num_heads, config.num_modes
        low, high = math.log(config.delta_min), math.log(config.delta_max)
        log_delta = jax.random.uniform(rngs.params(), (G,), minval=low, maxval=high)
        self.log_delta = param(log_delta, "G", group="ssm")
        self.a_log = param(jnp.full((G, M), math.log(0.5)), "G", "M", group="ssm")
        self.a_imag = param(frequencies(config.a_init, M, jnp.exp(log_delta)), "G", "M", group="ssm")
        if config.c == "identity":
            self.c = None
            return
        shape, fan_in = ((G, M, M), M) if config.c == "full" else ((G, M), 1)
        if config.c_init == "normal":
            planes = math.sqrt(config.c_init_scale / (2 * fan_in)) * jax.random.normal(rngs.params(), (2, *shape))
        else:
            eye = jnp.eye(M) if config.c == "full" else jnp.ones(M)
            planes = jnp.zeros((2, *shape)).at[0].set(math.sqrt(config.c_init_scale) * eye[None])
        self.c = param(planes, None, "G", *"MM"[: len(shape) - 1], group="ssm")

    def __call__(self) -> Basis:
        """The parameters as `idattn.ops` takes them."""
        c = None if self.c is None else (self.c[0], self.c[1])
        return Basis(self.log_delta[...], self.a_log[...], self.a_imag[...], c)

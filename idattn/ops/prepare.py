"""What is done to the heads of a projection before the state sees them: convolution, rotary positions, eq. 10 and 12.

One pass over memory forward and one backward, which recomputes the pass from its input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.platforms import apart

FLOOR = 1e-6  # under the root of the feature map, which keeps its gradient finite at 0


class HeadInputs(NamedTuple):
    """The arrays of a preparation; None for what it does not do.

    Attributes:
      x: (B, T, C) a projection, C channels of heads that lie next to each other.
      taps: (W, C) of a causal depthwise convolution, the last one of the token itself; with `conv_bias` and `tail`.
      conv_bias: (C,).
      tail: (B, W - 1, C) x of the tokens before token 0, for a convolution; None for zeros.
      scale: (width,) of the RMSNorm of eq. 12, shared by the heads; with `bias`.
      bias: (C,) of eq. 12.
      rotary: (B, T, 2 width) float32 as `rotary_table` makes it.
      positions: (B, T) int32 of the tokens in their documents, beyond whose border a convolution does not look; None
        where every row is one document.
    """

    x: jax.Array
    taps: jax.Array | None = None
    conv_bias: jax.Array | None = None
    tail: jax.Array | None = None
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    rotary: jax.Array | None = None
    positions: jax.Array | None = None


class Preparation(NamedTuple):
    """What is done after the convolution.

    Attributes:
      width: channels of a head.
      activate: whether xi of eq. 10 is applied.
      rotate_first: whether rotary positions come before xi.
      eps: of the RMSNorm of eq. 12.
    """

    width: int
    activate: bool = False
    rotate_first: bool = True
    eps: float = 0.0


class Rule(NamedTuple):
    """A way to prepare heads.

    Attributes:
      forward: (preparation, inputs) -> y (B, T, C).
      backward: (preparation, inputs, d_y) -> the cotangents of the inputs, None for `rotary` and `positions`.
      requirement: (inputs, preparation) -> what it would need of them, or None if it has all.
    """

    forward: Callable[..., jax.Array]
    backward: Callable[..., HeadInputs]
    requirement: Callable[[HeadInputs, Preparation], str | None] = lambda inputs, preparation: None


def rotary_table(positions: jax.Array, width: int, base: float) -> jax.Array:
    """What `rotate` multiplies by, (B, T, 2 width) float32: cosines, and sines with the signs of the rotation.

    Channel i < width / 2 and channel i + width / 2 are a pair, at angle position * base^(-2 i / width).

    Args:
      positions: (B, T) of the tokens.
      width: channels of a head, an even number.
      base: a wavelength is 2 pi base^(2 i / width) tokens.
    """
    half = width // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos, -sin, sin], axis=-1)


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Rotary positions on all channels of heads (B, T, H, width), by a table of `rotary_table`."""
    cos, sin = jnp.split(rotary[:, :, None], 2, axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([second, first], axis=-1) * sin).astype(x.dtype)


def feature_map(x: jax.Array) -> jax.Array:
    """xi(x) = SiLU(x) / ||SiLU(x)|| over the last axis (eq. 10)."""
    activated = jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    inverse = jax.lax.rsqrt(jnp.sum(activated**2, axis=-1, keepdims=True) + FLOOR)
    return (activated * inverse).astype(x.dtype)


def rms_normalise(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 and rounded to the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(x.dtype)


def with_tail(x: jax.Array, tail: jax.Array | None, width: int) -> jax.Array:
    """x (B, T, C) after the width - 1 inputs that a convolution of `width` taps needs of the tokens before."""
    tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype) if tail is None else tail.astype(x.dtype)
    return jnp.concatenate([tail, x], axis=1)


def short_convolution(
    x: jax.Array, taps: jax.Array, bias: jax.Array, tail: jax.Array | None, positions: jax.Array | None
) -> jax.Array:
    """A causal depthwise convolution of x (B, T, C); arguments as in `HeadInputs`."""
    T, before = x.shape[1], taps.shape[0] - 1
    padded = with_tail(x, tail, taps.shape[0])
    y = bias.astype(x.dtype)[None, None] + x * taps[None, None, before].astype(x.dtype)
    for back in range(1, before + 1):  # a constant few shifted sums, which XLA fuses into one pass
        shifted = padded[:, before - back : before - back + T]
        if positions is not None:
            shifted = jnp.where(positions[..., None] >= back, shifted, 0)
        y = y + shifted * taps[None, None, before - back].astype(x.dtype)
    return y


def compose(preparation: Preparation, inputs: HeadInputs) -> jax.Array:
    """The preparation step by step, differentiable by JAX, in float32 or better."""
    y = _after_convolution(preparation, inputs._replace(x=_convolve(inputs)))
    return y.astype(inputs.x.dtype)


def _convolve(inputs: HeadInputs) -> jax.Array:
    x = inputs.x.astype(jnp.promote_types(inputs.x.dtype, jnp.float32))
    if inputs.taps is None:
        return x
    assert inputs.conv_bias is not None, "taps come with a bias"
    return short_convolution(x, inputs.taps, inputs.conv_bias, inputs.tail, inputs.positions)


def _after_convolution(preparation: Preparation, inputs: HeadInputs) -> jax.Array:
    x = inputs.x.reshape(*inputs.x.shape[:2], -1, preparation.width)
    if inputs.rotary is not None and preparation.rotate_first:
        x = rotate(x, inputs.rotary)
    if preparation.activate:
        x = feature_map(x)
    if inputs.rotary is not None and not preparation.rotate_first:
        x = rotate(x, inputs.rotary)
    if inputs.scale is not None:
        assert inputs.bias is not None, "a scale comes with a bias"
        x = rms_normalise(x, inputs.scale, preparation.eps)
        x = x + inputs.bias.reshape(1, 1, -1, preparation.width)
    return x.reshape(inputs.x.shape)


def _backward(preparation: Preparation, inputs: HeadInputs, d_y: jax.Array) -> HeadInputs:
    conv = HeadInputs(inputs.x, inputs.taps, inputs.conv_bias, inputs.tail)
    x, pull = jax.vjp(lambda arrays: _convolve(arrays._replace(positions=inputs.positions)), conv)

    def after(x, scale, bias, rotary, d_y):
        def forward(x, scale, bias):
            return _after_convolution(preparation, HeadInputs(x, scale=scale, bias=bias, rotary=rotary))

        return jax.vjp(forward, x, scale, bias)[1](d_y.astype(x.dtype))

    d_x, d_scale, d_bias = apart(after)(x, inputs.scale, inputs.bias, inputs.rotary, d_y)
    return pull(d_x)[0]._replace(scale=d_scale, bias=d_bias)


COMPOSED = Rule(compose, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def prepare(inputs: HeadInputs, forward: Callable[..., Any], backward: Callable[..., Any]) -> jax.Array:
    """`forward(inputs)`, which keeps nothing but its inputs for `backward(inputs, d_y)`."""
    return forward(inputs)


def _prepare_forward(inputs: HeadInputs, forward: Callable[..., Any], backward: Callable[..., Any]):
    return forward(inputs), inputs


def _prepare_backward(forward: Callable[..., Any], backward: Callable[..., Any], inputs: HeadInputs, d_y: jax.Array):
    return (backward(inputs, d_y),)


prepare.defvjp(_prepare_forward, _prepare_backward)

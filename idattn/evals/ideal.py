"""How far the ideal layer is from kernel regression: by modes, by features, and for S4D-Inv in place of HiPPO-LegS.

The kernel is Gaussian, K(q, k) = exp(-|q - k|^2 / 2). Everything is float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idattn.choices import check_choice
from idattn.ops import draw_frequencies, ideal_attention, random_features
from idattn.ops.discretize import s4d_inv_frequencies

SIGNALS = ("smooth", "noise")


def draw_signal(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Tokens (T, width) of variance 1: "smooth" has periods of T / 3 tokens or more, "noise" is white."""
    check_choice("kind", kind, SIGNALS)
    T, width = shape
    if kind == "noise":
        return rng.standard_normal(shape)
    time = (np.arange(T)[:, None, None] + 0.5) / T
    cycles = np.arange(1, 4)
    phases = rng.uniform(0, 2 * np.pi, (width, 3))
    amplitudes = rng.standard_normal((width, 3)) * math.sqrt(2 / 3)
    return np.sum(amplitudes * np.cos(2 * np.pi * cycles * time + phases), axis=-1)


def error_by_modes(signal: str, modes: Sequence[int], *, T: int = 256, seed: int = 0) -> np.ndarray:
    """The error of eq. 8's numerator with M modes, against all of the past with the same features.

    Keys and values (T, 4) are the signal. 64 queries after its last token are normal. There are 64 positive features.
    The denominator has no error.

    Args:
      signal: "smooth" or "noise".
      modes: numbers M.
      T: tokens.
      seed: of the signal, the queries and the features.

    Returns:
      (len(modes),) root mean square of |sum_m (xi(q)^T u_m) gamma_m - (1/T) sum_s xi(q)^T xi(k_s) v_s| relative to that
      of the second.
    """
    rng = np.random.default_rng(seed)
    k, v = (draw_signal(signal, (T, 4), rng) for _ in range(2))
    frequencies = draw_frequencies(seed, "positive", 64, (4,))
    with jax.enable_x64(True):
        xi_q, xi_k = (
            random_features(jnp.asarray(x), frequencies, "positive") for x in (rng.standard_normal((64, 4)), k)
        )
        keys = xi_k[None, :, None]
        _, state = jax.jit(ideal_attention, static_argnums=3)(keys, keys, v[None, :, None], max(modes))
        u, gamma = np.split(np.asarray(state.coefficients[0, 0]), [xi_k.shape[-1]], axis=-1)
        xi_q, xi_k = np.asarray(xi_q), np.asarray(xi_k)
    whole = xi_q @ xi_k.T @ v / T
    terms = (u @ xi_q.T)[:, :, None] * gamma[:, None]
    parts = np.cumsum(terms, axis=0)[np.asarray(modes) - 1]  # the first modes do not depend on how many follow
    return np.sqrt(np.mean((parts - whole) ** 2, axis=(1, 2)) / np.mean(whole**2))


class FeatureErrors(NamedTuple):
    """By numbers of features, each (len(counts),)."""

    error: np.ndarray  # median of |o - o*| over the queries, relative to the root mean square of o*
    not_positive: np.ndarray  # share of the queries whose denominator is at most 0


def error_by_features(
    features: str, counts: Sequence[int], *, T: int = 256, draws: int = 32, seed: int = 0
) -> FeatureErrors:
    """The error of kernel regression with R random features, o, against that with the kernel itself, o*; all modes.

    Keys and queries (4 wide) are normal, values a smooth function of the key, all drawn anew with the features.

    Args:
      features: "positive" or "fourier".
      counts: numbers R.
      T: tokens, and queries after them.
      draws: of everything random, over which medians and shares are taken.
      seed: of the first draw.
    """
    errors, denominators = np.empty((2, len(counts), draws, T))
    for draw in range(draws):
        rng = np.random.default_rng(seed + draw)
        q, k = rng.standard_normal((2, T, 4))
        v = np.sin(k @ rng.standard_normal((4, 1)))
        kernel = np.exp(-np.sum((q[:, None] - k) ** 2, axis=-1) / 2)
        exact = kernel @ v / kernel.sum(axis=1, keepdims=True)
        for i, count in enumerate(counts):
            frequencies = draw_frequencies(seed + draw, features, count, (4,))
            with jax.enable_x64(True):
                xi_q, xi_k = (np.asarray(random_features(jnp.asarray(x), frequencies, features)) for x in (q, k))
            denominator = xi_q @ xi_k.mean(axis=0)
            o = xi_q @ (xi_k.T @ v) / (T * denominator[:, None])
            errors[i, draw] = np.abs(o - exact)[:, 0] / np.sqrt(np.mean(exact**2))
            denominators[i, draw] = denominator
    return FeatureErrors(np.median(errors, axis=(1, 2)), np.mean(denominators <= 0, axis=(1, 2)))


def s4d_residual(num_modes: int, delta: float, lengths: Sequence[int], *, degrees: int = 8) -> np.ndarray:
    """The part of HiPPO-LegS's coefficients that no readout of S4D-Inv's state tells, for tokens of white noise.

    The paper's first relaxation puts fixed modes in place of those that stretch with the past: S4D-Inv, the start of
    the scalable layer, weighs the token j ago by real and imaginary parts of exp(delta a_m j), m < M, LegS by
    integrals of g_n over a token's part of [0, 1]. The best linear readout is that of least squares; combinations of
    modes with singular values below 1e-6 of the largest, which float32 could not tell apart, are left out.

    Args:
      num_modes: M; 2M tokens or fewer are known whatever the modes are.
      delta: step size.
      lengths: numbers t of tokens so far.
      degrees: coefficients n = 0 ... degrees - 1 of LegS.

    Returns:
      (len(lengths),) root mean square over n of the unexplained part of a coefficient relative to it: 0 all, 1 nothing.
    """
    a = -0.5 + 1j * s4d_inv_frequencies(num_modes, np.float64)
    residuals = []
    for length in lengths:
        borders = np.polynomial.legendre.legvander(1 - 2 * np.arange(length + 1) / length, degrees)
        integrals = np.concatenate([borders[:, 1:2], borders[:, 2:] - borders[:, :-2]], axis=1)
        wanted = np.diff(integrals, axis=0)  # up to factors of each coefficient
        weights = np.exp(delta * np.outer(np.arange(length), a))
        planes = np.concatenate([np.real(weights), np.imag(weights)], axis=1)
        modes, sizes, _ = np.linalg.svd(planes, full_matrices=False)
        modes = modes[:, sizes > 1e-6 * sizes[0]]
        missed = wanted - modes @ (modes.T @ wanted)
        residuals.append(math.sqrt(np.mean(np.sum(missed**2, axis=0) / np.sum(wanted**2, axis=0))))
    return np.array(residuals)

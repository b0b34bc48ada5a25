"""Decays between the tokens of a chunk whose steps may differ, in factors that neither overflow nor vanish too early.

The decay from token s to token t is a product of the steps between them, lambda_{s+1} ... lambda_t. It is split at a
token between the two, so that it is a factor of t times a factor of s and a sum over pairs of tokens is a matrix
product. A chunk is cut into halves, these into halves, down to blocks of `BLOCK` tokens. A pair of tokens is split at
the middle of the smallest part that holds both in different halves: both factors are then at most 1 in size. Within a
block, factors refer to the block's middle; there a step's decay counts as at least exp(-limit), which is below the
rounding of what it is added to, so that factors stay within exp(+-4 limit).

Decays are complex, as flattened planes (..., 2M), or real, (..., M).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.planes import multiply_flattened, real_part_row

BLOCK = 8
_LIMIT = {"float32": 16.0, "float64": 40.0}  # exp(-limit) is below the rounding, exp(4 limit) far below the largest


class Level(NamedTuple):
    """The factors of pairs of tokens in different halves of parts of 2h tokens, (B, G, N, parts, h, ...)."""

    right: jax.Array  # of the tokens of right halves: decay from the middle of the part to the token
    left: jax.Array  # of those of left halves: decay from the token to the middle, times the token's weight


class Tree(NamedTuple):
    """The decays of chunks; axes B, G, N and of the parts have length 1 where all are alike."""

    later: jax.Array  # of the later token of a pair in one block, (B, G, N, blocks, c, ...)
    earlier: jax.Array  # of the earlier token, times its weight
    levels: tuple[Level, ...]  # from small parts to large ones
    start: jax.Array  # from before the chunk to each token, (B, G, N, K, ...)
    end: jax.Array  # from each token to the last of the chunk, times its weight, (B, G, N, K, ...)
    decay: jax.Array  # over the chunk, (B, G, N, ...)
    multiply: Callable[[jax.Array, jax.Array], jax.Array]  # of two decays, or of a row and a decay

    def conjugate(self, decay: jax.Array) -> jax.Array:
        return decay if self.multiply is jnp.multiply else real_part_row(decay)


def chunk_length(size: int, T: int) -> int:
    """The largest power of two up to `size`, but no more than T tokens need, where T is known."""
    largest = size.bit_length() - 1
    return 1 << (min(largest, (T - 1).bit_length()) if isinstance(T, int) else largest)


def block_length(K: int) -> int:
    """c, tokens in the blocks of a chunk of K."""
    return min(K, BLOCK)


def make_tree(
    log_size: jax.Array, phase: jax.Array | None, weight: jax.Array, K: int, run: jax.Array | None = None
) -> Tree:
    """The decays of chunks of K tokens, a power of two.

    Args:
      log_size: (B, G, N, K, M) of each token's step, at most 0; (1, G, 1, 1, M) where all steps are alike. The order of
        the first three axes is the caller's, but with `run` it is (N, B, G, K, M).
      phase: of each step, in radians, in the same shape; None where decays are real.
      weight: of each token, as decays are; in a shape that broadcasts.
      K: tokens in a chunk.
      run: (N, B, K) the documents of the tokens, where decays are wanted inside a run only: they do not depend on other
        runs then, not even by rounding. None for one document.
    """
    c = block_length(K)
    multiply = jnp.multiply if phase is None else multiply_flattened

    def in_blocks(x):  # one block stands for all where one step does
        x = jnp.broadcast_to(x, (*x.shape[:3], c, *x.shape[4:])) if x.shape[3] == 1 else x
        return blocks(x, c, 3)

    log_size, phase, weight = jax.tree.map(in_blocks, (log_size, phase, weight))

    def decays(log_size, phase):
        if phase is None:
            return jnp.exp(log_size)
        size = jnp.exp(log_size)
        return jnp.concatenate([size * jnp.cos(phase), size * jnp.sin(phase)], axis=-1)

    def map_both(function, log_size, phase):
        return function(log_size), None if phase is None else function(phase)

    def before(x):
        return jnp.cumsum(x, axis=4)

    def after(x):
        # Summed backwards rather than as a difference, which would lose small steps after large ones.
        x = jax.lax.cumsum(x, axis=4, reverse=True)
        return jnp.concatenate([x[:, :, :, :, 1:], jnp.zeros_like(x[:, :, :, :, :1])], axis=4)

    start = decays(*map_both(before, log_size, phase))
    end = multiply(decays(*map_both(after, log_size, phase)), weight)
    decay = start[:, :, :, :, -1]

    limited = jnp.maximum(log_size, -_LIMIT[log_size.dtype.name])
    if run is None:
        age, turn = map_both(before, limited, phase)
        middle = (age[:, :, :, :, :1] + age[:, :, :, :, -1:]) / 2
    else:
        run = blocks(run, c, 2)
        is_alike = (run[..., :, None] == run[..., None, :]).astype(log_size.dtype)  # (N, B, P, t, s)

        def since_start(x):
            return jnp.einsum("nbpts,nbgpsm->nbgptm", jnp.tril(is_alike), x, precision="highest")

        age, turn = map_both(since_start, limited, phase)
        middle = jnp.einsum("nbpts,nbgpsm->nbgptm", is_alike, limited, precision="highest") / 2
    age = age - jax.lax.stop_gradient(middle)  # which cancels in every product
    later = decays(age, turn)
    earlier = multiply(decays(-age, None if turn is None else -turn), weight)

    levels = []
    for _ in range((K // c).bit_length() - 1):
        (start_l, start_r), (end_l, end_r), (decay_l, decay_r) = (_halves(x) for x in (start, end, decay))
        levels.append(Level(start_r, end_l))
        start = jnp.concatenate([start_l, multiply(start_r, decay_l[:, :, :, :, None])], axis=4)
        end = jnp.concatenate([multiply(end_l, decay_r[:, :, :, :, None]), end_r], axis=4)
        decay = multiply(decay_l, decay_r)
    return Tree(later, earlier, tuple(levels), start[:, :, :, 0], end[:, :, :, 0], decay[:, :, :, 0], multiply)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every other part along axis 3: the left ones and the right ones."""
    return (x, x) if x.shape[3] == 1 else (x[:, :, :, ::2], x[:, :, :, 1::2])


def blocks(x: jax.Array, c: int, axis: int) -> jax.Array:
    """The axis of K tokens as blocks of c: (..., K, ...) -> (..., K / c, c, ...)."""
    return x.reshape(*x.shape[:axis], -1, c, *x.shape[axis + 1 :])


def halves(x: jax.Array, h: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """The left and right halves of parts of 2h tokens, (..., K / 2h, h, ...) each."""
    x = x.reshape(*x.shape[:axis], -1, 2, h, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(x, 0, axis + 1, keepdims=False), jax.lax.index_in_dim(x, 1, axis + 1, keepdims=False)


def join_right(x: jax.Array, axis: int) -> jax.Array:
    """Values of the tokens of right halves, (..., parts, h, ...) at `axis`, as those of all K tokens: 0 on the left."""
    x = jnp.stack([jnp.zeros_like(x), x], axis=axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])


def assemble(base: jax.Array, levels: list[jax.Array]) -> jax.Array:
    """The lower triangular matrices (..., K, K) of blocks (..., P, c, c) and, level by level, (..., parts, h, h)."""
    for corner in levels:
        pairs = base.reshape(*base.shape[:-3], -1, 2, *base.shape[-2:])
        left, right = pairs[..., 0, :, :], pairs[..., 1, :, :]
        top = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
        base = jnp.concatenate([top, jnp.concatenate([corner, right], axis=-1)], axis=-2)
    return base[..., 0, :, :]


def unit_inverse(lower: jax.Array) -> jax.Array:
    """(I + L)^-1 of strictly lower triangular L (..., K, K), K a power of two, by products of halves.

    The inverse of [[A, 0], [C, D]] is [[A^-1, 0], [-D^-1 C A^-1, D^-1]]. Powers of L, which a product of factors
    I + L^(2^n) needs, overflow where many keys are alike.
    """
    K = lower.shape[-1]
    if K == 1:
        return jnp.ones_like(lower)
    h = K // 2
    inverses = unit_inverse(jnp.stack([lower[..., :h, :h], lower[..., h:, h:]]))
    corner = jnp.matmul(
        jnp.matmul(inverses[1], lower[..., h:, :h], precision="highest"), inverses[0], precision="highest"
    )
    top = jnp.concatenate([inverses[0], jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([-corner, inverses[1]], axis=-1)], axis=-2)


@jax.custom_vjp
def solve(inverse: jax.Array, lower: jax.Array, x: jax.Array) -> jax.Array:
    """(I + L)^-1 x for x (..., K, E), given the inverse, which is not differentiated."""
    return jnp.matmul(inverse, x, precision="highest")


def _solve_forward(inverse: jax.Array, lower: jax.Array, x: jax.Array):
    y = solve(inverse, lower, x)
    return y, (inverse, y)


def _solve_backward(residuals: tuple[jax.Array, jax.Array], d_y: jax.Array):
    inverse, y = residuals
    d_x = jnp.matmul(inverse.swapaxes(-1, -2), d_y, precision="highest")
    return None, -jnp.matmul(d_x, y.swapaxes(-1, -2), precision="highest"), d_x


solve.defvjp(_solve_forward, _solve_backward)

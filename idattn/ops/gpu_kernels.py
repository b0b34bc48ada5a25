"""The bodies of the GPU kernels of `idattn.ops.pallas_gpu`: what one program makes of a query head and a chunk.

See `idattn.ops.chunks` for the equations. A program loads what it needs of its chunk once and takes the chunk's tokens
in tiles of 64, one after another. A tile's chain of products stays in registers and shared memory (SMEM). Complex
numbers are pairs of matrices, their planes, since registers can be neither cut nor joined freely.

The skew. Products by token are written to SMEM in rows of `pitch` elements and read back in rows of one more: row r
then starts r elements later, so that columns by token s become columns by lag. Rows of one less do the opposite. The
lags of a tile stand in descending order.

What depends on the GPU, or on there being none, is in `idattn.ops.gpu_machines`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from idattn.ops.gpu_machines import Hopper
from idattn.ops.pallas_gpu import TILE

SPREAD = 8  # elements by which rows of a tile are longer, so that rows lie in different banks of SMEM


class Block(NamedTuple):
    """The sizes of a program."""

    K: int  # tokens in a chunk
    J: int  # query heads for each key-value head
    R: int
    E: int
    M: int  # padded
    has_segments: bool

    @property
    def rows(self) -> int:
        """Tokens in a tile."""
        return min(self.K, TILE)

    @property
    def tiles(self) -> int:
        return self.K // self.rows

    @property
    def pitch(self) -> int:
        return self.K + SPREAD

    @property
    def skew_elements(self) -> int:
        """The room for a tile in rows of up to `pitch` + 1, at any offset up to K."""
        return self.rows * (self.pitch + 1) + self.K

    @property
    def planes(self) -> tuple[int, int]:
        return 0, 1


class Tile(NamedTuple):
    """A tile of a chunk, and its masks."""

    block: Block
    machine: Hopper
    skewed: Any  # the buffer
    first: jax.Array  # the token that the tile begins with
    reach: jax.Array | None  # over how many lags each token sees its document; past the chunk's start, all of it

    def by_lag(self, x):
        """skew(x) of x (rows, K) by token: x by lag, descending, 0 where the token does not see as far."""
        block, shape = self.block, x.shape
        self.machine.write_rows(x, self.skewed, block.K - self.first, block.pitch)
        x = self.machine.read_rows(self.skewed, 1, block.pitch + 1, shape)
        column, token = self._indices(shape)
        return self._where(column >= block.K - 1 - self._lags_seen(token), x)

    def by_token(self, x):
        """The opposite of `by_lag`: 0 at tokens that are not seen."""
        block, shape = self.block, x.shape
        self.machine.write_rows(x, self.skewed, 0, block.pitch)
        x = self.machine.read_rows(self.skewed, block.K - 1 - self.first, block.pitch - 1, shape)
        column, token = self._indices(shape)
        return self._where((column <= token) & (column >= token - self._lags_seen(token)), x)

    def from_start(self, x):
        """x (rows, columns), 0 where the token does not see the state at the chunk's start."""
        if self.reach is None:
            return x
        _, token = self._indices(x.shape)
        return self._where(self._rows(x.shape) > token, x)

    def _indices(self, shape):
        # Behind a barrier, so that they are computed anew each time: held, they would fill half of the registers.
        column, row = lax.optimization_barrier((self.machine.iota(shape, 1), self.machine.iota(shape, 0)))
        return column, row + self.first

    def _lags_seen(self, token):
        return token if self.reach is None else lax.min(token, self._rows(token.shape))

    def _rows(self, shape):
        assert self.reach is not None
        return lax.broadcast_in_dim(self.reach, shape, (0,))

    def _where(self, seen, x):
        return lax.select(seen, x, lax.full_like(x, 0))


class Operands(NamedTuple):
    """What the tiles of a chunk share, in SMEM; pairs of planes lie one below the other."""

    k: Any  # (K, R)
    v: Any  # (K, E)
    X_k: Any  # (2R, M)
    X_v: Any  # (2E, M)
    lags: Any  # (2K, M), the largest lag first
    spread: Any  # (2K, M), likewise
    readout: Any  # (4M, M): for both planes of w those of y

    @staticmethod
    def shapes(block: Block) -> list[tuple[int, int, int]]:
        """How many matrices each is, and their rows and columns."""
        K, R, E, M = block.K, block.R, block.E, block.M
        return [(1, K, R), (1, K, E), (2, R, M), (2, E, M), (2, K, M), (2, K, M), (4, M, M)]


def _multiply(x, y, *, conjugate: bool = False):
    """The complex product of pairs of planes, of x and the conjugate of y if so."""
    (x_re, x_im), (y_re, y_im) = x, y
    if conjugate:
        return x_re * y_re + x_im * y_im, x_im * y_re - x_re * y_im
    return x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re


def _read(tile: Tile, q, operands: Operands, decays, keep=lambda name, *matrices, start=0: None):
    """Queries q (rows, R) read the chunk: w, decayed_w and weights, in the dtype of q.

    Args:
      decays: a function, since they would fill a quarter of the registers from one use to the next.
      keep: is given the intermediate results when they are ready, with their names in `Kept`.
    """
    block, dot, dtype, planes = tile.block, tile.machine.dot, q.dtype, tile.block.planes
    response = _respond(tile, q, operands)
    decayed_response = [tile.from_start(x.astype(dtype)) for x in _multiply(response, decays())]
    keep("lagged", *decayed_response, start=block.K)
    scores = tile.by_lag(dot(block.K, (q, operands.k, True)).astype(dtype))
    keep("lagged", scores)
    w = []
    for o in planes:
        from_start = [(decayed_response[i], _plane(operands.readout, 2 * o + i, block.M), True) for i in planes]
        w.append(dot(block.M, (scores, _plane(operands.spread, o, block.K), False), *from_start))
    decayed_w = [tile.from_start(x.astype(dtype)) for x in _multiply(w, decays(), conjugate=True)]
    keep("weights", *decayed_w, start=block.K)
    w = [x.astype(dtype) for x in w]
    weights = dot(block.K, *((w[i], _plane(operands.lags, i, block.K), True) for i in planes))
    weights = tile.by_token(weights.astype(dtype))
    keep("weights", weights)
    return w, decayed_w, weights


def _respond(tile: Tile, q, operands: Operands):
    block = tile.block
    return [tile.machine.dot(block.M, (q, _plane(operands.X_k, i, block.R), False)) for i in block.planes]


def _plane(matrices, i: int, rows: int):
    return matrices.at[pl.ds(i * rows, rows)]


def _indices(block: Block):
    """The chunk's row of the batch, its number, its query head and key-value head, and the last three's counts."""
    (b, n, h), (N, H) = (lax.axis_index(x) for x in ("b", "n", "h")), (lax.axis_size(x) for x in ("n", "h"))
    return b, n, h, lax.div(h, jnp.int32(block.J)), N, H // block.J


def _decays(machine: Hopper, decays_ref, g, i, block: Block):
    return lambda: tuple(machine.read(decays_ref.at[g, plane, i]) for plane in block.planes)


def forward_kernel(reach_ref, decays_ref, k_ref, v_ref, X_k_ref, X_v_ref, lags_ref, spread_ref, readout_ref, q_ref,
                   o_ref, *scratch, block: Block, machine: Hopper):  # fmt: skip
    """The outputs of a chunk. Keys are (B N, K, G, width), queries and outputs (B N, tiles, rows, H, width)."""
    *operands, q, o, skewed, barrier, tile_barrier = scratch
    operands = Operands(*operands)
    b, n, h, g, N, G = _indices(block)
    chunk, state = b * N + n, (g * lax.axis_size("b") + b) * N + n
    sources = [
        k_ref.at[chunk, :, g], v_ref.at[chunk, :, g], X_k_ref.at[state], X_v_ref.at[state],
        lags_ref.at[g], spread_ref.at[g], readout_ref.at[g],
    ]  # fmt: skip
    machine.load(zip(sources, operands, strict=True), barrier)

    @pl.loop(0, block.tiles)
    def _(i):
        reach = machine.read(reach_ref.at[chunk, i], column=True) if block.has_segments else None
        tile = Tile(block, machine, skewed, i * block.rows, reach)
        machine.load([(q_ref.at[chunk, i, :, h], q)], tile_barrier)
        _, decayed_w, weights = _read(tile, machine.read(q), operands, _decays(machine, decays_ref, g, i, block))
        from_start = ((decayed_w[i], _plane(operands.X_v, i, block.E), True) for i in block.planes)
        out = machine.dot(block.E, (weights, operands.v, False), *from_start)
        machine.store(out.astype(o.dtype), o, o_ref.at[chunk, i, :, h])

    machine.finish()


class Kept(NamedTuple):
    """The results of `chain_kernel` for each query head of each chunk, as `idattn.ops.chunkwise.Chain`.

    Each is (G B N J, tiles, rows, columns); pairs of planes lie side by side.
    """

    lagged: Any
    weights: Any
    d_answers: Any
    d_scores: Any
    d_q: Any
    d_decays_of_w: Any
    d_decays_of_response: Any

    @staticmethod
    def widths(block: Block) -> "Kept":
        """The columns of each."""
        modes = 2 * block.M
        both = block.K + modes
        return Kept(both, both, both, both, block.R, modes, modes)


def chain_kernel(reach_ref, decays_ref, k_ref, v_ref, X_k_ref, X_v_ref, lags_ref, spread_ref, readout_ref, q_ref,
                 d_o_ref, *refs, block: Block, machine: Hopper):  # fmt: skip
    """What a chunk's queries compute, and its cotangents. Inputs as those of `forward_kernel`."""
    results, scratch = Kept(*refs[: len(Kept._fields)]), refs[len(Kept._fields) :]
    *operands, q_tile, d_o_tile, pairs, plane, skewed, barrier, tile_barrier = scratch
    operands, dot, planes, M = Operands(*operands), machine.dot, block.planes, block.M
    b, n, h, g, N, G = _indices(block)
    chunk, state = b * N + n, (g * lax.axis_size("b") + b) * N + n
    query, dtype = state * block.J + h - g * block.J, q_tile.dtype
    sources = [
        k_ref.at[chunk, :, g], v_ref.at[chunk, :, g], X_k_ref.at[state], X_v_ref.at[state],
        lags_ref.at[g], spread_ref.at[g], readout_ref.at[g],
    ]  # fmt: skip
    machine.load(zip(sources, operands, strict=True), barrier)

    @pl.loop(0, block.tiles)
    def _(i):
        def keep(name, *matrices, start=0):
            buffer = pairs if len(matrices) == 1 else plane
            for p, x in enumerate(matrices):
                columns = pl.ds(start + p * M, x.shape[1])
                machine.store(x.astype(dtype), buffer, getattr(results, name).at[query, i, :, columns])

        machine.load([(q_ref.at[chunk, i, :, h], q_tile), (d_o_ref.at[chunk, i, :, h], d_o_tile)], tile_barrier)
        reach = machine.read(reach_ref.at[chunk, i], column=True) if block.has_segments else None
        tile = Tile(block, machine, skewed, i * block.rows, reach)
        decays = _decays(machine, decays_ref, g, i, block)
        q, d_o = machine.read(q_tile), machine.read(d_o_tile)
        w, _, _ = _read(tile, q, operands, decays, keep)

        # o = P v + decayed_w X_v, P = skew(w lags^T), decayed_w = w conj(decays), since w carries the sign of Re
        d_decayed_w = [tile.from_start(dot(M, (d_o, _plane(operands.X_v, p, block.E), False))) for p in planes]
        wide = [x.astype(jnp.float32) for x in w]
        keep("d_decays_of_w", *_multiply(wide, d_decayed_w, conjugate=True))
        d_w_of_start = _multiply(d_decayed_w, decays())
        keep("d_answers", *d_w_of_start, start=block.K)
        d_weights = tile.by_lag(dot(block.K, (d_o, operands.v, True)).astype(dtype))
        keep("d_answers", d_weights)
        d_w = [
            (dot(M, (d_weights, _plane(operands.lags, p, block.K), False)) + d_w_of_start[p]).astype(dtype)
            for p in planes
        ]
        # w = skew(S) spread + readout decayed_response, decayed_response = response decays
        d_scores = dot(block.K, *((d_w[p], _plane(operands.spread, p, block.K), True) for p in planes))
        d_scores = tile.by_token(d_scores.astype(dtype))
        keep("d_scores", d_scores)
        d_decayed_response = [
            tile.from_start(dot(M, *((d_w[o], _plane(operands.readout, 2 * o + p, M), False) for o in planes)))
            for p in planes
        ]
        keep("d_decays_of_response", *_multiply(d_decayed_response, _respond(tile, q, operands), conjugate=True))
        d_response = [x.astype(dtype) for x in _multiply(d_decayed_response, decays(), conjugate=True)]
        keep("d_scores", *d_response, start=block.K)
        # S = q k^T and response = q X_k^T
        from_start = ((d_response[p], _plane(operands.X_k, p, block.R), True) for p in planes)
        d_q = dot(block.R, (d_scores, operands.k, False), *from_start)
        machine.store(d_q.astype(dtype), q_tile, results.d_q.at[query, i])
        machine.finish()

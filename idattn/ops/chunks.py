"""What the chunked backends share: a chunk's tables, which tokens see which, and one derivative for all of them.

With X^0 the state at a chunk's start and t, s counted inside the chunk from 0,

    S[t,s] = q_t . k_s                                                    (s <= t)
    y_t    = lambda^{t+1} (X_k^0 q_t) + sum_{s<=t} S[t,s] beta lambda^{t-s}
    w_t    = C^T f(C y_t)
    P[t,s] = Re sum_m w_t[m] beta_m lambda_m^{t-s}                        (s <= t)
    o_t    = Re (w_t lambda^{t+1})^T X_v^0 + sum_s P[t,s] v_s
    X^K    = lambda^K X^0 + sum_s beta lambda^{K-1-s} [k_s, v_s]^T

Decays enter only as powers lambda^l with l >= 0, through tables over the lag l = t - s, so nothing overflows,
however fast a mode forgets. The states at the chunks' starts are the only thing that crosses chunks.

A backend is a pair of functions, `forward` and `backward`, of whole chunks. The tables are inputs of both: `backward`
returns their cotangents, and JAX derives those of the parameters. Only the inputs are stored between the two.
docs/kernels.md derives both passes.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops.backend import Rule
from idattn.ops.discretize import Basis, discretize, readout_table
from idattn.ops.einsum import einsum_f32
from idattn.ops.planes import complex_multiply, conjugate, flatten_planes, powers, real_part_row, to_planes
from idattn.ops.segments import PADDING, Segments


class Tables(NamedTuple):
    """The constants of a chunk, functions of the basis alone."""

    lags: jax.Array  # beta lambda^l, l = 0..K-1, (G, K, 2M)
    decays: jax.Array  # lambda^{t+1}, t = 0..K-1, (G, K, 2, M)
    readout: jax.Array  # y -> w with the sign of Re on its imaginary half, (G, 2M, 2M), or (G, 2, 2, M) by modes
    spread: jax.Array  # readout beta lambda^l: what a score adds to the w of l tokens later, (G, K, 2M)


class LagTables(NamedTuple):
    """Those of `Tables` that do not depend on how the state is read."""

    lags: jax.Array  # beta lambda^l, l = 0..K-1, (G, K, 2M)
    decays: jax.Array  # lambda^{t+1}, t = 0..K-1, (G, K, 2, M)


def make_tables(basis: Basis, K: int, readout: str) -> Tables:
    """The tables of chunks of K tokens; readout as in `idattn.ops.interdomain_attention`."""
    table = signed_readout(basis, readout)
    lags, decays = lag_tables(basis, K)
    return Tables(lags, decays, table, apply_readout(table, lags, lags.dtype))


def signed_readout(basis: Basis, readout: str) -> jax.Array:
    """`Tables.readout`, of chunks of any size."""
    table = readout_table(basis, readout)
    if table.ndim == 4:
        return conjugate(table.swapaxes(1, 2)).swapaxes(1, 2)
    return real_part_row(table.swapaxes(-1, -2)).swapaxes(-1, -2)


def lag_tables(basis: Basis, K: int) -> LagTables:
    """The tables of chunks of K tokens that every readout has."""
    lam, beta = discretize(basis)
    table = jnp.moveaxis(powers(lam, K), 0, 1)  # (G, K + 1, 2, M)
    return LagTables(flatten_planes(complex_multiply(beta[:, None], table[:, :K])), table[:, 1:])


def apply_readout(table: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`Tables.readout` of flattened planes y (G, ..., 2M), in products of `dtype` where it is a matrix.

    With its axes 1 and 2 exchanged, the table is that of the transposed map.
    """
    if table.ndim == 3:
        return einsum_f32("g...m,gom->g...o", y, table, dtype)
    table = table.reshape(table.shape[0], *[1] * (y.ndim - 2), *table.shape[1:])  # (G, 1, ..., 2, 2, M)
    # Two terms rather than jnp.sum, which would have too many axes: see `merge_axes`.
    re, im = (to_planes(y)[..., None, plane, :] for plane in (0, 1))
    return flatten_planes(table[..., 0, :] * re + table[..., 1, :] * im)


def merge_axes(x: jax.Array, start: int, stop: int) -> jax.Array:
    """The axes from `start` up to `stop` as one, for sums over products of at most six axes.

    Programs for CPUs compute those of seven or more wrongly, or crash, with jaxlib 0.10.2 and 0.11.0
    (jax-ml/jax#39257), where JAX has run before the package could set its flag.
    """
    return x.reshape(*x.shape[:start], -1, *x.shape[stop:])


def decay_state(decay: jax.Array, state: jax.Array) -> jax.Array:
    """Rows of flattened planes (..., G, W, 2M), each mode times its complex number of decay (..., G, 2, M)."""
    return flatten_planes(complex_multiply(decay[..., None, :, :], to_planes(state)))


def pad_to_chunks(
    arrays: tuple[jax.Array, ...], segments: Segments | None, K: int
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Arrays (B, T, ...) with T padded to a multiple of K by zeros, and the run of every token, (B, T) int32.

    The run is -1 at padding; it is None where every row is one document without padding.
    """
    T = arrays[0].shape[1]
    pad = -(-T // K) * K - T  # not -T % K: of a symbolic T, jax.export knows that this is at least K with T
    run = None if segments is None else jnp.pad(segments.run, ((0, 0), (0, pad)), constant_values=PADDING)
    return tuple(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in arrays), run


def zero_padding(arrays: Sequence[jax.Array], run: jax.Array | None) -> tuple[jax.Array, ...]:
    """Arrays (B, T, ...) that are 0 at padding, whatever they hold there (NaN included)."""
    if run is None:
        return tuple(arrays)
    return tuple(jnp.where((run != PADDING).reshape(*run.shape, *[1] * (x.ndim - 2)), x, 0) for x in arrays)


def last_tokens(segments: Segments | None, B: int, T: int) -> jax.Array:
    """The index of each row's last token that is not padding, (B,) int32; -1 where there is none."""
    return jnp.full((B,), T - 1, jnp.int32) if segments is None else segments.last


def interdomain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: Basis,
    initial_state: jax.Array | None,
    segments: Segments | None,
    *,
    readout: str,
    chunk_size: int,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """Eq. 11 and 13 in chunks; shapes as in `idattn.ops.interdomain_attention`.

    Args:
      initial_state: None for zeros, which a backend then need not read.
      rule: the (forward, backward) pair of a backend, see `_attend`.
    """
    B, T = q.shape[:2]
    K = chunk_size
    tables = make_tables(basis, K, readout)
    last = last_tokens(segments, B, T)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    (q, k, v), run = pad_to_chunks((q, k, v), segments, K)
    outputs = _attend(rule, q, k, v, tables, initial_state, run, jnp.maximum(last, 0) // K)
    o, start = outputs  # pyright: ignore[reportGeneralTypeIssues]  # custom_vjp hides what its function returns
    initial_state = zero_state(k, v, tables) if initial_state is None else initial_state
    return o[:, :T], final_state((k, v), start, tables, initial_state, run, last)


def zero_state(k: jax.Array, v: jax.Array, tables: Tables) -> jax.Array:
    """(B, G, R + E, 2M) for keys (B, T, G, R) and values (B, T, G, E)."""
    B, _, G, R = k.shape
    return jnp.zeros((B, G, R + v.shape[-1], tables.lags.shape[-1]), tables.lags.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q, k, v, tables: Tables, initial_state, run, last_chunk):
    """Outputs (B, T, H, E) and the state at the start of chunk `last_chunk` (B,), T being a multiple of K.

    rule = (forward, backward), for which q, k and v may hold anything where `run` is PADDING:
      forward(q, k, v, tables, initial_state, run, last_chunk) returns those two;
      backward(the same, cotangents of those two) returns the cotangents of q, k, v, tables and initial_state.
    """
    return rule[0](q, k, v, tables, initial_state, run, last_chunk)


def _attend_forward(rule: Rule, *inputs):
    return rule[0](*inputs), inputs


def _attend_backward(rule: Rule, inputs, cotangents):
    return *rule[1](*inputs, cotangents), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def shorter(rule: Rule, K: int) -> Rule:
    """A rule that does what `rule` does in chunks of K tokens, where those that it is given hold a multiple of K."""

    def cut(tables: Tables, last_chunk: jax.Array) -> tuple[Tables, jax.Array]:
        size = tables.lags.shape[1]
        if size % K:
            return tables, last_chunk
        lags, decays, spread = (x[:, :K] for x in (tables.lags, tables.decays, tables.spread))
        return Tables(lags, decays, tables.readout, spread), last_chunk * (size // K)

    def forward(q, k, v, tables: Tables, initial_state, run, last_chunk):
        short, chunk = cut(tables, last_chunk)
        return rule[0](q, k, v, short, initial_state, run, chunk)

    def backward(q, k, v, tables: Tables, initial_state, run, last_chunk, cotangents):
        short, chunk = cut(tables, last_chunk)
        d_q, d_k, d_v, d_tables, d_state = rule[1](q, k, v, short, initial_state, run, chunk, cotangents)
        # Longer lags are in no chunk.
        missing = (0, tables.lags.shape[1] - short.lags.shape[1])
        d_lags, d_decays, d_readout, d_spread = d_tables
        d_lags, d_decays, d_spread = (
            jnp.pad(x, [(0, 0), missing, *[(0, 0)] * (x.ndim - 2)]) for x in (d_lags, d_decays, d_spread)
        )
        d_tables = Tables(d_lags, d_decays, d_readout, d_spread)
        return d_q, d_k, d_v, d_tables, d_state

    return forward, backward


def shorter_on_cpus(rule: Rule, K: int) -> Rule:
    """`rule`, but in chunks of K tokens where it is compiled for a CPU."""
    (forward, backward), (short_forward, short_backward) = rule, shorter(rule, K)
    return (
        lambda *arguments: jax.lax.platform_dependent(*arguments, cpu=short_forward, default=forward),
        lambda *arguments: jax.lax.platform_dependent(*arguments, cpu=short_backward, default=backward),
    )


def final_state(
    inputs: Sequence[jax.Array],
    start: jax.Array,
    tables: Tables | LagTables,
    initial_state: jax.Array,
    run: jax.Array | None,
    last: jax.Array,
) -> jax.Array:
    """The state after each row's last token that is not padding, in the shape of `initial_state`.

    Args:
      inputs: arrays (B, T, G, width) whose concatenation is what the state holds.
      start: (B, G, W, 2M) the state at the start of the chunk that the last token is in.
      run: (B, T) or None.
      last: (B,) index of the last token, -1 where there is none: then the state is the initial one.
    """
    B, K = last.shape[0], tables.lags.shape[1]
    first, offset = jnp.maximum(last, 0) // K * K, jnp.maximum(last, 0) % K
    chunk = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=K))
    # Heads side by side, as on TPUs: a slice of (..., G, width) lays all tokens out anew, at 1.5 times the cycles.
    z = [chunk(x.reshape(*x.shape[:2], -1), first).reshape(B, K, *x.shape[2:]) for x in inputs]
    z = jnp.concatenate(z, axis=-1)  # (B, K, G, W)
    lag = offset[:, None] - jnp.arange(K)[None]  # from each token of the chunk to the last one, (B, K)
    in_state = lag >= 0
    decayed = decay_state(tables.decays[:, offset].swapaxes(0, 1), start)
    if run is not None:
        runs = chunk(run, first)
        last_run = runs[jnp.arange(B), offset]
        run_before = jnp.where(first == 0, 0, run[jnp.arange(B), first - 1])
        (z,) = zero_padding((z,), runs)
        in_state &= runs == last_run[:, None]
        decayed = jnp.where((last_run == run_before)[:, None, None, None], decayed, 0)
    weights = jnp.where(in_state[None, ..., None], tables.lags[:, jnp.maximum(lag, 0)], 0)  # (G, B, K, 2M)
    state = decayed + einsum_f32("gbsm,bsgw->bgwm", weights, z, z.dtype)
    return jnp.where((last >= 0)[:, None, None, None], state, initial_state)

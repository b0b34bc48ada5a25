"""The public functions of the layer's core: what they take and return, their checks, and the choice of a backend."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from absl import logging

from idattn.choices import READOUTS, check_choice
from idattn.ops import chunk_linear, chunks, chunkwise, fft, pallas_gpu, pallas_tpu, prepare, recurrent
from idattn.ops.arguments import (
    cast,
    check_basis,
    check_heads,
    check_rank,
    check_segments,
    check_shape,
    check_state,
    state_dtype,
)
from idattn.ops.backend import Backend, Rule
from idattn.ops.discretize import Basis, discretize, linear_readout_row, mode_weights
from idattn.ops.planes import flatten_planes, real_part_row
from idattn.ops.segments import Segments
from idattn.shapes import Keys, Outputs, Queries, SegmentIds, State, Values

# In the order in which "auto" tries those that prefer a platform; chunkwise serves every platform.
BACKENDS = {
    backend.name: backend
    for backend in (
        pallas_tpu.BACKEND,
        pallas_gpu.BACKEND,
        chunkwise.BACKEND,
        chunkwise.ASSOCIATIVE,
        recurrent.BACKEND,
        fft.BACKEND,
    )
}
AUTO = "auto"
Functions = tuple[Callable[..., Any], ...]


@overload
def interdomain_attention(
    q: Queries, k: Keys, v: Values, basis: Basis, *, backend: str | Backend = AUTO,
    chunk_size: int | None = None, segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None, return_state: Literal[False] = False, readout: str = "transpose",
) -> Outputs: ...  # fmt: skip


@overload
def interdomain_attention(
    q: Queries, k: Keys, v: Values, basis: Basis, *, backend: str | Backend = AUTO,
    chunk_size: int | None = None, segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None, return_state: Literal[True], readout: str = "transpose",
) -> tuple[Outputs, State]: ...  # fmt: skip


def interdomain_attention(
    q: Queries,
    k: Keys,
    v: Values,
    basis: Basis,
    *,
    backend: str | Backend = AUTO,
    chunk_size: int | None = None,
    segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    readout: str = "transpose",
) -> Outputs | tuple[Outputs, State]:
    """Interdomain Attention of prepared inputs (eq. 11 and 13): queries read a fixed-size state by content.

        X_t = Lambda X_{t-1} + B [k_t, v_t]^T,   [U_t, Gamma_t] = C X_t,   o_t = Re(q_t^T U_t^T Gamma_t)

    The cost is linear in T. Chunked backends ("auto" among them) have a backward pass written by hand and no forward
    mode: `jax.jvp`, `jax.linearize` and `jax.hessian` need backend="recurrent" or "fft". Products are computed in the
    dtype of `q`, accumulated in float32 or better; the state and everything made from `basis` are float32 (float64 if
    q, k, v or `basis.log_delta` is).

    Args:
      q: (B, T, H, R) features of the queries, xi(q) (eq. 10); floating point, as are k and v.
      k: (B, T, G, R) features of the keys after normalisation, k~ (eq. 12); G divides H, and query head h reads state
        h // (H / G).
      v: (B, T, G, E) values after normalisation, v~ (eq. 12).
      basis: parameters of the G states with M modes each.
      backend: a name of `BACKENDS` or a record: "recurrent" (the literal recurrence: the reference, slow), "chunkwise"
        (matrix products over chunks), "fft" (convolutions by FFT: for the linear readout, no segments; of queries a
        reference for small T), "associative" (chunkwise, but the states run through the chunks in a parallel scan;
        with chunk_size=1 it is a scan over tokens), "pallas_tpu" (fused kernels, for TPUs only), "pallas_gpu"
        (kernels for H100, H200 and A100, which no card has run yet) or "auto" (by the platform that is compiled for:
        pallas_tpu on TPUs where it can run, else chunkwise).
      chunk_size: tokens in a chunk, at least 1. Changes speed and memory only. None for 128, but 64 in pallas_gpu
        and in chunkwise on CPUs. pallas_tpu needs a multiple of 128, pallas_gpu one of 64.
      segment_ids: (B, T) integers. A change from one token to the next starts a new document from a zero state;
        -1 marks padding, whose output is 0 and which leaves the state as it is. None for one document a row; or the
        result of `idattn.ops.segments.find_segments`.
      initial_state: (B, G, R + E, 2M) state that token 0's document continues from (not read if token 0 is
        padding); None for zeros.
      return_state: also return the state after each row's last token that is not padding.
      readout: "transpose" (eq. 13), "hermitian", Re(q^T U^H Gamma), or "real", q^T Re(U)^T Re(Gamma).

    Returns:
      The outputs (B, T, H, E) in the dtype of `q`; with `return_state`, also the state (B, G, R + E, 2M): the rows of
      the keys' features before those of the values, the real parts of the modes before the imaginary ones.

    Raises:
      ValueError: a shape, dtype or chunk size does not fit, also to what the backend needs, or a name is unknown.
      NotImplementedError: the backend asked for cannot do it; the message names one that can.
    """
    check_choice("readout", readout, READOUTS)
    chosen = _find_backend(backend)
    check_heads("B T", q, k, v)
    (B, T, _, R), (G, E) = q.shape, v.shape[2:]
    dtype = state_dtype(basis, q, k, v)
    M = check_basis(basis, G)
    shape = (B, G, R + E, 2 * M)
    state = None if initial_state is None else check_state(initial_state, shape, dtype)
    inputs = q, k, v, cast(basis, dtype)
    segments = check_segments(segment_ids, B, T)
    if chosen.interdomain is not None:
        state = jnp.zeros(shape, dtype) if state is None else state
        o, state = chosen.interdomain(*inputs, state, segments, readout=readout)
    else:
        size = chosen.chunk(chunk_size, T)
        requirement = chosen.requirement(q, k, v, M, size, dtype)
        if requirement:
            raise ValueError(f"backend={chosen.name!r} needs {requirement}; change that, or use backend='chunkwise'.")
        assert chosen.rule is not None, "a backend without `interdomain` has `rule`"
        rule = chosen.rule
        if chosen.cpu_chunk and chunk_size is None:
            rule = chunks.shorter_on_cpus(rule, chosen.cpu_chunk)
        if backend == AUTO:
            offers = [
                (x, x.rule, x.requirement(q, k, v, M, size, dtype))
                for x in BACKENDS.values()
                if x.platforms and x.rule is not None
            ]
            rule = by_platform("interdomain_attention", offers, chosen.name, rule)
        o, state = chunks.interdomain(*inputs, state, segments, readout=readout, chunk_size=size, rule=rule)
    return (o, state) if return_state else o


@overload
def linear_readout(
    z: jax.Array, basis: Basis, c_out: jax.Array, *, backend: str | Backend = AUTO,
    chunk_size: int | None = None, segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None, return_state: Literal[False] = False,
) -> jax.Array: ...  # fmt: skip


@overload
def linear_readout(
    z: jax.Array, basis: Basis, c_out: jax.Array, *, backend: str | Backend = AUTO,
    chunk_size: int | None = None, segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None, return_state: Literal[True],
) -> tuple[jax.Array, State]: ...  # fmt: skip


def linear_readout(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    *,
    backend: str | Backend = AUTO,
    chunk_size: int | None = None,
    segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, State]:
    """The S4D readout of the same recurrence: learned real weights contract the M coefficients of every head.

        X_t = Lambda X_{t-1} + B z_t^T,   y_t = Re(c_out^T C X_t)

    c_out and C make one real convolution kernel a head, so no token pays for M x M work. The other arguments are
    those of `interdomain_attention`, the state being (B, H, W, 2M).

    Args:
      z: (B, T, H, W) inputs, floating point.
      basis: parameters of the H states with M modes each.
      c_out: (H, M) real weights of the coefficients.

    Returns:
      The outputs (B, T, H, W) in the dtype of `z`; with `return_state`, also the state (B, H, W, 2M).

    Raises:
      ValueError: a shape, dtype or chunk size does not fit, or a name is unknown.
      NotImplementedError: the backend asked for cannot do it; the message names one that can.
    """
    chosen = _find_backend(backend)
    check_rank(z=(z, "B T H W"))
    B, T, H, W = z.shape
    M = check_basis(basis, H)
    check_shape("c_out", c_out, (H, M), "H M, with H that of z and M that of the basis")
    if chosen.linear is None:
        raise NotImplementedError(f"backend={chosen.name!r} has no linear readout; use backend='chunkwise'.")
    dtype = state_dtype(basis, z)
    state = check_state(initial_state, (B, H, W, 2 * M), dtype)
    segments = check_segments(segment_ids, B, T)
    inputs = z, cast(basis, dtype), c_out.astype(dtype), state, segments
    y, state = chosen.linear(*inputs, chunk_size=chosen.chunk(chunk_size, T))
    return (y, state) if return_state else y


def transfer(
    inputs: tuple[jax.Array, ...],
    basis: Basis,
    *,
    chunk_size: int | None = None,
    segment_ids: SegmentIds | Segments | None = None,
) -> tuple[jax.Array, State]:
    """How tokens change a state (eq. 11): after them it is decay * state + increment, a complex product of each mode.

    What a shard of a sequence adds to the state does not depend on the shards before it. The readout does, since it is
    quadratic in the state: it takes the state at the shard's start as its initial state.

    Args:
      inputs: arrays (B, T, G, width) whose concatenation the state holds: (k, v), or (z,).
      basis: parameters of the G states.
      chunk_size: as in `interdomain_attention`.
      segment_ids: as in `interdomain_attention`.

    Returns:
      decay, planes (B, G, 2, M), 0 where a document begins among the tokens, and increment (B, G, W, 2M), both
      float32 or wider.

    Raises:
      ValueError: a shape, dtype or chunk size does not fit.
    """
    check_rank(**{f"inputs[{i}]": (x, "B T G W") for i, x in enumerate(inputs)})
    B, T, G, _ = inputs[0].shape
    for i, x in enumerate(inputs):
        check_shape(f"inputs[{i}]", x, (B, T, G, x.shape[3]), "B T G W, with B, T and G those of the first")
    check_basis(basis, G)
    segments = check_segments(segment_ids, B, T)
    basis = cast(basis, state_dtype(basis, *inputs))
    return chunk_linear.transfer(inputs, basis, segments, chunk_size=chunkwise.BACKEND.chunk(chunk_size, T))


def step(
    q: jax.Array, k: jax.Array, v: jax.Array, basis: Basis, state: State, *, readout: str = "transpose"
) -> tuple[jax.Array, State]:
    """One token of `interdomain_attention` in O(M (R + E) + M^2) work a head: U and Gamma are never formed.

    Args:
      q: (B, H, R) features of the queries.
      k: (B, G, R) features of the keys.
      v: (B, G, E) values.
      basis: parameters of the G states.
      state: (B, G, R + E, 2M) before the token, as `interdomain_attention` returns it.
      readout: as in `interdomain_attention`.

    Returns:
      The outputs (B, H, E) in the dtype of `q`, and the state after the token, float32 or wider.

    Raises:
      ValueError: a shape or dtype does not fit, or the readout is unknown.
    """
    check_choice("readout", readout, READOUTS)
    check_heads("B", q, k, v)
    (B, H, R), (G, E) = q.shape, v.shape[1:]
    dtype = state_dtype(basis, q, k, v)
    state = check_state(state, (B, G, R + E, 2 * check_basis(basis, G)), dtype)
    basis = cast(basis, dtype)
    state = _advance(jnp.concatenate([k, v], axis=-1).astype(dtype), basis, state)
    X_k, X_v = jnp.split(state, [R], axis=-2)
    y = jnp.einsum("bgjr,bgrm->bgjm", q.reshape(B, G, H // G, R).astype(dtype), X_k, precision="highest")
    w = mode_weights(basis, readout, y)
    o = jnp.einsum("bgjm,bgem->bgje", real_part_row(w), X_v, precision="highest")
    return o.reshape(B, H, E).astype(q.dtype), state


def linear_step(z: jax.Array, basis: Basis, c_out: jax.Array, state: State) -> tuple[jax.Array, State]:
    """One token of `linear_readout` in O(M W) work a head.

    Args:
      z: (B, H, W) inputs.
      basis: parameters of the H states.
      c_out: (H, M) real weights of the coefficients.
      state: (B, H, W, 2M) before the token, as `linear_readout` returns it.

    Returns:
      The outputs (B, H, W) in the dtype of `z`, and the state after the token, float32 or wider.

    Raises:
      ValueError: a shape or dtype does not fit.
    """
    check_rank(z=(z, "B H W"))
    B, H, W = z.shape
    M = check_basis(basis, H)
    check_shape("c_out", c_out, (H, M), "H M, with H that of z and M that of the basis")
    dtype = state_dtype(basis, z)
    basis = cast(basis, dtype)
    state = _advance(z.astype(dtype), basis, check_state(state, (B, H, W, 2 * M), dtype))
    row = linear_readout_row(basis, c_out.astype(dtype))
    y = jnp.einsum("gm,bgwm->bgw", row, state, precision="highest")
    return y.astype(z.dtype), state


def prepare_heads(
    inputs: prepare.HeadInputs, preparation: prepare.Preparation, *, backend: str | Backend = AUTO
) -> jax.Array:
    """The heads of a projection, prepared for the op (eq. 10 and 12): convolved, rotated, mapped, normalised.

    Args:
      inputs: the projection and what it is prepared with.
      preparation: what is done.
      backend: as in `interdomain_attention`. Chunked ones prepare in one pass, and have no forward mode; what a kernel
        cannot do is composed of array operations.

    Returns:
      (B, T, C) in the dtype of the projection, computed in float32 or better.
    """
    chosen = _find_backend(backend)
    if not preparation.activate and inputs.taps is inputs.rotary is inputs.scale is None:
        return inputs.x  # which no kernel has to copy
    if chosen.rule is None:
        return prepare.compose(preparation, inputs)

    def bind(rule: prepare.Rule) -> Rule:
        return functools.partial(rule.forward, preparation), functools.partial(rule.backward, preparation)

    rule = bind(prepare.COMPOSED)
    if backend == AUTO:
        offers = [
            (x, bind(x.prepare), x.prepare.requirement(inputs, preparation))
            for x in BACKENDS.values()
            if x.prepare is not None
        ]
        rule = by_platform("prepare_heads", offers, "array operations", rule)
    elif chosen.prepare is not None and not chosen.prepare.requirement(inputs, preparation):
        rule = bind(chosen.prepare)
    return prepare.prepare(inputs, *rule)


def _find_backend(backend: str | Backend) -> Backend:
    """The record of a backend; of "auto" the one that serves every platform."""
    if isinstance(backend, Backend):
        return backend
    check_choice("backend", backend, (AUTO, *BACKENDS))
    return chunkwise.BACKEND if backend == AUTO else BACKENDS[backend]


def by_platform(
    op: str, offers: Sequence[tuple[Backend, Functions, str | None]], default: str, functions: Functions
) -> Any:
    """`functions`, but on the platforms that a backend prefers that backend's, where it can do it.

    Args:
      op: for the log.
      offers: backends that prefer a platform, the functions of each, and what it would need, or None if it has it.
      default: what `functions` are, for the log.
    """
    rules: dict[str, Functions] = {}
    chosen, refused = [], []
    for backend, offered, requirement in offers:
        for platform in backend.platforms:
            if requirement:
                refused.append(f"on {platform} not {backend.name}, which needs {requirement}")
            elif platform not in rules:
                rules[platform] = offered
                chosen.append(f"{backend.name} on {platform}")
    _log_once(f"{op}: backend='auto' takes " + "; ".join([*chosen, f"{default} else", *refused]))

    def choose(i: int) -> Callable[..., Any]:
        by_name = {platform: offered[i] for platform, offered in rules.items()}
        return lambda *arguments: jax.lax.platform_dependent(*arguments, **by_name, default=functions[i])

    return tuple(choose(i) for i in range(len(functions))) if rules else functions


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)


def _advance(z: jax.Array, basis: Basis, state: jax.Array) -> jax.Array:
    """The state (B, G, W, 2M) after a token z (B, G, W)."""
    lam, beta = discretize(basis)
    return chunks.decay_state(lam[None], state) + flatten_planes(beta)[None, :, None] * z[..., None]

"""Interdomain Attention whose clock and writes follow the data: beyond the paper (docs/beyond.md)."""

from functools import partial

import jax
import jax.numpy as jnp

from idattn.choices import READOUTS, check_choice
from idattn.ops import adaptive_chunks, damped_tpu, pallas_tpu
from idattn.ops.adaptive_chunks import FLOOR, Inputs
from idattn.ops.api import by_platform, interdomain_attention
from idattn.ops.arguments import (
    cast,
    check_basis,
    check_heads,
    check_segments,
    check_serial,
    check_shape,
    check_state,
    state_dtype,
)
from idattn.ops.chunks import decay_state
from idattn.ops.discretize import Basis, discretize, mode_weights
from idattn.ops.planes import flatten_planes, real_part_row
from idattn.ops.segments import Segments
from idattn.ops.tree_chunks import scan_tokens
from idattn.shapes import Keys, Outputs, Queries, SegmentIds, State, Values


def adaptive_attention(
    q: Queries,
    k: Keys,
    v: Values,
    basis: Basis,
    *,
    log_steps: jax.Array | None = None,
    gains: jax.Array | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    segment_ids: SegmentIds | Segments | None = None,
    initial_state: State | None = None,
    readout: str = "transpose",
    write: str = "delta",
) -> tuple[Outputs, State]:
    """Interdomain Attention with a clock, `log_steps`, or corrective writes, `gains`, or both.

        delta_t = Delta exp(log_steps_t),  lambda_t = exp(delta_t a),  beta_t = (lambda_t - 1) / a
        X_{k,t} = lambda_t X_{k,t-1} + beta_t k_t^T
        w_t = C^T f(C X_{k,t} k_t),  p_t = conj(w_t) / |w_t|^2          where the key reads
        X_{v,t} = lambda_t X_{v,t-1} + p_t u_t^T,  u_t = b_t (v_t - Re(w_t^T lambda_t X_{v,t-1}))

    Without gains, p_t = beta_t and u_t = v_t. The queries read X_t as in `idattn.ops.interdomain_attention`, which has
    the other arguments too. A correction is b_t times a projection: it moves what the key reads toward v_t and leaves
    what is orthogonal to it, so that states stay bounded whatever the keys. The backward pass keeps only the inputs,
    and on TPUs, where there is a kernel, u.

    The write "damped" corrects along p_t = beta_t, where the key enters, with b_t / (1 + b_t |w_t|^2 |beta_t|^2) for
    b_t. All w, also of queries, are divided by h = Re(w^T beta) of a unit key alone, which then reads its own value.

    Args:
      q: (B, T, H, R).
      k: (B, T, G, R).
      v: (B, T, G, E).
      basis: parameters of the G states.
      log_steps: (B, T, G), the logarithm of a token's step relative to Delta; None for 0, the paper's clock.
      gains: (B, T, G), b in [0, 1]; None for u_t = v_t, the paper's write.
      backend: "auto" and "chunkwise" are matrix products over chunks, "recurrent" is token by token. On TPUs "auto" is
        a kernel where the write is "damped", log_steps are None, and the kernel takes the sizes and dtypes.
      chunk_size: tokens in a chunk, of which the largest power of two up to 32 is taken; None for 32. Changes speed and
        memory only. The kernel's chunks have 128.
      segment_ids: (B, T) as in `idattn.ops.interdomain_attention`.
      initial_state: (B, G, R + E, 2M), None for zeros.
      readout: as in `idattn.ops.interdomain_attention`; "hermitian" where the write is damped, for h > 0.
      write: what gains do, "delta" or "damped".

    Returns:
      The outputs (B, T, H, E) in the dtype of `q`, and the state (B, G, R + E, 2M).

    Raises:
      ValueError: a shape, dtype or chunk size does not fit, or a name is unknown.
    """
    check_choice("readout", readout, READOUTS)
    check_serial(backend, chunk_size)
    check_write(write, readout)
    check_heads("B T", q, k, v)
    (B, T, _, R), (G, E) = q.shape, v.shape[2:]
    _check_controls((B, T, G), log_steps=log_steps, gains=gains)
    if log_steps is None and gains is None:
        raise ValueError("log_steps=None and gains=None leave the paper's op; use interdomain_attention.")
    dtype = state_dtype(basis, q, k, v)
    state = check_state(initial_state, (B, G, R + E, 2 * check_basis(basis, G)), dtype)
    basis, segments = cast(basis, dtype), check_segments(segment_ids, B, T)
    steps, gains = (None if x is None else x.astype(dtype)[..., None] for x in (log_steps, gains))
    inputs = Inputs(q, k, v, steps, gains)
    if backend == "recurrent":
        return _recurrent(inputs, basis, state, segments, readout, write)
    if gains is None:
        return _with_clock(readout, chunk_size, backend, inputs, basis, state, segments)
    attend = partial(adaptive_chunks.attend, readout=readout, write=write, chunk_size=chunk_size)
    if backend == "auto" and write == "damped" and log_steps is None:
        kernel = partial(damped_tpu.attend, readout=readout)
        offer = pallas_tpu.BACKEND, (kernel,), damped_tpu.requirement(inputs, basis)
        (attend,) = by_platform("adaptive_attention", [offer], "array operations", (attend,))
    return attend(inputs, basis, state, segments)


def _check_controls(shape: tuple[int, ...], **controls: jax.Array | None) -> None:
    for name, x in controls.items():
        if x is not None:
            check_shape(name, x, shape, "a number for each token and state")


def check_write(write: str, readout: str) -> None:
    """Raise a ValueError where gains have no such write, or it cannot be read so."""
    check_choice("write", write, ("delta", "damped"))
    if write == "damped" and readout != "hermitian":
        raise ValueError(f"{write=} needs readout='hermitian', not {readout!r}.")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _with_clock(
    readout: str, chunk_size: int | None, backend: str, inputs: Inputs, basis: Basis, state: State, segments
):
    """A clock alone. Where all steps are Delta, the numbers are those of the paper's op, to the last bit."""

    def paper():
        return interdomain_attention(
            inputs.q, inputs.k, inputs.v, basis, backend=backend, chunk_size=chunk_size, segment_ids=segments,
            initial_state=state, return_state=True, readout=readout,
        )  # fmt: skip

    def clock():
        return _clocked(readout, chunk_size)(inputs, basis, state, segments)

    assert inputs.log_steps is not None, "the clock's steps"
    return jax.lax.cond(jnp.all(inputs.log_steps == 0), paper, clock)


def _clocked(readout: str, chunk_size: int | None):
    return partial(adaptive_chunks.attend, readout=readout, write="add", chunk_size=chunk_size)


def _with_clock_forward(readout: str, chunk_size: int | None, backend: str, *arguments):
    return _with_clock(readout, chunk_size, backend, *arguments), arguments


def _with_clock_backward(readout: str, chunk_size: int | None, backend: str, arguments, cotangents):
    """By the clock in any case: the paper's op has no steps that a gradient could reach."""
    *arrays, segments = arguments
    attend = partial(_clocked(readout, chunk_size), segments=segments)
    return *jax.vjp(attend, *arrays)[1](cotangents), None


_with_clock.defvjp(_with_clock_forward, _with_clock_backward)


def adaptive_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    basis: Basis,
    state: State,
    *,
    log_steps: jax.Array | None = None,
    gains: jax.Array | None = None,
    readout: str = "transpose",
    write: str = "delta",
) -> tuple[jax.Array, State]:
    """One token of `adaptive_attention`: with gains, about twice the work of `idattn.ops.step`.

    Args:
      q: (B, H, R).
      k: (B, G, R).
      v: (B, G, E).
      basis: parameters of the G states.
      state: (B, G, R + E, 2M) before the token.
      log_steps: (B, G), or None.
      gains: (B, G), or None.
      readout: as in `adaptive_attention`.
      write: as there.

    Returns:
      The outputs (B, H, E) in the dtype of `q`, and the state after the token, float32 or wider.

    Raises:
      ValueError: a shape or dtype does not fit, or a name is unknown.
    """
    check_choice("readout", readout, READOUTS)
    check_write(write, readout)
    check_heads("B", q, k, v)
    (B, H, R), (G, E) = q.shape, v.shape[1:]
    _check_controls((B, G), log_steps=log_steps, gains=gains)
    dtype = state_dtype(basis, q, k, v)
    state = check_state(state, (B, G, R + E, 2 * check_basis(basis, G)), dtype)
    basis = cast(basis, dtype)
    q_, k, v = (x.astype(dtype) for x in (q, k, v))
    if log_steps is None:
        lam, beta = (x[None] for x in discretize(basis))
    else:
        lam, beta = jax.vmap(lambda g: discretize(basis._replace(log_delta=basis.log_delta + g)))(
            log_steps.astype(dtype)
        )
    state, beta = decay_state(lam, state), flatten_planes(beta)  # (B, G, W, 2M), (B or 1, G, 2M)
    is_damped = gains is not None and write == "damped"
    own = adaptive_chunks.own_weights(basis, readout)[None, :, None, None] if is_damped else 1

    def read(keys, rows):  # (B, G, J, R) -> weights on the modes with the sign of Re, (B, G, J, 2M)
        y = jnp.einsum("bgjr,bgrm->bgjm", rows, keys, precision="highest")
        return real_part_row(mode_weights(basis, readout, y)) / own

    keys = state[:, :, :R] + beta[:, :, None] * k[..., None]
    values, address = state[:, :, R:], beta
    if gains is not None:
        w, b = read(keys, k[:, :, None])[:, :, 0], gains.astype(dtype)[..., None]
        size = jnp.sum(w**2, axis=-1, keepdims=True)
        if is_damped:
            b = b / (1 + b * size * jnp.sum(beta**2, axis=-1, keepdims=True))
        else:
            address = w / (size + FLOOR)
        v = b * (v - jnp.einsum("bgm,bgem->bge", w, values, precision="highest"))
    values = values + address[:, :, None] * v[..., None]
    state = jnp.concatenate([keys, values], axis=-2)
    w = read(keys, q_.reshape(B, G, H // G, R))
    o = jnp.einsum("bgjm,bgem->bgje", w, values, precision="highest")
    return o.reshape(B, H, -1).astype(q.dtype), state


def _recurrent(
    inputs: Inputs, basis: Basis, state: jax.Array, segments: Segments | None, readout: str, write: str
) -> tuple[jax.Array, jax.Array]:
    """`adaptive_step` over the tokens of each row."""

    def step(x: Inputs, state: jax.Array):
        steps, gains = (None if y is None else y[..., 0] for y in (x.log_steps, x.gains))
        return adaptive_step(x.q, x.k, x.v, basis, state, log_steps=steps, gains=gains, readout=readout, write=write)

    return scan_tokens(step, inputs, state, segments)

"""The public functions of the layer's core: what they take and return, their checks, and the choice of a backend."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from absl import logging

from idattn.choices import BACKENDS, READOUTS, check_choice
from idattn.ops import chunks, chunkwise, fft, pallas_tpu, recurrent
from idattn.ops.discretize import Basis, discretize, multiply, output_matrices
from idattn.shapes import Keys, Outputs, Queries, SegmentIds, State, Values

DEFAULT_CHUNK_SIZE = 128


def interdomain_attention(
    q: Queries,
    k: Keys,
    v: Values,
    basis: Basis,
    *,
    backend: str = "auto",
    chunk_size: int | None = None,
    segment_ids: SegmentIds | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    readout: str = "transpose",
) -> Outputs | tuple[Outputs, State]:
    """Interdomain Attention of prepared inputs (eq. 11 and 13): queries read a fixed-size state by content.

        X_t = Lambda X_{t-1} + B [k_t, v_t]^T,   [U_t, Gamma_t] = C X_t,   o_t = Re(q_t^T U_t^T Gamma_t)

    The cost is linear in T. Products are computed in the dtype of `q`, accumulated in float32 or better; the state
    and everything made from `basis` are float32 (float64 if any input is).

    Args:
      q: (B, T, H, R) features of the queries, xi(q).
      k: (B, T, G, R) features of the keys after normalisation, k~; G divides H, and query head h reads state
        h // (H / G).
      v: (B, T, G, E) values after normalisation, v~.
      basis: parameters of the G states with M modes each.
      backend: "recurrent" (the literal recurrence: the reference, slow), "chunkwise" (matrix products over chunks),
        "fft" (convolutions by FFT: for the linear readout, no segments; of queries a reference for small T),
        "associative" (chunkwise with the state going through the chunks in a parallel scan; with chunk_size=1 a scan
        over tokens), "pallas_tpu" (fused kernels, for TPUs only) or "auto" (by the platform that is compiled for:
        pallas_tpu on TPUs where it can, else chunkwise).
      chunk_size: tokens in a chunk, at least 1; None for 128. Changes speed and memory only. pallas_tpu needs a
        multiple of 128.
      segment_ids: (B, T) integers. A change from one token to the next starts a new document from a zero state;
        -1 marks padding, whose output is 0 and which leaves the state as it is.
      initial_state: (B, G, 2, M, R + E) state that token 0's document continues from (not read if token 0 is
        padding); None for zeros.
      return_state: also return the state after each row's last token that is not padding.
      readout: "transpose" (eq. 13), "hermitian", Re(q^T U^H Gamma), or "real", q^T Re(U)^T Re(Gamma).

    Returns:
      The outputs (B, T, H, E) in the dtype of `q`; with `return_state`, also the state (B, G, 2, M, R + E): real
      and imaginary planes, the keys' features before the values.

    Raises:
      ValueError: shapes or dtypes do not fit, also what the backend needs of them, or a name is unknown.
      NotImplementedError: the backend asked for cannot do it; the message names one that can.
    """
    _check_names(backend=backend, readout=readout)
    _check_rank(q=(q, "B T H R"), k=(k, "B T G R"), v=(v, "B T G E"))
    B, T, H, R = q.shape
    G, E = k.shape[2], v.shape[3]
    _check_shape("k", k, (B, T, G, R), "B T G R, with B, T and R those of q")
    _check_shape("v", v, (B, T, G, E), "B T G E, with B, T and G those of k")
    if H % G:
        raise ValueError(f"the key-value heads of k, {G=}, must divide the query heads of q, {H=}.")
    dtype = _state_dtype(basis, q, k, v)
    shape = (B, G, 2, _check_basis(basis, G), R + E)
    state = None if initial_state is None else _check_state(initial_state, shape, dtype)
    _check_segments(segment_ids, B, T)
    inputs = q, k, v, _cast(basis, dtype)
    if backend in _WHOLE:
        state = jnp.zeros(shape, dtype) if state is None else state
        o, state = _WHOLE[backend].interdomain(*inputs, state, segment_ids, readout=readout)
    else:
        size = _chunk(backend, chunk_size, T)
        rule = _choose_rule(backend, q, k, v, shape[3], size, dtype)
        o, state = chunks.interdomain(*inputs, state, segment_ids, readout=readout, chunk_size=size, rule=rule)
    return (o, state) if return_state else o


def linear_readout(
    z: jax.Array,
    basis: Basis,
    c_out: jax.Array,
    *,
    backend: str = "auto",
    chunk_size: int | None = None,
    segment_ids: SegmentIds | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, State]:
    """The S4D readout of the same recurrence: learned real weights contract the M coefficients of every head.

        X_t = Lambda X_{t-1} + B z_t^T,   y_t = Re(c_out^T C X_t)

    c_out and C fold into one real convolution kernel a head, so no token pays for M x M work. The other arguments are
    those of `interdomain_attention`, the state being (B, H, 2, M, W).

    Args:
      z: (B, T, H, W) inputs.
      basis: parameters of the H states with M modes each.
      c_out: (H, M) real weights of the coefficients.

    Returns:
      The outputs (B, T, H, W) in the dtype of `z`; with `return_state`, also the state (B, H, 2, M, W).

    Raises:
      ValueError: shapes or dtypes do not fit, or a name is unknown.
      NotImplementedError: the backend asked for cannot do it; the message names one that can.
    """
    _check_names(backend=backend)
    _check_rank(z=(z, "B T H W"))
    B, T, H, W = z.shape
    M = _check_basis(basis, H)
    _check_shape("c_out", c_out, (H, M), "H M, with H that of z and M that of the basis")
    dtype = _state_dtype(basis, z)
    state = _check_state(initial_state, (B, H, 2, M, W), dtype)
    _check_segments(segment_ids, B, T)
    inputs = z, _cast(basis, dtype), c_out.astype(dtype), state, segment_ids
    if backend in _WHOLE:
        y, state = _WHOLE[backend].linear(*inputs)
    elif backend == "pallas_tpu":
        raise NotImplementedError("backend='pallas_tpu' has no linear readout; use backend='chunkwise'.")
    else:
        scan = chunkwise.associative_scan if backend == "associative" else chunkwise.scan
        y, state = chunkwise.linear(*inputs, chunk_size=_chunk(backend, chunk_size, T), scan=scan)
    return (y, state) if return_state else y


def transfer(
    inputs: tuple[jax.Array, ...],
    basis: Basis,
    *,
    chunk_size: int | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[jax.Array, State]:
    """How tokens change a state: after them it is decay * state + own, a complex product of planes.

    What a shard of a sequence adds is found without the shards before it; the readout, which is quadratic in the
    state, is not, and takes the state that arrives as its initial state.

    Args:
      inputs: arrays (B, T, G, width) whose concatenation the state holds: (k, v), or (z,).
      basis: parameters of the G states.
      chunk_size: as in `interdomain_attention`.
      segment_ids: as in `interdomain_attention`.

    Returns:
      decay (B, G, 2, M, 1), 0 where a document begins among the tokens, and own (B, G, 2, M, W), both float32 or
      wider.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check_rank(**{f"inputs[{i}]": (x, "B T G W") for i, x in enumerate(inputs)})
    B, T, G, _ = inputs[0].shape
    for i, x in enumerate(inputs):
        _check_shape(f"inputs[{i}]", x, (B, T, G, x.shape[3]), "B T G W, with B, T and G those of the first")
    _check_basis(basis, G)
    _check_segments(segment_ids, B, T)
    basis = _cast(basis, _state_dtype(basis, *inputs))
    return chunkwise.transfer(inputs, basis, segment_ids, chunk_size=_chunk("chunkwise", chunk_size, T))


def step(
    q: jax.Array, k: jax.Array, v: jax.Array, basis: Basis, state: State, *, readout: str = "transpose"
) -> tuple[jax.Array, State]:
    """One token of `interdomain_attention` in O(M (R + E) + M^2) work a head: U and Gamma are never formed.

    Args:
      q: (B, H, R) features of the queries.
      k: (B, G, R) features of the keys.
      v: (B, G, E) values.
      basis: parameters of the G states.
      state: (B, G, 2, M, R + E) state before the token.
      readout: as in `interdomain_attention`.

    Returns:
      The outputs (B, H, E) in the dtype of `q`, and the state after the token.

    Raises:
      ValueError: shapes do not fit, or the readout is unknown.
    """
    _check_names(readout=readout)
    _check_rank(q=(q, "B H R"), k=(k, "B G R"), v=(v, "B G E"))
    B, H, R = q.shape
    G, E = k.shape[1], v.shape[2]
    _check_shape("k", k, (B, G, R), "B G R, with B and R those of q")
    _check_shape("v", v, (B, G, E), "B G E, with B and G those of k")
    if H % G:
        raise ValueError(f"the key-value heads of k, {G=}, must divide the query heads of q, {H=}.")
    dtype = _state_dtype(basis, q, k, v)
    state = _check_state(state, (B, G, 2, _check_basis(basis, G), R + E), dtype)
    basis = _cast(basis, dtype)
    state = _advance(jnp.concatenate([k, v], axis=-1).astype(dtype), basis, state)
    X_k, X_v = jnp.split(state.reshape(B, G, -1, R + E), [R], axis=-1)
    to_u, to_w = output_matrices(basis, readout)
    y = jnp.einsum("bgjr,bgmr->bgjm", q.reshape(B, G, H // G, R).astype(dtype), X_k, precision="highest")
    w = jnp.einsum("gom,gmn,bgjn->bgjo", to_w, to_u, y, precision="highest", optimize=[(1, 2), (0, 1)])
    o = jnp.einsum("bgjm,bgme->bgje", chunks.real_part(w), X_v, precision="highest")
    return o.reshape(B, H, E).astype(q.dtype), state


def linear_step(z: jax.Array, basis: Basis, c_out: jax.Array, state: State) -> tuple[jax.Array, State]:
    """One token of `linear_readout` in O(M W) work a head.

    Args:
      z: (B, H, W) inputs.
      basis: parameters of the H states.
      c_out: (H, M) real weights of the coefficients.
      state: (B, H, 2, M, W) state before the token.

    Returns:
      The outputs (B, H, W) in the dtype of `z`, and the state after the token.

    Raises:
      ValueError: shapes do not fit.
    """
    _check_rank(z=(z, "B H W"))
    B, H, W = z.shape
    M = _check_basis(basis, H)
    _check_shape("c_out", c_out, (H, M), "H M, with H that of z and M that of the basis")
    dtype = _state_dtype(basis, z)
    basis = _cast(basis, dtype)
    state = _advance(z.astype(dtype), basis, _check_state(state, (B, H, 2, M, W), dtype))
    row = chunkwise.fold(basis, c_out.astype(dtype))
    y = jnp.einsum("gm,bgmw->bgw", row, state.reshape(B, H, -1, W), precision="highest")
    return y.astype(z.dtype), state


def _by_platform(tpu, default):
    return lambda *arguments: jax.lax.platform_dependent(*arguments, tpu=tpu, default=default)


_WHOLE = {"recurrent": recurrent, "fft": fft}  # modules without chunks
_RULES = {  # forward and backward, see `idattn.ops.chunks`
    "associative": tuple(
        partial(f, scan=chunkwise.associative_scan, group=None) for f in (chunkwise.forward, chunkwise.backward)
    ),
    "chunkwise": (chunkwise.forward, chunkwise.backward),
    "pallas_tpu": (pallas_tpu.forward, pallas_tpu.backward),
}
_AUTO = tuple(map(_by_platform, _RULES["pallas_tpu"], _RULES["chunkwise"]))


def _choose_rule(backend: str, q, k, v, M: int, chunk_size: int, dtype):
    """The forward and the backward of a chunked backend; "auto" leaves the choice to the platform compiled for."""
    if backend not in ("auto", "pallas_tpu"):
        return _RULES[backend]
    requirement = pallas_tpu.requirement(q, k, v, M, chunk_size, dtype)
    if backend == "pallas_tpu":
        if requirement:
            raise ValueError(f"{backend=} needs {requirement}; change that, or use backend='chunkwise'.")
        return _RULES[backend]
    chosen = f"chunkwise, since pallas_tpu needs {requirement}" if requirement else "pallas_tpu on TPU, else chunkwise"
    _log_once(f"interdomain_attention: backend='auto' takes {chosen}.")
    return _RULES["chunkwise"] if requirement else _AUTO


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)


def _advance(z: jax.Array, basis: Basis, state: jax.Array) -> jax.Array:
    lam, beta = discretize(basis)
    return multiply(lam[..., None], state, axis=-3) + beta[..., None] * z[:, :, None, None, :]


def _chunk(backend: str, chunk_size: int | None, T: int) -> int:
    """Tokens in a chunk; not more than there are, except for kernels, whose tiles are what they are."""
    size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1.")
    return size if backend == "pallas_tpu" else min(size, T)


def _check_names(*, backend: str = "auto", readout: str = "transpose") -> None:
    check_choice("backend", backend, BACKENDS)
    check_choice("readout", readout, READOUTS)


def _check_rank(**arrays: tuple[jax.Array, str]) -> None:
    for name, (array, axes) in arrays.items():
        if array.ndim != len(axes.split()) or 0 in array.shape:
            raise ValueError(f"{name} of shape {array.shape} must have the axes {axes}, none of them empty.")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} of dtype {array.dtype} must be floating point.")


def _check_shape(name: str, array: jax.Array, expected: tuple[int, ...], rule: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} of shape {array.shape} must have the shape {expected}: {rule}.")


def _check_basis(basis: Basis, G: int) -> int:
    """M, after checking that every parameter fits G heads."""
    if basis.a_log.ndim != 2:
        raise ValueError(f"basis.a_log of shape {basis.a_log.shape} must have the axes G M.")
    M = basis.a_log.shape[1]
    _check_shape("basis.log_delta", basis.log_delta, (G,), "one step size for each key-value head")
    _check_shape("basis.a_log", basis.a_log, (G, M), "G M, with G the number of key-value heads")
    _check_shape("basis.a_imag", basis.a_imag, (G, M), "G M, as basis.a_log")
    if basis.c is None:
        return M
    planes = basis.c if isinstance(basis.c, tuple) else (basis.c,)
    if isinstance(basis.c, tuple) and (len(planes) != 2 or planes[0].shape != planes[1].shape):
        raise ValueError(f"basis.c={[p.shape for p in planes]} must be two real planes (re, im) of one shape.")
    for plane in planes:
        if plane.shape not in ((G, M, M), (G, M)):
            raise ValueError(f"basis.c of shape {plane.shape} must have the shape {(G, M, M)} or {(G, M)}, or be None.")
    return M


def _check_state(state: jax.Array | None, shape: tuple[int, ...], dtype) -> jax.Array:
    if state is None:
        return jnp.zeros(shape, dtype)
    _check_shape("the state", state, shape, "B, G, 2 (real, imaginary), M, width of [k, v]")
    return state.astype(dtype)


def _check_segments(segment_ids: jax.Array | None, B: int, T: int) -> None:
    if segment_ids is None:
        return
    _check_shape("segment_ids", segment_ids, (B, T), "one id for each token")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids of dtype {segment_ids.dtype} must be integers.")


def _state_dtype(basis: Basis, *inputs: jax.Array):
    return jnp.result_type(jnp.float32, basis.log_delta.dtype, *(x.dtype for x in inputs))


def _cast(basis: Basis, dtype) -> Basis:
    """The basis in the state's dtype; complex parts keep their kind."""
    return jax.tree.map(
        lambda x: x.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype), basis
    )

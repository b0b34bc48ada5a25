"""Checks of what the public functions of the ops are given, and the dtype that they compute in."""

import jax
import jax.numpy as jnp

from idattn.ops.discretize import Basis
from idattn.ops.segments import Segments, find_segments

SERIAL = ("auto", "chunkwise", "recurrent")  # backends of the ops whose states follow the data


def check_rank(**arrays: tuple[jax.Array, str]) -> None:
    for name, (array, axes) in arrays.items():
        if array.ndim != len(axes.split()) or 0 in array.shape:
            raise ValueError(f"{name} of shape {array.shape} must have the axes {axes}, none of them empty.")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} of dtype {array.dtype} must be floating point.")


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...], rule: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} of shape {array.shape} must have the shape {expected}: {rule}.")


def check_heads(axes: str, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """q must be `axes` H R, k `axes` G R and v `axes` G E, where G divides H."""
    check_rank(q=(q, f"{axes} H R"), k=(k, f"{axes} G R"), v=(v, f"{axes} G E"))
    (*lead, H, R), G = q.shape, k.shape[-2]
    check_shape("k", k, (*lead, G, R), f"{axes} G R, all but G those of q")
    check_shape("v", v, (*lead, G, v.shape[-1]), f"{axes} G E, all but E those of k")
    if H % G:
        raise ValueError(f"the key-value heads of k, {G=}, must divide the query heads of q, {H=}.")


def check_serial(backend: str, chunk_size: int | None) -> None:
    """The options of the ops whose states follow the data."""
    if backend not in SERIAL:
        raise ValueError(f"{backend=} is none of this op's, which are {', '.join(SERIAL)}; 'auto' suits every op.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1.")


def check_basis(basis: Basis, G: int) -> int:
    """M, after checking that every parameter fits G heads."""
    if basis.a_log.ndim != 2:
        raise ValueError(f"basis.a_log of shape {basis.a_log.shape} must have the axes G M.")
    M = basis.a_log.shape[1]
    check_shape("basis.log_delta", basis.log_delta, (G,), "one step size for each key-value head")
    check_shape("basis.a_log", basis.a_log, (G, M), "G M, with G the number of key-value heads")
    check_shape("basis.a_imag", basis.a_imag, (G, M), "G M, as basis.a_log")
    if basis.c is None:
        return M
    planes = basis.c if isinstance(basis.c, tuple) else (basis.c,)
    if isinstance(basis.c, tuple) and (len(planes) != 2 or planes[0].shape != planes[1].shape):
        raise ValueError(f"basis.c={[p.shape for p in planes]} must be two real planes (re, im) of one shape.")
    for plane in planes:
        if plane.shape not in ((G, M, M), (G, M)):
            raise ValueError(f"basis.c of shape {plane.shape} must have the shape {(G, M, M)} or {(G, M)}, or be None.")
    return M


def check_state(state: jax.Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if state is None:
        return jnp.zeros(shape, dtype)
    check_shape("the state", state, shape, "B, G, width of [k, v], 2M (real parts, imaginary parts)")
    return state.astype(dtype)


def check_segments(segment_ids: jax.Array | Segments | None, B: int, T: int) -> Segments | None:
    if segment_ids is None:
        return None
    ids = segment_ids.run if isinstance(segment_ids, Segments) else segment_ids
    check_shape("segment_ids", ids, (B, T), "one id for each token")
    return segment_ids if isinstance(segment_ids, Segments) else find_segments(segment_ids)


def state_dtype(basis: Basis, *inputs: jax.Array) -> jnp.dtype:
    return jnp.result_type(jnp.float32, basis.log_delta.dtype, *(x.dtype for x in inputs))


def cast(basis: Basis, dtype: jnp.dtype) -> Basis:
    """The basis in the state's dtype; complex parts stay complex."""
    return jax.tree.map(
        lambda x: x.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype), basis
    )

"""Damped corrections on TPUs where every step is the paper's: the kernels of `idattn.ops.pallas_tpu` with one more row.

A key reads the state as a query does, by the same tables, and what is written for its value is u = gain (v - what it
reads); see `idattn.ops.adaptive_attention`. The kernels invert (I + gain P), as `idattn.ops.adaptive_chunks` does.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from idattn.ops import pallas_tpu
from idattn.ops.adaptive_chunks import Inputs, own_weights
from idattn.ops.backend import DEFAULT_CHUNK_SIZE
from idattn.ops.chunks import final_state, last_tokens, make_tables, pad_to_chunks, zero_padding
from idattn.ops.discretize import Basis, discretize
from idattn.ops.segments import Segments

K = DEFAULT_CHUNK_SIZE


def requirement(inputs: Inputs, basis: Basis) -> str | None:
    """What the kernels would need, or None if they have it."""
    M = basis.a_log.shape[1]
    return pallas_tpu.requirement(inputs.q, inputs.k, inputs.v, M, K, basis.a_log.dtype, corrects=True)


def attend(
    inputs: Inputs, basis: Basis, initial_state: jax.Array, segments: Segments | None, *, readout: str, interpret=False
) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, H, E) and the state after each row's last token, of inputs without `log_steps`.

    Args:
      readout: "hermitian".
      interpret: as `jax.experimental.pallas.pallas_call` takes it.
    """
    assert inputs.gains is not None and inputs.log_steps is None, "values are corrected, and all steps are alike"
    T, tables, own = inputs.q.shape[1], make_tables(basis, K, readout), own_weights(basis, readout)[:, None, None]
    tables = tables._replace(
        readout=tables.readout / own.reshape(-1, *[1] * (tables.readout.ndim - 1)), spread=tables.spread / own
    )
    beta_size = jnp.sum(discretize(basis)[1] ** 2, axis=(-2, -1))[None, None, :, None]
    last = last_tokens(segments, *inputs.q.shape[:2])
    k, v = inputs.k.astype(inputs.q.dtype), inputs.v.astype(inputs.q.dtype)
    (q, k, v, b), run = pad_to_chunks((inputs.q, k, v, inputs.gains), segments, K)
    (b,) = zero_padding((b,), run)  # which the kernels rely on; and NaN would reach the cotangent of beta
    gains = jnp.concatenate([b, b * beta_size], axis=-1)
    outputs: Any = _correct(interpret, q, k, v, gains, tables, initial_state, run, jnp.maximum(last, 0) // K)
    o, start, u = outputs
    return o[:, :T], final_state((k, u), start, tables, initial_state, run, last)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _correct(interpret: Any, q, k, v, gains, tables, initial_state, run, last_chunk):
    return pallas_tpu.forward(q, k, v, tables, initial_state, run, last_chunk, gains=gains, interpret=interpret)


def _correct_forward(interpret: Any, *inputs):
    outputs: Any = _correct(interpret, *inputs)
    return outputs, (*inputs, outputs[2])


def _correct_backward(interpret: Any, residuals, cotangents):
    q, k, v, gains, tables, initial_state, run, last_chunk, u = residuals
    d_q, d_k, d_v, d_tables, d_state, d_gains = pallas_tpu.backward(
        q, k, v, tables, initial_state, run, last_chunk, cotangents, gains=gains, u=u, interpret=interpret
    )
    return d_q, d_k, d_v, d_gains, d_tables, d_state, None, None


_correct.defvjp(_correct_forward, _correct_backward)

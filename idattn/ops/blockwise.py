"""Decoding in blocks of K tokens that start from one state, which is only written at their end.

With X^0 the state before the block, s and t counted inside the block from 0, and y, w as in `idattn.ops.discretize`,

    y_t = lambda^{t+1} (X_k^0 q_t) + sum_{s<=t} (q_t . k_s) beta lambda^{t-s}
    o_t = Re (w_t lambda^{t+1})^T X_v^0 + sum_{s<=t} Re(w_t^T beta lambda^{t-s}) v_s

So a token only reads the state, which `idattn.ops.step` also writes. The K tokens of the block, which it reads too, are
small next to the state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from idattn.ops import blockwise_tpu
from idattn.ops.discretize import Basis, discretize, linear_readout_row, mode_weights
from idattn.ops.planes import complex_matrix, complex_multiply, conjugate, flatten_planes, powers, to_planes


class Block(NamedTuple):
    """The tokens of a block so far, and the powers of its basis by lag; all but the tokens are float32."""

    tokens: jax.Array  # (B, K, G, W), [k, v] as they came; zeros where none has come yet
    decays: jax.Array  # (K + 1, G, 2, M), lambda^l
    lags: jax.Array  # (2K, G, 2M), beta lambda^l for l = K - 1 ... 0, then zeros for tokens that have not come
    count: jax.Array  # () int32, tokens so far


def open_block(basis: Basis, batch_size: int, size: int, width: int, dtype: jnp.dtype) -> Block:
    """An empty block with room for K = `size` tokens of `width` numbers a head."""
    lam, beta = discretize(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, dtype)), basis))
    decays = powers(lam, size)
    lags = flatten_planes(complex_multiply(beta[None], decays[size - 1 :: -1]))
    tokens = jnp.zeros((batch_size, size, lam.shape[0], width), dtype)
    return Block(tokens, decays, jnp.concatenate([lags, jnp.zeros_like(lags)]), jnp.int32(0))


def add_token(block: Block, z: jax.Array) -> Block:
    """The block with one more token, z (B, G, W)."""
    tokens = jax.lax.dynamic_update_slice_in_dim(block.tokens, z[:, None].astype(block.tokens.dtype), block.count, 1)
    return block._replace(tokens=tokens, count=block.count + 1)


def interdomain(
    q: jax.Array, basis: Basis, states: jax.Array, layer: jax.Array, block: Block, *, readout: str
) -> jax.Array:
    """The outputs (B, H, E) of the block's newest token.

    Args:
      q: (B, H, R) features of its queries.
      basis: parameters of the G states.
      states: (L, B, G, R + E, 2M) before the block, of a stack of layers: sliced here, so that it is not copied.
      layer: () int32, the layer's index in the stack.
      block: whose newest token is this one.
      readout: as in `idattn.ops.interdomain_attention`.
    """
    B, H, R = q.shape
    G = states.shape[2]
    wide = block.decays.dtype
    q = q.reshape(B, G, H // G, R).astype(wide)
    k, v = (x.astype(wide) for x in jnp.split(block.tokens, [R], axis=-1))
    scores = jnp.einsum("bgjr,bsgr->bgjs", q, k, precision="highest")
    response = jnp.einsum("bgjr,bgrm->bgjm", q, _rows(states, layer, 0, R).astype(wide), precision="highest")
    y = flatten_planes(complex_multiply(_decay(block)[None, :, None], to_planes(response)))
    y += jnp.einsum("bgjs,sgm->bgjm", scores, _lags(block), precision="highest")
    w = mode_weights(basis, readout, y)
    o = _read(to_planes(w), block, _rows(states, layer, R, v.shape[-1]), v)
    return o.reshape(B, H, -1)


def linear(basis: Basis, c_out: jax.Array, states: jax.Array, layer: jax.Array, block: Block) -> jax.Array:
    """The outputs (B, H, W) of the block's newest token by the linear readout; arguments as above."""
    B, _, G, W = block.tokens.shape
    row = linear_readout_row(basis, c_out.astype(block.decays.dtype)).reshape(G, 1, 2, -1)
    w = conjugate(row)  # Re(w^T X) is the product of planes with (re, -im)
    z = block.tokens.astype(row.dtype)
    return _read(jnp.broadcast_to(w[None], (B, *w.shape)), block, _rows(states, layer, 0, W), z)[:, :, 0]


def close_blocks(states: jax.Array, block: Block) -> jax.Array:
    """The states (L, B, G, W, 2M) of a stack of layers after a block each, in their dtype.

    Args:
      states: before the block.
      block: of the stack, with an axis L before the others; all layers have as many tokens.
    """
    K = block.tokens.shape[2]
    decay = jax.lax.dynamic_index_in_dim(block.decays, block.count[0], axis=1, keepdims=False)
    lags = jax.lax.dynamic_slice_in_dim(block.lags, K - block.count[0], K, axis=1)
    if not blockwise_tpu.fits(states):
        return _close(states, block.tokens, decay, lags)
    return jax.lax.platform_dependent(states, block.tokens, decay, lags, tpu=blockwise_tpu.close, default=_close)


def _close(states: jax.Array, tokens: jax.Array, decay: jax.Array, lags: jax.Array) -> jax.Array:
    """decay X + sum_s lags_s z_s^T, layer by layer; shapes as in `blockwise_tpu.close`."""
    eye = jnp.eye(states.shape[-1] // 2, dtype=decay.dtype)[None]

    def close(states, layer):
        state, z, d, lag = (
            jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (states, tokens, decay, lags)
        )
        # With the decays as matrices of flattened planes, XLA adds two products in one pass over the state. Complex
        # arithmetic on planes would take several passes.
        re, im = (x[..., None] * eye for x in jnp.moveaxis(d, 1, 0))
        decayed = jnp.einsum("gom,bgwm->bgwo", complex_matrix(re, im), state.astype(d.dtype), precision="highest")
        added = jnp.einsum("bsgw,sgm->bgwm", z.astype(d.dtype), lag, precision="highest")
        return jax.lax.dynamic_update_index_in_dim(states, (decayed + added).astype(state.dtype), layer, axis=0), None

    return jax.lax.scan(close, states, jnp.arange(states.shape[0]))[0]


def _rows(states: jax.Array, layer: jax.Array, start: int, width: int) -> jax.Array:
    """Rows (B, G, width, 2M) of a layer of the stack."""
    _, B, G, _, planes = states.shape
    return jax.lax.dynamic_slice(states, (layer, 0, 0, start, 0), (1, B, G, width, planes))[0]


def _decay(block: Block) -> jax.Array:
    """lambda^{t+1}, (G, 2, M)."""
    return jax.lax.dynamic_index_in_dim(block.decays, block.count, keepdims=False)


def _lags(block: Block) -> jax.Array:
    """beta lambda^{t-s} for all tokens s of the block, (K, G, 2M); 0 for those after t."""
    K = block.tokens.shape[1]
    return jax.lax.dynamic_slice_in_dim(block.lags, K - block.count, K)


def _read(w: jax.Array, block: Block, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """Re(w^T X_t), (B, G, J, E), for w (B, G, J, 2, M), the rows `state` (B, G, E, 2M) of X^0 and its tokens."""
    decayed = conjugate(complex_multiply(w, _decay(block)[None, :, None]))
    weights = jnp.einsum("bgjm,sgm->bgjs", flatten_planes(conjugate(w)), _lags(block), precision="highest")
    o = jnp.einsum("bgjs,bsge->bgje", weights, tokens, precision="highest")
    return o + jnp.einsum("bgjm,bgem->bgje", flatten_planes(decayed), state.astype(w.dtype), precision="highest")
